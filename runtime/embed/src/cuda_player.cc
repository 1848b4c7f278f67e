#include "cuda_player.h"

#include <algorithm>
#include <cstring>
#include <mutex>

namespace driffusion::cuda {
namespace {

NetworkFactory &known_factory() {
    static auto &factory = *new NetworkFactory;
    return factory;
}

}  // namespace

void set_network_factory(NetworkFactory factory) { known_factory() = std::move(factory); }

std::unique_ptr<DeviceNetwork> open_network(const Gpu &gpu, const OpenSession &session) {
    if (!known_factory()) fail(DRIFFUSION_ERROR_UNSUPPORTED, "this build runs no networks on GPUs: use \"cpu\"");
    return known_factory()(gpu, session);
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

Player::Player(const Program &program, const std::vector<std::unique_ptr<Session>> &none, Workers &workers, const std::vector<std::unique_ptr<Lane>> &lanes, const Pairs &pairs, u32 own)
    : driffusion::Player(program, none, workers), gpu_lanes_(lanes), pairs_(pairs), home_(lanes[own]->gpu), kernels_(home_), main_(home_) {
    for (auto &event : rounds_) event = std::make_unique<Event>(home_);
}

Player::~Player() { drain(); }

// After an error: nothing that is queued may still use this player's memory.
void Player::drain() noexcept {
    for (auto &[lane, place] : places_) freed(gpu_lanes_[lane]->gpu, [&, n = lane](const Functions &driver) { driver.cuStreamSynchronize(gpu_lanes_[n]->stream.get()); });
    freed(home_, [this](const Functions &driver) { driver.cuStreamSynchronize(main_.get()); });
}

void Player::bind(u32 images, double guidance, std::vector<Conditioning> branches) {
    drain();
    const u32 images_before = images_, branches_before = branches_;
    const double guidance_before = guidance_;
    driffusion::Player::bind(images, guidance, std::move(branches));
    ++request_;
    const bool other_shape = images_ != images_before || branches_ != branches_before;
    if (!other_shape && guidance_ == guidance_before && device_combinations_) return;
    device_combinations_.reset();
    try {
        if (other_shape || !slots_.get()) {
            places_.clear();
            slots_ = DeviceMemory();
            slots_ = DeviceMemory(home_, memory_.size() * sizeof(float));
            staging_.reset();
            staging_ = std::make_unique<PinnedMemory>(home_, elements_ * sizeof(float) * (1 + program_.noise_slots()));
        }
        auto made = std::make_unique<Combinations>(kernels_, elements_);
        auto on_device = [this](const float *pointer) { return slots_.get() + std::size_t(pointer - memory_.data()) * sizeof(float); };
        for (const Combination &one : combinations_) {
            std::vector<CUdeviceptr> sources, targets;
            for (const float *source : one.sources) sources.push_back(on_device(source));
            for (const float *target : one.targets) targets.push_back(on_device(target));
            made->add(sources, one.rows, targets);
        }
        made->upload(main_);
        device_combinations_ = std::move(made);
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
    Current current(home_);
    driver_call(cuMemcpyHtoDAsync_v2, slots_.get(), staging_->as<float>(), bytes, main_.get());
}

void Player::download() {
    const std::size_t bytes = elements_ * sizeof(float);
    Current current(home_);
    main_.wait();
    driver_call(cuMemcpyDtoHAsync_v2, staging_->as<float>(), at(rows_[0]), bytes, main_.get());
    main_.wait();
    std::memcpy(slot(0), staging_->as<float>(), bytes);
}

Player::Place &Player::place(u32 lane, std::size_t batch) {
    Place &found = places_[lane];
    if (found.there.size() >= batch) return found;
    const Gpu &gpu = gpu_lanes_[lane]->gpu;
    const std::size_t bytes = elements_ * sizeof(float);
    drain();  // the memory so far is freed
    found.there.clear(), found.back.clear();
    found.sample = DeviceMemory(gpu, batch * bytes), found.output = DeviceMemory(gpu, batch * bytes);
    std::vector<std::unique_ptr<Link>> there, back;
    for (std::size_t n = 0; n < batch; ++n) {
        there.push_back(std::make_unique<Link>(home_, gpu, pairs_.direct(home_, gpu), bytes));
        back.push_back(std::make_unique<Link>(gpu, home_, pairs_.direct(gpu, home_), bytes));
    }
    found.there = std::move(there), found.back = std::move(back);
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

void Player::enqueue(u32 lane, const std::vector<Branch> &call) {
    const Lane &there = *gpu_lanes_[lane];
    const Network &network = program_.network(Role::Denoiser);
    const std::size_t bytes = elements_ * sizeof(float);
    Place &mine = place(lane, call.size());
    Key kinds, steps;
    std::vector<float> timesteps;
    for (std::size_t n = 0; n < call.size(); ++n) {
        kinds.push_back(call[n].conditioning), steps.push_back(call[n].step);
        timesteps.insert(timesteps.end(), images_, float(program_.steps[call[n].step].timestep));
        mine.there[n]->receive(there.stream, mine.sample.get() + n * bytes, at(call[n].latent), bytes);
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
    for (std::size_t n = 0; n < call.size(); ++n) mine.back[n]->send(there.stream, mine.output.get() + n * bytes, bytes);
}

void Player::round(const Operation &operation, const std::vector<u32> &held, Counts &counts) {
    const std::size_t bytes = elements_ * sizeof(float);
    const auto calls = shares(operation, u32(held.size()));
    for (std::size_t n = 0; n < calls.size(); ++n) {
        Place &mine = place(held[n], calls[n].size());
        for (std::size_t i = 0; i < calls[n].size(); ++i) mine.there[i]->send(main_, at(calls[n][i].latent), bytes);
    }
    for (std::size_t n = 0; n < calls.size(); ++n) enqueue(held[n], calls[n]);
    for (std::size_t n = 0; n < calls.size(); ++n) {
        Place &mine = places_.at(held[n]);
        for (std::size_t i = 0; i < calls[n].size(); ++i) mine.back[i]->receive(main_, at(calls[n][i].output), mine.output.get() + i * bytes, bytes);
    }
    counts.rounds += 1, counts.calls += u32(calls.size()), counts.lane_rounds += held.size();
}

Counts Player::play(Lease &lease, const Check &check, const std::function<void(u32)> &finished) {
    Counts counts;
    u32 combination = 0, done = 0;
    try {
        for (const Operation &one : program_.operations) {
            if (one.kind == PREDICT) {
                check();
                lease.update();
                round(one, lease.held(), counts);
                counts.evaluations += one.size;
                continue;
            }
            {
                Current current(home_);
                device_combinations_->launch(combination++, main_);
                rounds_[counts.rounds % 2]->record(main_);
                if (counts.rounds > 1) rounds_[(counts.rounds + 1) % 2]->wait();
            }
            if (one.finished > done) finished(done = one.finished);
        }
        main_.wait();
    } catch (...) {
        drain();
        throw;
    }
    return counts;
}

}  // namespace driffusion::cuda
