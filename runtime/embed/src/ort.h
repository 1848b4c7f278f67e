// ONNX Runtime through its C interface, opened at run time: the library links to none, and a host may bring its own.
#pragma once
#include <cstdint>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "program.h"

struct OrtApi;
struct OrtEnv;
struct OrtMemoryInfo;
struct OrtSession;
struct OrtValue;
struct OrtStatus;

namespace driffusion {

// A loaded libonnxruntime. It stays loaded until the process ends: its threads and thread-locals outlive any handle.
class Runtime {
   public:
    static std::shared_ptr<Runtime> open(const std::string &path);
    Runtime(const std::string &path);
    ~Runtime();
    Runtime(const Runtime &) = delete;
    Runtime &operator=(const Runtime &) = delete;

    const OrtApi &api() const { return *api_; }
    const std::string &version() const { return version_; }
    void check(OrtStatus *status, const std::string &what) const;

   private:
    friend class Session;
    friend class Value;
    const OrtApi *api_ = nullptr;
    OrtEnv *env_ = nullptr;
    OrtMemoryInfo *memory_ = nullptr;
    std::string version_;
};

// A tensor over memory of the caller.
class Value {
   public:
    Value() = default;
    Value(const Runtime &runtime, void *data, u32 dtype, const std::vector<i64> &shape);
    Value(Value &&other) noexcept;
    Value &operator=(Value &&other) noexcept;
    ~Value();
    OrtValue *get() const { return value_; }

   private:
    const Runtime *runtime_ = nullptr;
    OrtValue *value_ = nullptr;
};

struct SessionOptions {
    u32 threads;
    bool spin, optimized;  // optimized: the file is a compiled one
    std::string folder;    // of weights that lie beside the file, if any do
};

// One network ready to run. `run` may be called from several threads.
class Session {
   public:
    Session(std::shared_ptr<Runtime> runtime, const std::string &name, std::string_view content, const SessionOptions &options,
            std::vector<std::string> inputs, std::vector<std::string> outputs);
    ~Session();
    Session(const Session &) = delete;
    Session &operator=(const Session &) = delete;

    // Reads and writes the values' own memory.
    void run(const std::vector<const OrtValue *> &inputs, std::vector<OrtValue *> outputs) const;
    const Runtime &runtime() const { return *runtime_; }

   private:
    std::shared_ptr<Runtime> runtime_;
    std::string name_;
    std::vector<std::string> inputs_, outputs_;
    std::vector<const char *> input_names_, output_names_;
    OrtSession *session_ = nullptr;
};

}  // namespace driffusion
