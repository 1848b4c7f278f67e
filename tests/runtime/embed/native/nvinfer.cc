// TensorRT on the imaginary machine, at its own binary interface: what it runs is ONNX, by ONNX Runtime. A plan is a text: the
// paths of ONNX Runtime and of the model, the input that the output is shaped like, the output, then the inputs, of which
// those after "int64" are of that type. Any function that the project does not use ends the process with its number.
#include <dlfcn.h>

#include <cstdio>
#include <cstdlib>
#include <map>
#include <sstream>

#include "error.h"
#include "files.h"
#include "ort.h"
#include "tensorrt_api.h"

// what NVIDIA's bindings want to be there and no test calls
#define ABSENT(name) \
    extern "C" __attribute__((visibility("default"))) void *name() { return nullptr; }

using namespace driffusion;
namespace trt = driffusion::tensorrt;

#define EXPORT extern "C" __attribute__((visibility("default")))

namespace {

constexpr std::size_t SCRATCH = 4096, PLACES = 120;

template <std::size_t N>
void unexpected(void *) {
    std::fprintf(stderr, "TensorRT's function %zu is called, which is not the one that was meant\n", N);
    std::abort();
}

struct Table {
    void *functions[PLACES];

    template <std::size_t... N>
    explicit Table(std::index_sequence<N...>) : functions{reinterpret_cast<void *>(unexpected<N>)...} {}
    Table() : Table(std::make_index_sequence<PLACES>()) {}
    template <typename Function>
    Table with(int place, Function *function) const {
        Table made = *this;
        made.functions[place] = reinterpret_cast<void *>(function);
        return made;
    }
};

template <typename Own>
struct Thing : trt::Object, trt::Implementation {
    explicit Thing(const Table &table) {
        static const Table own = Table().with(0, destroy_only).with(1, destroy);
        trt::Object::functions = own.functions, implementation = this;
        trt::Implementation::functions = table.functions;
    }
    static void destroy_only(trt::Object *) {}
    static void destroy(trt::Object *object) { delete static_cast<Own *>(static_cast<Thing *>(object)); }
    static Own &of(trt::Implementation *one) { return *static_cast<Own *>(static_cast<Thing *>(one)); }
};

template <typename Function>
Function driver(const char *name) {
    static void *library = dlopen("libcuda.so.1", RTLD_NOW | RTLD_LOCAL);
    return reinterpret_cast<Function>(dlsym(library, name));
}

struct Engine : Thing<Engine> {
    std::shared_ptr<driffusion::Runtime> runtime;
    std::unique_ptr<Session> session;
    std::string like, output;
    std::vector<std::string> inputs;
    std::map<std::string, u32> types;
    int device = -1;

    explicit Engine(const std::string &plan);
};

struct Context : Thing<Context> {
    Engine &engine;
    std::map<std::string, std::vector<i64>> shapes;
    std::map<std::string, std::uintptr_t> addresses;
    std::uintptr_t scratch = 0;

