// Modules, and launches of the project's kernels, which run as kernels/combine.cu compiled for this processor.
//
// A module is real machine code for a GPU. Which variant of the source it is was said when it was compiled (control.cc);
// that it has the function that is asked for is read from the code itself.
#include <elf.h>

#include <cmath>

#include "machine.h"

namespace imaginary {
namespace source {  // the struct of a launch, as the kernel declares it
#define STORAGE float
#define __device__
#define __global__
#define __grid_constant__
#define __launch_bounds__(threads)
[[maybe_unused]] static float __uint_as_float(unsigned int bits) {
    float value;
    memcpy(&value, &bits, 4);
    return value;
}
[[maybe_unused]] static unsigned int __float_as_uint(float value) {
    unsigned int bits;
    memcpy(&bits, &value, 4);
    return bits;
}
static struct {
    unsigned int x;
} gridDim, blockDim, blockIdx, threadIdx;
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wunknown-pragmas"
#include "../../kernels/combine.cu"
#pragma GCC diagnostic pop
#undef STORAGE
}  // namespace source

using source::Combination;
using source::Product;

size_t code_size(const void *image) {
    const auto *header = static_cast<const Elf64_Ehdr *>(image);
    if (memcmp(header->e_ident, ELFMAG, SELFMAG)) return 0;
    const size_t sections = header->e_shoff + size_t(header->e_shnum) * header->e_shentsize;
    return std::max(sections, header->e_phoff + size_t(header->e_phnum) * header->e_phentsize);
}

static bool has_function(const Module &module, const std::string &name) {
    const std::string section = std::string(".text.") + name;
    const auto *header = reinterpret_cast<const Elf64_Ehdr *>(module.code.data());
    const auto *sections = reinterpret_cast<const Elf64_Shdr *>(module.code.data() + header->e_shoff);
    const char *names = reinterpret_cast<const char *>(module.code.data()) + sections[header->e_shstrndx].sh_offset;
    for (int n = 0; n < header->e_shnum; ++n)
        if (section == names + sections[n].sh_name) return true;
    return false;
}

static uintptr_t address(const void *pointer) { return reinterpret_cast<uintptr_t>(pointer); }

template <typename T>
static T *content(T *pointer) {
    return reinterpret_cast<T *>(bytes_at(address(pointer), 1));
}

// --- combine_latents -------------------------------------------------------------------------------------------------

static void combination_accesses(const Combination &p, const Variant &variant, std::vector<Access> &found) {
    const size_t bytes = p.elements * element_size(variant.dtype);
    const auto add = [&](const void *pointer, size_t size, bool write) {
        found.push_back({address(pointer), address(pointer) + size, write});
    };
    add(p.round, 4, false);
    add(p.not_finite, 4, true);
    for (unsigned int n = 0; n < p.inputs; ++n) add(p.input[n], bytes, false);
    for (int n = 0; n < p.first[variant.outputs]; ++n) add(p.target[n], bytes, true);
    for (unsigned int n = 0; n < p.lanes; ++n) add(p.timestep[n], 4 * p.batch[n], true);
}

// Threads of one launch are in no order: what two of them touch must be the same element of the same latent.
static bool threads_meet(const Combination &p, const Variant &variant) {
    const size_t bytes = p.elements * element_size(variant.dtype);
    const auto overlap = [&](const void *a, const void *b) {
        return address(a) < address(b) + bytes && address(b) < address(a) + bytes;
    };
    for (int t = 0; t < p.first[variant.outputs]; ++t) {
        for (unsigned int n = 0; n < p.inputs; ++n)
            if (p.target[t] != p.input[n] && overlap(p.target[t], p.input[n])) return true;
        for (int other = 0; other < t; ++other)
            if (overlap(p.target[t], p.target[other])) return true;
    }
    return false;
}

// The round's block of the table is chosen by a number in memory, so that it is known only when the kernel runs.
static void block_accesses(const Combination &p, const Variant &variant, std::vector<Access> &found) {
    unsigned int round;
    memcpy(&round, bytes_at(address(p.round), 4), 4);
    const uintptr_t block = address(p.data) + 4 * (uintptr_t(round) * p.stride);
    if (p.inputs) found.push_back({block + 4 * p.rows, block + 4 * (p.rows + p.inputs * variant.outputs), false});
    size_t times = 0;
    for (unsigned int n = 0; n < p.lanes; ++n) times += p.batch[n];
    if (times) found.push_back({block + 4 * p.timesteps, block + 4 * (p.timesteps + times), false});
}

static CUresult combine(KernelFunction *function, Work &work, void **parameters, unsigned int grid, unsigned int block) {
    auto given = std::make_shared<Combination>();
    memcpy(given.get(), parameters[0], sizeof(Combination));
    const Variant &variant = *function->module->variant;
    const size_t pack = variant.width * element_size(variant.dtype);
    combination_accesses(*given, variant, work.accesses);
    if (threads_meet(*given, variant))
        violate("cuLaunchKernel: latents of one combination overlap, and its threads are in no order");
    bool aligned = given->elements % variant.width == 0;
    for (unsigned int n = 0; n < given->inputs; ++n) aligned = aligned && address(given->input[n]) % pack == 0;
    for (int n = 0; n < given->first[variant.outputs]; ++n) aligned = aligned && address(given->target[n]) % pack == 0;
    if (!aligned) {
        violate("cuLaunchKernel: a latent is not aligned to the %d elements that are read at once", variant.width);
        return CUDA_ERROR_MISALIGNED_ADDRESS;
    }
    const auto run = kernel<int(int, int, unsigned, unsigned, const void *)>(variant.dtype, "run_combine");
    if (!run) return CUDA_ERROR_NO_BINARY_FOR_GPU;
    work.dynamic = [given, &variant](std::vector<Access> &found) { block_accesses(*given, variant, found); };
    work.run = [given, &variant, run, grid, block](const Stamp &) {
        Combination p = *given;
        p.data = content(p.data), p.round = content(p.round), p.not_finite = content(p.not_finite);
        for (unsigned int n = 0; n < p.inputs; ++n) p.input[n] = content(p.input[n]);
        for (int n = 0; n < p.first[variant.outputs]; ++n) p.target[n] = content(p.target[n]);
        for (unsigned int n = 0; n < p.lanes; ++n) p.timestep[n] = content(p.timestep[n]);
        run(variant.outputs, variant.width, grid, block, &p);
    };
    return CUDA_SUCCESS;
}

// --- the small kernels -----------------------------------------------------------------------------------------------

template <typename T>
static T argument(void **parameters, int n) {
    T value;
    memcpy(&value, parameters[n], sizeof value);
    return value;
}

static CUresult distance(KernelFunction *function, Work &work, void **parameters, unsigned int grid, unsigned int block) {
    const std::string &dtype = function->module->variant->dtype;
    const void *a = argument<void *>(parameters, 0), *b = argument<void *>(parameters, 1);
    const auto elements = argument<unsigned long long>(parameters, 2);
    float *partial = argument<float *>(parameters, 3);
    const size_t bytes = elements * element_size(dtype), sums = size_t(8) * grid * block;
    work.accesses = {{address(a), address(a) + bytes, false},
                     {address(b), address(b) + bytes, false},
                     {address(partial), address(partial) + sums, true}};
    using Run = void(unsigned, unsigned, const void *, const void *, unsigned long long, float *);
    const auto run = kernel<Run>(dtype, "run_distance");
    if (!run) return CUDA_ERROR_NO_BINARY_FOR_GPU;
    work.run = [=](const Stamp &) { run(grid, block, content(const_cast<void *>(a)), content(const_cast<void *>(b)), elements, content(partial)); };
    return CUDA_SUCCESS;
}

static CUresult inner_product(KernelFunction *function, Work &work, void **parameters, unsigned int grid, unsigned int block) {
    const std::string &dtype = function->module->variant->dtype;
    auto given = std::make_shared<Product>();
    memcpy(given.get(), parameters[0], sizeof(Product));
    const size_t bytes = given->elements * element_size(dtype), sums = size_t(12) * grid * block;
    for (unsigned int n = 0; n < given->inputs; ++n)
        work.accesses.push_back({address(given->input[n]), address(given->input[n]) + bytes, false});
    work.accesses.push_back({address(given->partial), address(given->partial) + sums, true});
    const auto run = kernel<void(unsigned, unsigned, const void *)>(dtype, "run_inner_product");
    if (!run) return CUDA_ERROR_NO_BINARY_FOR_GPU;
    work.run = [given, run, grid, block](const Stamp &) {
        Product p = *given;
        for (unsigned int n = 0; n < p.inputs; ++n) p.input[n] = content(p.input[n]);
        p.partial = content(p.partial);
        run(grid, block, &p);
    };
    return CUDA_SUCCESS;
}

// The host may read what a kernel writes into its memory at any time, and knows then that what came before has ended.
static void tells_the_host(const Stamp &when) {
    join(machine.host, when.clock);
    machine.host_chain = std::max(machine.host_chain, when.chain);
}

// The kernel is the same for every storage type; its parameters are taken from its declaration.
[[maybe_unused]] static void prepare(void (*advance)(unsigned int *, unsigned int), Work &work, void **parameters) {
    auto *round = argument<unsigned int *>(parameters, 0);
    const auto blocks = argument<unsigned int>(parameters, 1);
    work.accesses = {{address(round), address(round) + 4, true}};
    work.run = [=](const Stamp &) { advance(content(round), blocks); };
}

[[maybe_unused]] static void prepare(void (*advance)(unsigned int *, unsigned int, volatile unsigned int *), Work &work,
                                     void **parameters) {
    auto *state = argument<unsigned int *>(parameters, 0);
    const auto blocks = argument<unsigned int>(parameters, 1);
    auto *seen = argument<unsigned int *>(parameters, 2);
    work.accesses = {{address(state), address(state) + 8, true}, {address(seen), address(seen) + 4, true}};
    work.run = [=](const Stamp &when) {
        advance(content(state), blocks, content(seen));
        changed_by_device(address(seen), 4);
        tells_the_host(when);
    };
}

static CUresult advance_round(KernelFunction *, Work &work, void **parameters, unsigned int grid, unsigned int block) {
    if (grid != 1 || block != 1) violate("cuLaunchKernel: more than one thread advances the round");
    prepare(source::advance, work, parameters);
    work.tells_host = true;
    return CUDA_SUCCESS;
}

}  // namespace imaginary

