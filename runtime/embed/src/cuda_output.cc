#include "cuda_output.h"

#include <cstring>

namespace driffusion::cuda {

Gpu gpu_of(const char *name, CUdeviceptr pointer) {
    const Functions &driver = Driver::instance().functions();
    int kind = 0, ordinal = 0;
    const bool known = driver.cuPointerGetAttribute(&kind, CU_POINTER_ATTRIBUTE_MEMORY_TYPE, pointer) == CUDA_SUCCESS;
    if (!known || kind != CU_MEMORYTYPE_DEVICE) fail(DRIFFUSION_ERROR_ARGUMENT, std::string(name) + " is not memory of a GPU");
    driver_call(cuPointerGetAttribute, &ordinal, CU_POINTER_ATTRIBUTE_DEVICE_ORDINAL, pointer);
    return Gpu(ordinal);
}

void Output::latents(const Stream &stream, CUdeviceptr source, std::size_t bytes, bool direct) {
    const Gpu &home = stream.gpu();
    outbox_ = std::make_unique<DeviceMemory>(home, bytes);
    link_ = std::make_unique<Link>(home, *target_.gpu, direct, bytes);
    left_ = std::make_unique<Event>(home), done_ = std::make_unique<Event>(*target_.gpu);
    sent_ = true;
    {
        Current current(home);
        driver_call(cuMemcpyDtoDAsync_v2, outbox_->get(), source, bytes, stream.get());
        link_->send(stream, outbox_->get(), bytes);
        left_->record(stream.get());
    }
    link_->receive(target_.stream, target_.latents, outbox_->get(), bytes);
}

void Output::rgb(const std::uint8_t *pixels, std::size_t bytes) {
    pixels_ = std::make_unique<PinnedMemory>(*target_.gpu, bytes);
    if (!done_) done_ = std::make_unique<Event>(*target_.gpu);
    sent_ = true;
    std::memcpy(pixels_->as<void>(), pixels, bytes);
    Current current(*target_.gpu);
    driver_call(cuMemcpyHtoDAsync_v2, target_.rgb, pixels_->as<void>(), bytes, target_.stream);
}

void Output::enqueued() {
    Current current(*target_.gpu);
    if (target_.event) driver_call(cuEventRecord, target_.event, target_.stream);
}

void Output::wait() {
    try {
        if (left_) left_->wait(seconds_, "an image");
        {
            Current current(*target_.gpu);
            done_->record(target_.stream);
        }
        done_->wait(seconds_, "the caller's stream, with the output on it,");
        sent_ = false;
    } catch (const Hang &) {
        (void)outbox_.release(), (void)link_.release(), (void)pixels_.release();
        sent_ = false;
        throw;
    }
}

Output::~Output() {
    if (!sent_) return;  // else after an error: nothing that is queued may still use this memory
    try {
        wait();
    } catch (const Error &) {  // a lost device, or a hang, of which that error has spoken
    }
}

}  // namespace driffusion::cuda
