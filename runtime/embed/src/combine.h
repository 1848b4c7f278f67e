// targets[m] = Σ_j rows[m][j] · sources[j] in float32, summed in the order of j: the bits of `engines.base.combine`.
#pragma once
#include <cstddef>
#include <vector>

namespace driffusion {

// Every part is complete before any of it is stored, so that targets may be among the sources.
void combine(const std::vector<const float *> &sources, const std::vector<float> &rows, const std::vector<float *> &targets, std::size_t elements);

}  // namespace driffusion
