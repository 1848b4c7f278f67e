// out_m = Σ_j C[m][j] · in_j over latents stored as half, bfloat16 or float, summed in float in the order of j.
//
// Every thread reads all inputs of its elements before it stores any output, so outputs may be inputs. What the host
// knows late (coefficients, timesteps) is read from `data`, one block per round, at the block that `round` names: a
// captured graph is replayed with other numbers and no change. README.md has the algebra.
//
// Compiled for one -DSTORAGE=Half|BFloat16|float and, for `combine_latents`, one number of -DOUTPUTS and one -DWIDTH:
// how many elements are read at once. Needs no header; tests/kernel_host.cc compiles this file for a CPU.

struct Half { unsigned short bits; };
struct BFloat16 { unsigned short bits; };

#ifdef __CUDACC__
__device__ inline float widen(Half value) {
    float wide;
    asm("cvt.f32.f16 %0, %1;" : "=f"(wide) : "h"(value.bits));
    return wide;
}
__device__ inline void narrow(float wide, Half &value) {
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(value.bits) : "f"(wide));
}
#endif
__device__ inline float widen(BFloat16 value) { return __uint_as_float(static_cast<unsigned int>(value.bits) << 16); }
__device__ inline void narrow(float wide, BFloat16 &value) {
    const unsigned int bits = __float_as_uint(wide);  // to nearest, ties to even; a NaN keeps a bit that makes it one
    value.bits = wide != wide ? (bits >> 16) | 64u : (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
}
__device__ inline float widen(float value) { return value; }
__device__ inline void narrow(float wide, float &value) { value = wide; }

// engines/cuda/kernels.py mirrors these numbers and structs.
#define MAX_INPUTS 256
#define MAX_TARGETS 128
#define MAX_OUTPUTS 34
#define MAX_LANES 64
#define MAX_PRODUCT_INPUTS 32

struct Combination {
    const float *data;            // blocks of `stride` floats
    const unsigned int *round;    // the block of this launch
    unsigned int *not_finite;     // becomes 1 when any output is not finite
    unsigned long long elements;
    unsigned int stride;
    unsigned int rows;            // where in the block the coefficients are: [input][output]
    unsigned int inputs;
    unsigned int timesteps;       // where in the block the lanes' timesteps are, one lane after the other
    unsigned int lanes;           // that get timesteps
    unsigned int batch[MAX_LANES];
    float *timestep[MAX_LANES];
    const void *input[MAX_INPUTS];
    void *target[MAX_TARGETS];
    unsigned char first[MAX_OUTPUTS + 1];  // output m goes into target[first[m]] … target[first[m + 1] − 1]
};

template <int V>
struct alignas(sizeof(STORAGE) * V) Pack {
    STORAGE value[V];
};

template <int M, int V>
__device__ inline bool combine_pack(const Combination &p, const float *rows, unsigned long long index) {
    float sum[M][V];
#pragma unroll
    for (int m = 0; m < M; ++m)
#pragma unroll
        for (int v = 0; v < V; ++v) sum[m][v] = 0.0f;

// as many loads in flight as leave registers for the sums
#pragma unroll(M * V <= 16 ? 4 : 2)
    for (unsigned int j = 0; j < p.inputs; ++j) {
        const Pack<V> in = static_cast<const Pack<V> *>(p.input[j])[index];
#pragma unroll
        for (int m = 0; m < M; ++m) {
            const float c = rows[j * M + m];
#pragma unroll
            for (int v = 0; v < V; ++v) sum[m][v] = fmaf(c, widen(in.value[v]), sum[m][v]);
        }
    }

    bool finite = true;
#pragma unroll
    for (int m = 0; m < M; ++m) {
        Pack<V> out;
#pragma unroll
        for (int v = 0; v < V; ++v) {
            narrow(sum[m][v], out.value[v]);
            finite = finite && fabsf(widen(out.value[v])) <= 3.402823466e38f;
        }
#pragma unroll 1
        for (unsigned int t = p.first[m]; t < p.first[m + 1]; ++t) static_cast<Pack<V> *>(p.target[t])[index] = out;
    }
    return finite;
}

template <int M, int V>
__device__ inline void combine(const Combination &p) {
    const float *block = p.data + static_cast<unsigned long long>(*p.round) * p.stride;
    const unsigned long long threads = static_cast<unsigned long long>(gridDim.x) * blockDim.x;
    const unsigned long long first = static_cast<unsigned long long>(blockIdx.x) * blockDim.x + threadIdx.x;
    bool finite = true;
#pragma unroll 1
    for (unsigned long long i = first; i < p.elements / V; i += threads)
        finite = combine_pack<M, V>(p, block + p.rows, i) && finite;
    if (!finite) *p.not_finite = 1u;

    const float *timestep = block + p.timesteps;
    for (unsigned int lane = 0; lane < p.lanes; timestep += p.batch[lane++])
        for (unsigned long long i = first; i < p.batch[lane]; i += threads) p.timestep[lane][i] = timestep[i];
}

#ifdef OUTPUTS
// Elements must be a multiple of WIDTH and every latent aligned to WIDTH of them.
extern "C" __global__ void __launch_bounds__(128, 1) combine_latents(const __grid_constant__ Combination p) {
    combine<OUTPUTS, WIDTH>(p);
}
#else
// ‖a − b‖² and ‖b‖² as one partial sum per thread, in an order that depends on the launch alone; the host adds them up.
extern "C" __global__ void __launch_bounds__(256)
    distance(const STORAGE *a, const STORAGE *b, unsigned long long elements, float *partial) {
    const unsigned int threads = gridDim.x * blockDim.x, thread = blockIdx.x * blockDim.x + threadIdx.x;
    float difference = 0.0f, norm = 0.0f;
    for (unsigned long long i = thread; i < elements; i += threads) {
        const float reference = widen(b[i]), d = widen(a[i]) - reference;
        difference = fmaf(d, d, difference);
        norm = fmaf(reference, reference, norm);
    }
    partial[thread] = difference;
    partial[threads + thread] = norm;
}

// ⟨a, b⟩, ‖a‖² and ‖b‖² of two combinations of the same latents, one partial sum per thread, as `distance` has them.
struct Product {
    unsigned long long elements;
    float *partial;
    unsigned int inputs;
    float a[MAX_PRODUCT_INPUTS];
    float b[MAX_PRODUCT_INPUTS];
    const void *input[MAX_PRODUCT_INPUTS];
};

extern "C" __global__ void __launch_bounds__(256) inner_product(const __grid_constant__ Product p) {
    const unsigned int threads = gridDim.x * blockDim.x, thread = blockIdx.x * blockDim.x + threadIdx.x;
    float inner = 0.0f, first = 0.0f, second = 0.0f;
    for (unsigned long long i = thread; i < p.elements; i += threads) {
        float a = 0.0f, b = 0.0f;
        for (unsigned int j = 0; j < p.inputs; ++j) {
            const float in = widen(static_cast<const STORAGE *>(p.input[j])[i]);
            a = fmaf(p.a[j], in, a);
            b = fmaf(p.b[j], in, b);
        }
        inner = fmaf(a, b, inner);
        first = fmaf(a, a, first);
        second = fmaf(b, b, second);
    }
    p.partial[thread] = inner;
    p.partial[threads + thread] = first;
    p.partial[2 * threads + thread] = second;
}

// When all combinations of a round have read their block, and when a lane has finished a call: state[0] names the next
// block, state[1] counts, and the count goes to `seen` in host memory, where the host reads it without a driver call.
extern "C" __global__ void advance(unsigned int *state, unsigned int blocks, volatile unsigned int *seen) {
    state[0] = (state[0] + 1u) % blocks;
    *seen = ++state[1];
}
#endif
