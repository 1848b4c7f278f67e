// The C functions: handles are looked up, arguments checked, and every exception ends here.
#include <chrono>
#include <cmath>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <new>
#include <string>
#include <system_error>
#include <thread>

#include "driffusion.h"
#include "engine.h"
#include "error.h"

using driffusion::Engine;
using driffusion::Error;
using driffusion::fail;
using driffusion::Request;

namespace {

constexpr std::uint64_t KIND_BIT = std::uint64_t(1) << 62;  // set in the handles of requests
constexpr double LONGEST = 1e9;                             // seconds

// Handles to objects. Never destroyed: a thread that still runs when the process exits finds it whole.
template <typename T>
class Table {
   public:
    Table(const char *name, std::uint64_t first) : name_(name), next_(first) {}

    std::uint64_t add(std::shared_ptr<T> object) {
        std::lock_guard<std::mutex> lock(mutex_);
        objects_[++next_] = std::move(object);
        return next_;
    }

    std::shared_ptr<T> find(std::uint64_t handle) {
        std::lock_guard<std::mutex> lock(mutex_);
        auto found = objects_.find(handle);
        if (found == objects_.end()) unknown(handle);
        return found->second;
    }

    std::shared_ptr<T> take(std::uint64_t handle) {
        std::lock_guard<std::mutex> lock(mutex_);
        auto found = objects_.find(handle);
        if (found == objects_.end()) unknown(handle);
        auto object = std::move(found->second);
        objects_.erase(found);
        return object;
    }

    void drop(std::uint64_t handle) {
        std::lock_guard<std::mutex> lock(mutex_);
        objects_.erase(handle);
    }

   private:
    [[noreturn]] void unknown(std::uint64_t handle) const {
        fail(DRIFFUSION_ERROR_HANDLE, std::to_string(handle) + " is no open " + name_ + ": it was closed, is of the other kind, or never was one");
    }

    const char *name_;
    std::mutex mutex_;
    std::uint64_t next_;
    std::map<std::uint64_t, std::shared_ptr<T>> objects_;
};

Table<Engine> &engines() {
    static auto &table = *new Table<Engine>("engine", 0);
    return table;
}

Table<Request> &requests() {
    static auto &table = *new Table<Request>("request", KIND_BIT);
    return table;
}

std::string &last_error() {
    thread_local std::string message;
    return message;
}

driffusion_status said(driffusion_status status, const char *message) noexcept {
    try {
        last_error() = message;
    } catch (...) {
        last_error().clear();  // no memory for words; the status says it
    }
    return status;
}

// Runs the body of a function; what it throws becomes a status and the thread's last error.
template <typename Body>
driffusion_status guarded(Body body) noexcept {
    try {
        return body();
    } catch (const Error &error) {
        return said(error.status(), error.what());
    } catch (const std::bad_alloc &) {
        return said(DRIFFUSION_ERROR_MEMORY, "out of memory");
    } catch (const std::system_error &error) {
        return said(DRIFFUSION_ERROR_MEMORY, error.what());  // of threads and locks
    } catch (const std::exception &error) {
        return said(DRIFFUSION_ERROR_INTERNAL, error.what());
    } catch (...) {
        return said(DRIFFUSION_ERROR_INTERNAL, "an unknown exception");
    }
}

template <typename T>
T &needed(T *pointer, const char *name) {
    if (!pointer) fail(DRIFFUSION_ERROR_ARGUMENT, std::string(name) + " must not be null");
    return *pointer;
}

// A struct of the caller, of this version's size.
template <typename T>
T &versioned(T *pointer, const char *name) {
    T &value = needed(pointer, name);
    if (value.struct_size != sizeof(T)) {
        fail(DRIFFUSION_ERROR_VERSION, std::string(name) + ".struct_size is " + std::to_string(value.struct_size) + ", this library knows " + std::to_string(sizeof(T)) + ": start from its _INIT, and compile with the header of this library");
    }
    return value;
}

// A call of this header or of the first one, whose missing fields are null.
driffusion_call call_of(const driffusion_call *call) {
    constexpr std::size_t FIRST = offsetof(driffusion_call, device_rgb);
    driffusion_call whole = DRIFFUSION_CALL_INIT;
    if (needed(call, "call").struct_size != FIRST) return versioned(call, "call");
    std::memcpy(static_cast<void *>(&whole), call, FIRST);
    return whole;
}

void outside_callback(const char *function) {
    if (driffusion::inside_callback()) fail(DRIFFUSION_ERROR_STATE, std::string(function) + " would wait for ever inside a callback");
}

driffusion_status outcome(Request &request, driffusion_result *result) {  // of a request that is done, under its lock
    if (request.status == DRIFFUSION_OK) {
        if (result) *result = request.result;
        return DRIFFUSION_OK;
    }
    return said(request.status, request.message.c_str());
}

// Waits for something about a request, whose lock is returned; Error with TIMEOUT.
template <typename Ready>
std::unique_lock<std::mutex> wait_for(Request &request, double seconds, const char *function, Ready ready) {
    if (std::isnan(seconds)) fail(DRIFFUSION_ERROR_ARGUMENT, "seconds must be a number");
    outside_callback(function);
    std::unique_lock<std::mutex> lock(request.mutex);
    if (seconds < 0) {
        request.changed.wait(lock, ready);
    } else if (!request.changed.wait_for(lock, std::chrono::duration<double>(std::min(seconds, LONGEST)), ready)) {
        fail(DRIFFUSION_ERROR_TIMEOUT, "the request is not finished yet");
    }
    return lock;
}

}  // namespace

