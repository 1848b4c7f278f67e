#include "engine.h"

#include <algorithm>
#include <cmath>
#include <new>

#include "error.h"
#include "files.h"
#include "noise.h"

namespace driffusion {
namespace {

constexpr u32 MOST_IMAGES = 1024;

thread_local u32 callbacks = 0;

struct InCallback {
    InCallback() { ++callbacks; }
    ~InCallback() { --callbacks; }
};

void check_text(const char *name, const char *text, std::string &into, bool &given) {
    given = text != nullptr;
    if (!text) return;
    into = text;
    if (!valid_utf8(into)) fail(DRIFFUSION_ERROR_ARGUMENT, std::string(name) + " is not UTF-8");
}

template <typename T>
std::vector<T> given(const char *name, const T *data, std::size_t count, u64 wanted) {
    if (!data) return {};
    if (count != wanted) {
        fail(DRIFFUSION_ERROR_ARGUMENT, std::string(name) + " must have " + std::to_string(wanted) + " numbers, not " + std::to_string(count));
    }
    return std::vector<T>(data, data + count);
}

void check_finite(const char *name, const std::vector<float> &values) {
    if (!std::all_of(values.begin(), values.end(), [](float value) { return std::isfinite(value); })) {
        fail(DRIFFUSION_ERROR_ARGUMENT, std::string(name) + " hold NaN or infinity");
    }
}

void need(const char *name, u64 has, u64 wanted, const char *unit) {
    if (has < wanted) {
        fail(DRIFFUSION_ERROR_BUFFER, std::string(name) + " is too small: it has " + std::to_string(has) + " " + unit + ", " + std::to_string(wanted) + " are needed");
    }
}

std::string joined(const Program &program, const TokenizerSpec &spec) { return program.string(program.files[spec.file].name); }

}  // namespace

bool inside_callback() { return callbacks > 0; }

Engine::Engine(const Settings &settings)
    : settings_(settings),
      program_(Program::parse(read_file(settings.program, DRIFFUSION_ERROR_PROGRAM, u64(1) << 28))),
      runtime_(Runtime::open(settings.runtime)),
      lanes_(settings.lanes ? settings.lanes : program_.model.lanes) {
    const u32 all = cores(), lanes = lanes_.count();
    if (!settings_.threads) settings_.threads = std::max(1u, std::min(program_.model.threads, all));
    for (const TokenizerSpec &spec : program_.tokenizers) {
        tokenizers_.push_back(nullptr);
        tokenizer_problems_.emplace_back();
        try {
            tokenizers_.back() = Tokenizer::load(read_checked(settings_.bundle, program_, program_.files[spec.file]));
        } catch (const Error &error) {
            if (error.status() != DRIFFUSION_ERROR_UNSUPPORTED) throw;
            tokenizer_problems_.back() = joined(program_, spec) + " cannot be used (" + error.what() + "): give token ids";
            log(DRIFFUSION_LOG_WARNING, tokenizer_problems_.back());
        }
    }
    if (lanes * settings_.threads > all) settings_.spin_seconds = 0;  // who spins would take a core from who computes
    const u32 threads = std::max(1u, lanes > 1 ? all : settings_.threads);
    encoder_ = open_session(Role::TextEncoder, threads, false);
    const bool on_gpus = !settings_.gpus.empty();
    for (u32 lane = 0; lane < lanes && !on_gpus; ++lane) denoisers_.push_back(open_session(Role::Denoiser, settings_.threads, lanes == 1));
    decoder_ = open_session(Role::VaeDecoder, threads, false);
    workers_ = std::make_unique<Workers>(on_gpus ? 1 : lanes, settings_.spin_seconds);
    for (int ordinal : settings_.gpus) {
        cuda::Gpu gpu(ordinal);
        gpu_lanes_.emplace_back(new cuda::Lane{gpu, cuda::open_network(gpu, [&] { return open_session(Role::Denoiser, settings_.threads, false); }), cuda::Stream(gpu)});
    }
    if (on_gpus) links_ = std::make_unique<cuda::Pairs>(gpu_lanes_);
    for (u32 lane = 0; lane < lanes && on_gpus; ++lane) players_.push_back(std::make_unique<cuda::Player>(program_, denoisers_, *workers_, gpu_lanes_, *links_, lane));
    for (u32 lane = 0; lane < lanes && !on_gpus; ++lane) players_.push_back(std::make_unique<Player>(program_, denoisers_, *workers_));
    log(DRIFFUSION_LOG_INFO, std::string(program_.string(program_.model.model)) + " is open: " + program_.string(program_.model.mode) + ", " +
                                 std::to_string(program_.model.steps) + " steps, " + std::to_string(lanes) + " lanes of " +
                                 std::to_string(settings_.threads) + " threads, ONNX Runtime " + runtime_->version());
}

Engine::~Engine() {
    close();
    workers_.reset();  // first: a lane's thread may still be leaving the last round of a player
}

std::unique_ptr<Session> Engine::open_session(Role role, u32 threads, bool spin) {
    const Network &network = program_.network(role);
    std::vector<std::string> inputs, outputs;
    for (u32 n = 0; n < network.inputs + network.outputs; ++n) {
        (n < network.inputs ? inputs : outputs).push_back(program_.string(program_.tensors[network.first_tensor + n].name));
    }
    const File *files[6] = {};
    for (u32 n = 0; n < network.files; ++n) files[u32(program_.files[network.first_file + n].kind)] = &program_.files[network.first_file + n];
    auto open = [&](const File &file, const File *weights, bool optimized) {
        std::string name = program_.string(file.name), folder = settings_.bundle;
        if (weights) read_checked(settings_.bundle, program_, *weights, false);
        if (name.rfind('/') != name.npos) folder += "/" + name.substr(0, name.rfind('/'));
        SessionOptions options{threads, spin, optimized, weights ? folder : ""};
        std::string content = read_checked(settings_.bundle, program_, file);
        return std::make_unique<Session>(runtime_, program_.string(network.name), content, options, inputs, outputs);
    };
    const File *compiled = files[u32(FileKind::Compiled)];
    if (compiled && settings_.compiled) {
        bool fits = program_.string(compiled->machine) == machine() && program_.string(compiled->runtime) == "onnxruntime " + runtime_->version();
        try {
            if (fits) return open(*compiled, files[u32(FileKind::CompiledWeights)], true);
            log(DRIFFUSION_LOG_INFO, std::string(program_.string(network.name)) + " was compiled for another machine or ONNX Runtime: it is optimized again");
        } catch (const Error &error) {
            if (error.status() != DRIFFUSION_ERROR_BUNDLE) throw;
            log(DRIFFUSION_LOG_WARNING, std::string(error.what()) + "; the network is optimized again");
        }
    }
    return open(*files[u32(FileKind::Onnx)], files[u32(FileKind::Weights)], false);
}

driffusion_sizes_info Engine::sizes(u32 images) const {
    if (images < 1 || images > MOST_IMAGES) fail(DRIFFUSION_ERROR_ARGUMENT, "images must be 1 to " + std::to_string(MOST_IMAGES));
    const Model &model = program_.model;
    driffusion_sizes_info sizes = DRIFFUSION_SIZES_INIT;
    sizes.width = model.width, sizes.height = model.height, sizes.steps = model.steps, sizes.lanes = lanes_.count();
    for (const TokenizerSpec &spec : program_.tokenizers) sizes.token_count += spec.max_length;
    sizes.rgb_bytes = u64(images) * model.width * model.height * 3;
    sizes.latent_count = u64(images) * program_.latent_elements();
    sizes.noise_count = sizes.latent_count * program_.noise_slots();
    return sizes;
}

Call Engine::checked(const driffusion_call &raw) const {
    driffusion_sizes_info sizes = this->sizes(raw.images);
    Call call;
    call.images = raw.images, call.seed = raw.seed;
    call.guidance = std::isnan(raw.guidance) ? program_.model.guidance : raw.guidance;
    if (!std::isfinite(call.guidance)) fail(DRIFFUSION_ERROR_ARGUMENT, "guidance must be a finite number");
    if (raw.reserved) fail(DRIFFUSION_ERROR_ARGUMENT, "reserved must be 0");
    check_text("prompt", raw.prompt, call.prompt, call.has_prompt);
    check_text("negative_prompt", raw.negative_prompt, call.negative_prompt, call.has_negative);
    if (call.has_prompt == (raw.token_ids != nullptr)) fail(DRIFFUSION_ERROR_ARGUMENT, "give either prompt or token_ids");
    if (call.has_negative && raw.negative_token_ids) fail(DRIFFUSION_ERROR_ARGUMENT, "give either negative_prompt or negative_token_ids");
    call.ids = given("token_ids", raw.token_ids, raw.token_count, sizes.token_count);
    call.negative_ids = given("negative_token_ids", raw.negative_token_ids, raw.negative_token_count, sizes.token_count);
    if (program_.model.guidance_kind != CLASSIFIER_FREE && (!call.negative_prompt.empty() || raw.negative_token_ids)) {
        fail(DRIFFUSION_ERROR_ARGUMENT, std::string(program_.string(program_.model.model)) + " makes no second pass that a negative prompt could be used in");
    }
    call.latents = given("latents", raw.latents, raw.latent_count, sizes.latent_count);
    call.noise = given("noise", raw.noise, raw.noise_count, sizes.noise_count);
    check_finite("latents", call.latents);
    check_finite("noise", call.noise);
    if (!raw.rgb && !raw.latents_out) fail(DRIFFUSION_ERROR_ARGUMENT, "give rgb or latents_out, or both: there is nowhere to put the image");
    if (raw.rgb) need("rgb", raw.rgb_bytes, sizes.rgb_bytes, "bytes");
    if (raw.latents_out) need("latents_out", raw.latents_out_count, sizes.latent_count, "floats");
    call.rgb = raw.rgb, call.latents_out = raw.latents_out;
    call.progress = raw.progress, call.preview = raw.preview, call.user = raw.user, call.preview_every = raw.preview_every;
    return call;
}

std::vector<i64> Engine::tokenize(std::string_view text, u32 *truncated) const { return ids_of(text, truncated); }

// Cut and padded to the length of each tokenizer, one after the other; as `runtime.tokenizer` does.
std::vector<i64> Engine::ids_of(std::string_view text, u32 *truncated) const {
    std::vector<i64> all;
    bool cut = false;
    for (std::size_t n = 0; n < tokenizers_.size(); ++n) {
        const TokenizerSpec &spec = program_.tokenizers[n];
        if (!tokenizers_[n]) fail(DRIFFUSION_ERROR_UNSUPPORTED, tokenizer_problems_[n]);
        std::vector<i64> ids = tokenizers_[n]->encode(text);
        if (ids.size() > spec.max_length) {
            cut = true;
            ids.resize(spec.max_length);
            ids.back() = spec.end_id;
        }
        ids.resize(spec.max_length, spec.pad_id);
        all.insert(all.end(), ids.begin(), ids.end());
    }
    *truncated += cut;
    return all;
}

Engine::Encoded Engine::encode(const Call &call) const {
    Encoded encoded;
    const Network &network = program_.network(Role::TextEncoder), &denoiser = program_.network(Role::Denoiser);
    std::vector<i64> negative = call.negative_ids, positive = call.ids;
    if (negative.empty()) negative = ids_of(call.negative_prompt, &encoded.truncated);
    if (positive.empty()) positive = ids_of(call.prompt, &encoded.truncated);
    std::vector<std::vector<i64>> whole(network.inputs);
    std::vector<std::vector<float>> made(network.outputs);
    std::vector<Value> values;
    std::vector<const OrtValue *> inputs;
    std::vector<OrtValue *> outputs;
    for (u32 n = 0; n < network.inputs; ++n) {
        const Tensor &tensor = program_.tensors[network.first_tensor + n];
        if (tensor.source == Source::Tokens) {
            std::size_t start = 0, length = program_.tokenizers[tensor.number].max_length;
            for (u32 before = 0; before < tensor.number; ++before) start += program_.tokenizers[before].max_length;
            for (const std::vector<i64> *row : {&negative, &positive}) {
                whole[n].insert(whole[n].end(), row->begin() + std::ptrdiff_t(start), row->begin() + std::ptrdiff_t(start + length));
            }
            values.emplace_back(*runtime_, whole[n].data(), INT64, std::vector<i64>{2, i64(length)});
        } else {
            whole[n] = {0, program_.model.clip_skip};  // a negative prompt never skips layers
            values.emplace_back(*runtime_, whole[n].data(), INT64, std::vector<i64>{2});
        }
    }
    for (u32 n = 0; n < network.outputs; ++n) {
        const Tensor &tensor = program_.tensors[network.first_tensor + network.inputs + n];
        made[n].resize(2 * tensor.row());
        std::vector<i64> shape(tensor.dims, tensor.dims + tensor.rank);
        shape[0] = 2;
        values.emplace_back(*runtime_, made[n].data(), FLOAT32, shape);
    }
    for (u32 n = 0; n < values.size(); ++n) n < network.inputs ? inputs.push_back(values[n].get()) : outputs.push_back(values[n].get());
    encoder_->run(inputs, outputs);
    bool zero = program_.model.flags & ZERO_NEGATIVE && !call.has_negative && call.negative_ids.empty();
    const float width = float(program_.model.width), height = float(program_.model.height);
    for (u32 branch = 0; branch < 2; ++branch) {
        Conditioning conditioning(denoiser.inputs);
        for (u32 n = 0; n < denoiser.inputs; ++n) {
            const Tensor &tensor = program_.tensors[denoiser.first_tensor + n];
            std::vector<float> row;
            if (tensor.source == Source::Encoded) {
                const float *from = made[tensor.number].data() + branch * tensor.row();
                row.assign(from, from + tensor.row());
                if (zero && !branch) std::fill(row.begin(), row.end(), 0.0f);
            } else if (tensor.source == Source::TimeIds) {
                row = {height, width, 0, 0, height, width};  // of the original, where it was cropped, of the image
            } else if (tensor.source == Source::Guidance) {
                row = {float(call.guidance)};
            }
            for (u32 image = 0; image < call.images; ++image) conditioning[n].insert(conditioning[n].end(), row.begin(), row.end());
        }
        encoded.branches.push_back(std::move(conditioning));
    }
    return encoded;
}

void Engine::decode(const float *latents, u32 images, std::uint8_t *rgb) const {
    const Model &model = program_.model;
    const std::size_t pixels = std::size_t(model.width) * model.height;
    std::vector<float> made(images * 3 * pixels);
    Value input(*runtime_, const_cast<float *>(latents), FLOAT32, {i64(images), i64(model.channels), i64(model.latent_height), i64(model.latent_width)});
    Value output(*runtime_, made.data(), FLOAT32, {i64(images), 3, i64(model.height), i64(model.width)});
    decoder_->run({input.get()}, {output.get()});
    const float scale = float(model.pixel_scale), shift = float(model.pixel_shift);
    bool finite = true;
    for (u32 image = 0; image < images; ++image) {
        for (u32 channel = 0; channel < 3; ++channel) {
            const float *from = made.data() + (image * 3 + channel) * pixels;
            std::uint8_t *to = rgb + image * 3 * pixels + channel;
            for (std::size_t n = 0; n < pixels; ++n, to += 3) {
                const bool good = std::isfinite(from[n]);
                finite = finite && good;
                float scaled = good ? std::min(std::max(from[n] * scale + shift, 0.0f), 1.0f) : 0.0f;
                *to = std::uint8_t(std::nearbyint(scaled * 255.0f));
            }
        }
    }
    if (!finite) fail(DRIFFUSION_ERROR_NONFINITE, "the VAE decoder gave NaN or infinity: no image can be made of it");
}

Seconds Engine::seconds(u32 images, u32 branches) const {
    Seconds found;
    for (u32 lanes = 1; lanes <= lanes_.count(); ++lanes) {
        double total = 0;
        for (const Operation &one : program_.operations) {
            if (one.kind != PREDICT) continue;
            u32 longest = (one.size * branches + lanes - 1) / lanes;
            total += call_seconds(program_.costs, double(longest) * images);
        }
        found.push_back(total);
    }
    return found;
}

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

driffusion_result Engine::make(Request &request) {
    const Call &call = request.call;
    const std::size_t elements = program_.latent_elements();
    auto check = [&] {
        if (request.cancelled.load()) fail(DRIFFUSION_ERROR_CANCELLED, "cancelled after " + std::to_string(request.finished.load()) + " steps");
    };
    driffusion_result result = DRIFFUSION_RESULT_INIT;
    const double started = now();
    check();
    Encoded encoded = encode(call);
    const double written = now();
    u32 branches = program_.model.guidance_kind == CLASSIFIER_FREE && call.guidance > 1 ? 2 : 1;
    std::vector<float> latents(elements * call.images);
    double leased, denoised;
    {
        Lease lease(lanes_, seconds(call.images, branches), check);
        leased = now();
        Player &player = *players_[lease.own()];
        player.bind(call.images, call.guidance, std::move(encoded.branches));
        const float scale = float(program_.model.start_scale);
        u32 noise = 0;
        for (u32 slot = 0; slot < program_.slots.size(); ++slot) {
            const Slot &one = program_.slots[slot];
            if (one.kind != SlotKind::State && one.kind != SlotKind::Noise) continue;
            float *to = player.slot(slot);
            const bool state = one.kind == SlotKind::State;
            const std::vector<float> &own = state ? call.latents : call.noise;
            if (!own.empty()) {
                const float *from = own.data() + (state ? 0 : latents.size() * noise);
                std::copy(from, from + latents.size(), to);
            } else {
                for (u32 image = 0; image < call.images; ++image) gaussian(call.seed, image, one.number, to + image * elements, elements);
            }
            if (state) {
                for (std::size_t n = 0; n < latents.size(); ++n) to[n] *= scale;
            } else {
                ++noise;
            }
        }
        player.upload();
        u32 previewed = 0;
        Counts counts = player.play(lease, check, [&](u32 finished) { notify(request, player, finished, &previewed); });
        player.download();
        std::copy(player.slot(0), player.slot(0) + latents.size(), latents.begin());
        result.rounds = counts.rounds, result.evaluations = counts.evaluations, result.calls = counts.calls;
        result.lanes_per_round = double(counts.lane_rounds) / std::max(1u, counts.rounds);
        result.critical_seconds = counts.critical_seconds;
        denoised = now();
    }
    if (!std::all_of(latents.begin(), latents.end(), [](float value) { return std::isfinite(value); })) {
        fail(DRIFFUSION_ERROR_NONFINITE, "the denoised latents hold NaN or infinity: no image can be made of them");
    }
    if (call.rgb) decode(latents.data(), call.images, call.rgb);
    if (call.latents_out) std::copy(latents.begin(), latents.end(), call.latents_out);
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

void Engine::log(driffusion_log_level level, const std::string &message) const noexcept {
    if (!settings_.log) return;
    try {
        InCallback inside;
        settings_.log(settings_.log_user, level, message.c_str());
    } catch (...) {  // the host's own exception has nowhere to go from here
    }
}

}  // namespace driffusion
