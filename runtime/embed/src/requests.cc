// A request's life: admitted, encoded, denoised on the lanes that it holds, decoded, and put where the caller wants it.
#include <algorithm>
#include <cmath>
#include <new>

#include "engine.h"
#include "error.h"
#include "noise.h"

namespace driffusion {

void Engine::notify(Request &request, Player &player, u32 finished, u32 *previewed) const {
    const Call &call = request.call;
    const u32 steps = program_.model.steps;
    request.finished.store(finished);
    int stop = 0;
    try {
        if (call.progress) {
            InCallback inside;
            stop = call.progress(call.user, finished, steps);
        }
        if (!stop && call.preview && finished < steps && finished - *previewed >= std::max(1u, call.preview_every)) {
            *previewed = finished;
            std::vector<std::uint8_t> rgb(std::size_t(program_.model.width) * program_.model.height * 3);
            player.download();
            decode(player.slot(0), 1, rgb.data());
            InCallback inside;
            stop = call.preview(call.user, rgb.data(), program_.model.width, program_.model.height, finished);
        }
    } catch (const Error &) {
        throw;
    } catch (const std::bad_alloc &) {
        throw;
    } catch (...) {
        fail(DRIFFUSION_ERROR_CANCELLED, "a callback threw an exception");
    }
    if (stop) fail(DRIFFUSION_ERROR_CANCELLED, "cancelled by a callback after " + std::to_string(finished) + " steps");
}

// Draws the state and the noise, or takes the caller's, and plays the program on the lanes of the lease.
void Engine::denoise(Request &request, Lease &lease, Player &player, driffusion_result &result, const Check &check) {
    const Call &call = request.call;
    const std::size_t each = program_.latent_elements(), elements = each * call.images;
    const float scale = float(program_.model.start_scale);
    u32 noise = 0;
    for (u32 slot = 0; slot < program_.slots.size(); ++slot) {
        const Slot &one = program_.slots[slot];
        if (one.kind != SlotKind::State && one.kind != SlotKind::Noise) continue;
        float *to = player.slot(slot);
        const bool state = one.kind == SlotKind::State;
        const std::vector<float> &own = state ? call.latents : call.noise;
        if (!own.empty()) {
            const float *from = own.data() + (state ? 0 : elements * noise);
            std::copy(from, from + elements, to);
        } else {
            for (u32 image = 0; image < call.images; ++image) gaussian(call.seed, image, one.number, to + image * each, each);
        }
        if (state) {
            for (std::size_t n = 0; n < elements; ++n) to[n] *= scale;
        } else {
            ++noise;
        }
    }
    player.upload();
    u32 previewed = 0;
    Counts counts = player.play(lease, check, [&](u32 finished) { notify(request, player, finished, &previewed); });
    result.rounds = counts.rounds, result.evaluations = counts.evaluations, result.calls = counts.calls;
    result.lanes_per_round = double(counts.lane_rounds) / std::max(1u, counts.rounds);
    result.critical_seconds = counts.critical_seconds;
}

void Engine::enqueued(Request &request, cuda::Output &output) const {
    output.enqueued();
    std::lock_guard<std::mutex> lock(request.mutex);
    request.enqueued = true;
    request.changed.notify_all();
}

driffusion_result Engine::make(Request &request) {
    const Call &call = request.call;
    const cuda::Target &target = call.target;
    auto check = [&] {
        if (request.cancelled.load()) fail(DRIFFUSION_ERROR_CANCELLED, "cancelled after " + std::to_string(request.finished.load()) + " steps");
    };
    driffusion_result result = DRIFFUSION_RESULT_INIT;
    const double started = now();
    check();
    Encoded encoded = encode(call);
    const double written = now();
    u32 branches = program_.model.guidance_kind == CLASSIFIER_FREE && call.guidance > 1 ? 2 : 1;
    std::vector<float> latents(program_.latent_elements() * call.images);
    std::unique_ptr<cuda::Output> output;
    if (target.gpu) output = std::make_unique<cuda::Output>(target, settings_.lane_timeout);
    const bool on_host = call.rgb || call.latents_out || target.rgb;
    double leased, denoised;
    {
        Lease lease(lanes_, seconds(call.images, branches), check);
        leased = now();
        Player &player = *players_[lease.own()];
        player.bind(call.images, call.guidance, std::move(encoded.branches));
        denoise(request, lease, player, result, check);
        if (target.latents) static_cast<cuda::Player &>(player).send(*output, *target.gpu);
        if (output && !target.rgb) enqueued(request, *output);
        player.finish();
        if (on_host) {
            player.download();
            std::copy(player.slot(0), player.slot(0) + latents.size(), latents.begin());
        }
        denoised = now();
    }
    if (!std::all_of(latents.begin(), latents.end(), [](float value) { return std::isfinite(value); })) {
        fail(DRIFFUSION_ERROR_NONFINITE, "the denoised latents hold NaN or infinity: no image can be made of them");
    }
    std::vector<std::uint8_t> pixels;
    if (target.rgb && !call.rgb) pixels.resize(std::size_t(program_.model.width) * program_.model.height * 3 * call.images);
    std::uint8_t *rgb = call.rgb ? call.rgb : pixels.data();
    if (call.rgb || target.rgb) decode(latents.data(), call.images, rgb);
    if (call.latents_out) std::copy(latents.begin(), latents.end(), call.latents_out);
    if (target.rgb) {
        output->rgb(rgb, std::size_t(program_.model.width) * program_.model.height * 3 * call.images);
        enqueued(request, *output);
    }
    if (output) output->wait();
    const double ended = now();
    result.truncated = encoded.truncated;
    result.text_seconds = written - started, result.wait_seconds = leased - written, result.denoise_seconds = denoised - leased;
    result.decode_seconds = ended - denoised, result.total_seconds = ended - started;
    return result;
}

void Engine::perform(Request &request) noexcept {
    driffusion_status status = DRIFFUSION_OK;
    driffusion_result result = DRIFFUSION_RESULT_INIT;
    std::string message;
    try {
        result = make(request);
    } catch (const Error &error) {
        status = error.status();
        message = error.what();
    } catch (const std::bad_alloc &) {
        status = DRIFFUSION_ERROR_MEMORY;  // no message: there may be no memory for one
    } catch (...) {
        status = DRIFFUSION_ERROR_INTERNAL;
    }
    std::lock_guard<std::mutex> lock(request.mutex);
    request.done = true;
    request.status = status;
    request.message = std::move(message);
    request.result = result;
    request.changed.notify_all();
}

void Engine::begin(const std::shared_ptr<Request> &request) {
    std::lock_guard<std::mutex> lock(mutex_);
    if (closing_) fail(DRIFFUSION_ERROR_HANDLE, "the engine is being closed");
    if (running_.size() >= settings_.max_requests) {
        fail(DRIFFUSION_ERROR_BUSY, std::to_string(running_.size()) + " requests are running or waiting already (option max_requests)");
    }
    running_.push_back(request);
}

void Engine::end(const Request *request) {
    std::lock_guard<std::mutex> lock(mutex_);
    running_.erase(std::find_if(running_.begin(), running_.end(), [request](auto &one) { return one.get() == request; }));
    idle_.notify_all();
}

bool Engine::close() {
    if (inside_callback()) return false;
    std::unique_lock<std::mutex> lock(mutex_);
    closing_ = true;
    for (auto &request : running_) request->cancelled.store(true);
    lanes_.wake();
    idle_.wait(lock, [this] { return running_.empty(); });
    return true;
}

}  // namespace driffusion
