// Memory of one process that another one opens.
//
// An allocation whose handle is asked for moves into a file without a name; the handle says which process has it open.
#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

#include <cstdio>

#include "machine.h"

namespace imaginary {

struct Handle {
    char magic[8];
    int process, file, device;
    size_t size, block_size;
};
static_assert(sizeof(Handle) <= sizeof(CUipcMemHandle), "a handle has 64 bytes");
static const char MAGIC[8] = "imagine";

static bool map_file(Allocation *allocation, int file) {
    return mmap(allocation->block, allocation->block_size, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_FIXED, file, 0) !=
           MAP_FAILED;
}

static bool move_to_file(Allocation *allocation) {
    const int file = memfd_create("imaginary device memory", MFD_CLOEXEC);
    if (file < 0) return false;
    if (write(file, allocation->block, allocation->block_size) != static_cast<ssize_t>(allocation->block_size) ||
        !map_file(allocation, file)) {
        close(file);
        return false;
    }
    allocation->file = file;
    return true;
}

static CUresult open_handle(CUdeviceptr *pointer, const CUipcMemHandle &given, unsigned int flags) {
    Handle handle;
    memcpy(&handle, given.reserved, sizeof handle);
    if (memcmp(handle.magic, MAGIC, sizeof MAGIC)) return CUDA_ERROR_INVALID_VALUE;
    if (flags != CU_IPC_MEM_LAZY_ENABLE_PEER_ACCESS) return CUDA_ERROR_INVALID_VALUE;
    if (handle.process == getpid()) return CUDA_ERROR_INVALID_CONTEXT;
    if (handle.device != current()->device && !machine.peers) return CUDA_ERROR_INVALID_VALUE;
    const std::string name(reinterpret_cast<const char *>(&handle), sizeof handle);
    for (auto &[address, allocation] : machine.memory)
        if (allocation->exporter == name && allocation->context == current()) {
            ++allocation->opened;
            *pointer = address;
            return CUDA_SUCCESS;
        }
    char path[64];
    snprintf(path, sizeof path, "/proc/%d/fd/%d", handle.process, handle.file);
    const int file = open(path, O_RDWR | O_CLOEXEC);
    if (file < 0) return CUDA_ERROR_MAP_FAILED;
    Allocation *made = allocate(handle.size, handle.device);
    if (made->block_size != handle.block_size || !map_file(made, file)) {
        close(file);
        free_allocation(made, false);
        return CUDA_ERROR_MAP_FAILED;
    }
    if (handle.device != current()->device) current()->peers.insert(handle.device);
    made->file = file;
    made->exporter = name;
    made->opened = 1;
    *pointer = made->address;
    return CUDA_SUCCESS;
}

}  // namespace imaginary

using namespace imaginary;

CUresult cuMemGetAddressRange_v2(CUdeviceptr *base, size_t *size, CUdeviceptr pointer) {
    return call(F_cuMemGetAddressRange, CONTEXT, [&] {
        const Allocation *found = allocation_at(pointer, 1);
        if (!found) return CUDA_ERROR_NOT_FOUND;
        if (base) *base = found->address;
        if (size) *size = found->size;
        return CUDA_SUCCESS;
    });
}

CUresult cuIpcGetMemHandle(CUipcMemHandle *handle, CUdeviceptr pointer) {
    return call(F_cuIpcGetMemHandle, CONTEXT | NO_CAPTURE, [&] {
        Allocation *found = allocation_at(pointer, 1);
        if (!found || found->device < 0 || found->opened) return CUDA_ERROR_INVALID_VALUE;
        if (found->file < 0 && !move_to_file(found)) return CUDA_ERROR_OUT_OF_MEMORY;
        Handle made{};
        memcpy(made.magic, MAGIC, sizeof MAGIC);
        made.process = getpid();
        made.file = found->file;
        made.device = found->device;
        made.size = found->size;
        made.block_size = found->block_size;
        memset(handle->reserved, 0, sizeof handle->reserved);
        memcpy(handle->reserved, &made, sizeof made);
        return CUDA_SUCCESS;
    });
}

CUresult cuIpcOpenMemHandle_v2(CUdeviceptr *pointer, CUipcMemHandle handle, unsigned int flags) {
    return call(F_cuIpcOpenMemHandle, CONTEXT | NO_CAPTURE, [&] { return open_handle(pointer, handle, flags); });
}

CUresult cuIpcCloseMemHandle(CUdeviceptr pointer) {
    return call(F_cuIpcCloseMemHandle, CONTEXT | NO_CAPTURE, [&] {
        const auto found = machine.memory.find(pointer);
        if (found == machine.memory.end() || !found->second->opened) {
            violate("cuIpcCloseMemHandle: no memory of another process is open at %#lx: closed twice, or never opened",
                    static_cast<unsigned long>(pointer));
            return CUDA_ERROR_INVALID_VALUE;
        }
        if (!idle(found->second.get(), "cuIpcCloseMemHandle") || --found->second->opened) return CUDA_SUCCESS;
        free_allocation(found->second.get(), false);
        return CUDA_SUCCESS;
    });
}
