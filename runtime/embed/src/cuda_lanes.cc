#include "cuda_lanes.h"

#include <cstring>

namespace driffusion::cuda {
namespace {

constexpr unsigned int DISABLE_TIMING = 2;
constexpr u32 PATTERNS = 64;
constexpr std::size_t PATTERN_BYTES[] = {1, 4 << 10, 32 << 10, (512 << 10) + 3};  // as engines/cuda/peers.py

struct Probe {
    DeviceMemory source, target;
    PinnedMemory host;
    Stream sending, receiving;
};

bool arrives(const Gpu &from, const Gpu &to, Probe &probe) {
    const std::size_t largest = PATTERN_BYTES[3];
    const auto &[source, target, host, sending, receiving] = probe;
    const std::string what = "a copy from cuda:" + std::to_string(from.ordinal()) + " to cuda:" + std::to_string(to.ordinal());
    std::uint64_t state = 0x9E3779B97F4A7C15;
    std::vector<unsigned char> pattern(largest);
    for (u32 number = 0; number < PATTERNS; ++number) {
        const std::size_t size = PATTERN_BYTES[number % 4];
        for (std::size_t n = 0; n < size; ++n) state = state * 6364136223846793005u + 1442695040888963407u, pattern[n] = static_cast<unsigned char>(state >> 56);
        std::memcpy(host.as<void>(), pattern.data(), size);
        {
            Current current(from);
            driver_call(cuMemcpyHtoDAsync_v2, source.get(), host.as<void>(), size, sending.get());
        }
        sending.wait(LANE_TIMEOUT, what);
        std::memset(host.as<void>(), 0, size);
        {
            Current current(to);
            driver_call(cuMemsetD8Async, target.get(), static_cast<unsigned char>(~pattern[0]), size, receiving.get());
            driver_call(cuMemcpyAsync, target.get(), source.get(), size, receiving.get());
            driver_call(cuMemcpyDtoHAsync_v2, host.as<void>(), target.get(), size, receiving.get());
        }
        receiving.wait(LANE_TIMEOUT, what);
        if (std::memcmp(host.as<void>(), pattern.data(), size)) return false;
    }
    return true;
}

}  // namespace

Event::Event(const Gpu &gpu) : gpu_(gpu) {
    Current current(gpu);
    driver_call(cuEventCreate, &event_, DISABLE_TIMING);
}

void Event::wait(double seconds, const std::string &what) const {
    Current current(gpu_);
    wait_until([this] { return Driver::instance().functions().cuEventQuery(event_); }, "cuEventQuery", seconds, what);
}

bool Event::over() const {
    Current current(gpu_);
    return Driver::instance().functions().cuEventQuery(event_) != CUDA_ERROR_NOT_READY;
}

Event::~Event() { freed(gpu_, [this](const Functions &driver) { driver.cuEventDestroy_v2(event_); }); }

bool peers(const Gpu &from, const Gpu &to) {
    if (from.ordinal() == to.ordinal()) return true;
    CUdevice device, peer;
    int can = 0;
    driver_call(cuDeviceGet, &device, to.ordinal());
    driver_call(cuDeviceGet, &peer, from.ordinal());
    driver_call(cuDeviceCanAccessPeer, &can, device, peer);
    if (!can) return false;
    {
        Current current(to);
        const CUresult status = Driver::instance().functions().cuCtxEnablePeerAccess(from.context(), 0);
        if (status != CUDA_ERROR_PEER_ACCESS_ALREADY_ENABLED && status != CUDA_SUCCESS) return false;
    }
    const std::size_t largest = PATTERN_BYTES[3];
    std::unique_ptr<Probe> probe;
    try {
        probe.reset(new Probe{DeviceMemory(from, largest), DeviceMemory(to, largest), PinnedMemory(from, largest), Stream(from), Stream(to)});
        return arrives(from, to, *probe);
    } catch (const Hang &) {
        (void)probe.release();  // freeing it would wait
        throw;
    } catch (const Error &) {  // of this pair: latents go through the host, where a lost device says so again
        return false;
    }
}

Link::Link(const Gpu &from, const Gpu &to, bool direct, std::size_t bytes) : from_(from), to_(to), direct_(direct), sent_(from) {
    if (!direct) staging_ = std::make_unique<PinnedMemory>(from, bytes);
}

void Link::send(const Stream &sender, CUdeviceptr source, std::size_t bytes) {
    Current current(from_);
    if (!direct_) driver_call(cuMemcpyDtoHAsync_v2, staging_->as<void>(), source, bytes, sender.get());
    sent_.record(sender.get());
}

void Link::receive(CUstream receiver, CUdeviceptr target, CUdeviceptr source, std::size_t bytes) {
    Current current(to_);
    sent_.join(receiver);
    if (direct_) {
        driver_call(cuMemcpyAsync, target, source, bytes, receiver);
    } else {
        driver_call(cuMemcpyHtoDAsync_v2, target, staging_->as<void>(), bytes, receiver);
    }
}

}  // namespace driffusion::cuda
