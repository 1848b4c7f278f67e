// What tests use beside the driver API: to set up the machine, to arm faults, to put model calls on streams, to ask.
#include <dlfcn.h>

#include "machine.h"

namespace imaginary {

static std::map<std::string, std::string> libraries;       // of host kernels, by storage type
static std::map<std::string, Variant> variants;            // by content of the machine code
static std::map<std::string, void *> loaded;

const Variant *known_variant(const unsigned char *code, size_t size) {
    const auto found = variants.find(std::string(code, code + size));
    return found == variants.end() ? nullptr : &found->second;
}

size_t element_size(const std::string &dtype) { return dtype == "float32" ? 4 : 2; }

void *host_kernel(const std::string &dtype, const char *name) {
    const std::string key = dtype + "/" + name;
    if (!loaded.count(key)) {
        void *library = libraries.count(dtype) ? dlopen(libraries[dtype].c_str(), RTLD_NOW | RTLD_LOCAL) : nullptr;
        loaded[key] = library ? dlsym(library, name) : nullptr;
        if (!loaded[key]) violate("no kernels for %s are compiled for this processor", dtype.c_str());
    }
    return loaded[key];
}

static Function function_named(const char *name) {
    for (int n = 0; n < FUNCTIONS; ++n)
        if (!strcmp(NAMES[n], name)) return static_cast<Function>(n);
    return FUNCTIONS;
}

static size_t answer(const std::string &text, char *buffer, size_t size) {
    if (size) {
        const size_t count = std::min(size - 1, text.size());
        memcpy(buffer, text.data(), count);
        buffer[count] = 0;
    }
    return text.size() + 1;
}

}  // namespace imaginary

using namespace imaginary;

#define CONTROL extern "C" __attribute__((visibility("default")))

// A machine with nothing in it. What was there is gone, unchecked.
CONTROL void imaginary_reset(int devices, unsigned int seed, int eager) {
    std::lock_guard<std::mutex> guard(machine.lock);
    for (const CapturePointer &capture : std::vector<CapturePointer>(machine.captures)) leave_capture(capture);
    machine.streams.clear();
    machine.objects.clear();
    while (!machine.memory.empty()) free_allocation(machine.memory.begin()->second.get(), false);
    machine.random.seed(seed);
    machine.devices.assign(devices, Device());
    machine.eager = eager;
    machine.version = 13000;
    machine.initialized = machine.peer_zeros = false;
    machine.peers = machine.races = machine.computes = true;
    machine.calls.fill(0);
    machine.faults.clear();
    machine.violations.clear();
    machine.ticks.clear();
    machine.host.clear();
    machine.host_chain = machine.longest_chain = machine.tracks = 0;
    machine.time = 0;
    machine.ignored = nullptr;
}

// One number of the machine, or of one of its devices. False when there is none of that name.
CONTROL int imaginary_set(const char *name, int number, long value) {
    std::lock_guard<std::mutex> guard(machine.lock);
    const std::string what = name;
    if (what == "version") machine.version = static_cast<int>(value);
    else if (what == "eager") machine.eager = static_cast<int>(value);
    else if (what == "peers") machine.peers = value;
    else if (what == "peer_zeros") machine.peer_zeros = value;
    else if (what == "races") machine.races = value;
    else if (what == "computes") machine.computes = value;
    else {
        Device &device = machine.devices.at(number);
        if (what == "free_bytes") device.free_bytes = value;
        else if (what == "total_bytes") device.total_bytes = value;
        else if (what == "lost_after") device.lost_after = value < 0 ? -1 : device.work_done + value;
        else if (what == "lost_status") device.lost_status = static_cast<CUresult>(value);
        else if (what == "hangs") device.hangs = value;
        else if (what == "gone") device.gone = value;
        else return 0;
    }
    return 1;
}

// The n-th call of a function from now fails with a status, or is skipped; sticky: so does every later one in its context.
CONTROL int imaginary_fail(const char *name, int nth, int status, int sticky, int skip) {
    std::lock_guard<std::mutex> guard(machine.lock);
    const Function function = function_named(name);
    if (function == FUNCTIONS || nth < 1) return 0;
    machine.faults.push_back({function, nth, status, sticky != 0, skip != 0});
    return 1;
}

// Waits that `ignored(stream, event)` picks are forgotten. It is asked about those that have something to wait for.
CONTROL void imaginary_ignore_waits(int (*ignored)(uintptr_t, uintptr_t)) {
    std::lock_guard<std::mutex> guard(machine.lock);
    machine.ignored = ignored;
}

CONTROL long imaginary_calls(const char *name) {
    std::lock_guard<std::mutex> guard(machine.lock);
    const Function function = function_named(name);
    if (function != FUNCTIONS) return machine.calls[function];
    long sum = 0;
    for (const long calls : machine.calls) sum += calls;
    return *name ? -1 : sum;
}

// That callers spent in driver calls since the process began, waiting for one another included.
CONTROL uint64_t imaginary_nanoseconds() { return machine.nanoseconds; }

