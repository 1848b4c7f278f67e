// kernels/combine.cu on a GPU: targets[m] = Σ_j rows[m][j] · sources[j] in float32, accumulated by fused multiply-add.
#pragma once
#include <functional>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "cuda_driver.h"
#include "program.h"

namespace driffusion::cuda {

constexpr u32 MAX_INPUTS = 256, MAX_TARGETS = 128, MAX_OUTPUTS = 34, MAX_LANES = 64;

// The struct of the same name in combine.cu.
struct Combination {
    CUdeviceptr data, round, not_finite;
    unsigned long long elements;
    u32 stride, rows, inputs, timesteps, lanes;
    u32 batch[MAX_LANES];
    CUdeviceptr timestep[MAX_LANES], input[MAX_INPUTS], target[MAX_TARGETS];
    unsigned char first[MAX_OUTPUTS + 1];
};

// Machine code of one variant, from the cache of the Python engine ($XDG_CACHE_HOME/driffusion-engine) or compiled into
// it by NVRTC. `cache` null: that folder. Error with DEVICE where there is neither code nor a compiler.
std::string machine_code(const std::string &arch, u32 outputs, u32 width, const std::string *cache = nullptr);

// The kernels of one GPU, loaded when they are first asked for.
class Kernels {
   public:
    explicit Kernels(const Gpu &gpu) : gpu_(gpu) {}
    ~Kernels();
    Kernels(const Kernels &) = delete;
    Kernels &operator=(const Kernels &) = delete;

    CUfunction combination(u32 outputs, u32 width);
    const Gpu &gpu() const { return gpu_; }

   private:
    struct Loaded {
        CUmodule module;
        CUfunction function;
    };
    Gpu gpu_;
    std::map<std::pair<u32, u32>, Loaded> loaded_;
};

// Combinations of latents of one GPU, with their coefficients in its memory: made once, launched in any order. Every stream that
// it was uploaded or launched on is drained before its end.
class Combinations {
   public:
    Combinations(Kernels &kernels, std::size_t elements) : kernels_(kernels), elements_(elements) {}

    // rows: of each target one coefficient for each source. Returns the number to launch it by. What does not fit one
    // launch becomes several, through memory of its own where sources are among the targets. watched: NaN and infinity in what
    // it makes set the flag.
    u32 add(const std::vector<CUdeviceptr> &sources, const std::vector<float> &rows, const std::vector<CUdeviceptr> &targets, bool watched = false);
    // Copies the coefficients, in order on the stream, and waits for that, so many seconds at most. Called once, after all were added.
    void upload(const Stream &stream, double seconds = LANE_TIMEOUT);
    // Enqueues one; the caller has made the GPU's context current.
    void launch(u32 number, const Stream &stream) const;
    // A word on the device: 1 when a watched combination made NaN or infinity, since it was set to 0.
    CUdeviceptr flag() const { return words_.get() + 2 * sizeof(u32); }

   private:
    struct Launch {
        Combination parameters;
        u32 outputs, width;
        std::size_t rows;  // into `table_`
        CUfunction function;
    };
    struct Added {
        bool watched;
        std::vector<Launch> launches;
        std::vector<std::pair<CUdeviceptr, CUdeviceptr>> copies;  // from, to, after the launches
    };
    void append(Added &added, const std::vector<CUdeviceptr> &sources, const std::vector<std::vector<float>> &rows, const std::vector<CUdeviceptr> &targets);

    Kernels &kernels_;
    std::size_t elements_;
    std::vector<Added> added_;
    std::vector<float> table_;
    std::vector<DeviceMemory> scratch_;
    DeviceMemory device_table_, words_;
    std::unique_ptr<PinnedMemory> staging_;
};

}  // namespace driffusion::cuda
