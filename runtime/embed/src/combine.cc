#include "combine.h"

#include <algorithm>
#include <cstring>

// Compiled with -ffp-contract=off: NumPy multiplies and adds in two roundings, and so does this.
namespace driffusion {
namespace {

constexpr std::size_t PART = 512;

inline void scale_and_add(float *__restrict sum, const float *__restrict source, float coefficient, std::size_t size) {
    for (std::size_t i = 0; i < size; ++i) sum[i] += coefficient * source[i];
}

}  // namespace

void combine(const std::vector<const float *> &sources, const std::vector<float> &rows, const std::vector<float *> &targets, std::size_t elements) {
    thread_local std::vector<float> made;
    made.resize(targets.size() * PART);
    for (std::size_t start = 0; start < elements; start += PART) {
        std::size_t size = std::min(PART, elements - start);
        const float *row = rows.data();
        for (std::size_t m = 0; m < targets.size(); ++m, row += sources.size()) {
            float *sum = made.data() + m * PART;
            std::fill(sum, sum + size, 0.0f);
            for (std::size_t j = 0; j < sources.size(); ++j) scale_and_add(sum, sources[j] + start, row[j], size);
        }
        for (std::size_t m = 0; m < targets.size(); ++m) std::memcpy(targets[m] + start, made.data() + m * PART, size * sizeof(float));
    }
}

}  // namespace driffusion
