// The part of the CUDA driver API that is used: types, status codes and one list of functions. The imaginary driver
// in tests/libcuda defines them all; `cuda_driver.cc` beside this looks its own up in the real one.
//
// The numbers and signatures are those of cuda.h (CUDA 13), so that code which includes this needs no toolkit;
// tests/libcuda/test_library.py compares them with the declarations that come with cuda-python.
#pragma once
#include <cstddef>
#include <cstdint>

typedef int CUdevice;
typedef unsigned long long CUdeviceptr;
typedef struct CUctx_st *CUcontext;
typedef struct CUstream_st *CUstream;
typedef struct CUevent_st *CUevent;
typedef struct CUgraph_st *CUgraph;
typedef struct CUgraphExec_st *CUgraphExec;
typedef struct CUmod_st *CUmodule;
typedef struct CUfunc_st *CUfunction;
typedef struct CUuuid_st CUuuid;
typedef int CUdevice_attribute;
typedef int CUpointer_attribute;
typedef int CUstreamCaptureMode;
typedef int CUstreamCaptureStatus;
typedef int CUdriverProcAddressQueryResult;
typedef unsigned long long cuuint64_t;
typedef struct CUipcMemHandle_st {
    char reserved[64];
} CUipcMemHandle;

enum : int {
    CU_STREAM_CAPTURE_MODE_GLOBAL = 0,
    CU_STREAM_CAPTURE_MODE_THREAD_LOCAL = 1,
    CU_STREAM_CAPTURE_MODE_RELAXED = 2,
    CU_EVENT_DISABLE_TIMING = 2,
    CU_POINTER_ATTRIBUTE_MEMORY_TYPE = 2,
    CU_POINTER_ATTRIBUTE_DEVICE_ORDINAL = 9,
    CU_MEMORYTYPE_HOST = 1,
    CU_MEMORYTYPE_DEVICE = 2,
    CU_IPC_MEM_LAZY_ENABLE_PEER_ACCESS = 1,
    CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR = 75,
    CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR = 76,
};

// status codes, with the driver's own words for each
#define DRIVER_STATUS(X)                                                                                             \
    X(CUDA_SUCCESS, 0, "no error")                                                                                   \
    X(CUDA_ERROR_INVALID_VALUE, 1, "invalid argument")                                                               \
    X(CUDA_ERROR_OUT_OF_MEMORY, 2, "out of memory")                                                                  \
    X(CUDA_ERROR_NOT_INITIALIZED, 3, "initialization error")                                                         \
    X(CUDA_ERROR_DEVICE_UNAVAILABLE, 46, "CUDA-capable device(s) is/are busy or unavailable")                        \
    X(CUDA_ERROR_NO_DEVICE, 100, "no CUDA-capable device is detected")                                               \
    X(CUDA_ERROR_INVALID_DEVICE, 101, "invalid device ordinal")                                                      \
    X(CUDA_ERROR_INVALID_IMAGE, 200, "device kernel image is invalid")                                               \
    X(CUDA_ERROR_INVALID_CONTEXT, 201, "invalid device context")                                                     \
    X(CUDA_ERROR_MAP_FAILED, 205, "mapping of buffer object failed")                                                 \
    X(CUDA_ERROR_NO_BINARY_FOR_GPU, 209, "no kernel image is available for execution on the device")                 \
    X(CUDA_ERROR_PEER_ACCESS_UNSUPPORTED, 217, "peer access is not supported between these two devices")             \
    X(CUDA_ERROR_INVALID_HANDLE, 400, "invalid resource handle")                                                     \
    X(CUDA_ERROR_NOT_FOUND, 500, "named symbol not found")                                                           \
    X(CUDA_ERROR_NOT_READY, 600, "device not ready")                                                                 \
    X(CUDA_ERROR_ILLEGAL_ADDRESS, 700, "an illegal memory access was encountered")                                   \
    X(CUDA_ERROR_LAUNCH_TIMEOUT, 702, "the launch timed out and was terminated")                                     \
    X(CUDA_ERROR_PEER_ACCESS_ALREADY_ENABLED, 704, "peer access is already enabled")                                 \
    X(CUDA_ERROR_MISALIGNED_ADDRESS, 716, "misaligned address")                                                      \
    X(CUDA_ERROR_LAUNCH_FAILED, 719, "unspecified launch failure")                                                   \
    X(CUDA_ERROR_NOT_PERMITTED, 800, "operation not permitted")                                                      \
    X(CUDA_ERROR_NOT_SUPPORTED, 801, "operation not supported")                                                      \
    X(CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED, 900, "operation not permitted when stream is capturing")                \
    X(CUDA_ERROR_STREAM_CAPTURE_INVALIDATED, 901, "operation failed due to a previous error during capture")         \
    X(CUDA_ERROR_STREAM_CAPTURE_MERGE, 902, "operation would result in a merge of separate capture sequences")       \
    X(CUDA_ERROR_STREAM_CAPTURE_UNMATCHED, 903, "capture was not ended in the same stream as it began")              \
    X(CUDA_ERROR_STREAM_CAPTURE_UNJOINED, 904, "capturing stream has unjoined work")                                 \
    X(CUDA_ERROR_STREAM_CAPTURE_ISOLATION, 905, "dependency created on uncaptured work in another stream")           \
    X(CUDA_ERROR_STREAM_CAPTURE_IMPLICIT, 906, "operation would make the legacy stream depend on a capturing stream") \
    X(CUDA_ERROR_CAPTURED_EVENT, 907, "operation not permitted on an event last recorded in a capturing stream")     \
    X(CUDA_ERROR_STREAM_CAPTURE_WRONG_THREAD, 908,                                                                   \
      "attempt to terminate a thread-local capture sequence from another thread")                                    \
    X(CUDA_ERROR_UNKNOWN, 999, "unknown error")

