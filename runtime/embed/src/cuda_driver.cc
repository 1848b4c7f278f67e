#include "cuda_driver.h"

#include <dlfcn.h>

#include <chrono>
#include <cstdio>
#include <mutex>
#include <thread>

#include "workers.h"

namespace driffusion::cuda {
namespace {

constexpr int MINIMUM_DRIVER = 13000;  // as engines/cuda/driver.py: the CUDA version that our machine code is of
constexpr unsigned int NON_BLOCKING = 1, PORTABLE = 1;
constexpr double SPIN_SECONDS = 0.002;  // before the host sleeps between two questions
constexpr auto PAUSE = std::chrono::microseconds(50);

std::string version_text(int version) { return std::to_string(version / 1000) + "." + std::to_string(version % 1000 / 10); }

}  // namespace

const Driver &Driver::instance() {
    // Never destroyed, so that no order of destructors at exit matters. A failed attempt is made again at the next call.
    static auto &mutex = *new std::mutex;
    static Driver *driver = nullptr;
    std::lock_guard<std::mutex> lock(mutex);
    if (!driver) driver = new Driver;
    return *driver;
}

Driver::Driver() {
    void *library = dlopen("libcuda.so.1", RTLD_NOW | RTLD_LOCAL | RTLD_NODELETE);
    if (!library) {
        const char *reason = dlerror();
        fail(DRIFFUSION_ERROR_DEVICE, "there is no NVIDIA driver (" + std::string(reason ? reason : "libcuda.so.1") + "): use \"cpu\"");
    }
#define X(name)                                                                                  \
    functions_.name = reinterpret_cast<decltype(functions_.name)>(dlsym(library, #name));        \
    if (!functions_.name) fail(DRIFFUSION_ERROR_DEVICE, "the NVIDIA driver has no " #name ": install a newer one");
    DRIFFUSION_DRIVER(X)
#undef X
    int version = 0;
    check(functions_.cuDriverGetVersion(&version), "cuDriverGetVersion");
    if (version < MINIMUM_DRIVER) {
        fail(DRIFFUSION_ERROR_DEVICE, "the NVIDIA driver is for CUDA " + version_text(version) + ", this program needs " + version_text(MINIMUM_DRIVER) + " or newer: install driver 580 or newer, or use \"cpu\"");
    }
}

void Driver::check(CUresult status, const char *name) const {
    if (status == CUDA_SUCCESS) return;
    const char *label = nullptr, *text = nullptr;
    functions_.cuGetErrorName(status, &label);
    functions_.cuGetErrorString(status, &text);
    std::string message = std::string(name) + " failed with " + (label ? label : std::to_string(int(status))) + " (" + (text ? text : "unknown") + ")";
    if (status == CUDA_ERROR_OUT_OF_MEMORY) fail(DRIFFUSION_ERROR_MEMORY, message + ": make fewer images at once, or free the GPU's memory");
    if (int(status) >= 700 && int(status) < 800) message += ": the device was lost: start the program again, and look at the system's log for Xid messages";
    fail(DRIFFUSION_ERROR_DEVICE, message);
}

void wait_until(const std::function<CUresult()> &ask, const char *name, double seconds, const std::string &what) {
    const double start = now();
    CUresult status;
    while ((status = ask()) == CUDA_ERROR_NOT_READY) {
        const double waited = now() - start;
        if (waited > seconds) {
            char limit[32];
            std::snprintf(limit, sizeof limit, "%g", seconds);
            throw Hang(what + " did not end within " + limit + " s");
        }
        if (waited > SPIN_SECONDS) std::this_thread::sleep_for(PAUSE);
    }
    Driver::instance().check(status, name);
}

Gpu::Gpu(int ordinal) : ordinal_(ordinal) {
    int count = 0;
    driver_call(cuInit, 0);  // does nothing the second time
    driver_call(cuDeviceGetCount, &count);
    if (ordinal < 0 || ordinal >= count) {
        const std::string there = count ? "cuda:0 to cuda:" + std::to_string(count - 1) : "an NVIDIA driver and no GPU";
        fail(DRIFFUSION_ERROR_DEVICE, "there is no cuda:" + std::to_string(ordinal) + ": this machine has " + there);
    }
    CUdevice device;
    CUcontext context;
    int major, minor;
    driver_call(cuDeviceGet, &device, ordinal);
    driver_call(cuDeviceGetAttribute, &major, CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR, device);
    driver_call(cuDeviceGetAttribute, &minor, CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR, device);
    arch_ = std::to_string(major) + std::to_string(minor);
    driver_call(cuDevicePrimaryCtxRetain, &context, device);
    context_ = std::shared_ptr<CUctx_st>(context, [device](CUcontext) { Driver::instance().functions().cuDevicePrimaryCtxRelease_v2(device); });
}

Current::Current(const Gpu &gpu) {
    driver_call(cuCtxGetCurrent, &before_);
    driver_call(cuCtxSetCurrent, gpu.context());
}

Current::~Current() { Driver::instance().functions().cuCtxSetCurrent(before_); }

void check_context(const Gpu &gpu) {
    const DeviceMemory asked(gpu, 1);
}

DeviceMemory::DeviceMemory(const Gpu &gpu, std::size_t bytes) : gpu_(std::make_shared<Gpu>(gpu)) {
    Current current(gpu);
    driver_call(cuMemAlloc_v2, &pointer_, bytes);
}

DeviceMemory &DeviceMemory::operator=(DeviceMemory &&other) noexcept {
    std::swap(gpu_, other.gpu_);
    std::swap(pointer_, other.pointer_);
    return *this;
}

DeviceMemory::~DeviceMemory() {
    if (pointer_) freed(*gpu_, [this](const Functions &driver) { driver.cuMemFree_v2(pointer_); });
}

PinnedMemory::PinnedMemory(const Gpu &gpu, std::size_t bytes) : gpu_(gpu) {
    Current current(gpu);
    driver_call(cuMemHostAlloc, &pointer_, bytes, PORTABLE);
}

PinnedMemory::~PinnedMemory() {
    freed(gpu_, [this](const Functions &driver) { driver.cuMemFreeHost(pointer_); });
}

Stream::Stream(const Gpu &gpu) : gpu_(gpu) {
    Current current(gpu);
    driver_call(cuStreamCreate, &stream_, NON_BLOCKING);
}

Stream::~Stream() {
    freed(gpu_, [this](const Functions &driver) {
        driver.cuStreamSynchronize(stream_);
        driver.cuStreamDestroy_v2(stream_);
    });
}

void Stream::wait(double seconds, const std::string &what) const {
    Current current(gpu_);
    wait_until([this] { return Driver::instance().functions().cuStreamQuery(stream_); }, "cuStreamQuery", seconds, what);
}

}  // namespace driffusion::cuda
