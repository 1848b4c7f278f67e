// A model opened for a program: its networks, lanes, and the requests that run on them.
#pragma once
#include <atomic>
#include <condition_variable>
#include <functional>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#include "cuda_player.h"
#include "driffusion.h"
#include "lanes.h"
#include "ort.h"
#include "player.h"
#include "program.h"
#include "tokenizer.h"
#include "workers.h"

namespace driffusion {

struct Settings {
    std::string bundle, program, runtime, plan, tensorrt = "libnvinfer.so.11";
    u32 lanes = 0, threads = 0;  // 0: as the program says
    std::vector<int> gpus;       // by lane; empty: lanes on processor cores
    double spin_seconds = 0;
    u32 max_requests = 256;
    bool compiled = true;
    double lane_timeout = cuda::LANE_TIMEOUT;
    void (*log)(void *, driffusion_log_level, const char *) = nullptr;
    void *log_user = nullptr;

    static Settings of(const driffusion_open_info &info);
    // One lane on each of these GPUs: cuda:0,cuda:1 or cuda:0*LANES.
    void place_on_gpus(const std::string &text);
};

// A checked call. It owns what a caller may free after driffusion_start().
struct Call {
    u32 images = 1;
    u64 seed = 0;
    double guidance = 0;
    std::string prompt, negative_prompt;
    bool has_prompt = false, has_negative = false;
    std::vector<i64> ids, negative_ids;
    std::vector<float> latents, noise;
    std::uint8_t *rgb = nullptr;
    float *latents_out = nullptr;
    cuda::Target target;
    driffusion_progress progress = nullptr;
    driffusion_preview preview = nullptr;
    void *user = nullptr;
    u32 preview_every = 0;
};

struct Request {
    Call call;
    std::atomic<bool> cancelled{false};
    std::atomic<u32> finished{0};
    std::mutex mutex;
    std::condition_variable changed;
    bool done = false;  // these five under the mutex
    bool enqueued = false;
    driffusion_status status = DRIFFUSION_ERROR_TIMEOUT;
    std::string message;
    driffusion_result result = DRIFFUSION_RESULT_INIT;
    std::thread thread;
    std::weak_ptr<class Engine> engine;
};

class Engine {
   public:
    explicit Engine(const Settings &settings);
    ~Engine();

    const Program &program() const { return program_; }
    driffusion_sizes_info sizes(u32 images) const;
    Call checked(const driffusion_call &call) const;
    std::vector<i64> tokenize(std::string_view text, u32 *truncated) const;

    // Makes the images of a request in this thread; what went wrong is in its status and message.
    void perform(Request &request) noexcept;
    // Counts a request as running; Error with BUSY or STATE where it may not begin.
    void begin(const std::shared_ptr<Request> &request);
    void end(const Request *request);
    // Cancels everything and waits until nothing runs any more. False when called from one of its own callbacks.
    bool close();
    void wake() { lanes_.wake(); }
    void log(driffusion_log_level level, const std::string &message) const noexcept;

   private:
    struct Encoded {
        std::vector<Conditioning> branches;
        u32 truncated = 0;
    };
    std::unique_ptr<Session> open_session(Role role, u32 threads, bool spin);
    std::vector<i64> ids_of(std::string_view text, u32 *truncated) const;
    driffusion_result make(Request &request);
    Encoded encode(const Call &call) const;
    void decode(const float *latents, u32 images, std::uint8_t *rgb) const;
    Seconds seconds(u32 images, u32 branches) const;
    u32 placed();
    void open_gpus();
    void denoise(Request &request, Lease &lease, Player &player, driffusion_result &result, const Check &check);
    void enqueued(Request &request, cuda::Output &output) const;
    void check_outputs(const driffusion_call &raw, const driffusion_sizes_info &sizes, Call &call) const;
    void notify(Request &request, Player &player, u32 finished, u32 *previewed) const;

    Settings settings_;
    Program program_;
    std::shared_ptr<Runtime> runtime_;
    std::vector<std::unique_ptr<Tokenizer>> tokenizers_;  // null where the file is of another kind
    std::vector<std::string> tokenizer_problems_;
    std::unique_ptr<Session> encoder_, decoder_;
    std::vector<std::unique_ptr<Session>> denoisers_;
    Lanes lanes_;
    std::unique_ptr<Workers> workers_;
    std::vector<std::unique_ptr<cuda::Lane>> gpu_lanes_;
    std::unique_ptr<cuda::Pairs> links_;
    std::unique_ptr<cuda::Hangs> hangs_;
    std::vector<std::unique_ptr<Player>> players_;  // by owned lane
    std::mutex mutex_;
    std::condition_variable idle_;
    std::vector<std::shared_ptr<Request>> running_;
    bool closing_ = false;
};

struct InCallback {
    InCallback();
    ~InCallback();
};
// Whether this thread is inside a callback of the engine.
bool inside_callback();

}  // namespace driffusion