typedef enum cudaError_enum : int {
#define X(name, number, text) name = number,
    DRIVER_STATUS(X)
#undef X
} CUresult;

// X(name in cuGetProcAddress, exported symbol, parameters)
#define DRIVER_FUNCTIONS(X)                                                                                          \
    X(cuInit, cuInit, (unsigned int flags))                                                                          \
    X(cuDriverGetVersion, cuDriverGetVersion, (int *version))                                                        \
    X(cuGetErrorString, cuGetErrorString, (CUresult error, const char **text))                                       \
    X(cuGetErrorName, cuGetErrorName, (CUresult error, const char **text))                                           \
    X(cuGetProcAddress, cuGetProcAddress_v2,                                                                         \
      (const char *symbol, void **function, int version, cuuint64_t flags, CUdriverProcAddressQueryResult *status))  \
    X(cuGetExportTable, cuGetExportTable, (const void **table, const CUuuid *id))                                    \
    X(cuDeviceGetCount, cuDeviceGetCount, (int *count))                                                              \
    X(cuDeviceGet, cuDeviceGet, (CUdevice * device, int ordinal))                                                    \
    X(cuDeviceGetName, cuDeviceGetName, (char *name, int length, CUdevice device))                                   \
    X(cuDeviceGetAttribute, cuDeviceGetAttribute, (int *value, CUdevice_attribute attribute, CUdevice device))       \
    X(cuDeviceGetPCIBusId, cuDeviceGetPCIBusId, (char *id, int length, CUdevice device))                             \
    X(cuDeviceCanAccessPeer, cuDeviceCanAccessPeer, (int *can, CUdevice device, CUdevice peer))                      \
    X(cuDevicePrimaryCtxRetain, cuDevicePrimaryCtxRetain, (CUcontext * context, CUdevice device))                    \
    X(cuDevicePrimaryCtxRelease, cuDevicePrimaryCtxRelease_v2, (CUdevice device))                                    \
    X(cuDevicePrimaryCtxReset, cuDevicePrimaryCtxReset_v2, (CUdevice device))                                        \
    X(cuDevicePrimaryCtxGetState, cuDevicePrimaryCtxGetState, (CUdevice device, unsigned int *flags, int *active))   \
    X(cuCtxSetCurrent, cuCtxSetCurrent, (CUcontext context))                                                         \
    X(cuCtxGetCurrent, cuCtxGetCurrent, (CUcontext * context))                                                       \
    X(cuCtxGetDevice, cuCtxGetDevice, (CUdevice * device))                                                           \
    X(cuCtxSynchronize, cuCtxSynchronize, ())                                                                        \
    X(cuCtxGetStreamPriorityRange, cuCtxGetStreamPriorityRange, (int *least, int *greatest))                         \
    X(cuCtxEnablePeerAccess, cuCtxEnablePeerAccess, (CUcontext peer, unsigned int flags))                            \
    X(cuCtxDisablePeerAccess, cuCtxDisablePeerAccess, (CUcontext peer))                                              \
    X(cuMemGetInfo, cuMemGetInfo_v2, (size_t * free, size_t *total))                                                 \
    X(cuPointerGetAttribute, cuPointerGetAttribute,                                                                  \
      (void *data, CUpointer_attribute attribute, CUdeviceptr pointer))                                              \
    X(cuMemGetAddressRange, cuMemGetAddressRange_v2, (CUdeviceptr * base, size_t *size, CUdeviceptr pointer))        \
    X(cuIpcGetMemHandle, cuIpcGetMemHandle, (CUipcMemHandle * handle, CUdeviceptr pointer))                          \
    X(cuIpcOpenMemHandle, cuIpcOpenMemHandle_v2,                                                                     \
      (CUdeviceptr * pointer, CUipcMemHandle handle, unsigned int flags))                                            \
    X(cuIpcCloseMemHandle, cuIpcCloseMemHandle, (CUdeviceptr pointer))                                               \
    X(cuMemAlloc, cuMemAlloc_v2, (CUdeviceptr * pointer, size_t size))                                               \
    X(cuMemFree, cuMemFree_v2, (CUdeviceptr pointer))                                                                \
    X(cuMemHostAlloc, cuMemHostAlloc, (void **pointer, size_t size, unsigned int flags))                             \
    X(cuMemFreeHost, cuMemFreeHost, (void *pointer))                                                                 \
    X(cuMemcpyAsync, cuMemcpyAsync, (CUdeviceptr target, CUdeviceptr source, size_t size, CUstream stream))          \
    X(cuMemcpyPeerAsync, cuMemcpyPeerAsync,                                                                          \
      (CUdeviceptr target, CUcontext to, CUdeviceptr source, CUcontext from, size_t size, CUstream stream))          \
    X(cuMemcpyHtoDAsync, cuMemcpyHtoDAsync_v2,                                                                       \
      (CUdeviceptr target, const void *source, size_t size, CUstream stream))                                        \
    X(cuMemcpyDtoHAsync, cuMemcpyDtoHAsync_v2, (void *target, CUdeviceptr source, size_t size, CUstream stream))     \
    X(cuMemcpyDtoDAsync, cuMemcpyDtoDAsync_v2,                                                                       \
      (CUdeviceptr target, CUdeviceptr source, size_t size, CUstream stream))                                        \
    X(cuMemsetD8Async, cuMemsetD8Async, (CUdeviceptr target, unsigned char value, size_t count, CUstream stream))    \
    X(cuMemsetD32Async, cuMemsetD32Async, (CUdeviceptr target, unsigned int value, size_t count, CUstream stream))   \
    X(cuStreamCreate, cuStreamCreate, (CUstream * stream, unsigned int flags))                                       \
    X(cuStreamCreateWithPriority, cuStreamCreateWithPriority, (CUstream * stream, unsigned int flags, int priority)) \
    X(cuStreamDestroy, cuStreamDestroy_v2, (CUstream stream))                                                        \
    X(cuStreamQuery, cuStreamQuery, (CUstream stream))                                                               \
    X(cuStreamSynchronize, cuStreamSynchronize, (CUstream stream))                                                   \
    X(cuStreamWaitEvent, cuStreamWaitEvent, (CUstream stream, CUevent event, unsigned int flags))                    \
    X(cuStreamBeginCapture, cuStreamBeginCapture_v2, (CUstream stream, CUstreamCaptureMode mode))                    \
    X(cuStreamEndCapture, cuStreamEndCapture, (CUstream stream, CUgraph *graph))                                     \
    X(cuStreamIsCapturing, cuStreamIsCapturing, (CUstream stream, CUstreamCaptureStatus *status))                    \
    X(cuThreadExchangeStreamCaptureMode, cuThreadExchangeStreamCaptureMode, (CUstreamCaptureMode * mode))            \
    X(cuEventCreate, cuEventCreate, (CUevent * event, unsigned int flags))                                           \
    X(cuEventDestroy, cuEventDestroy_v2, (CUevent event))                                                            \
    X(cuEventRecord, cuEventRecord, (CUevent event, CUstream stream))                                                \
    X(cuEventQuery, cuEventQuery, (CUevent event))                                                                   \
    X(cuEventSynchronize, cuEventSynchronize, (CUevent event))                                                       \
    X(cuEventElapsedTime, cuEventElapsedTime_v2, (float *milliseconds, CUevent start, CUevent end))                  \
    X(cuGraphInstantiate, cuGraphInstantiateWithFlags,                                                               \
      (CUgraphExec * executable, CUgraph graph, unsigned long long flags))                                           \
    X(cuGraphLaunch, cuGraphLaunch, (CUgraphExec executable, CUstream stream))                                       \
    X(cuGraphDestroy, cuGraphDestroy, (CUgraph graph))                                                               \
    X(cuGraphExecDestroy, cuGraphExecDestroy, (CUgraphExec executable))                                              \
    X(cuModuleLoadData, cuModuleLoadData, (CUmodule * module, const void *image))                                    \
    X(cuModuleUnload, cuModuleUnload, (CUmodule module))                                                             \
    X(cuModuleGetFunction, cuModuleGetFunction, (CUfunction * function, CUmodule module, const char *name))          \
    X(cuLaunchKernel, cuLaunchKernel,                                                                                \
      (CUfunction function, unsigned int grid_x, unsigned int grid_y, unsigned int grid_z, unsigned int block_x,     \
       unsigned int block_y, unsigned int block_z, unsigned int shared_bytes, CUstream stream, void **parameters,    \
       void **extra))

#define X(name, symbol, parameters) extern "C" __attribute__((visibility("default"))) CUresult symbol parameters;
DRIVER_FUNCTIONS(X)
#undef X
