#include "engine.h"

#include <algorithm>
#include <cmath>

#include "error.h"
#include "files.h"

namespace driffusion {
namespace {

constexpr u32 MOST_IMAGES = 1024;

thread_local u32 callbacks = 0;

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

InCallback::InCallback() { ++callbacks; }
InCallback::~InCallback() { --callbacks; }
bool inside_callback() { return callbacks > 0; }

Engine::Engine(const Settings &settings)
    : settings_(settings),
      program_(Program::parse(read_file(settings.program, DRIFFUSION_ERROR_PROGRAM, u64(1) << 28))),
      runtime_(Runtime::open(settings.runtime)),
      lanes_(placed()) {
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
    if (on_gpus) open_gpus();
    for (u32 lane = 0; lane < lanes && !on_gpus; ++lane) players_.push_back(std::make_unique<Player>(program_, denoisers_, *workers_));
    log(DRIFFUSION_LOG_INFO, std::string(program_.string(program_.model.model)) + " is open: " + program_.string(program_.model.mode) + ", " +
                                 std::to_string(program_.model.steps) + " steps, " + std::to_string(lanes) + " lanes of " +
                                 std::to_string(settings_.threads) + " threads, ONNX Runtime " + runtime_->version());
}

// How many lanes there are, on GPUs where the caller or else the program says so.
u32 Engine::placed() {
    const std::string runtime(program_.string(program_.model.runtime));
    if (!settings_.lanes && runtime.substr(0, 5) == "cuda:") {
        const u32 threads = settings_.threads;
        try {
            settings_.place_on_gpus(runtime);
            if (threads) settings_.threads = threads;
        } catch (const Error &error) {
            fail(DRIFFUSION_ERROR_PROGRAM, "the program's lanes cannot be used: " + std::string(error.what()));
        }
    }
    return settings_.lanes ? settings_.lanes : program_.model.lanes;
}

void Engine::open_gpus() {
    hangs_ = std::make_unique<cuda::Hangs>(settings_.lane_timeout);
    cuda::NetworkSource source{[this] { return open_session(Role::Denoiser, settings_.threads, false); }, settings_.plan, settings_.tensorrt, {}, {}};
    const Network &network = program_.network(Role::Denoiser);
    for (u32 n = 0; n < network.inputs + network.outputs; ++n) {
        const Tensor &tensor = program_.tensors[network.first_tensor + n];
        source.names.push_back(program_.string(tensor.name)), source.dtypes.push_back(tensor.dtype);
    }
    for (int ordinal : settings_.gpus) {
        cuda::Gpu gpu(ordinal);
        gpu_lanes_.emplace_back(new cuda::Lane{gpu, cuda::open_network(gpu, source), cuda::Stream(gpu)});
    }
    links_ = std::make_unique<cuda::Pairs>(gpu_lanes_);
    for (u32 lane = 0; lane < lanes_.count(); ++lane) {
        players_.push_back(std::make_unique<cuda::Player>(program_, denoisers_, *workers_, gpu_lanes_, *links_, *hangs_, lane));
    }
}

Engine::~Engine() {
    close();
    if (hangs_ && hangs_->any()) {  // freeing what is on the GPUs would wait for the lane
        log(DRIFFUSION_LOG_ERROR, "a lane hangs: what the model has on GPUs stays taken until this process ends");
        for (auto &one : players_) (void)one.release();
        for (auto &one : gpu_lanes_) (void)one.release();
        (void)links_.release(), (void)hangs_.release();
    }
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
    for (const std::vector<i64> *ids : {&call.ids, &call.negative_ids}) {  // a network would count them from its table's end
        for (i64 id : *ids) if (id < 0) fail(DRIFFUSION_ERROR_ARGUMENT, "a token id is negative: " + std::to_string(id));
    }
    if (program_.model.guidance_kind != CLASSIFIER_FREE && (!call.negative_prompt.empty() || raw.negative_token_ids)) {
        fail(DRIFFUSION_ERROR_ARGUMENT, std::string(program_.string(program_.model.model)) + " makes no second pass that a negative prompt could be used in");
    }
    call.latents = given("latents", raw.latents, raw.latent_count, sizes.latent_count);
    call.noise = given("noise", raw.noise, raw.noise_count, sizes.noise_count);
    check_finite("latents", call.latents);
    check_finite("noise", call.noise);
    check_outputs(raw, sizes, call);
    call.progress = raw.progress, call.preview = raw.preview, call.user = raw.user, call.preview_every = raw.preview_every;
    return call;
}

void Engine::check_outputs(const driffusion_call &raw, const driffusion_sizes_info &sizes, Call &call) const {
    const bool on_device = raw.device_rgb || raw.device_latents;
    if (!raw.rgb && !raw.latents_out && !on_device) fail(DRIFFUSION_ERROR_ARGUMENT, "give rgb or latents_out, or both: there is nowhere to put the image");
    if (raw.rgb) need("rgb", raw.rgb_bytes, sizes.rgb_bytes, "bytes");
    if (raw.latents_out) need("latents_out", raw.latents_out_count, sizes.latent_count, "floats");
    call.rgb = raw.rgb, call.latents_out = raw.latents_out;
    if (!on_device) {
        if (raw.stream || raw.event) fail(DRIFFUSION_ERROR_ARGUMENT, "stream and event are for device_rgb and device_latents: give one of them");
        return;
    }
    if (gpu_lanes_.empty()) fail(DRIFFUSION_ERROR_ARGUMENT, "device_rgb and device_latents need lanes on GPUs: open the engine on cuda:0, or use rgb and latents_out");
    if (!raw.stream) fail(DRIFFUSION_ERROR_ARGUMENT, "stream must not be null: device_rgb and device_latents are written on a stream of the caller");
    cuda::Target &target = call.target;
    target.rgb = raw.device_rgb, target.latents = raw.device_latents;
    target.stream = static_cast<CUstream>(raw.stream), target.event = static_cast<CUevent>(raw.event);
    if (raw.device_rgb) {
        need("device_rgb", raw.device_rgb_bytes, sizes.rgb_bytes, "bytes");
        target.gpu = std::make_unique<cuda::Gpu>(cuda::gpu_of("device_rgb", raw.device_rgb));
    }
    if (raw.device_latents) {
        need("device_latents", raw.device_latents_count, sizes.latent_count, "floats");
        const cuda::Gpu gpu = cuda::gpu_of("device_latents", raw.device_latents);
        if (target.gpu && target.gpu->ordinal() != gpu.ordinal()) fail(DRIFFUSION_ERROR_ARGUMENT, "device_rgb and device_latents must be on the same GPU");
        target.gpu = std::make_unique<cuda::Gpu>(gpu);
    }
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

void Engine::log(driffusion_log_level level, const std::string &message) const noexcept {
    if (!settings_.log) return;
    try {
        InCallback inside;
        settings_.log(settings_.log_user, level, message.c_str());
    } catch (...) {  // the host's own exception has nowhere to go from here
    }
}

}  // namespace driffusion
