#include "noise.h"


// From NumPy's libnpyrandom.a. Its headers include Python's; these two declarations are all that is used of them.
extern "C" {
struct bitgen {
    void *state;
    std::uint64_t (*next_uint64)(void *);
    std::uint32_t (*next_uint32)(void *);
    double (*next_double)(void *);
    std::uint64_t (*next_raw)(void *);
};
void random_standard_normal_fill_f(bitgen *, std::intptr_t count, float *out);
}

namespace driffusion {
namespace {

// Philox4x64-10 (Salmon et al. 2011), buffered as NumPy does: the counter is raised before a block is made.
struct Philox {
    std::uint64_t key[2];
    std::uint64_t counter[4] = {0, 0, 0, 0};
    std::uint64_t block[4] = {0, 0, 0, 0};
    unsigned taken = 4;
    bool has_half = false;
    std::uint32_t half = 0;

    std::uint64_t next() {
        if (taken == 4) fill();
        return block[taken++];
    }

    void fill() {
        for (std::uint64_t &word : counter) {
            if (++word) break;
        }
        std::uint64_t c[4] = {counter[0], counter[1], counter[2], counter[3]}, k[2] = {key[0], key[1]};
        for (int round = 0; round < 10; ++round) {
            __extension__ using Wide = unsigned __int128;
            Wide a = Wide(0xD2E7470EE14C6C93ull) * c[0], b = Wide(0xCA5A826395121157ull) * c[2];
            std::uint64_t made[4] = {std::uint64_t(b >> 64) ^ c[1] ^ k[0], std::uint64_t(b), std::uint64_t(a >> 64) ^ c[3] ^ k[1], std::uint64_t(a)};
            for (int i = 0; i < 4; ++i) c[i] = made[i];
            k[0] += 0x9E3779B97F4A7C15ull;
            k[1] += 0xBB67AE8584CAA73Bull;
        }
        for (int i = 0; i < 4; ++i) block[i] = c[i];
        taken = 0;
    }
};

std::uint64_t next64(void *state) { return static_cast<Philox *>(state)->next(); }

std::uint32_t next32(void *state) {
    auto &philox = *static_cast<Philox *>(state);
    if (philox.has_half) {
        philox.has_half = false;
        return philox.half;
    }
    std::uint64_t value = philox.next();
    philox.has_half = true;
    philox.half = std::uint32_t(value >> 32);
    return std::uint32_t(value);
}

double next_double(void *state) { return double(next64(state) >> 11) * (1.0 / 9007199254740992.0); }

}  // namespace

void gaussian(std::uint64_t seed, std::uint32_t image, std::uint32_t number, float *out, std::size_t count) {
    Philox philox;
    philox.key[0] = seed;
    philox.key[1] = std::uint64_t(image) << 32 | number;
    bitgen generator{&philox, next64, next32, next_double, next64};
    random_standard_normal_fill_f(&generator, std::intptr_t(count), out);
}

}  // namespace driffusion
