// The NVIDIA driver, opened at run time: its functions, one GPU's context, memory, streams and events.
//
// Design of the GPU side of this library, from the bottom:
//   cuda_driver   every driver call by its name, its status as an Error with DEVICE and words; objects that free
//                 themselves in the context that they belong to. Nothing here links to libcuda: a machine without a GPU
//                 opens the library, and engines on "cpu" never look for a driver.
//   cuda_combine  kernels/combine.cu for one GPU: machine code from the cache that the Python engine has, or compiled
//                 by NVRTC (opened at run time, too) into that cache; a program's combinations as launches on a stream.
//   cuda_lanes    streams' events, tested peers, and the way of latents between home and a lane.
//   cuda_player   a program's operations: slots lie at home, the GPU of the lane that a request owns. Each lane has a
//                 stream that waits for home's event, copies its inputs (directly between peers that were tested, else
//                 through pinned memory), runs the network, copies its outputs home and records an event that home's
//                 stream waits for. The host is one round ahead at most, so that a request can be cancelled.
//   cuda_output   the latents and the image in the caller's device memory, on the caller's stream.
// Still to come: text encoder and VAE decoder on a GPU (they run on processor cores), shares at home without a copy.
//
// The host never waits without a limit: `wait_until` asks, and gives up with a Hang that names what did not end. What a
// hang holds is not freed, as freeing would wait for it.
//
// A host may use CUDA itself: primary contexts are shared with it, and `Current` puts its context back.
#pragma once
#include <functional>
#include <memory>
#include <string>
#include <utility>

#include "driver_api.h"
#include "error.h"

namespace driffusion::cuda {

// What this library uses, by the name that libcuda exports.
#define DRIFFUSION_DRIVER(X)                                                                                         \
    X(cuInit) X(cuDriverGetVersion) X(cuGetErrorString) X(cuGetErrorName) X(cuDeviceGetCount) X(cuDeviceGet)         \
    X(cuDeviceGetAttribute) X(cuDevicePrimaryCtxRetain) X(cuDevicePrimaryCtxRelease_v2) X(cuCtxSetCurrent)           \
    X(cuCtxGetCurrent) X(cuMemAlloc_v2) X(cuMemFree_v2) X(cuMemHostAlloc) X(cuMemFreeHost) X(cuMemcpyHtoDAsync_v2)   \
    X(cuMemcpyDtoHAsync_v2) X(cuMemcpyDtoDAsync_v2) X(cuMemsetD32Async) X(cuStreamCreate) X(cuStreamDestroy_v2)      \
    X(cuStreamSynchronize) X(cuStreamQuery) X(cuStreamWaitEvent) X(cuEventCreate) X(cuEventDestroy_v2) X(cuEventRecord)                \
    X(cuEventQuery) X(cuPointerGetAttribute) X(cuDeviceCanAccessPeer) X(cuCtxEnablePeerAccess) X(cuMemcpyAsync) X(cuMemsetD8Async)      \
    X(cuModuleLoadData) X(cuModuleUnload) X(cuModuleGetFunction) X(cuLaunchKernel)

struct Functions {
#define X(name) decltype(&::name) name = nullptr;
    DRIFFUSION_DRIVER(X)
#undef X
};

class Driver {
   public:
    // One per process. Error with DEVICE where there is none, or it is too old.
    static const Driver &instance();

    const Functions &functions() const { return functions_; }
    void check(CUresult status, const char *name) const;

   private:
    Driver();
    Functions functions_;
};

// driver_call(cuMemAlloc_v2, &pointer, size): Error with DEVICE, or with MEMORY where the GPU's is full.
#define driver_call(name, ...) \
    (::driffusion::cuda::Driver::instance().check(::driffusion::cuda::Driver::instance().functions().name(__VA_ARGS__), #name))

// A GPU with its primary context, which is kept while any copy of this lives.
class Gpu {
   public:
    explicit Gpu(int ordinal);
    int ordinal() const { return ordinal_; }
    CUcontext context() const { return context_.get(); }
    const std::string &arch() const { return arch_; }  // as compilers name it: 90 for 9.0

   private:
    int ordinal_;
    std::shared_ptr<CUctx_st> context_;
    std::string arch_;
};

constexpr double LANE_TIMEOUT = 120;  // seconds, as engines/cuda/driver.py

// Something on a GPU did not end in time.
class Hang : public Error {
   public:
    explicit Hang(std::string message) : Error(DRIFFUSION_ERROR_DEVICE, std::move(message)) {}
};

// Asks until the status is no longer NOT_READY; what an error says is that of `name`. Hang after so many seconds.
void wait_until(const std::function<CUresult()> &ask, const char *name, double seconds, const std::string &what);

// Error with DEVICE where the GPU was lost.
void check_context(const Gpu &gpu);

// Makes a GPU's context current in this thread, and puts back what was.
class Current {
   public:
    explicit Current(const Gpu &gpu);
    ~Current();
    Current(const Current &) = delete;
    Current &operator=(const Current &) = delete;

   private:
    CUcontext before_ = nullptr;
};

// Frees what belongs to a context. After a lost device nothing can be freed, and the context takes it with it.
template <typename Free>
void freed(const Gpu &gpu, Free release) noexcept {
    try {
        Current current(gpu);
        release(Driver::instance().functions());
    } catch (const Error &) {  // the context is gone, and with it what was in it
    }
}

// Memory of a GPU. Freed without a wait: the owner drains its streams first.
class DeviceMemory {
   public:
    DeviceMemory() = default;
    DeviceMemory(const Gpu &gpu, std::size_t bytes);
    DeviceMemory(DeviceMemory &&other) noexcept : gpu_(std::move(other.gpu_)), pointer_(std::exchange(other.pointer_, 0)) {}
    DeviceMemory &operator=(DeviceMemory &&other) noexcept;
    ~DeviceMemory();
    CUdeviceptr get() const { return pointer_; }

   private:
    std::shared_ptr<Gpu> gpu_;
    CUdeviceptr pointer_ = 0;
};

// Host memory that copies may use while the host goes on.
class PinnedMemory {
   public:
    PinnedMemory(const Gpu &gpu, std::size_t bytes);
    ~PinnedMemory();
    PinnedMemory(const PinnedMemory &) = delete;
    PinnedMemory &operator=(const PinnedMemory &) = delete;
    template <typename T>
    T *as() const {
        return static_cast<T *>(pointer_);
    }

   private:
    Gpu gpu_;
    void *pointer_ = nullptr;
};

// A stream that does not wait for the default stream; its end waits for what it has to do.
class Stream {
   public:
    explicit Stream(const Gpu &gpu);
    ~Stream();
    Stream(const Stream &) = delete;
    Stream &operator=(const Stream &) = delete;
    CUstream get() const { return stream_; }
    const Gpu &gpu() const { return gpu_; }
    // Only for a stream that nobody else puts work on.
    void wait(double seconds = LANE_TIMEOUT, const std::string &what = "work on a GPU") const;

   private:
    Gpu gpu_;
    CUstream stream_ = nullptr;
};

}  // namespace driffusion::cuda
