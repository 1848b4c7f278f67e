// kernels/combine.cu for a CPU: what the language has there and not here, then every thread of a launch after another.
#include <bit>
#include <cmath>
#include <utility>
#define __device__
#define __global__
#define __grid_constant__
#define __launch_bounds__(threads)
static thread_local struct { unsigned int x; } gridDim, blockDim, blockIdx, threadIdx;
static unsigned int __float_as_uint(float value) { return std::bit_cast<unsigned int>(value); }
static float __uint_as_float(unsigned int bits) { return std::bit_cast<float>(bits); }
struct Half;
static float widen(Half value);
static void narrow(float wide, Half &value);
#include "../kernels/combine.cu"
static float widen(Half value) { return std::bit_cast<_Float16>(value.bits); }
static void narrow(float wide, Half &value) { value.bits = std::bit_cast<unsigned short>(static_cast<_Float16>(wide)); }

using Kernel = void (*)(const Combination &);
template <int V, int... M>
static void pick(std::integer_sequence<int, M...>, int outputs, const Combination &p) {
    static const Kernel kernels[] = {combine<M + 1, V>...};
    kernels[outputs - 1](p);
}

template <typename Thread>
static void every_thread(unsigned int grid, unsigned int block, Thread run) {
    gridDim.x = grid, blockDim.x = block;
    for (blockIdx.x = 0; blockIdx.x < grid; ++blockIdx.x)
        for (threadIdx.x = 0; threadIdx.x < block; ++threadIdx.x) run();
}

extern "C" int run_combine(int outputs, int width, unsigned int grid, unsigned int block, const Combination *p) {
    using Outputs = std::make_integer_sequence<int, MAX_OUTPUTS>;
    switch (width) {
        case 1: every_thread(grid, block, [&] { pick<1>(Outputs(), outputs, *p); }); return 0;
        case 2: every_thread(grid, block, [&] { pick<2>(Outputs(), outputs, *p); }); return 0;
        case 4: every_thread(grid, block, [&] { pick<4>(Outputs(), outputs, *p); }); return 0;
        case 8: every_thread(grid, block, [&] { pick<8>(Outputs(), outputs, *p); }); return 0;
        default: return 1;
    }
}

extern "C" void run_distance(unsigned int grid, unsigned int block, const STORAGE *a, const STORAGE *b,
                             unsigned long long elements, float *partial) {
    every_thread(grid, block, [&] { distance(a, b, elements, partial); });
}

extern "C" void run_inner_product(unsigned int grid, unsigned int block, const Product *p) {
    every_thread(grid, block, [&] { inner_product(*p); });
}

extern "C" void run_advance(unsigned int *state, unsigned int blocks, unsigned int *seen) {
    advance(state, blocks, seen);
}
