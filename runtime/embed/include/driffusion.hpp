// driffusion.hpp: driffusion.h with owners that release and errors that throw. C++17, header only; with C++20 images can
// be made into a std::span.
#pragma once
#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>
#if __cplusplus >= 202002L
#include <span>
#endif

#include "driffusion.h"

namespace driffusion {

class error : public std::runtime_error {
   public:
    error(driffusion_status status, const std::string &message) : std::runtime_error(message), status_(status) {}
    driffusion_status status() const noexcept { return status_; }

   private:
    driffusion_status status_;
};

inline void check(driffusion_status status) {
    if (status != DRIFFUSION_OK) throw error(status, std::string(driffusion_status_name(status)) + ": " + driffusion_last_error());
}

// What was made: of several images one after the other.
struct image {
    std::uint32_t width = 0, height = 0;
    std::vector<std::uint8_t> rgb;  // rows from the top
    driffusion_result result = DRIFFUSION_RESULT_INIT;
    std::vector<float> latents = {};  // where they were asked for
};

// Memory of a GPU: its CUdeviceptr, and how many bytes or floats there are.
struct device_memory {
    std::uint64_t address = 0;
    std::size_t size = 0;
};

// What to make. Callbacks return true to go on; they run between two rounds, and may not throw.
struct call {
    std::string prompt;
    std::string negative_prompt = {};
    std::uint64_t seed = 0;
    double guidance = DRIFFUSION_DEFAULT_GUIDANCE;
    std::function<bool(std::uint32_t finished, std::uint32_t steps)> progress = {};
    std::function<bool(const std::uint8_t *rgb, std::uint32_t width, std::uint32_t height, std::uint32_t finished)> preview = {};
    std::uint32_t preview_every = 0;
    std::uint32_t images = 1;
    std::vector<std::int64_t> token_ids = {}, negative_token_ids = {};  // in place of words
    std::vector<float> latents = {}, noise = {};                        // in place of what the seed draws
    bool want_rgb = true, want_latents = false;                         // in memory of this process
    device_memory device_rgb = {}, device_latents = {};                 // only for lanes on GPUs, with their stream
    void *stream = nullptr, *event = nullptr;                           // CUstream, and a CUevent or null
};

class engine;

// An image that is being made in a thread of the library. Its destructor cancels it and waits.
class request {
   public:
    request(request &&other) noexcept : handle_(std::exchange(other.handle_, 0)), state_(std::move(other.state_)) {}
    request &operator=(request &&other) noexcept {
        std::swap(handle_, other.handle_);
        std::swap(state_, other.state_);
        return *this;
    }
    ~request() {
        if (handle_) driffusion_release(handle_);
    }
    void cancel() { check(driffusion_cancel(handle_)); }
    bool done() { return driffusion_poll(handle_, nullptr) != DRIFFUSION_ERROR_TIMEOUT; }
    // Until the outputs in device memory are in order on the stream; throws as wait() does.
    void wait_enqueued(double seconds = -1) { check(driffusion_wait_enqueued(handle_, seconds)); }
    // The image; throws what the request came to, and TIMEOUT when it is not finished after so many seconds.
    image wait(double seconds = -1) {
        check(driffusion_wait(handle_, seconds, &state_->made.result));
        return state_->made;
    }

   private:
    friend class engine;
    struct state {
        call asked;
        image made;
    };
    request() = default;
    driffusion_request handle_ = 0;
    std::unique_ptr<state> state_;
};

class engine {
   public:
    engine(const std::string &bundle, const std::string &program, const std::string &devices = "", std::vector<std::pair<std::string, std::string>> options = {}) {
        std::vector<driffusion_option> raw;
        for (auto &[key, value] : options) raw.push_back({key.c_str(), value.c_str()});
        driffusion_open_info info = DRIFFUSION_OPEN_INIT;
        info.bundle = bundle.c_str(), info.program = program.c_str();
        info.devices = devices.empty() ? nullptr : devices.c_str();
        info.options = raw.data(), info.option_count = raw.size();
        check(driffusion_open(&info, &handle_));
    }
    engine(engine &&other) noexcept : handle_(std::exchange(other.handle_, 0)) {}
    engine &operator=(engine &&other) noexcept {
        std::swap(handle_, other.handle_);
        return *this;
    }
    ~engine() {
        if (handle_) driffusion_close(handle_);
    }
    driffusion_engine handle() const { return handle_; }

