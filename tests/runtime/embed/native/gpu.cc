// The GPU parts of the library as functions for ctypes, in a process that has the imaginary driver.
#include <cstring>
#include <numeric>
#include <string>

#include "cuda_combine.h"
#include "cuda_lanes.h"

using namespace driffusion;
using namespace driffusion::cuda;

#define EXPORT extern "C" __attribute__((visibility("default")))

static thread_local std::string message;

template <typename Run>
static int guarded(Run run) {
    try {
        run();
        return DRIFFUSION_OK;
    } catch (const Error &error) {
        message = error.what();
        return error.status();
    }
}

EXPORT const char *gpu_message() { return message.c_str(); }

EXPORT int gpu_open(int ordinal) {
    return guarded([&] { Gpu gpu(ordinal); });
}

EXPORT std::size_t gpu_layout(std::size_t *offsets) {
    const std::size_t found[] = {offsetof(Combination, data), offsetof(Combination, round), offsetof(Combination, not_finite),
                                 offsetof(Combination, elements), offsetof(Combination, stride), offsetof(Combination, rows),
                                 offsetof(Combination, inputs), offsetof(Combination, timesteps), offsetof(Combination, lanes),
                                 offsetof(Combination, batch), offsetof(Combination, timestep), offsetof(Combination, input),
                                 offsetof(Combination, target), offsetof(Combination, first)};
    std::memcpy(offsets, found, sizeof found);
    return sizeof(Combination);
}

EXPORT int gpu_code(const char *arch, u32 outputs, u32 width, const char *cache, char *code, std::size_t *size) {
    return guarded([&] {
        const std::string folder = cache, made = machine_code(arch, outputs, width, &folder);
        if (made.size() <= *size) std::memcpy(code, made.data(), made.size());
        *size = made.size();
    });
}

// `slots` latents, one after the other in device memory, combined `times` times and read back.
EXPORT int gpu_combine(int ordinal, std::size_t elements, u32 slots, float *values, u32 sources, const u32 *source, u32 targets, const u32 *target, const float *rows, u32 times) {
    return guarded([&] {
        const std::size_t bytes = slots * elements * sizeof(float);
        Gpu gpu(ordinal);
        Kernels kernels(gpu);
        DeviceMemory memory(gpu, bytes);
        PinnedMemory staging(gpu, bytes);
        Combinations combinations(kernels, elements);
        Stream stream(gpu);
        auto at = [&](u32 slot) { return memory.get() + slot * elements * sizeof(float); };
        std::vector<CUdeviceptr> from, to;
        for (u32 n = 0; n < sources; ++n) from.push_back(at(source[n]));
        for (u32 n = 0; n < targets; ++n) to.push_back(at(target[n]));
        const u32 number = combinations.add(from, std::vector<float>(rows, rows + sources * targets), to);
        combinations.upload(stream);
        std::memcpy(staging.as<float>(), values, bytes);
        Current current(gpu);
        driver_call(cuMemcpyHtoDAsync_v2, memory.get(), staging.as<float>(), bytes, stream.get());
        for (u32 n = 0; n < times; ++n) combinations.launch(number, stream);
        driver_call(cuMemcpyDtoHAsync_v2, staging.as<float>(), memory.get(), bytes, stream.get());
        stream.wait();
        std::memcpy(values, staging.as<float>(), bytes);
    });
}

EXPORT int gpu_peers(int from, int to, int *direct) {
    return guarded([&] { *direct = peers(Gpu(from), Gpu(to)); });
}

// Rounds as an engine makes them: `latents` at home, on GPU 0, one per lane; every lane's model makes an output of its
// latent, and each output is added to its latent at home, all in one combination. Lane n is on GPU devices[n].
// `model` puts a call on a stream and returns the driver's status. The host waits once, at the end.
EXPORT int gpu_rounds(u32 lanes, const int *devices, std::size_t elements, float *latents, u32 rounds, int (*model)(u32 lane, CUstream stream, CUdeviceptr sample, CUdeviceptr output)) {
    return guarded([&] {
        const std::size_t bytes = elements * sizeof(float);
        struct Lane {
            Gpu gpu;
            DeviceMemory sample, output;
            Link there, back;
            Stream stream;
        };
        Gpu home(0);
        Kernels kernels(home);
        DeviceMemory slots(home, 2 * lanes * bytes);
        PinnedMemory staging(home, lanes * bytes);
        Combinations combinations(kernels, elements);
        std::vector<std::unique_ptr<Lane>> all;
        for (u32 n = 0; n < lanes; ++n) {
            Gpu gpu(devices[n]);
            const bool in = peers(home, gpu), out = peers(gpu, home);
            all.emplace_back(new Lane{gpu, DeviceMemory(gpu, bytes), DeviceMemory(gpu, bytes), Link(home, gpu, in, bytes), Link(gpu, home, out, bytes), Stream(gpu)});
        }
        Stream main(home);
        std::vector<CUdeviceptr> sources, targets;
        for (u32 n = 0; n < 2 * lanes; ++n) sources.push_back(slots.get() + n * bytes);
        targets.assign(sources.begin(), sources.begin() + lanes);
        std::vector<float> rows(2 * lanes * lanes);
        for (u32 n = 0; n < lanes; ++n) rows[n * 2 * lanes + n] = rows[n * 2 * lanes + lanes + n] = 1;
        const u32 number = combinations.add(sources, rows, targets);
        combinations.upload(main);
        std::memcpy(staging.as<float>(), latents, lanes * bytes);
        Current current(home);
        driver_call(cuMemcpyHtoDAsync_v2, slots.get(), staging.as<float>(), lanes * bytes, main.get());
        for (u32 round = 0; round < rounds; ++round) {
            for (u32 n = 0; n < lanes; ++n) all[n]->there.send(main, sources[n], bytes);
            for (u32 n = 0; n < lanes; ++n) {
                Lane &lane = *all[n];
                lane.there.receive(lane.stream.get(), lane.sample.get(), sources[n], bytes);
                Current there(lane.gpu);
                Driver::instance().check(static_cast<CUresult>(model(n, lane.stream.get(), lane.sample.get(), lane.output.get())), "a model call");
                lane.back.send(lane.stream, lane.output.get(), bytes);
            }
            for (u32 n = 0; n < lanes; ++n) all[n]->back.receive(main.get(), sources[lanes + n], all[n]->output.get(), bytes);
            combinations.launch(number, main);
        }
        driver_call(cuMemcpyDtoHAsync_v2, staging.as<float>(), slots.get(), lanes * bytes, main.get());
        main.wait();
        std::memcpy(latents, staging.as<float>(), lanes * bytes);
    });
}
