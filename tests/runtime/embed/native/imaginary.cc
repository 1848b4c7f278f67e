// libdriffusion whose networks run on imaginary GPUs: ONNX Runtime on the content of their memory, when its turn comes.
#include <dlfcn.h>

#include <deque>

#include "cuda_player.h"

using namespace driffusion;
using namespace driffusion::cuda;

namespace {

using Submit = int (*)(CUstream, void (*)(void *), void *, int, const std::uintptr_t *, const std::size_t *, const unsigned char *, int);
using Content = void *(*)(std::uintptr_t, std::size_t);

template <typename Function>
Function control(const char *name) {
    void *library = dlopen("libcuda.so.1", RTLD_NOW | RTLD_LOCAL);
    auto found = reinterpret_cast<Function>(library ? dlsym(library, name) : nullptr);
    if (!found) fail(DRIFFUSION_ERROR_UNSUPPORTED, std::string("this is not the imaginary driver: it has no ") + name);
    return found;
}

class ImaginaryNetwork : public DeviceNetwork {
   public:
    explicit ImaginaryNetwork(std::unique_ptr<Session> session) : session_(std::move(session)) {}

    void enqueue(const std::vector<Buffer> &inputs, const Buffer &output, CUstream stream) override {
        calls_.push_back({this, inputs});
        calls_.back().buffers.push_back(output);
        std::vector<std::uintptr_t> addresses;
        std::vector<std::size_t> sizes;
        std::vector<unsigned char> writes(inputs.size() + 1);
        writes.back() = 1;
        for (const Buffer &one : calls_.back().buffers) addresses.push_back(one.data), sizes.push_back(bytes(one));
        const int status = submit_(stream, run, &calls_.back(), int(sizes.size()), addresses.data(), sizes.data(), writes.data(), 1);
        Driver::instance().check(static_cast<CUresult>(status), "a model call");
    }

   private:
    struct Call {
        ImaginaryNetwork *network;
        std::vector<Buffer> buffers;
    };
    static std::size_t bytes(const Buffer &one) {
        std::size_t size = one.dtype == INT64 ? 8 : 4;
        for (i64 dim : one.shape) size *= std::size_t(dim);
        return size;
    }
    static void run(void *data) {
        const Call &call = *static_cast<Call *>(data);
        const ImaginaryNetwork &own = *call.network;
        std::vector<Value> values;
        std::vector<const OrtValue *> inputs;
        for (const Buffer &one : call.buffers) values.emplace_back(own.session_->runtime(), own.content_(one.data, bytes(one)), one.dtype, one.shape);
        for (std::size_t n = 0; n + 1 < values.size(); ++n) inputs.push_back(values[n].get());
        own.session_->run(inputs, {values.back().get()});
    }

    std::unique_ptr<Session> session_;
    std::deque<Call> calls_;
    Submit submit_ = control<Submit>("imaginary_model");
    Content content_ = control<Content>("imaginary_bytes");
};

}  // namespace

extern "C" __attribute__((visibility("default"))) void imaginary_install() {
    set_network_factory([](const Gpu &, const NetworkSource &source) { return std::make_unique<ImaginaryNetwork>(source.session()); });
}
