// The part of TensorRT's binary interface that is used: TensorRT 11 (libnvinfer.so.11) and TensorRT-RTX 1
// (libtensorrt_rtx.so.1). No package that pip or apt installs here has their headers, so that this declares what NVIDIA's
// own Python bindings call: tests/runtime/embed/test_tensorrt.py drives those bindings and this library over one and the
// same implementation, and finds every function at the place that is named here.
//
// An object is a pointer to its table of virtual functions, then one to its implementation, whose own table has the
// functions; `this` is the first argument (Itanium C++ ABI).
#pragma once
#include <cstddef>
#include <cstdint>

#include "driver_api.h"

namespace driffusion::tensorrt {

struct Implementation {
    void *const *functions;
};
struct Object {
    void *const *functions;  // 0 and 1: destructors, the second of which frees, too
    Implementation *implementation;
};

struct Dims {
    std::int32_t rank;
    std::int64_t sizes[8];
};

struct InterfaceInfo {
    const char *kind;
    std::int32_t major, minor;
};

enum Place : int {
    DELETE = 1,
    // of the runtime
    DESERIALIZE = 3,  // Object *(const void *plan, size_t size)
    // of an engine
    CREATE_CONTEXT = 5,    // Object *(int strategy)
    TENSOR_DATA_TYPE = 16, // int (const char *name)
    // of a context
    SET_INPUT_SHAPE = 20,     // bool (const char *name, const Dims &)
    SET_TENSOR_ADDRESS = 23,  // bool (const char *name, void *)
    ENQUEUE = 36,             // bool (CUstream)
    MEMORY_SIZE = 47,         // size_t (), for the shapes that were set
    SET_MEMORY = 48,          // void (void *, int64_t size)
    // of a logger, which is ours and has no implementation beside it: 0 the language, 1 the interface, 2 and 3 destructors
    LOG = 4,  // void (int severity, const char *message)
    LOGGER_PLACES = 5,
};
constexpr int USER_MANAGED = 2;         // where a context's memory comes from
constexpr int FLOAT = 0, INT64 = 8;     // data types
constexpr int INTERNAL_ERROR = 0, ERROR = 1;  // severities of messages

template <typename Result, typename... Arguments>
Result call(Object *object, Place place, Arguments... arguments) {
    using Function = Result (*)(Implementation *, Arguments...);
    return reinterpret_cast<Function>(object->implementation->functions[place])(object->implementation, arguments...);
}

inline void destroy(Object *object) { reinterpret_cast<void (*)(Object *)>(object->functions[DELETE])(object); }

}  // namespace driffusion::tensorrt