    explicit Context(Engine &owner);
};

struct Call {  // keeps what it was enqueued with
    Engine &engine;
    std::vector<std::vector<i64>> shapes;
    std::vector<std::uintptr_t> addresses;
    std::vector<std::size_t> sizes;
};

int device() {
    int found = -1;
    driver<CUresult (*)(int *)>("cuCtxGetDevice")(&found);
    return found;
}

void run(void *data) {
    std::unique_ptr<Call> call(static_cast<Call *>(data));
    const auto bytes = driver<void *(*)(std::uintptr_t, std::size_t)>("imaginary_bytes");
    std::vector<Value> values;
    std::vector<const OrtValue *> given;
    for (std::size_t n = 0; n < call->shapes.size(); ++n) {
        const std::string &name = n < call->engine.inputs.size() ? call->engine.inputs[n] : call->engine.output;
        values.emplace_back(*call->engine.runtime, bytes(call->addresses[n], call->sizes[n]), call->engine.types.at(name), call->shapes[n]);
    }
    for (std::size_t n = 0; n + 1 < values.size(); ++n) given.push_back(values[n].get());
    call->engine.session->run(given, {values.back().get()});
}

bool set_shape(trt::Implementation *self, const char *name, const trt::Dims &dims) {
    Context &own = Context::of(self);
    if (!own.engine.types.count(name) || dims.sizes[0] > 16) return false;
    own.shapes[name].assign(dims.sizes, dims.sizes + dims.rank);
    return true;
}

bool set_address(trt::Implementation *self, const char *name, void *data) {
    Context &own = Context::of(self);
    own.addresses[name] = reinterpret_cast<std::uintptr_t>(data);
    return own.engine.types.count(name) > 0;
}

std::size_t memory_size(trt::Implementation *) { return SCRATCH; }

void set_memory(trt::Implementation *self, void *memory, std::int64_t size) {
    if (size >= std::int64_t(SCRATCH)) Context::of(self).scratch = reinterpret_cast<std::uintptr_t>(memory);
}

bool enqueue(trt::Implementation *self, CUstream stream) {
    Context &own = Context::of(self);
    if (!own.scratch || device() != own.engine.device) return false;
    auto call = std::make_unique<Call>(Call{own.engine, {}, {}, {}});
    own.shapes[own.engine.output] = own.shapes[own.engine.like];
    auto names = own.engine.inputs;
    names.push_back(own.engine.output);
    for (const std::string &name : names) {
        std::size_t size = own.engine.types.at(name) == INT64 ? 8 : 4;
        for (i64 axis : own.shapes.at(name)) size *= std::size_t(axis);
        call->shapes.push_back(own.shapes[name]), call->addresses.push_back(own.addresses.at(name)), call->sizes.push_back(size);
    }
    std::vector<std::uintptr_t> ranges = call->addresses;
    std::vector<std::size_t> sizes = call->sizes;
    ranges.push_back(own.scratch), sizes.push_back(SCRATCH);
    std::vector<unsigned char> writes(ranges.size());
    writes.back() = writes[writes.size() - 2] = 1;
    using Submit = int (*)(CUstream, void (*)(void *), void *, int, const std::uintptr_t *, const std::size_t *, const unsigned char *, int);
    return driver<Submit>("imaginary_model")(stream, run, call.release(), int(sizes.size()), ranges.data(), sizes.data(), writes.data(), 1) == 0;
}

Context::Context(Engine &owner)
    : Thing([]() -> const Table & {
          static const Table table = Table().with(trt::SET_INPUT_SHAPE, set_shape).with(trt::SET_TENSOR_ADDRESS, set_address).with(trt::ENQUEUE, enqueue).with(trt::MEMORY_SIZE, memory_size).with(trt::SET_MEMORY, set_memory);
          return table;
      }()),
      engine(owner) {}

trt::Object *create_context(trt::Implementation *self, int strategy) {
    Engine &own = Engine::of(self);
    return strategy == trt::USER_MANAGED && device() == own.device ? new Context(own) : nullptr;
}

int data_type(trt::Implementation *self, const char *name) {
    auto found = Engine::of(self).types.find(name);
    return found == Engine::of(self).types.end() ? -1 : found->second == INT64 ? trt::INT64 : trt::FLOAT;
}

Engine::Engine(const std::string &plan)
    : Thing([]() -> const Table & {
          static const Table table = Table().with(trt::CREATE_CONTEXT, create_context).with(trt::TENSOR_DATA_TYPE, data_type);
          return table;
      }()),
      device(::device()) {
    std::istringstream lines(plan);
    std::string library, model, name;
    u32 type = FLOAT32;
    lines >> library >> model >> like >> output;
    types[output] = FLOAT32;
    while (lines >> name) {
        if (name == "int64") {
            type = INT64;
        } else {
            inputs.push_back(name), types[name] = type;
        }
    }
    runtime = driffusion::Runtime::open(library);
    const std::string folder = model.substr(0, model.rfind('/'));
    session = std::make_unique<Session>(runtime, "denoiser", read_file(model, DRIFFUSION_ERROR_BUNDLE, u64(1) << 32), SessionOptions{1, false, false, folder}, inputs, std::vector<std::string>{output});
}

struct Root : Thing<Root> {
    void *logger;

    Root(void *given, const Table &table) : Thing(table), logger(given) {}
};

trt::Object *deserialize(trt::Implementation *self, const void *plan, std::size_t size) {
    try {
        return new Engine(std::string(static_cast<const char *>(plan), size));
    } catch (const Error &error) {
        void *logger = Root::of(self).logger;
        void *const *functions = *static_cast<void *const *const *>(logger);
        const auto interface = reinterpret_cast<trt::InterfaceInfo (*)(void *)>(functions[1])(logger);
        const bool known = interface.kind == std::string("ILogger") && interface.major == 1 && interface.minor == 0;
        using Log = void (*)(void *, int, const char *);
        reinterpret_cast<Log>(functions[trt::LOG])(logger, trt::ERROR, known ? error.what() : "this is no ILogger 1.0");
        return nullptr;
    }
}

}  // namespace

EXPORT int getInferLibVersion() { return IMAGINARY_VERSION; }

EXPORT void *createInferRuntime_INTERNAL(void *logger, int version) {
    static const Table table = Table().with(trt::DESERIALIZE, deserialize);
    return version == IMAGINARY_VERSION ? static_cast<trt::Object *>(new Root(logger, table)) : nullptr;
}

ABSENT(createInferBuilder_INTERNAL)
ABSENT(createInferRefitter_INTERNAL)
ABSENT(getBuilderPluginRegistry)
ABSENT(getPluginRegistry)
