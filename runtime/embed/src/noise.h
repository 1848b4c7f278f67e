// Standard normal noise that depends on (seed, image, number) alone: NumPy's Philox and its float32 ziggurat, bit for bit.
#pragma once
#include <cstddef>
#include <cstdint>

namespace driffusion {

// `number` 0 is where an image starts; number n + 1 is what step n adds.
void gaussian(std::uint64_t seed, std::uint32_t image, std::uint32_t number, float *out, std::size_t count);

}  // namespace driffusion