    driffusion_sizes_info sizes(std::uint32_t images = 1) const {
        driffusion_sizes_info sizes = DRIFFUSION_SIZES_INIT;
        check(driffusion_sizes(handle_, images, &sizes));
        return sizes;
    }

    image generate(call asked) const {
        image made;
        driffusion_call raw = prepare(asked, made);
        check(driffusion_generate(handle_, &raw, &made.result));
        return made;
    }

#if __cplusplus >= 202002L
    // Into memory of the caller in place of an image's own: an empty span is an output that is not wanted.
    driffusion_result generate(call asked, std::span<std::uint8_t> rgb, std::span<float> latents = {}) const {
        asked.want_rgb = asked.want_latents = false;
        image none;
        driffusion_call raw = prepare(asked, none);
        raw.rgb = rgb.data(), raw.rgb_bytes = rgb.size();
        raw.latents_out = latents.data(), raw.latents_out_count = latents.size();
        check(driffusion_generate(handle_, &raw, &none.result));
        return none.result;
    }
#endif

    request start(call asked) const {
        request started;
        started.state_ = std::make_unique<request::state>();
        started.state_->asked = std::move(asked);
        driffusion_call raw = prepare(started.state_->asked, started.state_->made);
        check(driffusion_start(handle_, &raw, &started.handle_));
        return started;
    }

   private:
    template <typename T>
    static T *given(std::vector<T> &values) { return values.empty() ? nullptr : values.data(); }

    driffusion_call prepare(call &asked, image &made) const {
        const driffusion_sizes_info needed = sizes(asked.images);
        made.width = needed.width, made.height = needed.height;
        made.rgb.resize(asked.want_rgb ? needed.rgb_bytes : 0);
        made.latents.resize(asked.want_latents ? needed.latent_count : 0);
        driffusion_call raw = DRIFFUSION_CALL_INIT;
        raw.images = asked.images, raw.seed = asked.seed, raw.guidance = asked.guidance;
        raw.token_ids = given(asked.token_ids), raw.token_count = asked.token_ids.size();
        raw.negative_token_ids = given(asked.negative_token_ids), raw.negative_token_count = asked.negative_token_ids.size();
        raw.prompt = raw.token_ids && asked.prompt.empty() ? nullptr : asked.prompt.c_str();
        raw.negative_prompt = asked.negative_prompt.empty() ? nullptr : asked.negative_prompt.c_str();
        raw.latents = given(asked.latents), raw.latent_count = asked.latents.size();
        raw.noise = given(asked.noise), raw.noise_count = asked.noise.size();
        raw.rgb = given(made.rgb), raw.rgb_bytes = made.rgb.size();
        raw.latents_out = given(made.latents), raw.latents_out_count = made.latents.size();
        raw.device_rgb = asked.device_rgb.address, raw.device_rgb_bytes = asked.device_rgb.size;
        raw.device_latents = asked.device_latents.address, raw.device_latents_count = asked.device_latents.size;
        raw.stream = asked.stream, raw.event = asked.event;
        raw.user = &asked, raw.preview_every = asked.preview_every;
        if (asked.progress) {
            raw.progress = [](void *user, std::uint32_t finished, std::uint32_t steps) -> int { return !static_cast<call *>(user)->progress(finished, steps); };
        }
        if (asked.preview) {
            raw.preview = [](void *user, const std::uint8_t *rgb, std::uint32_t width, std::uint32_t height, std::uint32_t finished) -> int {
                return !static_cast<call *>(user)->preview(rgb, width, height, finished);
            };
        }
        return raw;
    }

    driffusion_engine handle_ = 0;
};

}  // namespace driffusion
