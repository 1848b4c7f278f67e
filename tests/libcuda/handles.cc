// Handles, violations, faults on request, devices and contexts.
#include <cstdarg>
#include <cstdio>

#include "machine.h"

namespace imaginary {

Machine machine;
thread_local bool inside_callback = false;
thread_local int capture_mode = CU_STREAM_CAPTURE_MODE_GLOBAL;
static thread_local uintptr_t current_context = 0;

const char *const NAMES[FUNCTIONS] = {
#define X(name, symbol, parameters) #name,
    DRIVER_FUNCTIONS(X)
#undef X
};

const char *name_of(Kind kind) {
    static const char *const names[] = {"context", "stream", "event", "graph", "executable graph", "module", "function"};
    return names[static_cast<int>(kind)];
}

void violate(const char *format, ...) {
    char text[600];
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(text, sizeof text, format, arguments);
    va_end(arguments);
    for (const std::string &known : machine.violations)
        if (known == text) return;
    if (machine.violations.size() < 200) machine.violations.emplace_back(text);
}

// Handles count up from an address that nothing is mapped at, and none is given out twice in a process.
uintptr_t new_handle() {
    static uintptr_t last = 0x7e0000000000;
    return last += 16;
}

Object *find(uintptr_t handle, Kind kind, const char *function) {
    const auto found = machine.objects.find(handle);
    if (found == machine.objects.end())
        violate("%s: %#lx is no %s", function, static_cast<unsigned long>(handle), name_of(kind));
    else if (found->second->kind != kind)
        violate("%s: a %s is taken for a %s", function, name_of(found->second->kind), name_of(kind));
    else if (!found->second->alive)
        violate("%s: this %s was destroyed before", function, name_of(kind));
    else
        return found->second.get();
    return nullptr;
}

Context *current() {
    const auto found = machine.objects.find(current_context);
    if (found == machine.objects.end() || !found->second->alive) return nullptr;
    return static_cast<Context *>(found->second.get());
}

CUresult usable(const Context *context) { return context ? context->sticky : CUDA_ERROR_INVALID_CONTEXT; }

void break_context(Context *context, CUresult status) {
    if (context->sticky == CUDA_SUCCESS) context->sticky = status;
}

CUresult begin(Function function, int needs, bool *skip) {
    ++machine.calls[function];
    for (int n = machine.eager ? machine.random() % (machine.eager + 1) : 0; n > 0 && advance(); --n) {
    }
    CUresult failure = CUDA_SUCCESS;
    for (Fault &fault : machine.faults)
        if (fault.function == function && fault.left > 0 && --fault.left == 0) {
            failure = static_cast<CUresult>(fault.status);
            *skip = fault.skip;
            if (fault.sticky && current()) break_context(current(), failure);
        }
    if (failure != CUDA_SUCCESS || *skip) return failure;
    if (needs & (DRIVER | CONTEXT) && !machine.initialized) {
        violate("%s is called before cuInit", NAMES[function]);
        return CUDA_ERROR_NOT_INITIALIZED;
    }
    if (needs & CONTEXT) {
        if (!current()) violate("%s: this thread has no current context, or one that was destroyed", NAMES[function]);
        if (const CUresult status = usable(current())) return status;
    }
    return needs & NO_CAPTURE ? refuse_during_capture(function) : CUDA_SUCCESS;
}

void destroy_context(Context *context, bool checked) {
    checked = checked && context->sticky == CUDA_SUCCESS;
    for (auto &[handle, object] : machine.objects) {
        if (!object->alive || object->context != context) continue;
        if (checked) violate("a context is destroyed, and with it a %s that is still there", name_of(object->kind));
        object->alive = false;
        if (object->kind == Kind::Stream) {
            Stream *stream = static_cast<Stream *>(object.get());
            if (checked && !stream->queue.empty()) violate("a context is destroyed while work is queued in it");
            stream->queue.clear();
        }
    }
    auto &streams = machine.streams;
    streams.erase(std::remove_if(streams.begin(), streams.end(), [](Stream *one) { return !one->alive; }), streams.end());
    std::vector<Allocation *> mine;
    for (auto &[address, allocation] : machine.memory)
        if (allocation->context == context) mine.push_back(allocation.get());
    for (Allocation *allocation : mine) {
        if (checked) violate("a context is destroyed, and with it %zu bytes that were not freed", allocation->size);
        free_allocation(allocation, false);
    }
    context->alive = false;
}

static bool exists(CUdevice device, const char *function) {
    if (device >= 0 && device < static_cast<int>(machine.devices.size())) return true;
    violate("%s: there is no device %d", function, device);
    return false;
}

}  // namespace imaginary

