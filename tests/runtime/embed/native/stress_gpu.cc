// stress_gpu BUNDLE PROGRAM KERNELS SECONDS SEED [hang]: an engine on imaginary GPUs with everything at once, for sanitizers.
// Turns follow each other: a machine that works, one whose calls fail now and then, one that loses a GPU; with "hang", one
// whose GPU stops. Aborts where an image that was made is not that of its seed, a result is not among those that the header
// allows, a rule of the driver is broken, or something is left on a machine that works.
#include <dlfcn.h>
#include <driffusion.h>

#include <atomic>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <string>
#include <thread>

#include "cuda_combine.h"
#include "cuda_lanes.h"

using namespace driffusion::cuda;
extern "C" void imaginary_install();

namespace {

enum Scenario { WORKS, FAILS, LOSES, HANGS };
constexpr double HANG_SECONDS = 2;  // as the option lane_timeout below
constexpr unsigned KINDS = 4, CLIENTS = 5, DEVICES = 2;
const char *bundle, *program;
std::atomic<unsigned> statuses[DRIFFUSION_ERROR_INTERNAL + 1];

[[noreturn]] void wrong(const std::string &what) {
    std::fprintf(stderr, "%s: %s\n", what.c_str(), driffusion_last_error());
    std::abort();
}

template <typename Function>
Function control(const char *name) {
    static void *const library = dlopen("libcuda.so.1", RTLD_NOW);
    const auto found = reinterpret_cast<Function>(library ? dlsym(library, name) : nullptr);
    if (!found) wrong(std::string("this is not the imaginary driver: it has no ") + name);
    return found;
}

std::string text_of(const char *name) {
    std::string text(1 << 18, '\0');
    control<std::size_t (*)(char *, std::size_t)>(name)(text.data(), text.size());
    return text.c_str();
}

void set(const char *name, int device, long value) { control<int (*)(const char *, int, long)>("imaginary_set")(name, device, value); }

void count(driffusion_status status, Scenario scenario) {
    ++statuses[status];
    bool good = status == DRIFFUSION_OK || status == DRIFFUSION_ERROR_CANCELLED || status == DRIFFUSION_ERROR_HANDLE || status == DRIFFUSION_ERROR_BUSY;
    good = good || (scenario != WORKS && (status == DRIFFUSION_ERROR_DEVICE || status == DRIFFUSION_ERROR_MEMORY));
    if (!good) wrong(std::string("a request ended with ") + driffusion_status_name(status));
}

driffusion_engine open(const char *devices) {
    driffusion_open_info info = DRIFFUSION_OPEN_INIT;
    const driffusion_option options[] = {{"max_requests", "6"}, {"lane_timeout", "2"}};
    info.bundle = bundle, info.program = program, info.devices = devices, info.options = options, info.option_count = 2;
    driffusion_engine engine = 0;
    if (driffusion_open(&info, &engine) != DRIFFUSION_OK) wrong("open");
    return engine;
}

driffusion_call call_of(unsigned kind) {
    driffusion_call call = DRIFFUSION_CALL_INIT;
    call.seed = kind, call.images = 1 + kind % 2, call.prompt = "a star", call.guidance = kind % 2 ? 4.0 : 1.0;
    return call;
}

std::vector<float> latents_for(driffusion_engine engine, unsigned kind) {
    driffusion_sizes_info sizes = DRIFFUSION_SIZES_INIT;
    if (driffusion_sizes(engine, 1 + kind % 2, &sizes) != DRIFFUSION_OK) return {};  // closed meanwhile
    return std::vector<float>(sizes.latent_count, NAN);
}

using Expected = std::vector<std::vector<float>>;
Expected made_on_cores() {
    const driffusion_engine engine = open("cpu*2");
    Expected expected;
    for (unsigned kind = 0; kind < KINDS; ++kind) {
        expected.push_back(latents_for(engine, kind));
        driffusion_call call = call_of(kind);
        call.latents_out = expected[kind].data(), call.latents_out_count = expected[kind].size();
        if (driffusion_generate(engine, &call, nullptr) != DRIFFUSION_OK) wrong("generate");
    }
    driffusion_close(engine);
    return expected;
}

void compare(const float *made, const std::vector<float> &expected) {
    float scale = 0, apart = 0;
    for (std::size_t n = 0; n < expected.size(); ++n) {
        scale = std::max(scale, std::abs(expected[n]));
        if (!(std::abs(made[n] - expected[n]) <= apart)) apart = std::abs(made[n] - expected[n]);  // also where it is NaN
    }
    if (!(apart <= 1e-4f * scale)) wrong("an image is not that of its seed: " + std::to_string(apart) + " of " + std::to_string(scale));
}

// What a host has on a GPU: streams, an event, and memory for latents.
struct Host {
    Gpu gpu;
    DeviceMemory latents;
    PinnedMemory seen;
    Stream stream, later;
    CUevent event = nullptr;

