// The state of the imaginary machine and what its parts call of one another. One lock guards all of it.
#pragma once
#include <algorithm>
#include <array>
#include <atomic>
#include <chrono>
#include <cstring>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <random>
#include <set>
#include <string>
#include <thread>
#include <unordered_map>
#include <vector>

#include "../../runtime/embed/src/driver_api.h"

namespace imaginary {

enum Function {
#define X(name, symbol, parameters) F_##name,
    DRIVER_FUNCTIONS(X)
#undef X
        FUNCTIONS
};
extern const char *const NAMES[FUNCTIONS];

// --- happens-before (races.cc) ---------------------------------------------------------------------------------------

using Clock = std::vector<uint32_t>;  // by track: how much of it has surely ended
void join(Clock &into, const Clock &from);

// Host memory as it was when a copy of it was asked for (memory.cc)
struct Watch {
    uintptr_t address;
    std::vector<unsigned char> expected;
};

// When one operation runs in the partial order: what has ended before it, its own place, model calls on its longest path
struct Stamp {
    Clock clock;
    int track = 0;
    uint32_t tick = 0;
    int chain = 0;
    std::shared_ptr<Watch> watched;
};

struct Access {
    uintptr_t low, high;
    bool write;
};

struct Record {  // of an access that ran
    uintptr_t low, high;
    bool write;
    int track;
    uint32_t tick;
    const char *what;
};

// --- objects behind handles (handles.cc) -----------------------------------------------------------------------------

enum class Kind { Context, Stream, Event, Graph, Executable, Module, Function };
const char *name_of(Kind kind);

struct Context;
struct Object {
    explicit Object(Kind kind) : kind(kind) {}
    virtual ~Object() = default;
    Kind kind;
    uintptr_t handle = 0;
    bool alive = true;
    Context *context = nullptr;
};

struct Context : Object {
    static constexpr Kind KIND = Kind::Context;
    Context() : Object(KIND) {}
    int device = 0;
    CUresult sticky = CUDA_SUCCESS;
    std::set<int> peers;  // devices whose memory it may reach
};

// One operation on memory. `dynamic` tells what is known only when it runs.
struct Work {
    const char *what = "";
    Context *context = nullptr;
    const struct Module *module = nullptr;
    bool model = false;
    uintptr_t host_source = 0;  // pinned memory that it copies, and how much
    size_t host_size = 0;
    bool tells_host = false;    // how far a device is
    bool through_host = false;  // a copy that the driver makes without peer access
    std::vector<Access> accesses;
    std::function<void(std::vector<Access> &)> dynamic;
    std::function<void(const Stamp &)> run;
};
using WorkPointer = std::shared_ptr<Work>;

struct Stream;
struct Node {
    WorkPointer work;
    std::set<int> needs;
    int branch = 0;  // which of the captured streams it was put on
};

struct Capture {
    Stream *origin = nullptr;
    int mode = 0;
    std::thread::id thread;
    bool active = true, invalid = false;
    std::vector<Node> nodes;
    std::vector<Stream *> streams;
};
using CapturePointer = std::shared_ptr<Capture>;

struct Event : Object {
    static constexpr Kind KIND = Kind::Event;
    Event() : Object(KIND) {}
    bool timing = false;
    uint64_t asked = 0, done = 0, at = 0;
    Clock clock;
    int chain = 0;
    CapturePointer capture;
    std::set<int> nodes;
};

struct Executable;
struct Replay {  // one launch of a graph under way
    Executable *executable = nullptr;
    std::vector<Stamp> stamps;
    std::vector<int> missing, ready;
    size_t left = 0;
    int number = 0;
};

struct Operation {
    enum Type { WORK, RECORD, WAIT, LAUNCH } type = WORK;
    WorkPointer work;
    Stamp stamp;
    Event *event = nullptr;
    uint64_t version = 0;
    std::unique_ptr<Replay> replay;
};

struct Stream : Object {
    static constexpr Kind KIND = Kind::Stream;
    Stream() : Object(KIND) {}
    int speed = 1;  // how often it is chosen
    std::deque<Operation> queue;
    Clock clock;
    int chain = 0;
    std::vector<int> tracks;  // its own, then one per branch of the graphs that are launched on it
    CapturePointer capture;
    std::set<int> tail;  // nodes that its next one depends on
    int branch = 0;
};

struct Graph : Object {
    static constexpr Kind KIND = Kind::Graph;
    Graph() : Object(KIND) {}
    std::vector<Node> nodes;
};

struct Executable : Object {
    static constexpr Kind KIND = Kind::Executable;
    Executable() : Object(KIND) {}
    std::vector<Node> nodes;
    std::vector<std::vector<int>> followers;
    Clock end;  // launches of one graph follow each other
    int chain = 0, launched = 0, ended = 0;
};

struct Variant {
    std::string dtype;
    int outputs = 0, width = 0;
};

struct Module : Object {
    static constexpr Kind KIND = Kind::Module;
    Module() : Object(KIND) {}
    std::vector<unsigned char> code;
    const Variant *variant = nullptr;
};

struct KernelFunction : Object {
    static constexpr Kind KIND = Kind::Function;
    KernelFunction() : Object(KIND) {}
    Module *module = nullptr;
    std::string name;
};

// --- memory (memory.cc) ----------------------------------------------------------------------------------------------

struct Allocation {
    uintptr_t address = 0;  // what the program sees
    size_t size = 0;
    int device = -1;  // −1: pinned host memory
    Context *context = nullptr;
    unsigned char *bytes = nullptr, *block = nullptr;  // where its content is, and the pages round it
    size_t block_size = 0;
    int file = -1;          // of memory that other processes may open
    std::string exporter;   // of another process's memory: its handle
    int opened = 0;         // how often, of the same
    std::vector<Record> history;
};

Allocation *allocate(size_t size, int device);              // of the current context
bool idle(const Allocation *allocation, const char *function);  // neither queued nor, for all the host knows, running
Allocation *allocation_at(uintptr_t address, size_t size);  // that holds all of it, or null
unsigned char *bytes_at(uintptr_t address, size_t size);    // null outside allocations
void free_allocation(Allocation *allocation, bool checked);
size_t allocated_bytes(int device);
std::shared_ptr<Watch> watch(const Work &work);  // null where it copies no host memory
void changed_by_device(uintptr_t address, size_t size);  // host memory that is written by a copy, not by the host
const char *visible(Context *context, const Allocation *allocation);  // why a device may not touch it, or null

// --- the machine -----------------------------------------------------------------------------------------------------

struct Fault {
    Function function;
    int left;  // calls until it happens
    int status;
    bool sticky, skip;
};

struct Device {
    Context *context = nullptr;
    int references = 0;
    size_t free_bytes = size_t(8) << 30, total_bytes = size_t(16) << 30;
    long work_done = 0, lost_after = -1;
    CUresult lost_status = CUDA_ERROR_ILLEGAL_ADDRESS;
    bool hangs = false, gone = false;
};

struct Machine {
    std::mutex lock;
    std::mt19937 random;
    std::vector<Device> devices;
    int eager = 2, version = 13000;
    bool initialized = false, peers = true, peer_zeros = false, races = true;
    bool computes = true;  // else only what tells the host how far a device is does anything
    std::array<long, FUNCTIONS> calls{};
    std::vector<Fault> faults;
    std::vector<std::string> violations;
    std::unordered_map<uintptr_t, std::unique_ptr<Object>> objects;
    std::map<uintptr_t, std::unique_ptr<Allocation>> memory;
    std::vector<Stream *> streams;  // that are alive
    std::vector<CapturePointer> captures;
    Clock ticks, host;  // by track: ticks given out; what the host knows to have ended
    int host_chain = 0, longest_chain = 0, tracks = 0;
    uint64_t time = 0;  // operations that ran
    std::atomic<uint64_t> nanoseconds{0};  // that its callers spent in driver calls
    int (*ignored)(uintptr_t stream, uintptr_t event) = nullptr;
};
extern Machine machine;
extern thread_local bool inside_callback;
extern thread_local int capture_mode;

void violate(const char *format, ...) __attribute__((format(printf, 1, 2)));
Context *current();  // of this thread, or null
CUresult usable(const Context *context);
void break_context(Context *context, CUresult status);
void destroy_context(Context *context, bool checked);

uintptr_t new_handle();
template <typename T>
T *create(Context *context) {
    auto made = std::make_unique<T>();
    T *object = made.get();
    object->handle = new_handle();
    object->context = context;
    machine.objects[object->handle] = std::move(made);
    return object;
}
Object *find(uintptr_t handle, Kind kind, const char *function);  // null, and a violation, when it is not alive
template <typename T>
T *find(const void *handle, const char *function) {
    return static_cast<T *>(find(reinterpret_cast<uintptr_t>(handle), T::KIND, function));
}
template <typename Handle>
Handle handle_of(const Object *object) {
    return reinterpret_cast<Handle>(object->handle);
}

// --- work (executor.cc, graphs.cc) -----------------------------------------------------------------------------------

CUresult submit(Stream *stream, WorkPointer work);
Stamp stamp(Stream *stream, int track, bool model);
int track_of(Stream *stream, int branch);
bool advance();  // runs one operation that may run now; false when there is none
bool may_hang();
bool broken();  // whether some context has failed: what the host does not know then, it cannot know
CUresult wait_until(const std::function<bool()> &done, const char *function);
void run_work(const Work &work, const Stamp &when);
bool touches(const Stream *stream, uintptr_t low, uintptr_t high);
bool uses(const Stream *stream, const Module *module);
CUresult capture_node(Stream *stream, WorkPointer work);
CUresult refuse_during_capture(Function function, CUresult status = CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED);
void invalidate(const CapturePointer &capture, const char *function, const char *why);
void leave_capture(const CapturePointer &capture);
void notice_other_thread(const CapturePointer &capture, const char *function);  // that adds to a capture of this one's
void check_races(const Work &work, const std::vector<Access> &accesses, const Stamp &when);
bool host_knows(const Record &record);

// --- kernels (modules.cc, control.cc) --------------------------------------------------------------------------------

size_t code_size(const void *image);  // of machine code, 0 when it is none
const Variant *known_variant(const unsigned char *code, size_t size);
size_t element_size(const std::string &dtype);
void *host_kernel(const std::string &dtype, const char *name);
template <typename Signature>
Signature *kernel(const std::string &dtype, const char *name) {
    return reinterpret_cast<Signature *>(host_kernel(dtype, name));
}

// --- every call ------------------------------------------------------------------------------------------------------

enum Needs { NOTHING = 0, DRIVER = 1, CONTEXT = 2, NO_CAPTURE = 4 };
CUresult begin(Function function, int needs, bool *skip);

class Stopwatch {
   public:
    ~Stopwatch() {
        const auto spent = std::chrono::steady_clock::now() - start_;
        machine.nanoseconds += std::chrono::duration_cast<std::chrono::nanoseconds>(spent).count();
    }

   private:
    std::chrono::steady_clock::time_point start_ = std::chrono::steady_clock::now();
};

// A driver call: counted, failed or skipped on request, checked for what it needs, with some work done meanwhile.
template <typename Body>
CUresult call(Function function, int needs, Body body) {
    const Stopwatch stopwatch;
    if (inside_callback) {
        violate("%s is called from within work on a stream", NAMES[function]);
        return CUDA_ERROR_NOT_PERMITTED;
    }
    std::lock_guard<std::mutex> guard(machine.lock);
    bool skip = false;
    const CUresult status = begin(function, needs, &skip);
    return status != CUDA_SUCCESS || skip ? status : body();
}

}  // namespace imaginary