using namespace imaginary;

CUresult cuInit(unsigned int flags) {
    return call(F_cuInit, NOTHING, [&] {
        if (flags) return CUDA_ERROR_INVALID_VALUE;
        if (machine.devices.empty()) return CUDA_ERROR_NO_DEVICE;
        machine.initialized = true;
        return CUDA_SUCCESS;
    });
}

CUresult cuDriverGetVersion(int *version) {
    return call(F_cuDriverGetVersion, NOTHING, [&] {
        *version = machine.version;
        return CUDA_SUCCESS;
    });
}

CUresult cuGetErrorString(CUresult error, const char **text) {
#define X(name, number, words) if (error == name) return *text = words, CUDA_SUCCESS;
    DRIVER_STATUS(X)
#undef X
    return *text = nullptr, CUDA_ERROR_INVALID_VALUE;
}

CUresult cuGetErrorName(CUresult error, const char **text) {
#define X(name, number, words) if (error == name) return *text = #name, CUDA_SUCCESS;
    DRIVER_STATUS(X)
#undef X
    return *text = nullptr, CUDA_ERROR_INVALID_VALUE;
}

CUresult cuGetExportTable(const void **table, const CUuuid *) {
    *table = nullptr;  // the compiler library asks, and goes on without
    return CUDA_ERROR_NOT_FOUND;
}

