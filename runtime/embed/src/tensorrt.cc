#include "tensorrt.h"

#include <dlfcn.h>

#include <algorithm>
#include <deque>
#include <map>
#include <mutex>

#include "files.h"
#include "tensorrt_api.h"

namespace driffusion::tensorrt {
namespace {

constexpr std::size_t CONTEXTS = 8, LEAST_MEMORY = 256, MESSAGES = 3;
constexpr u32 MOST_ROWS = 16;  // of a plan: engines/tensorrt/plan.py; larger calls run in parts
constexpr u64 MOST_PLAN_BYTES = u64(1) << 36;

struct Destroy {
    void operator()(Object *object) const { destroy(object); }
};
using Owned = std::unique_ptr<Object, Destroy>;

// What TensorRT says; never destroyed, as it may say something at any time.
struct Logger {
    void *const *functions;
    std::mutex mutex;
    std::deque<std::string> messages;

    std::string said() {
        std::lock_guard<std::mutex> lock(mutex);
        std::string text;
        for (const std::string &one : messages) text += (text.empty() ? "" : "; ") + one;
        messages.clear();
        return text;
    }
};

void log(Logger *logger, int severity, const char *message) noexcept {
    if (severity != INTERNAL_ERROR && severity != ERROR) return;
    try {
        std::lock_guard<std::mutex> lock(logger->mutex);
        logger->messages.push_back(message);
        if (logger->messages.size() > MESSAGES) logger->messages.pop_front();
    } catch (...) {  // no memory for words
    }
}

unsigned char language(Logger *) noexcept { return 0; }  // C++

InterfaceInfo interface(Logger *) noexcept { return {"ILogger", 1, 0}; }

void nothing(Logger *) noexcept {}

void *const logger_functions[LOGGER_PLACES] = {reinterpret_cast<void *>(language), reinterpret_cast<void *>(interface), reinterpret_cast<void *>(nothing),
                                               reinterpret_cast<void *>(nothing), reinterpret_cast<void *>(log)};

// A library and its runtime, one per name in a process.
struct Runtime {
    std::string name;
    Logger logger{logger_functions, {}, {}};
    Object *runtime = nullptr;
    std::mutex mutex;  // contexts and engines are made one at a time

    explicit Runtime(const std::string &path) : name(path) {
        void *library = dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL | RTLD_NODELETE);
        if (!library) {
            const char *reason = dlerror();
            fail(DRIFFUSION_ERROR_DEVICE, "TensorRT cannot be opened (" + std::string(reason ? reason : path) + "): name libnvinfer.so.11 or libtensorrt_rtx.so.1 with the option tensorrt");
        }
        const auto version = reinterpret_cast<int (*)()>(dlsym(library, "getInferLibVersion"));
        const auto create = reinterpret_cast<Object *(*)(void *, int)>(dlsym(library, "createInferRuntime_INTERNAL"));
        if (!version || !create) fail(DRIFFUSION_ERROR_DEVICE, path + " is no TensorRT: it has no createInferRuntime_INTERNAL");
        const int number = version(), major = number / 10000;
        if (major != 11 && major != 1) fail(DRIFFUSION_ERROR_VERSION, path + " is TensorRT " + std::to_string(major) + "." + std::to_string(number / 100 % 100) + ": TensorRT 11 or TensorRT-RTX 1 can be used");
        runtime = create(&logger, number);
        if (!runtime) fail(DRIFFUSION_ERROR_DEVICE, "TensorRT made no runtime: " + logger.said());
    }
};

Runtime &runtime_of(const std::string &path) {
    static auto &mutex = *new std::mutex;
    static auto &known = *new std::map<std::string, Runtime *>;
    std::lock_guard<std::mutex> lock(mutex);
    Runtime *&found = known[path];
    if (!found) found = new Runtime(path);
    return *found;
}

// A plan on one GPU: its weights are there once, however many lanes use it.
struct Engine {
    Runtime &runtime;
    const cuda::Gpu gpu;
    Owned object;

    Engine(Runtime &owner, const cuda::Gpu &on, const cuda::NetworkSource &source) : runtime(owner), gpu(on) {
        const std::string plan = read_file(source.plan, DRIFFUSION_ERROR_BUNDLE, MOST_PLAN_BYTES);
        std::lock_guard<std::mutex> lock(runtime.mutex);
        cuda::Current current(gpu);
        object.reset(call<Object *>(runtime.runtime, DESERIALIZE, static_cast<const void *>(plan.data()), plan.size()));
        if (!object) {
            const std::string said = runtime.logger.said();
            fail(DRIFFUSION_ERROR_DEVICE, "TensorRT cannot load " + source.plan + " on cuda:" + std::to_string(gpu.ordinal()) + ": " + (said.empty() ? "it is for another GPU or version" : said) + ": build it again with `make engines`");
        }
    }
    ~Engine() {
        std::lock_guard<std::mutex> lock(runtime.mutex);
        cuda::freed(gpu, [this](const cuda::Functions &) { object.reset(); });
    }
};

std::shared_ptr<Engine> engine_of(const cuda::Gpu &gpu, const cuda::NetworkSource &source) {
    static auto &mutex = *new std::mutex;
    static auto &known = *new std::map<std::pair<int, std::string>, std::weak_ptr<Engine>>;
    std::lock_guard<std::mutex> lock(mutex);
    auto &kept = known[{gpu.ordinal(), source.library + "\n" + source.plan}];
    auto found = kept.lock();
    if (!found) kept = found = std::make_shared<Engine>(runtime_of(source.library), gpu, source);
    return found;
}

class Network : public cuda::DeviceNetwork {
   public:
    Network(const cuda::Gpu &gpu, const cuda::NetworkSource &source) : engine_(engine_of(gpu, source)), source_(source) {
        for (std::size_t n = 0; n < source_.names.size(); ++n) {
            const int wanted = source_.dtypes[n] == driffusion::INT64 ? INT64 : FLOAT;
            if (call<int>(engine_->object.get(), TENSOR_DATA_TYPE, source_.names[n].c_str()) != wanted) {
                fail(DRIFFUSION_ERROR_UNSUPPORTED, source_.plan + " does not take " + source_.names[n] + " in the type of the program: build it from the model that the program was written for");
            }
        }
    }