extern "C" {

uint32_t driffusion_version(void) { return DRIFFUSION_VERSION; }

const char *driffusion_status_name(driffusion_status status) {
    static const char *const names[] = {"OK", "ARGUMENT", "HANDLE", "VERSION", "PROGRAM", "BUNDLE", "DEVICE", "BUFFER",
                                        "CANCELLED", "NONFINITE", "BUSY", "TIMEOUT", "MEMORY", "STATE", "UNSUPPORTED", "INTERNAL"};
    auto number = static_cast<unsigned>(status);
    return number < sizeof names / sizeof *names ? names[number] : "UNKNOWN";
}

const char *driffusion_last_error(void) {
    try {
        return last_error().c_str();
    } catch (...) {
        return "";
    }
}

driffusion_status driffusion_open(const driffusion_open_info *info, driffusion_engine *engine) {
    return guarded([&] {
        needed(engine, "engine") = 0;
        const driffusion_open_info &given = needed(info, "info");
        if (given.abi_version != DRIFFUSION_ABI_VERSION) {
            fail(DRIFFUSION_ERROR_VERSION, "the caller was compiled for ABI " + std::to_string(given.abi_version) + ", this library has " + std::to_string(DRIFFUSION_ABI_VERSION));
        }
        versioned(info, "info");
        needed(given.bundle, "info.bundle");
        needed(given.program, "info.program");
        if (given.option_count) needed(given.options, "info.options");
        outside_callback("driffusion_open");
        driffusion::SignalsBlocked blocked;  // also in the threads of ONNX Runtime
        *engine = engines().add(std::make_shared<Engine>(driffusion::Settings::of(given)));
        return DRIFFUSION_OK;
    });
}

driffusion_status driffusion_close(driffusion_engine engine) {
    return guarded([&] {
        outside_callback("driffusion_close");
        auto closing = engines().take(engine);
        closing->close();
        // who is just leaving a function still has it in hand
        while (closing.use_count() > 1) std::this_thread::sleep_for(std::chrono::microseconds(100));
        return DRIFFUSION_OK;
    });
}

driffusion_status driffusion_sizes(driffusion_engine engine, uint32_t images, driffusion_sizes_info *sizes) {
    return guarded([&] {
        versioned(sizes, "sizes") = engines().find(engine)->sizes(images);
        return DRIFFUSION_OK;
    });
}

driffusion_status driffusion_tokenize(driffusion_engine engine, const char *text, int64_t *ids, size_t capacity, size_t *count) {
    return guarded([&] {
        needed(text, "text");
        needed(count, "count") = 0;
        if (!driffusion::valid_utf8(text)) fail(DRIFFUSION_ERROR_ARGUMENT, "text is not UTF-8");
        driffusion::u32 truncated = 0;
        std::vector<int64_t> found = engines().find(engine)->tokenize(text, &truncated);
        *count = found.size();
        if (capacity < found.size()) {
            fail(DRIFFUSION_ERROR_BUFFER, "ids is too small: it has " + std::to_string(capacity) + ", " + std::to_string(found.size()) + " are needed");
        }
        if (!found.empty()) std::memcpy(&needed(ids, "ids"), found.data(), found.size() * sizeof(int64_t));
        return DRIFFUSION_OK;
    });
}

driffusion_status driffusion_generate(driffusion_engine engine, const driffusion_call *call, driffusion_result *result) {
    return guarded([&] {
        const driffusion_call given = call_of(call);
        if (result) versioned(result, "result");
        outside_callback("driffusion_generate");
        auto opened = engines().find(engine);
        auto request = std::make_shared<Request>();
        request->call = opened->checked(given);
        opened->begin(request);
        opened->perform(*request);
        opened->end(request.get());
        return outcome(*request, result);
    });
}

driffusion_status driffusion_start(driffusion_engine engine, const driffusion_call *call, driffusion_request *request) {
    return guarded([&] {
        needed(request, "request") = 0;
        const driffusion_call given = call_of(call);
        auto opened = engines().find(engine);
        auto made = std::make_shared<Request>();
        made->call = opened->checked(given);
        made->engine = opened;
        opened->begin(made);
        std::lock_guard<std::mutex> lock(made->mutex);  // another thread that releases it waits for its thread
        try {
            *request = requests().add(made);  // before the thread starts: callbacks may use it
            driffusion::SignalsBlocked blocked;
            made->thread = std::thread([opened, made]() mutable {
                opened->perform(*made);
                opened->end(made.get());
                opened.reset();
            });
        } catch (...) {
            requests().drop(*request);
            *request = 0;
            opened->end(made.get());
            throw;
        }
        return DRIFFUSION_OK;
    });
}

driffusion_status driffusion_wait(driffusion_request request, double seconds, driffusion_result *result) {
    return guarded([&] {
        if (result) versioned(result, "result");
        auto waited = requests().find(request);
        auto lock = wait_for(*waited, seconds, "driffusion_wait", [&] { return waited->done; });
        return outcome(*waited, result);
    });
}

driffusion_status driffusion_wait_enqueued(driffusion_request request, double seconds) {
    return guarded([&] {
        auto waited = requests().find(request);
        if (!waited->call.target.gpu) fail(DRIFFUSION_ERROR_ARGUMENT, "the request has no output in device memory");
        auto lock = wait_for(*waited, seconds, "driffusion_wait_enqueued", [&] { return waited->enqueued || waited->done; });
        return waited->enqueued ? DRIFFUSION_OK : outcome(*waited, nullptr);
    });
}

driffusion_status driffusion_poll(driffusion_request request, uint32_t *finished) {
    return guarded([&] {
        auto asked = requests().find(request);
        if (finished) *finished = asked->finished.load();
        std::lock_guard<std::mutex> lock(asked->mutex);
        if (!asked->done) fail(DRIFFUSION_ERROR_TIMEOUT, "the request is not finished yet");
        return outcome(*asked, nullptr);
    });
}

driffusion_status driffusion_cancel(driffusion_request request) {
    return guarded([&] {
        auto asked = requests().find(request);
        asked->cancelled.store(true);
        if (auto engine = asked->engine.lock()) engine->wake();
        return DRIFFUSION_OK;
    });
}

driffusion_status driffusion_release(driffusion_request request) {
    return guarded([&] {
        outside_callback("driffusion_release");
        auto released = requests().take(request);
        released->cancelled.store(true);
        if (auto engine = released->engine.lock()) engine->wake();
        {
            std::lock_guard<std::mutex> lock(released->mutex);  // until driffusion_start() has made the thread
        }
        if (released->thread.joinable()) released->thread.join();
        return DRIFFUSION_OK;
    });
}

driffusion_status driffusion_request_error(driffusion_request request, char *message, size_t capacity, size_t *needed_size) {
    return guarded([&] {
        auto asked = requests().find(request);
        std::lock_guard<std::mutex> lock(asked->mutex);
        const std::string &text = asked->message;
        needed(needed_size, "needed") = text.size() + 1;
        if (capacity < text.size() + 1) {
            fail(DRIFFUSION_ERROR_BUFFER, "message is too small: it has " + std::to_string(capacity) + " bytes, " + std::to_string(text.size() + 1) + " are needed");
        }
        std::memcpy(&needed(message, "message"), text.c_str(), text.size() + 1);
        return DRIFFUSION_OK;
    });
}

}  // extern "C"
