// The denoiser by TensorRT, whose library is opened at run time: none is needed to build or to run on processor cores.
#pragma once
#include <memory>

#include "cuda_player.h"

namespace driffusion::tensorrt {

// Error with DEVICE where there is no TensorRT, it is of another version, or it cannot load the plan.
std::unique_ptr<cuda::DeviceNetwork> open(const cuda::Gpu &gpu, const cuda::NetworkSource &source);

}  // namespace driffusion::tensorrt
