#include "ort.h"

#include <dlfcn.h>

#include <map>
#include <mutex>

#include "error.h"

// The part of ONNX Runtime's C interface that is used here. Its table of functions only ever grows at its end: a
// function's place is a promise that holds since the version that brought it (all of these: 1.4). No package that pip,
// apt or npm install has the headers.
struct OrtApiBase {
    const OrtApi *(*GetApi)(std::uint32_t version);
    const char *(*GetVersionString)();
};
struct OrtSessionOptions;
struct OrtRunOptions;

#define UNUSED(from, to) void *unused_##from[(to) - (from)]
struct OrtApi {
    UNUSED(0, 2);
    const char *(*GetErrorMessage)(const OrtStatus *);  // 2
    OrtStatus *(*CreateEnv)(int severity, const char *log_id, OrtEnv **);  // 3
    UNUSED(4, 8);
    OrtStatus *(*CreateSessionFromArray)(const OrtEnv *, const void *, std::size_t, const OrtSessionOptions *, OrtSession **);  // 8
    OrtStatus *(*Run)(OrtSession *, const OrtRunOptions *, const char *const *, const OrtValue *const *, std::size_t, const char *const *, std::size_t, OrtValue **);  // 9
    OrtStatus *(*CreateSessionOptions)(OrtSessionOptions **);  // 10
    UNUSED(11, 22);
    OrtStatus *(*SetSessionLogSeverityLevel)(OrtSessionOptions *, int);        // 22
    OrtStatus *(*SetSessionGraphOptimizationLevel)(OrtSessionOptions *, int);  // 23
    OrtStatus *(*SetIntraOpNumThreads)(OrtSessionOptions *, int);              // 24
    OrtStatus *(*SetInterOpNumThreads)(OrtSessionOptions *, int);              // 25
    UNUSED(26, 49);
    OrtStatus *(*CreateTensorWithDataAsOrtValue)(const OrtMemoryInfo *, void *, std::size_t, const std::int64_t *, std::size_t, int, OrtValue **);  // 49
    UNUSED(50, 69);
    OrtStatus *(*CreateCpuMemoryInfo)(int allocator, int memory, OrtMemoryInfo **);  // 69
    UNUSED(70, 92);
    void (*ReleaseEnv)(OrtEnv *);                // 92
    void (*ReleaseStatus)(OrtStatus *);          // 93
    void (*ReleaseMemoryInfo)(OrtMemoryInfo *);  // 94
    void (*ReleaseSession)(OrtSession *);        // 95
    void (*ReleaseValue)(OrtValue *);            // 96
    UNUSED(97, 100);
    void (*ReleaseSessionOptions)(OrtSessionOptions *);  // 100
    UNUSED(101, 130);
    OrtStatus *(*AddSessionConfigEntry)(OrtSessionOptions *, const char *, const char *);  // 130
};
#undef UNUSED
static_assert(sizeof(OrtApi) == 131 * sizeof(void *), "a function is not in its place");

namespace driffusion {
namespace {

constexpr std::uint32_t API_VERSION = 4;
constexpr int SEVERITY_FATAL = 4, ARENA = 1, DEFAULT_MEMORY = 0, OPTIMIZE_NOTHING = 0, OPTIMIZE_ALL = 99;

std::size_t bytes_of(u32 dtype) { return dtype == INT64 ? 8 : 4; }

}  // namespace

std::shared_ptr<Runtime> Runtime::open(const std::string &path) {
    // One per library for all engines; never destroyed, so that no order of destructors at exit matters.
    static auto &mutex = *new std::mutex;
    static auto &known = *new std::map<std::string, std::weak_ptr<Runtime>>;
    std::lock_guard<std::mutex> lock(mutex);
    auto runtime = known[path].lock();
    if (!runtime) known[path] = runtime = std::make_shared<Runtime>(path);
    return runtime;
}

Runtime::Runtime(const std::string &path) {
    void *library = dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL | RTLD_NODELETE);
    if (!library) {
        const char *reason = dlerror();
        fail(DRIFFUSION_ERROR_DEVICE, "ONNX Runtime cannot be opened (" + std::string(reason ? reason : path) + "): name libonnxruntime.so with the option onnxruntime");
    }
    auto base = reinterpret_cast<const OrtApiBase *(*)()>(dlsym(library, "OrtGetApiBase"));
    if (!base) fail(DRIFFUSION_ERROR_DEVICE, path + " is no ONNX Runtime: it has no OrtGetApiBase");
    version_ = base()->GetVersionString();
    api_ = base()->GetApi(API_VERSION);
    if (!api_) fail(DRIFFUSION_ERROR_VERSION, "ONNX Runtime " + version_ + " in " + path + " is too old: 1.4 is the first that can be used");
    // what goes wrong is said by the statuses: the host's standard error is not this library's
    check(api_->CreateEnv(SEVERITY_FATAL, "driffusion", &env_), "ONNX Runtime");
    try {
        check(api_->CreateCpuMemoryInfo(ARENA, DEFAULT_MEMORY, &memory_), "ONNX Runtime");
    } catch (...) {
        api_->ReleaseEnv(env_);
        throw;
    }
}

