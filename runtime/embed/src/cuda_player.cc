#include "cuda_player.h"

#include <algorithm>
#include <cstring>
#include <mutex>

#include "tensorrt.h"

namespace driffusion::cuda {
namespace {

constexpr int TRIES = 3;  // to wait for a lane after an error: a call may fail once, on a device that is lost all do

NetworkFactory &known_factory() {
    static auto &factory = *new NetworkFactory;
    return factory;
}

}  // namespace

void set_network_factory(NetworkFactory factory) { known_factory() = std::move(factory); }

std::unique_ptr<DeviceNetwork> open_network(const Gpu &gpu, const NetworkSource &source) {
    if (known_factory()) return known_factory()(gpu, source);
    if (source.plan.empty()) fail(DRIFFUSION_ERROR_UNSUPPORTED, "networks on GPUs run by TensorRT: name the file of the denoiser's plan with the option plan, or use \"cpu\"");
    return tensorrt::open(gpu, source);
}

void Hangs::add(const std::string &message) {
    std::lock_guard<std::mutex> lock(mutex_);
    if (any_) return;
    message_ = message;
    any_ = true;
}

void Hangs::check() const {
    if (!any_) return;
    std::lock_guard<std::mutex> lock(mutex_);
    fail(DRIFFUSION_ERROR_DEVICE, message_);
}

Pairs::Pairs(const std::vector<std::unique_ptr<Lane>> &lanes) {
    std::set<std::pair<int, int>> tested;
    for (const auto &from : lanes) {
        for (const auto &to : lanes) {
            const std::pair<int, int> pair{from->gpu.ordinal(), to->gpu.ordinal()};
            if (tested.insert(pair).second && peers(from->gpu, to->gpu)) direct_.insert(pair);
        }
    }
}

Player::Player(const Program &program, const std::vector<std::unique_ptr<Session>> &none, Workers &workers, const std::vector<std::unique_ptr<Lane>> &lanes, const Pairs &pairs, Hangs &hangs, u32 own)
    : driffusion::Player(program, none, workers), gpu_lanes_(lanes), pairs_(pairs), hangs_(hangs), own_(own), home_(lanes[own]->gpu), kernels_(home_), main_(home_) {
    for (auto &event : rounds_) event = std::make_unique<Event>(home_);
    for (auto &event : begun_) event = std::make_unique<Event>(home_);
    idle_ = std::make_unique<Event>(home_), flag_ = std::make_unique<PinnedMemory>(home_, sizeof(u32));
}

Player::~Player() { drain(); }

// Streams of lanes may be busy for others: an event says when what they have to do by now is over.
void Player::await(u32 lane, const Gpu &gpu, const Event &event, CUstream stream) {
    {
        Current current(gpu);
        event.record(stream);
    }
    try {
        event.wait(hangs_.seconds, "what was left of an image");
    } catch (const Hang &error) {
        hangs_.add(std::string(error.what()) + ": lane " + std::to_string(lane) + " (cuda:" + std::to_string(gpu.ordinal()) + ") hangs");
        hangs_.check();
    }
}

// Nothing that is queued may use this player's memory any more. After a hang nothing is freed, and nothing waited for.
void Player::settle() {
    for (auto &[lane, place] : places_) {
        if (place.idle) await(lane, gpu_lanes_[lane]->gpu, *place.idle, gpu_lanes_[lane]->stream.get());
    }
    await(own_, home_, *idle_, main_.get());
    busy_ = false;
}

// The same after an error; of every lane, whatever another says: a device that is lost runs nothing.
void Player::drain() noexcept {
    if (!busy_) return;
    auto try_await = [this](u32 lane, const Gpu &gpu, const Event &event, CUstream stream) {
        for (int n = 0; n < TRIES && !hangs_.any(); ++n) {
            try {
                return await(lane, gpu, event, stream);
            } catch (const Error &) {  // an event that could not be recorded says nothing of what still runs
            }
        }
    };
    for (auto &[lane, place] : places_) {
        if (place.idle) try_await(lane, gpu_lanes_[lane]->gpu, *place.idle, gpu_lanes_[lane]->stream.get());
    }
    try_await(own_, home_, *idle_, main_.get());
    busy_ = false;
}

// Names the lanes that have not ended the older, else the newer, of the last two rounds; home's own, when it is none of
// them, or home has not begun the round.
void Player::hung(const Hang &error) {
    std::vector<u32> late;
    for (u32 parity : {(made_ + 1) % 2, made_ % 2}) {
        if (!begun_[parity]->over()) break;  // lanes wait for home
        for (u32 lane : asked_[parity]) {
            if (!places_.at(lane).ended[parity]->over()) late.push_back(lane);
        }
        if (!late.empty()) break;
    }
    std::string named;
    for (u32 lane : late.empty() ? std::vector<u32>{own_} : late) {
        named += (named.empty() ? "lane " : ", lane ") + std::to_string(lane) + " (cuda:" + std::to_string(gpu_lanes_[lane]->gpu.ordinal()) + ")";
    }
    hangs_.add(std::string(error.what()) + ": " + named + (late.size() > 1 ? " hang or are" : " hangs or is") + " far too slow; start the program again to get its memory back, or allow more with the option lane_timeout");
    hangs_.check();
    throw error;
}

// Home does not notice when another device is lost: a wait for it ends, and home goes on with what lay there before.
void Player::check_lanes() const {
    for (const auto &[lane, place] : places_) {
        Current current(gpu_lanes_[lane]->gpu);
        const CUresult status = Driver::instance().functions().cuStreamQuery(gpu_lanes_[lane]->stream.get());
        if (status != CUDA_ERROR_NOT_READY) Driver::instance().check(status, "cuStreamQuery");
    }
}

void Player::bind(u32 images, double guidance, std::vector<Conditioning> branches) {
    hangs_.check();
    drain();
    const u32 images_before = images_, branches_before = branches_;
    const double guidance_before = guidance_;
    driffusion::Player::bind(images, guidance, std::move(branches));
    ++request_;
    const bool other_shape = images_ != images_before || branches_ != branches_before;
    if (!other_shape && guidance_ == guidance_before && device_combinations_) return;
    busy_ = true;
    std::unique_ptr<Combinations> made;
    try {
        if (slots_.get()) settle();  // freeing waits for the devices: do they go on?
        busy_ = true;
        device_combinations_.reset();
        if (other_shape || !slots_.get()) {
            places_.clear();
            slots_ = DeviceMemory();
            slots_ = DeviceMemory(home_, memory_.size() * sizeof(float));
            staging_.reset();
            staging_ = std::make_unique<PinnedMemory>(home_, elements_ * sizeof(float) * (1 + program_.noise_slots()));
        }
        made = std::make_unique<Combinations>(kernels_, elements_);
        auto on_device = [this](const float *pointer) { return slots_.get() + std::size_t(pointer - memory_.data()) * sizeof(float); };
        std::size_t last = 0;  // that writes the state: of what it makes the image is made
        for (std::size_t n = 0; n < combinations_.size(); ++n) {
            const auto &targets = combinations_[n].targets;
            if (std::find(targets.begin(), targets.end(), slot(0)) != targets.end()) last = n;
        }
        for (const Combination &one : combinations_) {
            std::vector<CUdeviceptr> sources, targets;
            for (const float *source : one.sources) sources.push_back(on_device(source));
            for (const float *target : one.targets) targets.push_back(on_device(target));
            made->add(sources, one.rows, targets, &one == &combinations_[last]);
        }
        made->upload(main_, hangs_.seconds);
        device_combinations_ = std::move(made);
    } catch (const Hang &error) {
        (void)made.release();  // freeing it would wait
        images_ = 0;
        asked_[0].clear(), asked_[1].clear();
        hung(error);
    } catch (...) {
        drain();
        images_ = 0;  // nothing of it is whole
        throw;
    }
}

// The state and the noise have the first rows: see `lay_out`.
void Player::upload() {
    const std::size_t bytes = elements_ * sizeof(float) * (1 + program_.noise_slots());
    std::memcpy(staging_->as<float>(), memory_.data(), bytes);
    busy_ = true;
    Current current(home_);
    driver_call(cuMemcpyHtoDAsync_v2, slots_.get(), staging_->as<float>(), bytes, main_.get());
    driver_call(cuMemsetD32Async, device_combinations_->flag(), 0, 1, main_.get());
}

void Player::download() {
    const std::size_t bytes = elements_ * sizeof(float);
    Current current(home_);
    settled([&] {
        main_.wait(hangs_.seconds, "an image");
        driver_call(cuMemcpyDtoHAsync_v2, staging_->as<float>(), at(rows_[0]), bytes, main_.get());
        main_.wait(hangs_.seconds, "an image");
    });
    std::memcpy(slot(0), staging_->as<float>(), bytes);
}

void Player::send(Output &output, const Gpu &to) {
    settled([&] { output.latents(main_, at(rows_[0]), elements_ * sizeof(float), pairs_.direct(home_, to)); });
}

void Player::finish() {
    settled([&] { main_.wait(hangs_.seconds, "an image"); });
    check_lanes();
    busy_ = false;  // home has waited for every lane
    if (*flag_->as<u32>()) fail(DRIFFUSION_ERROR_NONFINITE, "the denoised latents hold NaN or infinity: no image can be made of them");
}

// For the largest share of any number of lanes, so that nothing is freed while rounds run: freeing waits for the device.
Player::Place &Player::place(u32 lane) {
    Place &found = places_[lane];
    if (!found.there.empty()) return found;
    const Gpu &gpu = gpu_lanes_[lane]->gpu;
    const std::size_t bytes = elements_ * sizeof(float);
    u32 most = 1;
    for (const Operation &one : program_.operations) {
        if (one.kind == PREDICT) most = std::max(most, one.size * branches_);
    }
    found.sample = DeviceMemory(gpu, most * bytes), found.output = DeviceMemory(gpu, most * bytes);
    for (auto *event : {&found.ended[0], &found.ended[1], &found.idle}) *event = std::make_unique<Event>(gpu);
    std::vector<std::unique_ptr<Link>> there, back;
    for (std::size_t n = 0; n < most; ++n) {
        there.push_back(std::make_unique<Link>(home_, gpu, pairs_.direct(home_, gpu), bytes));
        back.push_back(std::make_unique<Link>(gpu, home_, pairs_.direct(gpu, home_), bytes));
    }
    found.back = std::move(back), found.there = std::move(there);
    return found;
}

CUdeviceptr Player::sent(Sent &one, const Lane &lane, const std::vector<float> &values) {
    const std::size_t bytes = values.size() * sizeof(float);
    if (one.bytes != bytes || !one.staging) {
        one.memory = DeviceMemory(lane.gpu, bytes);
        one.staging = std::make_unique<PinnedMemory>(lane.gpu, bytes);
        one.bytes = bytes, one.request = 0;
    }
    if (one.request == request_) return one.memory.get();
    std::memcpy(one.staging->as<float>(), values.data(), bytes);
    driver_call(cuMemcpyHtoDAsync_v2, one.memory.get(), one.staging->as<float>(), bytes, lane.stream.get());
    one.request = request_;
    return one.memory.get();
}

void Player::enqueue(u32 lane, const std::vector<Branch> &call, const Event &ended) {
    const Lane &there = *gpu_lanes_[lane];
    const Network &network = program_.network(Role::Denoiser);
    const std::size_t bytes = elements_ * sizeof(float);
    Place &mine = place(lane);
    Key kinds, steps;
    std::vector<float> timesteps;
    for (std::size_t n = 0; n < call.size(); ++n) {
        kinds.push_back(call[n].conditioning), steps.push_back(call[n].step);
        timesteps.insert(timesteps.end(), images_, float(program_.steps[call[n].step].timestep));
        mine.there[n]->receive(there.stream.get(), mine.sample.get() + n * bytes, at(call[n].latent), bytes);
    }
    Current current(there.gpu);
    std::vector<Sent> &conditioning = mine.conditioning[kinds];
    conditioning.resize(network.inputs);
    std::vector<DeviceNetwork::Buffer> inputs;
    DeviceNetwork::Buffer output{};
    for (u32 n = 0; n < network.inputs + network.outputs; ++n) {
        const Tensor &tensor = program_.tensors[network.first_tensor + n];
        std::vector<i64> shape(tensor.dims, tensor.dims + tensor.rank);
        shape[0] = i64(call.size()) * images_;
        if (n >= network.inputs) {
            output = {mine.output.get(), tensor.dtype, shape};
        } else if (tensor.source == Source::Sample) {
            inputs.push_back({mine.sample.get(), tensor.dtype, shape});
        } else if (tensor.source == Source::Timestep) {
            inputs.push_back({sent(mine.timesteps[steps], there, timesteps), tensor.dtype, shape});
        } else {
            std::vector<float> values;
            for (u32 kind : kinds) values.insert(values.end(), conditioning_[kind][n].begin(), conditioning_[kind][n].end());
            inputs.push_back({sent(conditioning[n], there, values), tensor.dtype, shape});
        }
    }
    there.network->enqueue(inputs, output, there.stream.get());
    ended.record(there.stream.get());
    for (std::size_t n = 0; n < call.size(); ++n) mine.back[n]->send(there.stream, mine.output.get() + n * bytes, bytes);
}

void Player::round(const Operation &operation, const std::vector<u32> &held, Counts &counts) {
    const std::size_t bytes = elements_ * sizeof(float);
    const auto calls = shares(operation, u32(held.size()));
    for (std::size_t n = 0; n < calls.size(); ++n) {
        Place &mine = place(held[n]);
        for (std::size_t i = 0; i < calls[n].size(); ++i) mine.there[i]->send(main_, at(calls[n][i].latent), bytes);
    }
    const u32 parity = ++made_ % 2;
    {
        Current current(home_);
        begun_[parity]->record(main_.get());
    }
    asked_[parity].assign(held.begin(), held.begin() + std::ptrdiff_t(calls.size()));
    for (std::size_t n = 0; n < calls.size(); ++n) enqueue(held[n], calls[n], *places_.at(held[n]).ended[parity]);
    for (std::size_t n = 0; n < calls.size(); ++n) {
        Place &mine = places_.at(held[n]);
        for (std::size_t i = 0; i < calls[n].size(); ++i) mine.back[i]->receive(main_.get(), at(calls[n][i].output), mine.output.get() + i * bytes, bytes);
    }
    counts.rounds += 1, counts.calls += u32(calls.size()), counts.lane_rounds += held.size();
}

template <typename Body>
void Player::settled(Body body) {
    try {
        body();
    } catch (const Hang &error) {
        hung(error);
    } catch (...) {
        drain();
        throw;
    }
}

Counts Player::play(Lease &lease, const Check &check, const std::function<void(u32)> &finished) {
    Counts counts;
    u32 combination = 0, done = 0;
    asked_[0].clear(), asked_[1].clear(), made_ = 0;
    settled([&] {
        for (const Operation &one : program_.operations) {
            if (one.kind == PREDICT) {
                check();
                hangs_.check();
                lease.update();
                round(one, lease.held(), counts);
                counts.evaluations += one.size;
                continue;
            }
            {
                Current current(home_);
                device_combinations_->launch(combination++, main_);
                rounds_[counts.rounds % 2]->record(main_.get());
            }
            if (counts.rounds > 1) rounds_[(counts.rounds + 1) % 2]->wait(hangs_.seconds, "a round");
            if (one.finished > done) finished(done = one.finished);
        }
        Current current(home_);
        driver_call(cuMemcpyDtoHAsync_v2, flag_->as<u32>(), device_combinations_->flag(), sizeof(u32), main_.get());
    });
    return counts;
}

}  // namespace driffusion::cuda
