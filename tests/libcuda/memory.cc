// Memory, copies and fills.
//
// The address that a program gets for device memory is never mapped: touching it from the host ends the process, as
// with a real GPU. Its content lies between guard pages and starts as NaN; what lies between its end and the page's is
// checked when it is freed. No address is given out twice.
#include <sys/mman.h>
#include <unistd.h>

#include <cstdio>
#include <cstdlib>

#include "machine.h"

namespace imaginary {

#ifndef IMAGINARY_SPACE_BITS
#define IMAGINARY_SPACE_BITS 40
#endif
static const size_t PAGE = 4096, ALIGNMENT = 256, SPACE = size_t(1) << IMAGINARY_SPACE_BITS;
static const size_t LARGE = size_t(64) << 20;  // beyond that memory is not touched, so that cards of any size fit in here
static const unsigned char POISON = 0xFF, SLACK = 0xA5;  // all ones is NaN in every type

static unsigned char *reserve() {
    void *space = mmap(nullptr, SPACE, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (space == MAP_FAILED) {
        perror("the imaginary driver has no address space for its GPUs");
        abort();
    }
    return static_cast<unsigned char *>(space);
}

static size_t pages(size_t size) { return (size + PAGE - 1) / PAGE * PAGE; }

// Content ends at a guard page, as nearly as alignment allows.
Allocation *allocate(size_t size, int device) {
    static unsigned char *const content = reserve(), *const device_space = reserve();
    static size_t used = 0;
    const size_t aligned = (size + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT, whole = pages(aligned);
    if (used + whole + 2 * PAGE > SPACE) {
        fputs("the imaginary driver has given out all addresses: use fewer or smaller allocations\n", stderr);
        abort();
    }
    auto made = std::make_unique<Allocation>();
    made->block = content + used + PAGE;
    made->block_size = whole;
    used += whole + PAGE;
    if (mprotect(made->block, whole, PROT_READ | PROT_WRITE)) abort();
    made->bytes = made->block + whole - aligned;
    memset(made->block, SLACK, whole - aligned);
    if (size <= LARGE) memset(made->bytes, POISON, size);
    memset(made->bytes + size, SLACK, aligned - size);
    unsigned char *seen = device < 0 ? made->bytes : device_space + (made->bytes - content);
    made->address = reinterpret_cast<uintptr_t>(seen);
    made->size = size;
    made->device = device;
    made->context = current();
    return (machine.memory[made->address] = std::move(made)).get();
}

void free_allocation(Allocation *allocation, bool checked) {
    const unsigned char *end = allocation->block + allocation->block_size, *p = allocation->block;
    for (; checked && p < end; ++p) {
        if (p == allocation->bytes) p += allocation->size;
        if (p < end && *p != SLACK) {
            violate("%zu bytes are freed, and something was written %s them", allocation->size,
                    p < allocation->bytes ? "in front of" : "behind");
            break;
        }
    }
    mmap(allocation->block, allocation->block_size, PROT_NONE,
         MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED, -1, 0);
    if (allocation->file >= 0) close(allocation->file);
    machine.memory.erase(allocation->address);
}

Allocation *allocation_at(uintptr_t address, size_t size) {
    auto next = machine.memory.upper_bound(address);
    if (next == machine.memory.begin()) return nullptr;
    Allocation *found = std::prev(next)->second.get();
    return address + size <= found->address + found->size && address < found->address + found->size ? found : nullptr;
}

unsigned char *bytes_at(uintptr_t address, size_t size) {
    const Allocation *found = allocation_at(address, size);
    return found ? found->bytes + (address - found->address) : nullptr;
}

size_t allocated_bytes(int device) {
    size_t sum = 0;
    for (auto &[address, allocation] : machine.memory)
        if (allocation->device == device) sum += allocation->size;
    return sum;
}

const char *visible(Context *context, const Allocation *allocation) {
    if (!allocation) return "memory that is not allocated, or not any more";
    if (allocation->device < 0 || allocation->device == context->device) return nullptr;
    return context->peers.count(allocation->device) ? nullptr : "memory of another device, without peer access";
}

// --- host memory that must not change before it was copied -----------------------------------------------------------

static std::vector<std::weak_ptr<Watch>> watches;

std::shared_ptr<Watch> watch(const Work &work) {
    if (!work.host_size) return nullptr;
    const unsigned char *bytes = bytes_at(work.host_source, work.host_size);
    auto made = std::make_shared<Watch>(Watch{work.host_source, {bytes, bytes + work.host_size}});
    watches.erase(std::remove_if(watches.begin(), watches.end(), [](auto &one) { return one.expired(); }), watches.end());
    watches.push_back(made);
    return made;
}

void changed_by_device(uintptr_t address, size_t size) {
    for (auto &one : watches)
        if (auto kept = one.lock()) {
            const uintptr_t low = std::max(address, kept->address);
            const uintptr_t high = std::min(address + size, kept->address + kept->expected.size());
            if (low < high) memcpy(kept->expected.data() + (low - kept->address), bytes_at(low, high - low), high - low);
        }
}

// --- copies ----------------------------------------------------------------------------------------------------------

enum Side { HOST, DEVICE, ANY };

static bool is_side(uintptr_t address, size_t size, Side side, const char *function) {
    const Allocation *start = allocation_at(address, 1);
    if (start && !allocation_at(address, size)) {
        violate("%s: %zu bytes reach beyond an allocation of %zu", function, size, start->size);
        return false;
    }
    if (start ? side != ANY && side != (start->device < 0 ? HOST : DEVICE) : side == DEVICE) {
        violate("%s: %s", function,
                !start ? "device memory that is not allocated, or not any more"
                       : side == HOST ? "device memory is given for host memory" : "host memory is given for device memory");
        return false;
    }
    return true;
}

static CUresult copy(Function function, uintptr_t target, Side to, uintptr_t source, Side from, size_t size, CUstream on,
                     bool through_host = false) {
    const char *name = NAMES[function];
    Stream *stream = find<Stream>(on, name);
    if (!stream) return CUDA_ERROR_INVALID_HANDLE;
    if (const CUresult status = usable(stream->context)) return status;
    if (!is_side(target, size, to, name) || !is_side(source, size, from, name)) return CUDA_ERROR_INVALID_VALUE;
    const Allocation *sides[] = {allocation_at(target, size), allocation_at(source, size)};
    for (const Allocation *side : sides) {
        const char *why = side ? visible(stream->context, side) : nullptr;
        if (why && !through_host) {
            violate("%s: the stream's device copies %s", name, why);
            return CUDA_ERROR_INVALID_VALUE;
        }
    }
    const bool pageable = !sides[0] || !sides[1];
    if (pageable && stream->capture) {
        invalidate(stream->capture, name, "copies pageable memory, which a graph would read after it is gone");
        return CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED;
    }
    auto work = std::make_shared<Work>();
    work->what = name;
    work->context = stream->context;
    work->through_host = through_host;
    if (sides[0]) work->accesses.push_back({target, target + size, true});
    if (sides[1]) work->accesses.push_back({source, source + size, false});
    const bool between = sides[0] && sides[1] && sides[0]->device >= 0 && sides[1]->device >= 0 &&
                         sides[0]->device != sides[1]->device;
    const bool zeros = between && machine.peer_zeros;
    std::vector<unsigned char> held;  // pageable memory is read before the call returns
    if (!sides[1]) held.assign(reinterpret_cast<unsigned char *>(source), reinterpret_cast<unsigned char *>(source) + size);
    if (sides[1] && sides[1]->device < 0) work->host_source = source, work->host_size = size;
    const bool to_host = sides[0] && sides[0]->device < 0, to_pageable = !sides[0];
    auto done = std::make_shared<bool>(false);
    work->run = [=, held = std::move(held)](const Stamp &when) {
        unsigned char *into = to_pageable ? reinterpret_cast<unsigned char *>(target) : bytes_at(target, size);
        const unsigned char *of = held.empty() ? bytes_at(source, size) : held.data();
        if (when.watched && memcmp(of, when.watched->expected.data(), size))
            violate("%s: the host changed the memory before it was copied", name);
        zeros ? memset(into, 0, size) : memmove(into, of, size);
        if (to_host) changed_by_device(target, size);
        *done = true;
    };
    const CUresult status = submit(stream, std::move(work));
    if (status != CUDA_SUCCESS || !to_pageable) return status;
    return wait_until([&] { return *done || stream->context->sticky; }, name);  // pageable memory is written at once
}

static CUresult fill(Function function, uintptr_t target, unsigned int value, size_t width, size_t count, CUstream on) {
    const char *name = NAMES[function];
    Stream *stream = find<Stream>(on, name);
    if (!stream) return CUDA_ERROR_INVALID_HANDLE;
    if (const CUresult status = usable(stream->context)) return status;
    if (stream->context != current()) {
        violate("%s: the stream is of another context than the current one", name);
        return CUDA_ERROR_INVALID_HANDLE;
    }
    const size_t size = width * count;
    if (target % width || !is_side(target, size, DEVICE, name)) return CUDA_ERROR_INVALID_VALUE;
    if (const char *why = visible(stream->context, allocation_at(target, size))) {
        violate("%s: the stream's device fills %s", name, why);
        return CUDA_ERROR_INVALID_VALUE;
    }
    auto work = std::make_shared<Work>();
    work->what = name;
    work->context = stream->context;
    work->accesses.push_back({target, target + size, true});
    work->run = [=](const Stamp &) {
        unsigned char *into = bytes_at(target, size);
        for (size_t n = 0; n < size; n += width) memcpy(into + n, &value, width);
    };
    return submit(stream, std::move(work));
}

// A real GPU may be slower than this one: what the host has not heard of may still be running.
bool idle(const Allocation *allocation, const char *function) {
    if (broken()) return true;
    for (const Stream *stream : machine.streams)
        if (touches(stream, allocation->address, allocation->address + allocation->size)) {
            violate("%s: %zu bytes are freed while work on them is queued", function, allocation->size);
            return false;
        }
    for (const Record &record : allocation->history)
        if (machine.races && !host_knows(record)) {
            violate("%s: %zu bytes are freed before the host knows that %s on them is over", function, allocation->size,
                    record.what);
            return false;
        }
    return true;
}

static CUresult release(Function function, uintptr_t address, bool host) {
    const auto found = machine.memory.find(address);
    if (found == machine.memory.end() || (found->second->device < 0) != host) {
        violate("%s: nothing of this kind is allocated at %#lx: freed twice, or never allocated", NAMES[function],
                static_cast<unsigned long>(address));
        return CUDA_ERROR_INVALID_VALUE;
    }
    if (found->second->opened) {
        violate("%s: memory of another process is freed: its handle is to be closed", NAMES[function]);
        return CUDA_ERROR_INVALID_VALUE;
    }
    for (const Device &device : machine.devices)
        if (device.hangs) violate("%s waits for a device that hangs, for ever", NAMES[function]);
    idle(found->second.get(), NAMES[function]);
    free_allocation(found->second.get(), true);
    return CUDA_SUCCESS;
}

}  // namespace imaginary

using namespace imaginary;

CUresult cuPointerGetAttribute(void *data, CUpointer_attribute attribute, CUdeviceptr pointer) {
    return call(F_cuPointerGetAttribute, DRIVER, [&] {
        const Allocation *found = allocation_at(pointer, 1);
        if (!found) return CUDA_ERROR_INVALID_VALUE;
        if (attribute == CU_POINTER_ATTRIBUTE_MEMORY_TYPE) {
            *static_cast<unsigned int *>(data) = found->device < 0 ? CU_MEMORYTYPE_HOST : CU_MEMORYTYPE_DEVICE;
            return CUDA_SUCCESS;
        }
        if (attribute != CU_POINTER_ATTRIBUTE_DEVICE_ORDINAL) return CUDA_ERROR_NOT_SUPPORTED;
        *static_cast<int *>(data) = found->device < 0 ? found->context->device : found->device;
        return CUDA_SUCCESS;
    });
}

CUresult cuMemGetInfo_v2(size_t *free, size_t *total) {
    return call(F_cuMemGetInfo, CONTEXT, [&] {
        const size_t all = machine.devices[current()->device].free_bytes, used = allocated_bytes(current()->device);
        *free = all > used ? all - used : 0;
        *total = machine.devices[current()->device].total_bytes;
        return CUDA_SUCCESS;
    });
}

CUresult cuMemAlloc_v2(CUdeviceptr *pointer, size_t size) {
    return call(F_cuMemAlloc, CONTEXT | NO_CAPTURE, [&] {
        if (!size) return CUDA_ERROR_INVALID_VALUE;
        if (allocated_bytes(current()->device) + size > machine.devices[current()->device].free_bytes)
            return CUDA_ERROR_OUT_OF_MEMORY;
        *pointer = allocate(size, current()->device)->address;
        return CUDA_SUCCESS;
    });
}

CUresult cuMemFree_v2(CUdeviceptr pointer) {
    return call(F_cuMemFree, CONTEXT | NO_CAPTURE, [&] { return pointer ? release(F_cuMemFree, pointer, false) : CUDA_SUCCESS; });
}

CUresult cuMemHostAlloc(void **pointer, size_t size, unsigned int) {
    return call(F_cuMemHostAlloc, CONTEXT | NO_CAPTURE, [&] {
        if (!size) return CUDA_ERROR_INVALID_VALUE;
        *pointer = reinterpret_cast<void *>(allocate(size, -1)->address);
        return CUDA_SUCCESS;
    });
}

CUresult cuMemFreeHost(void *pointer) {
    return call(F_cuMemFreeHost, CONTEXT | NO_CAPTURE,
                [&] { return release(F_cuMemFreeHost, reinterpret_cast<uintptr_t>(pointer), true); });
}

CUresult cuMemcpyAsync(CUdeviceptr target, CUdeviceptr source, size_t size, CUstream stream) {
    return call(F_cuMemcpyAsync, CONTEXT, [&] { return copy(F_cuMemcpyAsync, target, ANY, source, ANY, size, stream); });
}

// Between contexts that are named; without peer access the driver goes through the host, which no graph can.
CUresult cuMemcpyPeerAsync(CUdeviceptr target, CUcontext to, CUdeviceptr source, CUcontext from, size_t size, CUstream on) {
    return call(F_cuMemcpyPeerAsync, CONTEXT, [&] {
        const Context *contexts[] = {find<Context>(to, "cuMemcpyPeerAsync"), find<Context>(from, "cuMemcpyPeerAsync")};
        if (!contexts[0] || !contexts[1]) return CUDA_ERROR_INVALID_CONTEXT;
        const Allocation *sides[] = {allocation_at(target, size), allocation_at(source, size)};
        for (int n = 0; n < 2; ++n)
            if (sides[n] && sides[n]->device != contexts[n]->device) {
                violate("cuMemcpyPeerAsync: memory is of another context than the one that is named");
                return CUDA_ERROR_INVALID_VALUE;
            }
        const Stream *stream = find<Stream>(on, "cuMemcpyPeerAsync");
        const bool through_host = stream && !stream->capture;
        return copy(F_cuMemcpyPeerAsync, target, DEVICE, source, DEVICE, size, on, through_host);
    });
}

CUresult cuMemcpyHtoDAsync_v2(CUdeviceptr target, const void *source, size_t size, CUstream stream) {
    return call(F_cuMemcpyHtoDAsync, CONTEXT, [&] {
        return copy(F_cuMemcpyHtoDAsync, target, DEVICE, reinterpret_cast<uintptr_t>(source), HOST, size, stream);
    });
}

CUresult cuMemcpyDtoHAsync_v2(void *target, CUdeviceptr source, size_t size, CUstream stream) {
    return call(F_cuMemcpyDtoHAsync, CONTEXT, [&] {
        return copy(F_cuMemcpyDtoHAsync, reinterpret_cast<uintptr_t>(target), HOST, source, DEVICE, size, stream);
    });
}

CUresult cuMemcpyDtoDAsync_v2(CUdeviceptr target, CUdeviceptr source, size_t size, CUstream stream) {
    return call(F_cuMemcpyDtoDAsync, CONTEXT,
                [&] { return copy(F_cuMemcpyDtoDAsync, target, DEVICE, source, DEVICE, size, stream); });
}

CUresult cuMemsetD8Async(CUdeviceptr target, unsigned char value, size_t count, CUstream stream) {
    return call(F_cuMemsetD8Async, CONTEXT, [&] { return fill(F_cuMemsetD8Async, target, value, 1, count, stream); });
}

CUresult cuMemsetD32Async(CUdeviceptr target, unsigned int value, size_t count, CUstream stream) {
    return call(F_cuMemsetD32Async, CONTEXT, [&] { return fill(F_cuMemsetD32Async, target, value, 4, count, stream); });
}
