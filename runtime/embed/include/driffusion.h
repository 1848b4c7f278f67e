/* driffusion.h: makes images from a program file and an exported model, without Python. C11 and C++17.
 *
 * Handles are numbers, never pointers: a handle that was closed or released, or that never was one, is answered with
 * DRIFFUSION_ERROR_HANDLE. Every function may be called from any thread. No function throws, aborts or exits.
 * README.md beside this folder has the rules of ownership, threads, errors and versions. */
#ifndef DRIFFUSION_H
#define DRIFFUSION_H

#include <math.h>
#include <stddef.h>
#include <stdint.h>

#if defined(DRIFFUSION_BUILDING)
#define DRIFFUSION_API __attribute__((visibility("default")))
#else
#define DRIFFUSION_API
#endif

#ifdef __cplusplus
extern "C" {
#endif

/* The ABI that this header describes. It changes only where an old binary would go wrong. */
#define DRIFFUSION_ABI_VERSION 1u

typedef enum driffusion_status {
    DRIFFUSION_OK = 0,
    DRIFFUSION_ERROR_ARGUMENT = 1,  /* a null pointer, a number out of range, a text that is not UTF-8, an unknown option */
    DRIFFUSION_ERROR_HANDLE = 2,    /* closed, released, of the other kind, or never a handle */
    DRIFFUSION_ERROR_VERSION = 3,   /* of the ABI, a struct, a program file or ONNX Runtime */
    DRIFFUSION_ERROR_PROGRAM = 4,   /* the program file is missing, damaged or of another kind */
    DRIFFUSION_ERROR_BUNDLE = 5,    /* a file of the model is missing or not the one that the program was written for */
    DRIFFUSION_ERROR_DEVICE = 6,    /* an unknown device, or one that failed */
    DRIFFUSION_ERROR_BUFFER = 7,    /* a buffer is too small; the message and driffusion_sizes() say what is needed */
    DRIFFUSION_ERROR_CANCELLED = 8, /* by driffusion_cancel(), by a callback, or because the engine was closed */
    DRIFFUSION_ERROR_NONFINITE = 9, /* the model gave NaN or infinity: there is no image */
    DRIFFUSION_ERROR_BUSY = 10,     /* too many requests at once (option max_requests) */
    DRIFFUSION_ERROR_TIMEOUT = 11,  /* driffusion_wait(): not finished yet */
    DRIFFUSION_ERROR_MEMORY = 12,   /* out of memory or threads */
    DRIFFUSION_ERROR_STATE = 13,    /* not allowed inside a callback */
    DRIFFUSION_ERROR_UNSUPPORTED = 14, /* the program asks for what this build cannot do */
    DRIFFUSION_ERROR_INTERNAL = 15  /* a fault of this library */
} driffusion_status;

typedef uint64_t driffusion_engine;  /* 0 is never a handle */
typedef uint64_t driffusion_request;

typedef enum driffusion_log_level { DRIFFUSION_LOG_ERROR = 1, DRIFFUSION_LOG_WARNING = 2, DRIFFUSION_LOG_INFO = 3 } driffusion_log_level;

typedef struct driffusion_option {
    const char *key, *value;
} driffusion_option;

/* What driffusion_open() is told. Start from DRIFFUSION_OPEN_INIT. Nothing in it is kept after the call but `log_user`. */
typedef struct driffusion_open_info {
    uint32_t struct_size;  /* sizeof(driffusion_open_info) */
    uint32_t abi_version;  /* DRIFFUSION_ABI_VERSION */
    const char *bundle;    /* the folder of the exported model */
    const char *program;   /* the file that `python -m runtime program` wrote */
    const char *devices;   /* "cpu" (one lane, all cores), "cpu@THREADS", "cpu*LANES", "cuda:0,cuda:1"; null: as the program says */
    const driffusion_option *options; /* threads, spin_us, max_requests, lane_timeout, …; see README.md */
    size_t option_count;
    void (*log)(void *log_user, driffusion_log_level level, const char *message); /* may be null; from any thread */
    void *log_user;
} driffusion_open_info;
#define DRIFFUSION_OPEN_INIT {sizeof(driffusion_open_info), DRIFFUSION_ABI_VERSION, NULL, NULL, NULL, NULL, 0, NULL, NULL}

/* What buffers for so many images need. Asking draws nothing. */
typedef struct driffusion_sizes_info {
    uint32_t struct_size; /* sizeof(driffusion_sizes_info) */
    uint32_t width, height, steps, lanes;
    uint32_t token_count;     /* ids of one prompt: of all tokenizers, one after the other */
    uint64_t rgb_bytes;       /* images × height × width × 3 */
    uint64_t latent_count;    /* floats: images × channels × height/f × width/f */
    uint64_t noise_count;     /* floats of the noise that stochastic steps add; 0 for a deterministic scheduler */
} driffusion_sizes_info;
#define DRIFFUSION_SIZES_INIT {sizeof(driffusion_sizes_info), 0, 0, 0, 0, 0, 0, 0, 0}

/* After each block of steps. Not 0 cancels the request. Runs in the thread that makes the image, between two rounds. */
typedef int (*driffusion_progress)(void *user, uint32_t finished, uint32_t steps);
/* The image so far, of the first image of the request: RGB, 8 bits, rows from the top; valid during the call. */
typedef int (*driffusion_preview)(void *user, const uint8_t *rgb, uint32_t width, uint32_t height, uint32_t finished);

#define DRIFFUSION_DEFAULT_GUIDANCE ((double)NAN) /* the program's own */

/* What to make. Start from DRIFFUSION_CALL_INIT. driffusion_start() copies texts, ids, latents and noise; `rgb` and
 * `latents_out` must stay valid until the request is finished. One of prompt and token_ids, and at least one output, must
 * be given. `struct_size` may be that of an older header, down to the one that ended with `reserved`. */
typedef struct driffusion_call {
    uint32_t struct_size; /* sizeof(driffusion_call) */
    uint32_t images;      /* image i of a call draws its noise from (seed, i, step) */
    uint64_t seed;
    double guidance;
    const char *prompt, *negative_prompt; /* UTF-8; a null negative prompt is none */
    const int64_t *token_ids, *negative_token_ids; /* in place of words: exactly token_count ids, padded */
    size_t token_count, negative_token_count;
    const float *latents; /* initial noise of unit variance, or null */
    size_t latent_count;
    const float *noise; /* of the stochastic steps: (slots in the program's order, images, channels, height, width), or null */
    size_t noise_count;
    uint8_t *rgb; /* (images, height, width, 3) */
    size_t rgb_bytes;
    float *latents_out; /* (images, channels, height/f, width/f) */
    size_t latents_out_count;
    driffusion_progress progress;
    driffusion_preview preview;
    void *user;
    uint32_t preview_every; /* steps between previews; 0: after every block */
    uint32_t reserved;      /* 0 */
    /* since 1.1: outputs in memory of a GPU, beside or in place of rgb and latents_out; only for lanes on GPUs */
    uint64_t device_rgb;     /* CUdeviceptr of (images, height, width, 3) bytes, or 0 */
    size_t device_rgb_bytes;
    uint64_t device_latents; /* CUdeviceptr of float32, as latents_out, or 0; on the same GPU */
    size_t device_latents_count;
    void *stream; /* CUstream on which they are written, behind what it has to do already; CU_STREAM_LEGACY: the default one */
    void *event;  /* CUevent that is recorded on the stream behind them, or null; see driffusion_wait_enqueued() */
} driffusion_call;
#define DRIFFUSION_CALL_INIT \
    {sizeof(driffusion_call), 1, 0, DRIFFUSION_DEFAULT_GUIDANCE, NULL, NULL, NULL, NULL, 0, 0, NULL, 0, NULL, 0, NULL, 0, NULL, 0, NULL, NULL, NULL, 0, 0, 0, 0, 0, 0, NULL, NULL}

/* What a request did. Seconds are wall time. */
typedef struct driffusion_result {
    uint32_t struct_size; /* sizeof(driffusion_result) */
    uint32_t rounds, evaluations, calls, truncated; /* truncated: prompts that were cut at the tokenizer's length */
    double lanes_per_round;
    double text_seconds, wait_seconds, denoise_seconds, decode_seconds, total_seconds;
    double critical_seconds; /* the longest model call of every round, added up: denoise minus that is overhead */
} driffusion_result;
#define DRIFFUSION_RESULT_INIT {sizeof(driffusion_result), 0, 0, 0, 0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0}

/* MAJOR << 16 | MINOR << 8 | PATCH of the library that is running. */
DRIFFUSION_API uint32_t driffusion_version(void);
/* The name of a status, such as "BUFFER"; never null. */
DRIFFUSION_API const char *driffusion_status_name(driffusion_status status);
/* What went wrong in the last failed call of this thread; valid until its next call. Never null. */
DRIFFUSION_API const char *driffusion_last_error(void);

/* Opens a model for a program on some lanes. Several engines may be open in a process. */
DRIFFUSION_API driffusion_status driffusion_open(const driffusion_open_info *info, driffusion_engine *engine);
/* Cancels and waits for everything that runs on the engine, then frees it. Its requests can still be asked and released. */
DRIFFUSION_API driffusion_status driffusion_close(driffusion_engine engine);
DRIFFUSION_API driffusion_status driffusion_sizes(driffusion_engine engine, uint32_t images, driffusion_sizes_info *sizes);
/* The ids of a text as driffusion_generate() makes them; *count is how many there are, also when `capacity` is too small. */
DRIFFUSION_API driffusion_status driffusion_tokenize(driffusion_engine engine, const char *text, int64_t *ids, size_t capacity, size_t *count);

/* Makes images in the calling thread. `result` may be null. */
DRIFFUSION_API driffusion_status driffusion_generate(driffusion_engine engine, const driffusion_call *call, driffusion_result *result);
/* Makes images in a thread of the library. Every request is to be released. *request is set before the first callback. */
DRIFFUSION_API driffusion_status driffusion_start(driffusion_engine engine, const driffusion_call *call, driffusion_request *request);
/* Waits for so many seconds, for ever if negative; then what the request came to, or TIMEOUT. `result` may be null. */
DRIFFUSION_API driffusion_status driffusion_wait(driffusion_request request, double seconds, driffusion_result *result);
/* Waits until the outputs in device memory are in order on the call's stream: what is put on the stream or waits for the
 * event from then on finds them there. The image may still be under way, and what it came to, NaN included, is what
 * driffusion_wait() says. TIMEOUT as there; a request that ended with an error before: its status. Since 1.1. */
DRIFFUSION_API driffusion_status driffusion_wait_enqueued(driffusion_request request, double seconds);
/* TIMEOUT while it runs, else what it came to; `finished` counts steps and may be null. */
DRIFFUSION_API driffusion_status driffusion_poll(driffusion_request request, uint32_t *finished);
/* Ends a request before its next round. Nothing happens to one that is finished. */
DRIFFUSION_API driffusion_status driffusion_cancel(driffusion_request request);
/* Cancels a request that still runs, waits until its buffers are no longer used, and forgets it. */
DRIFFUSION_API driffusion_status driffusion_release(driffusion_request request);
/* The message of a request that failed, with its ending 0; *needed is its size, also when `capacity` is too small. */
DRIFFUSION_API driffusion_status driffusion_request_error(driffusion_request request, char *message, size_t capacity, size_t *needed);

#ifdef __cplusplus
}
#endif
#endif