CUresult cuGetProcAddress_v2(const char *symbol, void **function, int, cuuint64_t, CUdriverProcAddressQueryResult *status) {
    static const std::map<std::string, void *> functions = {
#define X(name, exported, parameters) \
    {#name, reinterpret_cast<void *>(exported)}, {#exported, reinterpret_cast<void *>(exported)},
        DRIVER_FUNCTIONS(X)
#undef X
    };
    const auto found = functions.find(symbol);
    *function = found == functions.end() ? nullptr : found->second;
    if (status) *status = *function ? 0 : 1;
    return *function ? CUDA_SUCCESS : CUDA_ERROR_NOT_FOUND;
}

// --- devices ---------------------------------------------------------------------------------------------------------

CUresult cuDeviceGetCount(int *count) {
    return call(F_cuDeviceGetCount, DRIVER, [&] {
        *count = static_cast<int>(machine.devices.size());
        return CUDA_SUCCESS;
    });
}

CUresult cuDeviceGet(CUdevice *device, int ordinal) {
    return call(F_cuDeviceGet, DRIVER, [&] {
        if (!exists(ordinal, "cuDeviceGet")) return CUDA_ERROR_INVALID_DEVICE;
        *device = ordinal;
        return CUDA_SUCCESS;
    });
}

CUresult cuDeviceGetName(char *name, int length, CUdevice device) {
    return call(F_cuDeviceGetName, DRIVER, [&] {
        if (!exists(device, "cuDeviceGetName")) return CUDA_ERROR_INVALID_DEVICE;
        snprintf(name, length, "Imaginary GPU");
        return CUDA_SUCCESS;
    });
}

CUresult cuDeviceGetAttribute(int *value, CUdevice_attribute attribute, CUdevice device) {
    return call(F_cuDeviceGetAttribute, DRIVER, [&] {
        if (!exists(device, "cuDeviceGetAttribute")) return CUDA_ERROR_INVALID_DEVICE;
        *value = attribute == CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR ? 9 : 0;
        return CUDA_SUCCESS;
    });
}

CUresult cuDeviceGetPCIBusId(char *id, int length, CUdevice device) {
    return call(F_cuDeviceGetPCIBusId, DRIVER, [&] {
        if (!exists(device, "cuDeviceGetPCIBusId")) return CUDA_ERROR_INVALID_DEVICE;
        snprintf(id, length, "0000:%02x:00.0", device);
        return CUDA_SUCCESS;
    });
}

CUresult cuDeviceCanAccessPeer(int *can, CUdevice device, CUdevice peer) {
    return call(F_cuDeviceCanAccessPeer, DRIVER, [&] {
        if (!exists(device, "cuDeviceCanAccessPeer") || !exists(peer, "cuDeviceCanAccessPeer"))
            return CUDA_ERROR_INVALID_DEVICE;
        *can = machine.peers && device != peer;
        return CUDA_SUCCESS;
    });
}

// --- contexts --------------------------------------------------------------------------------------------------------

CUresult cuDevicePrimaryCtxRetain(CUcontext *context, CUdevice number) {
    return call(F_cuDevicePrimaryCtxRetain, DRIVER | NO_CAPTURE, [&] {
        if (!exists(number, "cuDevicePrimaryCtxRetain")) return CUDA_ERROR_INVALID_DEVICE;
        Device &device = machine.devices[number];
        if (!device.context || !device.context->alive) {
            if (device.gone) return CUDA_ERROR_DEVICE_UNAVAILABLE;
            device.context = create<Context>(nullptr);
            device.context->device = number;
        }
        ++device.references;
        *context = handle_of<CUcontext>(device.context);
        return CUDA_SUCCESS;
    });
}

CUresult cuDevicePrimaryCtxRelease_v2(CUdevice number) {
    return call(F_cuDevicePrimaryCtxRelease, DRIVER | NO_CAPTURE, [&] {
        if (!exists(number, "cuDevicePrimaryCtxRelease")) return CUDA_ERROR_INVALID_DEVICE;
        Device &device = machine.devices[number];
        if (!device.references) {
            violate("cuDevicePrimaryCtxRelease: the context of device %d is released more often than retained", number);
            return CUDA_ERROR_INVALID_CONTEXT;
        }
        if (!--device.references && device.context->alive) destroy_context(device.context, true);
        return CUDA_SUCCESS;
    });
}

CUresult cuDevicePrimaryCtxReset_v2(CUdevice number) {
    return call(F_cuDevicePrimaryCtxReset, DRIVER | NO_CAPTURE, [&] {
        if (!exists(number, "cuDevicePrimaryCtxReset")) return CUDA_ERROR_INVALID_DEVICE;
        Device &device = machine.devices[number];
        if (device.context && device.context->alive) destroy_context(device.context, true);
        return CUDA_SUCCESS;
    });
}

CUresult cuDevicePrimaryCtxGetState(CUdevice number, unsigned int *flags, int *active) {
    return call(F_cuDevicePrimaryCtxGetState, DRIVER, [&] {
        if (!exists(number, "cuDevicePrimaryCtxGetState")) return CUDA_ERROR_INVALID_DEVICE;
        *flags = 0;
        *active = machine.devices[number].context && machine.devices[number].context->alive;
        return CUDA_SUCCESS;
    });
}

CUresult cuCtxSetCurrent(CUcontext context) {
    return call(F_cuCtxSetCurrent, DRIVER, [&] {
        if (context && !find<Context>(context, "cuCtxSetCurrent")) return CUDA_ERROR_INVALID_CONTEXT;
        current_context = reinterpret_cast<uintptr_t>(context);
        return CUDA_SUCCESS;
    });
}

CUresult cuCtxGetCurrent(CUcontext *context) {
    return call(F_cuCtxGetCurrent, DRIVER, [&] {
        *context = current() ? handle_of<CUcontext>(current()) : nullptr;
        return CUDA_SUCCESS;
    });
}

CUresult cuCtxGetDevice(CUdevice *device) {
    return call(F_cuCtxGetDevice, DRIVER, [&] {
        if (!current()) return CUDA_ERROR_INVALID_CONTEXT;
        *device = current()->device;
        return CUDA_SUCCESS;
    });
}

CUresult cuCtxGetStreamPriorityRange(int *least, int *greatest) {
    return call(F_cuCtxGetStreamPriorityRange, CONTEXT, [&] {
        *least = 0, *greatest = -5;
        return CUDA_SUCCESS;
    });
}

CUresult cuCtxEnablePeerAccess(CUcontext peer, unsigned int flags) {
    return call(F_cuCtxEnablePeerAccess, CONTEXT, [&] {
        const Context *other = find<Context>(peer, "cuCtxEnablePeerAccess");
        if (!other || other == current()) return CUDA_ERROR_INVALID_CONTEXT;
        if (flags) return CUDA_ERROR_INVALID_VALUE;
        if (!machine.peers) return CUDA_ERROR_PEER_ACCESS_UNSUPPORTED;
        const bool added = current()->peers.insert(other->device).second;
        return added ? CUDA_SUCCESS : CUDA_ERROR_PEER_ACCESS_ALREADY_ENABLED;
    });
}

CUresult cuCtxDisablePeerAccess(CUcontext peer) {
    return call(F_cuCtxDisablePeerAccess, CONTEXT, [&] {
        const Context *other = find<Context>(peer, "cuCtxDisablePeerAccess");
        if (!other || !current()->peers.erase(other->device)) return CUDA_ERROR_INVALID_CONTEXT;
        return CUDA_SUCCESS;
    });
}