CONTROL long imaginary_work_done(int device) {
    std::lock_guard<std::mutex> guard(machine.lock);
    return machine.devices.at(device).work_done;
}

// The most model calls of which each had to wait for the one before, since the machine was made or this was set to 0.
CONTROL int imaginary_chain(int start_again) {
    std::lock_guard<std::mutex> guard(machine.lock);
    const int longest = machine.longest_chain;
    if (start_again) {
        machine.longest_chain = machine.host_chain = 0;
        for (auto &[handle, object] : machine.objects)
            if (object->kind == Kind::Stream) static_cast<Stream *>(object.get())->chain = 0;
            else if (object->kind == Kind::Event) static_cast<Event *>(object.get())->chain = 0;
            else if (object->kind == Kind::Executable) static_cast<Executable *>(object.get())->chain = 0;
    }
    return longest;
}

CONTROL void imaginary_finish() {
    std::lock_guard<std::mutex> guard(machine.lock);
    while (advance()) {
    }
}

// Runs what is still queued first: what never ran never broke a rule.
CONTROL size_t imaginary_violations(char *buffer, size_t size) {
    std::lock_guard<std::mutex> guard(machine.lock);
    while (advance()) {
    }
    std::string text;
    for (const std::string &one : machine.violations) text += one + "\n";
    return answer(text, buffer, size);
}

CONTROL void imaginary_forgive() {
    std::lock_guard<std::mutex> guard(machine.lock);
    machine.violations.clear();
}

// Everything that is still there: "kind count" by line; "bytes" of devices and of the host, "reference" of contexts.
CONTROL size_t imaginary_live(char *buffer, size_t size) {
    std::lock_guard<std::mutex> guard(machine.lock);
    std::map<std::string, size_t> counts;
    for (auto &[handle, object] : machine.objects)
        if (object->alive) ++counts[name_of(object->kind)];
    for (auto &[address, allocation] : machine.memory) {
        if (allocation->opened) {
            ++counts["memory of another process"];
            continue;
        }
        ++counts[allocation->device < 0 ? "pinned allocation" : "allocation"];
        counts[allocation->device < 0 ? "pinned bytes" : "bytes"] += allocation->size;
    }
    for (const Device &device : machine.devices)
        if (device.references) counts["context reference"] += device.references;
    std::string text;
    for (auto &[kind, count] : counts) text += kind + "\t" + std::to_string(count) + "\n";
    return answer(text, buffer, size);
}

CONTROL void imaginary_kernels(const char *dtype, const char *path) {
    std::lock_guard<std::mutex> guard(machine.lock);
    libraries[dtype] = path;
}

// Says which variant of the kernel a piece of machine code is.
CONTROL int imaginary_code(const void *code, const char *dtype, int outputs, int width) {
    std::lock_guard<std::mutex> guard(machine.lock);
    const auto *bytes = static_cast<const unsigned char *>(code);
    const size_t size = code_size(code);
    if (size) variants[std::string(bytes, bytes + size)] = {dtype, outputs, width};
    return size != 0;
}

// The content of memory, which is not at the address that a program has; null outside allocations.
CONTROL void *imaginary_bytes(uintptr_t address, size_t size) {
    if (inside_callback) return bytes_at(address, size);  // a model call at work, which has the lock
    std::lock_guard<std::mutex> guard(machine.lock);
    return bytes_at(address, size);
}

// What another library does that may wait for all streams of the current context, as one that makes an execution context.
CONTROL int imaginary_library_call(const char *what) {
    std::lock_guard<std::mutex> guard(machine.lock);
    if (!current()) violate("%s: this thread has no current context", what);
    if (const CUresult status = usable(current())) return status;
    bool capturing = false;
    for (const CapturePointer &capture : std::vector<CapturePointer>(machine.captures))
        for (const Stream *stream : capture->streams)
            if (stream->context == current() && !capturing) {
                invalidate(capture, what, "may wait for all streams, one of which is capturing");
                capturing = true;
            }
    return capturing ? CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED : CUDA_SUCCESS;
}

// Puts a model call on a stream: `run(data)` when its turn comes. It reads and writes the ranges that are given.
CONTROL int imaginary_model(CUstream handle, void (*run)(void *), void *data, int count, const uintptr_t *addresses,
                            const size_t *sizes, const unsigned char *writes, int is_model) {
    std::lock_guard<std::mutex> guard(machine.lock);
    Stream *stream = find<Stream>(handle, "a model call");
    if (!stream) return CUDA_ERROR_INVALID_HANDLE;
    if (const CUresult status = usable(stream->context)) return status;
    auto work = std::make_shared<Work>();
    work->what = "a model call";
    work->context = stream->context;
    work->model = is_model;
    for (int n = 0; n < count; ++n) work->accesses.push_back({addresses[n], addresses[n] + sizes[n], writes[n] != 0});
    if (run) work->run = [=](const Stamp &) { run(data); };
    return submit(stream, std::move(work));
}