using namespace imaginary;

CUresult cuModuleLoadData(CUmodule *made, const void *image) {
    return call(F_cuModuleLoadData, CONTEXT | NO_CAPTURE, [&] {
        const size_t size = code_size(image);
        const auto *bytes = static_cast<const unsigned char *>(image);
        const Variant *variant = size ? known_variant(bytes, size) : nullptr;
        if (!variant) {
            violate("cuModuleLoadData: this is not code that the project's compiler made");
            return CUDA_ERROR_INVALID_IMAGE;
        }
        Module *module = create<Module>(current());
        module->code.assign(bytes, bytes + size);
        module->variant = variant;
        *made = handle_of<CUmodule>(module);
        return CUDA_SUCCESS;
    });
}

CUresult cuModuleUnload(CUmodule handle) {
    return call(F_cuModuleUnload, CONTEXT | NO_CAPTURE, [&] {
        Module *module = find<Module>(handle, "cuModuleUnload");
        if (!module) return CUDA_ERROR_INVALID_HANDLE;
        for (const Stream *stream : machine.streams)
            if (uses(stream, module)) violate("cuModuleUnload: a kernel of the module is queued");
        module->alive = false;
        for (auto &[key, object] : machine.objects)
            if (object->kind == Kind::Function && static_cast<KernelFunction *>(object.get())->module == module)
                object->alive = false;
        return CUDA_SUCCESS;
    });
}

