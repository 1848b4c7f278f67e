// stress BUNDLE PROGRAM SECONDS: everything at once, for sanitizers, until some images were made and some cancelled.
// Aborts where a result is not among those that the header allows.
#include <driffusion.h>

#include <atomic>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <thread>
#include <vector>

namespace {

std::atomic<unsigned> made{0}, cancelled{0}, refused{0};
const char *bundle, *program;

void expect(bool good, const char *what, driffusion_status status) {
    if (good) return;
    std::fprintf(stderr, "%s: %s: %s\n", what, driffusion_status_name(status), driffusion_last_error());
    std::abort();
}

void count(driffusion_status status) {
    expect(status == DRIFFUSION_OK || status == DRIFFUSION_ERROR_CANCELLED || status == DRIFFUSION_ERROR_HANDLE || status == DRIFFUSION_ERROR_BUSY, "request", status);
    (status == DRIFFUSION_OK ? made : status == DRIFFUSION_ERROR_CANCELLED ? cancelled : refused)++;
}

driffusion_engine open(const char *devices) {
    driffusion_open_info info = DRIFFUSION_OPEN_INIT;
    driffusion_option few = {"max_requests", "4"};
    info.bundle = bundle, info.program = program, info.devices = devices, info.options = &few, info.option_count = 1;
    driffusion_engine engine = 0;
    driffusion_status status = driffusion_open(&info, &engine);
    expect(status == DRIFFUSION_OK, "open", status);
    return engine;
}

struct Buffers {
    std::vector<std::uint8_t> rgb;
    std::vector<float> latents;
    driffusion_call call = DRIFFUSION_CALL_INIT;

    Buffers(driffusion_engine engine, unsigned turn) {
        driffusion_sizes_info sizes = DRIFFUSION_SIZES_INIT;
        call.images = 1 + turn % 2;
        if (driffusion_sizes(engine, call.images, &sizes) != DRIFFUSION_OK) return;  // closed meanwhile: generate says so, too
        rgb.resize(sizes.rgb_bytes);
        latents.resize(sizes.latent_count);
        call.seed = turn, call.prompt = "a star", call.guidance = turn % 2 ? 4.0 : 1.0;
        call.rgb = rgb.data(), call.rgb_bytes = rgb.size();
        call.latents_out = latents.data(), call.latents_out_count = latents.size();
        call.user = this;
        call.progress = [](void *, std::uint32_t, std::uint32_t) { return 0; };
        call.preview = [](void *, const std::uint8_t *pixels, std::uint32_t width, std::uint32_t height, std::uint32_t) {
            unsigned sum = 0;  // every byte is there to be read
            for (std::size_t n = 0; n < std::size_t(width) * height * 3; ++n) sum += pixels[n];
            return int(sum == ~0u);
        };
        call.preview_every = 2;
    }
};

void client(driffusion_engine engine, unsigned number, const std::atomic<bool> &stop) {
    for (unsigned turn = number; !stop; turn += 8) {
        Buffers own(engine, turn);
        if (own.rgb.empty()) return;
        if (turn % 3 == 0) {
            count(driffusion_generate(engine, &own.call, nullptr));
            continue;
        }
        driffusion_request request = 0;
        driffusion_status status = driffusion_start(engine, &own.call, &request);
        if (status != DRIFFUSION_OK) {
            count(status);
            continue;
        }
        std::thread canceller([request, turn] {
            std::this_thread::sleep_for(std::chrono::milliseconds(turn % 40));
            driffusion_cancel(request);  // may be finished or released by now
        });
        std::uint32_t finished = 0;
        driffusion_poll(request, &finished);
        if (turn % 5) {
            driffusion_result result = DRIFFUSION_RESULT_INIT;
            count(driffusion_wait(request, -1, &result));
        }
        status = driffusion_release(request);
        expect(status == DRIFFUSION_OK, "release", status);
        expect(driffusion_poll(request, nullptr) == DRIFFUSION_ERROR_HANDLE, "a released request", DRIFFUSION_OK);
        canceller.join();
    }
}

}  // namespace

int main(int argc, char **argv) {
    if (argc != 4) return 2;
    bundle = argv[1], program = argv[2];
    const double seconds = std::atof(argv[3]);
    const auto end = std::chrono::steady_clock::now() + std::chrono::duration<double>(seconds);
    unsigned turns = 0;
    do {  // two engines, closed while their clients are in the middle of something
        driffusion_engine engines[] = {open("cpu*2"), open("cpu*3")};
        std::atomic<bool> stop{false};
        std::vector<std::thread> clients;
        for (unsigned n = 0; n < 6; ++n) clients.emplace_back(client, engines[n % 2], n, std::cref(stop));
        std::this_thread::sleep_for(std::chrono::duration<double>(seconds / 4));
        stop = turns % 2;
        for (driffusion_engine engine : engines) {
            driffusion_status status = driffusion_close(engine);
            expect(status == DRIFFUSION_OK, "close", status);
            expect(driffusion_close(engine) == DRIFFUSION_ERROR_HANDLE, "a closed engine", DRIFFUSION_OK);
        }
        stop = true;
        for (std::thread &one : clients) one.join();
        ++turns;
    } while (std::chrono::steady_clock::now() < end || !made || !cancelled);
    std::printf("made %u, cancelled %u, refused %u in %u turns\n", made.load(), cancelled.load(), refused.load(), turns);
}
