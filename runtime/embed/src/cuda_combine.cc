#include "cuda_combine.h"

#include <dlfcn.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <iterator>
#include <set>
#include <utility>

#include "sha256.h"

namespace driffusion::cuda {
namespace {

constexpr u32 BLOCK = 128, MAX_GRID = 8192;
constexpr u32 VECTOR_BYTES = 16, MOST_SUMS = 68;  // of registers; engines/cuda/kernels.py has the same rule

const char SOURCE[] = {
#include "combine_source.inc"
    , 0};

// The part of NVRTC's interface that is used here (nvrtc.h).
struct Nvrtc {
    using Handle = struct _nvrtcProgram *;
    int (*create)(Handle *, const char *source, const char *name, int headers, const char *const *, const char *const *) = nullptr;
    int (*compile)(Handle, int count, const char *const *options) = nullptr;
    int (*log_size)(Handle, std::size_t *) = nullptr;
    int (*log)(Handle, char *) = nullptr;
    int (*cubin_size)(Handle, std::size_t *) = nullptr;
    int (*cubin)(Handle, char *) = nullptr;
    int (*destroy)(Handle *) = nullptr;
    const char *(*error)(int) = nullptr;

    Nvrtc() {
        void *library = nullptr;
        for (const char *name : {"libnvrtc.so.13", "libnvrtc.so.12", "libnvrtc.so"}) {
            if ((library = dlopen(name, RTLD_NOW | RTLD_LOCAL | RTLD_NODELETE))) break;
        }
        if (!library) fail(DRIFFUSION_ERROR_DEVICE, "combine.cu is not compiled for this GPU yet, and there is no libnvrtc.so: install NVRTC, or run `make engines` for the GPU first");
        auto find = [&](auto &function, const char *name) {
            function = reinterpret_cast<std::remove_reference_t<decltype(function)>>(dlsym(library, name));
            if (!function) fail(DRIFFUSION_ERROR_DEVICE, std::string("NVRTC has no ") + name + ": install a newer one");
        };
        find(create, "nvrtcCreateProgram"), find(compile, "nvrtcCompileProgram"), find(destroy, "nvrtcDestroyProgram");
        find(log_size, "nvrtcGetProgramLogSize"), find(log, "nvrtcGetProgramLog"), find(error, "nvrtcGetErrorString");
        find(cubin_size, "nvrtcGetCUBINSize"), find(cubin, "nvrtcGetCUBIN");
    }
};

std::vector<std::string> options(const std::string &arch, u32 outputs, u32 width) {
    return {"--gpu-architecture=sm_" + arch, "--std=c++17", "--ptxas-options=-v", "-DSTORAGE=float", "-DOUTPUTS=" + std::to_string(outputs), "-DWIDTH=" + std::to_string(width)};
}

std::string compiled(const std::string &arch, u32 outputs, u32 width) {
    const Nvrtc nvrtc;
    const std::string what = "combine.cu cannot be compiled for sm_" + arch;
    auto check = [&](int status) {
        if (status) fail(DRIFFUSION_ERROR_DEVICE, what + ": " + nvrtc.error(status));
    };
    Nvrtc::Handle made = nullptr;
    check(nvrtc.create(&made, SOURCE, "combine.cu", 0, nullptr, nullptr));
    std::unique_ptr<Nvrtc::Handle, std::function<void(Nvrtc::Handle *)>> owned(&made, [&](Nvrtc::Handle *one) { nvrtc.destroy(one); });
    const std::vector<std::string> words = options(arch, outputs, width);
    std::vector<const char *> raw;
    for (const std::string &word : words) raw.push_back(word.c_str());
    if (int status = nvrtc.compile(made, int(raw.size()), raw.data())) {
        std::size_t size = 0;
        check(nvrtc.log_size(made, &size));
        std::string log(size + 1, '\0');
        check(nvrtc.log(made, log.data()));
        fail(DRIFFUSION_ERROR_DEVICE, what + ": " + nvrtc.error(status) + "\n" + log.c_str());
    }
    std::size_t size = 0;
    check(nvrtc.cubin_size(made, &size));
    std::string code(size, '\0');
    check(nvrtc.cubin(made, code.data()));
    return code;
}

std::string cache_folder() {
    const char *base = std::getenv("XDG_CACHE_HOME"), *home = std::getenv("HOME");
    std::string folder = base && *base ? base : home && *home ? std::string(home) + "/.cache" : "";
    return folder.empty() ? folder : folder + "/driffusion-engine";
}

// Whole or not at all, as other processes see it. A cache that cannot be written is none: the code is compiled again.
void keep(const std::string &folder, const std::string &path, const std::string &code) {
    const std::size_t above = folder.rfind('/');
    if (above != folder.npos && above) mkdir(folder.substr(0, above).c_str(), 0777);
    mkdir(folder.c_str(), 0777);
    std::string partial = path + "." + std::to_string(getpid()) + ".XXXXXX";
    const int file = mkstemp(partial.data());
    if (file < 0) return;
    const bool whole = write(file, code.data(), code.size()) == ssize_t(code.size());
    close(file);
    if (!whole || rename(partial.c_str(), path.c_str())) unlink(partial.c_str());
}

}  // namespace

std::string machine_code(const std::string &arch, u32 outputs, u32 width, const std::string *cache) {
    std::string wanted;
    for (const std::string &one : options(arch, outputs, width)) wanted += (wanted.empty() ? "" : " ") + one;
    wanted.append(SOURCE, sizeof SOURCE - 1);
    const std::string folder = cache ? *cache : cache_folder();
    const std::string path = folder + "/" + hex(sha256(wanted.data(), wanted.size())).substr(0, 32) + ".cubin";
    if (!folder.empty()) {
        std::ifstream file(path, std::ios::binary);
        std::string code{std::istreambuf_iterator<char>(file), {}};
        if (!code.empty()) return code;
    }
    std::string code = compiled(arch, outputs, width);
    if (!folder.empty()) keep(folder, path, code);
    return code;
}

Kernels::~Kernels() {
    if (loaded_.empty()) return;
    try {
        Current current(gpu_);
        for (auto &[key, one] : loaded_) Driver::instance().functions().cuModuleUnload(one.module);
    } catch (const Error &) {  // the context is gone, and with it the modules
    }
}

CUfunction Kernels::combination(u32 outputs, u32 width) {
    auto found = loaded_.find({outputs, width});
    if (found != loaded_.end()) return found->second.function;
    const std::string code = machine_code(gpu_.arch(), outputs, width);
    Current current(gpu_);
    Loaded made{};
    driver_call(cuModuleLoadData, &made.module, code.data());
    const CUresult status = Driver::instance().functions().cuModuleGetFunction(&made.function, made.module, "combine_latents");
    if (status != CUDA_SUCCESS) Driver::instance().functions().cuModuleUnload(made.module);
    Driver::instance().check(status, "cuModuleGetFunction");
    loaded_[{outputs, width}] = made;
    return made.function;
}

void Combinations::append(Added &added, const std::vector<CUdeviceptr> &sources, const std::vector<std::vector<float>> &rows, const std::vector<CUdeviceptr> &targets) {
    Launch one{};
    Combination &p = one.parameters;
    u32 width = VECTOR_BYTES / sizeof(float);
    auto fits = [&](u32 wide) {
        auto aligned = [wide](CUdeviceptr pointer) { return pointer % (wide * sizeof(float)) == 0; };
        return wide * targets.size() <= MOST_SUMS && elements_ % wide == 0 && std::all_of(sources.begin(), sources.end(), aligned) && std::all_of(targets.begin(), targets.end(), aligned);
    };
    while (width > 1 && !fits(width)) width /= 2;
    p.elements = elements_, p.inputs = u32(sources.size());
    std::copy(sources.begin(), sources.end(), p.input);
    std::copy(targets.begin(), targets.end(), p.target);
    for (std::size_t m = 0; m <= targets.size(); ++m) p.first[m] = static_cast<unsigned char>(m);
    one.outputs = u32(targets.size()), one.width = width, one.rows = table_.size();
    one.function = kernels_.combination(one.outputs, width);
    for (std::size_t j = 0; j < sources.size(); ++j) {
        for (const std::vector<float> &row : rows) table_.push_back(row[j]);
    }
    added.launches.push_back(one);
}

u32 Combinations::add(const std::vector<CUdeviceptr> &sources, const std::vector<float> &rows, const std::vector<CUdeviceptr> &targets, bool watched) {
    Added added{watched, {}, {}};
    const std::set<CUdeviceptr> read(sources.begin(), sources.end());
    const bool several = targets.size() > MAX_OUTPUTS || sources.size() > MAX_INPUTS;
    for (std::size_t start = 0; start < targets.size(); start += MAX_OUTPUTS) {
        std::vector<CUdeviceptr> into;
        for (std::size_t m = start; m < std::min(targets.size(), start + MAX_OUTPUTS); ++m) {
            into.push_back(targets[m]);
            if (!several || !read.count(targets[m])) continue;  // else later launches still read it
            scratch_.emplace_back(kernels_.gpu(), elements_ * sizeof(float));
            into.back() = scratch_.back().get();
            added.copies.push_back({into.back(), targets[m]});
        }
        // after the first of several launches the sums so far are sources, in the place of the first ones: the order stays
        for (std::size_t j = 0; j < sources.size();) {
            std::vector<CUdeviceptr> part;
            std::vector<std::vector<float>> coefficients(into.size());
            for (std::size_t m = 0; j && m < into.size(); ++m) {
                part.push_back(into[m]);
                for (std::size_t other = 0; other < into.size(); ++other) coefficients[other].push_back(other == m ? 1.0f : 0.0f);
            }
            const std::size_t end = std::min(sources.size(), j + MAX_INPUTS - part.size());
            for (std::size_t n = j; n < end; ++n) {
                part.push_back(sources[n]);
                for (std::size_t m = 0; m < into.size(); ++m) coefficients[m].push_back(rows[(start + m) * sources.size() + n]);
            }
            append(added, part, coefficients, into);
            j = end;
        }
    }
    added_.push_back(std::move(added));
    return u32(added_.size()) - 1;
}

void Combinations::upload(const Stream &stream, double seconds) {
    if (table_.empty()) return;
    const Gpu &gpu = kernels_.gpu();
    const std::size_t bytes = table_.size() * sizeof(float);
    device_table_ = DeviceMemory(gpu, bytes), words_ = DeviceMemory(gpu, 3 * sizeof(u32));  // round, a flag that nobody reads, the flag
    staging_ = std::make_unique<PinnedMemory>(gpu, bytes);
    std::copy(table_.begin(), table_.end(), staging_->as<float>());
    Current current(gpu);
    driver_call(cuMemsetD32Async, words_.get(), 0, 3, stream.get());
    driver_call(cuMemcpyHtoDAsync_v2, device_table_.get(), staging_->as<float>(), bytes, stream.get());
    stream.wait(seconds, "the upload of coefficients");
    for (Added &added : added_) {
        for (Launch &one : added.launches) {
            one.parameters.data = device_table_.get() + one.rows * sizeof(float);
            one.parameters.round = words_.get(), one.parameters.not_finite = words_.get() + (added.watched ? 2 : 1) * sizeof(u32);
        }
    }
}

void Combinations::launch(u32 number, const Stream &stream) const {
    for (const Launch &one : added_[number].launches) {
        const u64 packs = (elements_ + u64(one.width) * BLOCK - 1) / (u64(one.width) * BLOCK);
        void *parameters[] = {const_cast<Combination *>(&one.parameters)};
        driver_call(cuLaunchKernel, one.function, u32(std::clamp<u64>(packs, 1, MAX_GRID)), 1, 1, BLOCK, 1, 1, 0, stream.get(), parameters, nullptr);
    }
    for (const auto &[from, to] : added_[number].copies) driver_call(cuMemcpyDtoDAsync_v2, to, from, elements_ * sizeof(float), stream.get());
}

}  // namespace driffusion::cuda