Runtime::~Runtime() {
    api_->ReleaseMemoryInfo(memory_);
    api_->ReleaseEnv(env_);
}

void Runtime::check(OrtStatus *status, const std::string &what) const {
    if (!status) return;
    std::unique_ptr<OrtStatus, void (*)(OrtStatus *)> owned(status, api_->ReleaseStatus);
    fail(DRIFFUSION_ERROR_DEVICE, what + " failed in ONNX Runtime: " + api_->GetErrorMessage(status));
}

Value::Value(const Runtime &runtime, void *data, u32 dtype, const std::vector<i64> &shape) : runtime_(&runtime) {
    std::size_t bytes = bytes_of(dtype);
    for (i64 size : shape) bytes *= std::size_t(size);
    runtime.check(runtime.api_->CreateTensorWithDataAsOrtValue(runtime.memory_, data, bytes, shape.data(), shape.size(), int(dtype), &value_), "a tensor");
}

Value::Value(Value &&other) noexcept : runtime_(other.runtime_), value_(std::exchange(other.value_, nullptr)) {}

Value &Value::operator=(Value &&other) noexcept {
    std::swap(runtime_, other.runtime_);
    std::swap(value_, other.value_);
    return *this;
}

Value::~Value() {
    if (value_) runtime_->api_->ReleaseValue(value_);
}

Session::Session(std::shared_ptr<Runtime> runtime, const std::string &name, std::string_view content, const SessionOptions &options,
                 std::vector<std::string> inputs, std::vector<std::string> outputs)
    : runtime_(std::move(runtime)), name_(name), inputs_(std::move(inputs)), outputs_(std::move(outputs)) {
    const OrtApi &api = runtime_->api();
    OrtSessionOptions *made = nullptr;
    runtime_->check(api.CreateSessionOptions(&made), name);
    std::unique_ptr<OrtSessionOptions, void (*)(OrtSessionOptions *)> owned(made, api.ReleaseSessionOptions);
    runtime_->check(api.SetSessionLogSeverityLevel(made, SEVERITY_FATAL), name);
    runtime_->check(api.SetSessionGraphOptimizationLevel(made, options.optimized ? OPTIMIZE_NOTHING : OPTIMIZE_ALL), name);
    runtime_->check(api.SetIntraOpNumThreads(made, int(options.threads)), name);
    runtime_->check(api.SetInterOpNumThreads(made, 1), name);
    runtime_->check(api.AddSessionConfigEntry(made, "session.intra_op.allow_spinning", options.spin ? "1" : "0"), name);
    if (!options.folder.empty()) {
        runtime_->check(api.AddSessionConfigEntry(made, "session.model_external_initializers_file_folder_path", options.folder.c_str()), name);
    }
    for (const std::string &one : inputs_) input_names_.push_back(one.c_str());
    for (const std::string &one : outputs_) output_names_.push_back(one.c_str());
    runtime_->check(api.CreateSessionFromArray(runtime_->env_, content.data(), content.size(), made, &session_), name);
}

Session::~Session() { runtime_->api().ReleaseSession(session_); }

void Session::run(const std::vector<const OrtValue *> &inputs, std::vector<OrtValue *> outputs) const {
    runtime_->check(runtime_->api().Run(session_, nullptr, input_names_.data(), inputs.data(), inputs.size(), output_names_.data(), outputs.size(), outputs.data()), name_);
}

}  // namespace driffusion