    ~Network() override {
        std::lock_guard<std::mutex> lock(engine_->runtime.mutex);
        cuda::freed(engine_->gpu, [this](const cuda::Functions &) { contexts_.clear(); });
    }

    void enqueue(const std::vector<Buffer> &inputs, const Buffer &output, CUstream stream) override {
        const i64 batch = output.shape[0];
        for (i64 start = 0; start < batch; start += MOST_ROWS) {
            const i64 rows = std::min<i64>(MOST_ROWS, batch - start);
            std::vector<Buffer> part = inputs;
            part.push_back(output);
            for (Buffer &one : part) {
                one.data += std::size_t(start) * row_bytes(one);
                one.shape[0] = rows;
            }
            Object *context = context_of(part);
            for (std::size_t n = 0; n < part.size(); ++n) {
                if (!call<bool>(context, SET_TENSOR_ADDRESS, source_.names[n].c_str(), reinterpret_cast<void *>(part[n].data))) failed("takes no address of " + source_.names[n]);
            }
            if (!call<bool>(context, ENQUEUE, stream)) failed("failed");
        }
    }

   private:
    struct Context {
        std::vector<std::vector<i64>> shapes;
        Owned object;
    };
    static std::size_t row_bytes(const Buffer &one) {
        std::size_t bytes = one.dtype == driffusion::INT64 ? 8 : 4;
        for (std::size_t n = 1; n < one.shape.size(); ++n) bytes *= std::size_t(one.shape[n]);
        return bytes;
    }

    [[noreturn]] void failed(const std::string &what) {
        cuda::check_context(engine_->gpu);  // says it when the device was lost, which TensorRT does not
        fail(DRIFFUSION_ERROR_DEVICE, "the denoiser " + what + " in TensorRT: " + engine_->runtime.logger.said());
    }

    // One per shape, all of which work in the same memory: they run one after the other, on the lane's stream.
    Object *context_of(const std::vector<Buffer> &part) {
        std::vector<std::vector<i64>> shapes;
        for (const Buffer &one : part) shapes.push_back(one.shape);
        for (Context &one : contexts_) {
            if (one.shapes == shapes) return one.object.get();
        }
        if (contexts_.size() >= CONTEXTS) fail(DRIFFUSION_ERROR_MEMORY, "calls of so many sizes are more than TensorRT is prepared for: open another engine");
        std::lock_guard<std::mutex> lock(engine_->runtime.mutex);
        Owned made(call<Object *>(engine_->object.get(), CREATE_CONTEXT, USER_MANAGED));
        if (!made) failed("gets no execution context");
        for (std::size_t n = 0; n + 1 < part.size(); ++n) {
            Dims dims{std::int32_t(part[n].shape.size()), {}};
            std::copy(part[n].shape.begin(), part[n].shape.end(), dims.sizes);
            if (!call<bool>(made.get(), SET_INPUT_SHAPE, source_.names[n].c_str(), static_cast<const Dims *>(&dims))) failed("takes no such shape of " + source_.names[n] + " with this plan: build it again; it failed");
        }
        const std::size_t size = std::max(call<std::size_t>(made.get(), MEMORY_SIZE), LEAST_MEMORY);
        if (size > size_) {  // what works in the smaller one stays there
            memory_.emplace_back(engine_->gpu, size);
            size_ = size;
        }
        call<void>(made.get(), SET_MEMORY, reinterpret_cast<void *>(memory_.back().get()), std::int64_t(size_));
        contexts_.push_back({std::move(shapes), std::move(made)});
        return contexts_.back().object.get();
    }

    std::shared_ptr<Engine> engine_;
    const cuda::NetworkSource source_;
    std::deque<cuda::DeviceMemory> memory_;
    std::size_t size_ = 0;
    std::deque<Context> contexts_;
};

}  // namespace

std::unique_ptr<cuda::DeviceNetwork> open(const cuda::Gpu &gpu, const cuda::NetworkSource &source) { return std::make_unique<Network>(gpu, source); }

}  // namespace driffusion::tensorrt