    Host(int device, std::size_t bytes) : gpu(device), latents(gpu, bytes), seen(gpu, bytes), stream(gpu), later(gpu) {
        Current current(gpu);
        driver_call(cuEventCreate, &event, 0);
    }
    ~Host() {
        freed(gpu, [this](const Functions &driver) { driver.cuEventDestroy_v2(event); });
    }
};

struct Turn {
    Scenario scenario;
    const Expected &expected;
    std::atomic<bool> stop{false};
};

// After a wait that failed the host's copy may still be queued, and the next request writes what it reads.
void drain(Host &host) {
    for (int n = 0; n < 3; ++n) {
        try {
            return host.later.wait(HANG_SECONDS);
        } catch (const driffusion::Error &) {  // a call may fail once, on a device that is lost all do
        }
    }
}

// One request with its output in device memory, used on another stream without a wait of the host.
void on_device(driffusion_engine engine, unsigned turn, Host &host, Turn &now) {
    const std::vector<float> &expected = now.expected[turn % KINDS];
    const std::size_t bytes = expected.size() * sizeof(float);
    driffusion_call call = call_of(turn % KINDS);
    call.device_latents = host.latents.get(), call.device_latents_count = expected.size();
    call.stream = host.stream.get();
    call.event = host.event;
    driffusion_request request = 0;
    driffusion_status status = driffusion_start(engine, &call, &request);
    if (status != DRIFFUSION_OK) return count(status, now.scenario);
    status = driffusion_wait_enqueued(request, turn % 4 ? -1 : 0.002);
    if (status == DRIFFUSION_ERROR_TIMEOUT) status = driffusion_wait_enqueued(request, -1);
    if (status == DRIFFUSION_OK) {
        try {
            Current current(host.gpu);
            driver_call(cuStreamWaitEvent, host.later.get(), host.event, 0);
            driver_call(cuMemcpyDtoHAsync_v2, host.seen.as<void>(), host.latents.get(), bytes, host.later.get());
            host.later.wait(HANG_SECONDS);
        } catch (const driffusion::Error &) {
            if (now.scenario == WORKS) wrong("a call of the host");
            drain(host);
            status = DRIFFUSION_ERROR_DEVICE;
        }
    }
    const driffusion_status ended = driffusion_wait(request, -1, nullptr);
    count(ended, now.scenario);
    if (ended == DRIFFUSION_OK && status == DRIFFUSION_OK) compare(host.seen.as<float>(), expected);
    if (driffusion_release(request) != DRIFFUSION_OK) wrong("release");
}

// One request in a thread of the library, cancelled at some moment by another thread, released before or after its end.
void cancelled(driffusion_engine engine, unsigned turn, Turn &now) {
    std::vector<float> latents = latents_for(engine, turn % KINDS);
    driffusion_call call = call_of(turn % KINDS);
    call.latents_out = latents.data(), call.latents_out_count = latents.size();
    driffusion_request request = 0;
    driffusion_status status = latents.empty() ? DRIFFUSION_ERROR_HANDLE : driffusion_start(engine, &call, &request);
    if (status != DRIFFUSION_OK) return count(status, now.scenario);
    std::thread canceller([request, turn] {
        std::this_thread::sleep_for(std::chrono::milliseconds(turn * 7 % 40));
        driffusion_cancel(request);  // may be finished or released by now
    });
    status = turn % 3 ? driffusion_wait(request, turn % 5 * 0.01, nullptr) : DRIFFUSION_ERROR_TIMEOUT;
    if (status == DRIFFUSION_OK) compare(latents.data(), now.expected[turn % KINDS]);
    if (status != DRIFFUSION_ERROR_TIMEOUT) count(status, now.scenario);
    if (driffusion_release(request) != DRIFFUSION_OK) wrong("release");
    if (driffusion_release(request) != DRIFFUSION_ERROR_HANDLE) wrong("a released request");
    canceller.join();
}

void here(driffusion_engine engine, unsigned turn, Turn &now) {
    std::vector<float> latents = latents_for(engine, turn % KINDS);
    driffusion_call call = call_of(turn % KINDS);
    call.latents_out = latents.data(), call.latents_out_count = latents.size();
    const driffusion_status status = driffusion_generate(engine, &call, nullptr);
    count(status, now.scenario);
    if (status == DRIFFUSION_OK) compare(latents.data(), now.expected[turn % KINDS]);
}

void client(driffusion_engine engine, unsigned number, Host &host, Turn &now) {
    for (unsigned turn = number; !now.stop; turn += CLIENTS) {
        if (latents_for(engine, 0).empty()) std::this_thread::sleep_for(std::chrono::milliseconds(1));  // it is closed
        if (turn % 3 == 0) {
            here(engine, turn, now);
        } else if (turn % 3 == 1) {
            on_device(engine, turn, host, now);
        } else {
            cancelled(engine, turn, now);
        }
    }
}

void sabotage(Turn &now, std::mt19937 &random) {
    const auto fail = control<int (*)(const char *, int, int, int, int)>("imaginary_fail");
    const char *const calls[] = {"cuLaunchKernel", "cuMemcpyHtoDAsync", "cuMemAlloc", "cuStreamWaitEvent", "cuEventRecord", "cuStreamQuery"};
    while (!now.stop) {
        std::this_thread::sleep_for(std::chrono::milliseconds(5 + random() % 40));
        if (now.scenario == FAILS) fail(calls[random() % 6], 1 + int(random() % 5), 2, 0, 0);
    }
}

void take(Scenario scenario, unsigned seed, double seconds, const Expected &expected) {
    std::mt19937 random(seed);
    control<void (*)(int, unsigned, int)>("imaginary_reset")(DEVICES, seed, int(random() % 3));
    set("peers", 0, random() % 2);
    Turn now{scenario, expected};
    {
        std::vector<std::unique_ptr<Host>> hosts;
        for (unsigned n = 0; n < CLIENTS; ++n) hosts.push_back(std::make_unique<Host>(int(n % DEVICES), expected[1].size() * sizeof(float)));
        const driffusion_engine engines[] = {open("cuda:0,cuda:1"), open("cuda:1*2,cuda:0")};
        std::vector<std::thread> threads;
        for (unsigned n = 0; n < CLIENTS; ++n) threads.emplace_back(client, engines[n / 3], n, std::ref(*hosts[n]), std::ref(now));
        threads.emplace_back([&] { sabotage(now, random); });
        std::this_thread::sleep_for(std::chrono::duration<double>(seconds / 2));
        if (scenario == LOSES) set("lost_after", int(seed % DEVICES), seed % 300);
        if (scenario == HANGS) set("hangs", int(seed % DEVICES), 1);
        std::this_thread::sleep_for(std::chrono::duration<double>(seconds / 2));
        for (driffusion_engine engine : engines) {  // while their clients are in the middle of something
            if (driffusion_close(engine) != DRIFFUSION_OK) wrong("close");
        }
        now.stop = true;
        for (std::thread &one : threads) one.join();
        if (scenario == HANGS) {
            set("hangs", int(seed % DEVICES), 0);
            control<void (*)()>("imaginary_finish")();
        }
    }
    if (scenario == LOSES || scenario == HANGS) return;  // what is there cannot be freed
    if (!text_of("imaginary_violations").empty()) wrong(text_of("imaginary_violations"));
    const std::string left = text_of("imaginary_live");
    for (const char *kind : {"allocation", "stream", "event", "module"}) {
        if (left.find(kind) != left.npos) wrong("left on the machine: " + left);
    }
}

}  // namespace

int main(int argc, char **argv) {
    if (argc < 6) return 2;
    bundle = argv[1], program = argv[2];
    const double seconds = std::atof(argv[4]);
    const unsigned seed = unsigned(std::atoi(argv[5]));
    control<void (*)(const char *, const char *)>("imaginary_kernels")("float32", argv[3]);
    for (unsigned outputs = 1; outputs <= 8; ++outputs) {
        for (unsigned width : {1u, 2u, 4u}) {
            const std::string code = machine_code("90", outputs, width);
            control<int (*)(const void *, const char *, int, int)>("imaginary_code")(code.data(), "float32", int(outputs), int(width));
        }
    }
    imaginary_install();
    const Expected expected = made_on_cores();
    if (argc > 6) {
        take(HANGS, seed, seconds, expected);
    } else {
        for (unsigned turn = 0; turn < 3; ++turn) take(Scenario(turn), seed + turn, seconds / 3, expected);
    }
    for (int status = 0; status <= DRIFFUSION_ERROR_INTERNAL; ++status) {
        if (statuses[status]) std::printf("%s %u\n", driffusion_status_name(driffusion_status(status)), statuses[status].load());
    }
}
