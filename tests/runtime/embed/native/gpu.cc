// The GPU parts of the library as functions for ctypes, in a process that has the imaginary driver.
#include <cstring>
#include <numeric>
#include <string>

#include "cuda_combine.h"

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