CUresult cuModuleGetFunction(CUfunction *made, CUmodule handle, const char *name) {
    return call(F_cuModuleGetFunction, CONTEXT, [&] {
        Module *module = find<Module>(handle, "cuModuleGetFunction");
        if (!module) return CUDA_ERROR_INVALID_HANDLE;
        if (!has_function(*module, name)) return CUDA_ERROR_NOT_FOUND;
        KernelFunction *function = create<KernelFunction>(module->context);
        function->module = module;
        function->name = name;
        *made = handle_of<CUfunction>(function);
        return CUDA_SUCCESS;
    });
}

CUresult cuLaunchKernel(CUfunction handle, unsigned int grid_x, unsigned int grid_y, unsigned int grid_z,
                        unsigned int block_x, unsigned int block_y, unsigned int block_z, unsigned int, CUstream on,
                        void **parameters, void **) {
    return call(F_cuLaunchKernel, CONTEXT, [&] {
        KernelFunction *function = find<KernelFunction>(handle, "cuLaunchKernel");
        Stream *stream = find<Stream>(on, "cuLaunchKernel");
        if (!function || !stream) return CUDA_ERROR_INVALID_HANDLE;
        if (const CUresult status = usable(stream->context)) return status;
        if (stream->context != current() || function->context != current()) {
            violate("cuLaunchKernel: the %s is of another context than the current one",
                    stream->context != current() ? "stream" : "function");
            return CUDA_ERROR_INVALID_HANDLE;
        }
        const unsigned long threads = (unsigned long)block_x * block_y * block_z;
        if (!grid_x || grid_y != 1 || grid_z != 1 || !threads || threads != block_x || threads > 1024) {
            violate("cuLaunchKernel: a grid of %u × %u × %u blocks of %u × %u × %u threads", grid_x, grid_y, grid_z,
                    block_x, block_y, block_z);
            return CUDA_ERROR_INVALID_VALUE;
        }
        auto work = std::make_shared<Work>();
        static const std::map<std::string, CUresult (*)(KernelFunction *, Work &, void **, unsigned int, unsigned int)> launches = {
            {"combine_latents", combine}, {"distance", distance}, {"inner_product", inner_product}, {"advance", advance_round}};
        const auto known = launches.find(function->name);
        if (known == launches.end()) return CUDA_ERROR_INVALID_HANDLE;
        work->what = known->first.c_str();
        work->context = stream->context;
        work->module = function->module;
        if (const CUresult status = known->second(function, *work, parameters, grid_x, block_x)) return status;
        return submit(stream, std::move(work));
    });
}
