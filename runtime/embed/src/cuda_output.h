// Output in device memory of the caller: on the caller's stream, behind an event in place of a wait.
#pragma once
#include <memory>

#include "cuda_lanes.h"

namespace driffusion::cuda {

// Where a caller wants latents and image. `stream` and `event` belong to the primary context of the memory's GPU.
struct Target {
    CUdeviceptr rgb = 0, latents = 0;
    CUstream stream = nullptr;
    CUevent event = nullptr;
    std::unique_ptr<Gpu> gpu;  // null: nothing is wanted
};

// The GPU that memory of a caller lies on. Error with ARGUMENT where it is no device memory.
Gpu gpu_of(const char *name, CUdeviceptr pointer);

// What a request sends to a caller's stream; it owns what is sent until that was done. The caller's stream may be busy for long,
// so that nothing here holds a lane.
class Output {
   public:
    // seconds: after which what does not end counts as hanging.
    Output(const Target &target, double seconds) : target_(target), seconds_(seconds) {}
    ~Output();
    Output(const Output &) = delete;
    Output &operator=(const Output &) = delete;
    // `source` of `stream` at home goes to the caller's latents. Returns at once; what the stream does next may change `source`.
    void latents(const Stream &stream, CUdeviceptr source, std::size_t bytes, bool direct);
    void rgb(const std::uint8_t *pixels, std::size_t bytes);
    // Records the caller's event behind what was sent.
    void enqueued();
    // Waits for what was sent. After a Hang its memory is kept.
    void wait();

   private:
    const Target &target_;
    const double seconds_;
    bool sent_ = false;
    std::unique_ptr<Event> left_;  // home
    std::unique_ptr<DeviceMemory> outbox_;
    std::unique_ptr<Link> link_;
    std::unique_ptr<PinnedMemory> pixels_;
    std::unique_ptr<Event> done_;
};

}  // namespace driffusion::cuda
