// Lanes on GPUs: streams of their own, and the way of latents from home to a lane and back. Nothing here waits.
#pragma once
#include <memory>
#include <vector>

#include "cuda_driver.h"
#include "program.h"

namespace driffusion::cuda {

class Event {
   public:
    explicit Event(const Gpu &gpu);
    ~Event();
    Event(const Event &) = delete;
    Event &operator=(const Event &) = delete;
    // The stream must be of the event's GPU, whose context is current.
    void record(CUstream stream) const { driver_call(cuEventRecord, event_, stream); }
    // What `stream`, of any GPU, is told from now on runs after what was recorded.
    void join(CUstream stream) const { driver_call(cuStreamWaitEvent, stream, event_, 0); }
    void wait(double seconds, const std::string &what) const;
    bool over() const;  // true also when it failed

   private:
    Gpu gpu_;
    CUevent event_ = nullptr;
};

// Whether copies from one GPU to another arrive. Peer copies have been seen to succeed and change nothing: patterns are
// sent and read back before a pair is trusted. Enables access of `to` to the memory of `from`. Hang when a copy does not end.
bool peers(const Gpu &from, const Gpu &to);

// One latent's way, or that of several neighbours, between memory of two GPUs; both streams go on in order.
class Link {
   public:
    // direct: by one copy on the receiving stream, which needs peers(from, to) or one GPU; else through pinned memory.
    Link(const Gpu &from, const Gpu &to, bool direct, std::size_t bytes);
    // The first half, on the sender's stream, and the second, on the receiver's, which waits for it. A link may be used
    // again when the sender's stream has waited for the second half.
    void send(const Stream &sender, CUdeviceptr source, std::size_t bytes);
    void receive(CUstream receiver, CUdeviceptr target, CUdeviceptr source, std::size_t bytes);

   private:
    Gpu from_, to_;
    bool direct_;
    Event sent_;
    std::unique_ptr<PinnedMemory> staging_;
};

}  // namespace driffusion::cuda
