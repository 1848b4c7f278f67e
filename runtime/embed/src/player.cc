#include "player.h"

#include <algorithm>
#include <cstring>

#include "combine.h"
#include "error.h"

namespace driffusion {
namespace {

constexpr u64 MOST_SLOT_BYTES = u64(1) << 40;

bool neighbours(const std::vector<u32> &rows) {
    for (std::size_t n = 1; n < rows.size(); ++n) {
        if (rows[n] != rows[n - 1] + 1) return false;
    }
    return true;
}

}  // namespace

Player::Player(const Program &program, const std::vector<std::unique_ptr<Session>> &lanes, Workers &workers)
    : program_(program), lanes_(lanes), workers_(workers) {}

void Player::bind(u32 images, double guidance, std::vector<Conditioning> branches) {
    u32 count = program_.model.guidance_kind == CLASSIFIER_FREE && guidance > 1 ? 2 : 1;
    conditioning_ = std::move(branches);
    if (images != images_ || count != branches_) {
        images_ = images, branches_ = count;
        try {
            lay_out();
            weigh(guidance);
        } catch (...) {
            images_ = 0;  // nothing of it is whole
            throw;
        }
    } else if (guidance != guidance_) {
        weigh(guidance);
    }
    for (auto &[key, inputs] : inputs_) fill(key, inputs);
}

// Rows in the order in which slots are first written, so that what a call reads and writes is mostly neighbours: the
// outputs of a round branch by branch, as `runtime.sampling.program` deals them.
void Player::lay_out() {
    dealt_.clear(), bound_.clear(), inputs_.clear(), combinations_.clear();
    elements_ = program_.latent_elements() * images_;
    const u32 none = ~0u;
    rows_.assign(program_.slots.size(), none);
    strides_.assign(program_.slots.size(), 1);
    u32 rows = 0;
    for (u32 slot = 0; slot < rows_.size(); ++slot) {
        if (program_.slots[slot].kind == SlotKind::State || program_.slots[slot].kind == SlotKind::Noise) rows_[slot] = rows++;
    }
    for (const Operation &one : program_.operations) {
        std::vector<u32> fresh;
        for (u32 n = 0; n < (one.kind == PREDICT ? one.size : one.targets_size); ++n) {
            u32 slot = one.kind == PREDICT ? program_.evaluations[one.first + n].output : program_.references[one.targets_first + n];
            if (rows_[slot] == none) fresh.push_back(slot), rows_[slot] = rows + u32(fresh.size()) - 1;
        }
        for (u32 slot : fresh) strides_[slot] = u32(fresh.size());
        rows += u32(fresh.size()) * (one.kind == PREDICT ? branches_ : 1);
    }
    u64 bytes = u64(rows) * elements_ * sizeof(float);
    if (bytes > MOST_SLOT_BYTES) fail(DRIFFUSION_ERROR_MEMORY, "so many images of this size need " + std::to_string(bytes) + " bytes: make fewer at once");
    memory_.clear();
    memory_.shrink_to_fit();
    memory_.resize(std::size_t(rows) * elements_);
}

// Guidance, ε = (1 − g)·ε_unconditional + g·ε_conditional, is multiplied into the coefficients that read an ε.
void Player::weigh(double guidance) {
    guidance_ = guidance;
    combinations_.clear();
    for (const Operation &one : program_.operations) {
        if (one.kind != COMBINE) continue;
        Combination made;
        std::vector<std::pair<u32, double>> columns;
        for (u32 column = 0; column < one.size; ++column) {
            u32 slot = program_.references[one.first + column];
            bool output = program_.slots[slot].kind == SlotKind::Output;
            for (u32 branch = 0; branch < (output ? branches_ : 1); ++branch) {
                made.sources.push_back(row(rows_[slot] + branch * strides_[slot]));
                columns.push_back({column, !output || branches_ == 1 ? 1.0 : branch ? guidance : 1 - guidance});
            }
        }
        const double *coefficients = &program_.coefficients[one.coefficient];
        for (u32 target = 0; target < one.targets_size; ++target, coefficients += one.size) {
            made.targets.push_back(slot(program_.references[one.targets_first + target]));
            for (auto &[column, factor] : columns) made.rows.push_back(float(coefficients[column] * factor));
        }
        combinations_.push_back(std::move(made));
    }
}

// The conditioning of a batch: one block of images per branch.
void Player::fill(const std::vector<u32> &branches, std::vector<std::vector<float>> &inputs) {
    for (std::size_t tensor = 0; tensor < inputs.size(); ++tensor) {
        float *to = inputs[tensor].data();
        for (u32 branch : branches) {
            const std::vector<float> &from = conditioning_[branch][tensor];
            to = std::copy(from.begin(), from.end(), to);
        }
    }
}

std::vector<std::unique_ptr<Player::Round>> &Player::dealt(u32 lanes) {
    auto &rounds = dealt_[lanes];
    if (rounds.empty()) {
        std::vector<std::unique_ptr<Round>> made;
        for (const Operation &one : program_.operations) {
            if (one.kind == PREDICT) made.push_back(deal(one, lanes));
        }
        rounds = std::move(made);
    }
    return rounds;
}

// The one rule of placement: the branches of a round are dealt evenly over the lanes, in order, a share as one call.
std::vector<std::vector<Player::Branch>> Player::shares(const Operation &operation, u32 lanes) const {
    std::vector<Branch> branches;
    for (u32 branch = 0; branch < branches_; ++branch) {
        for (u32 n = 0; n < operation.size; ++n) {
            const Evaluation &one = program_.evaluations[operation.first + n];
            u32 output = rows_[one.output] + branch * strides_[one.output];
            branches.push_back({rows_[one.latent], output, branches_ == 1 ? 1 : branch, one.step});
        }
    }
    std::vector<std::vector<Branch>> found;
    u32 share = u32(branches.size()) / lanes, extra = u32(branches.size()) % lanes;
    auto start = branches.begin();
    for (u32 lane = 0; lane < lanes && start != branches.end(); ++lane) {
        auto end = start + share + (lane < extra);
        found.emplace_back(start, end);
        start = end;
    }
    return found;
}

std::unique_ptr<Player::Round> Player::deal(const Operation &operation, u32 lanes) {
    auto round = std::make_unique<Round>();
    for (const std::vector<Branch> &call : shares(operation, lanes)) {
        Call made{bound(call), {}, 0};
        for (const Branch &one : call) made.timesteps.insert(made.timesteps.end(), images_, float(program_.steps[one.step].timestep));
        round->calls.push_back(std::move(made));
    }
    round->jobs.resize(round->calls.size());
    for (std::size_t n = 0; n < round->calls.size(); ++n) {
        Call &call = round->calls[n];
        round->jobs[n].run = [this, &call] { lanes_[call.lane]->run(call.bound->inputs, call.bound->outputs); };
    }
    return round;
}

Player::Bound *Player::bound(const std::vector<Branch> &branches) {
    Key key, kinds;
    std::vector<u32> latents, outputs;
    for (const Branch &one : branches) {
        key.insert(key.end(), {one.latent, one.output, one.conditioning});
        latents.push_back(one.latent), outputs.push_back(one.output), kinds.push_back(one.conditioning);
    }
    auto &found = bound_[key];
    if (found) return found.get();
    auto made = std::make_unique<Bound>();
    const Network &network = program_.network(Role::Denoiser);
    const Runtime &runtime = lanes_[0]->runtime();
    const i64 batch = i64(branches.size()) * images_;
    auto place = [&](const std::vector<u32> &rows, std::vector<u32> &apart, std::vector<float> &own) {
        if (neighbours(rows)) return row(rows[0]);
        apart = rows;
        own.resize(rows.size() * elements_);
        return own.data();
    };
    float *sample = place(latents, made->gather, made->sample), *output = place(outputs, made->scatter, made->output);
    made->timestep.resize(std::size_t(batch));
    auto [inputs, fresh] = inputs_.try_emplace(kinds);
    if (fresh) {
        inputs->second.resize(network.inputs);
        for (u32 n = 0; n < network.inputs; ++n) inputs->second[n].resize(conditioning_[1][n].size() * branches.size());
        fill(kinds, inputs->second);
    }
    for (u32 n = 0; n < network.inputs + network.outputs; ++n) {
        const Tensor &tensor = program_.tensors[network.first_tensor + n];
        std::vector<i64> shape(tensor.dims, tensor.dims + tensor.rank);
        shape[0] = batch;
        float *data = n == network.inputs ? output : tensor.source == Source::Sample ? sample : tensor.source == Source::Timestep ? made->timestep.data() : inputs->second[n].data();
        made->values.emplace_back(runtime, data, tensor.dtype, shape);
        if (n < network.inputs) {
            made->inputs.push_back(made->values.back().get());
        } else {
            made->outputs.push_back(made->values.back().get());
        }
    }
    found = std::move(made);
    return found.get();
}

void Player::run(Round &round, const std::vector<u32> &held, Counts &counts) {
    const std::size_t bytes = elements_ * sizeof(float);
    round.lanes.assign(held.begin(), held.begin() + std::ptrdiff_t(round.calls.size()));
    for (std::size_t n = 0; n < round.calls.size(); ++n) {
        Call &call = round.calls[n];
        call.lane = round.lanes[n];
        call.bound->timestep = call.timesteps;  // of the same size: the memory stays where it is
        for (std::size_t i = 0; i < call.bound->gather.size(); ++i) {
            std::memcpy(call.bound->sample.data() + i * elements_, row(call.bound->gather[i]), bytes);
        }
    }
    workers_.run(round.lanes, round.jobs, countdown_);
    double longest = 0;
    for (const Job &job : round.jobs) longest = std::max(longest, job.ended - job.started);
    for (const Call &call : round.calls) {
        for (std::size_t i = 0; i < call.bound->scatter.size(); ++i) {
            std::memcpy(row(call.bound->scatter[i]), call.bound->output.data() + i * elements_, bytes);
        }
    }
    counts.critical_seconds += longest;
    counts.rounds += 1;
    counts.calls += u32(round.calls.size());
    counts.lane_rounds += held.size();
}

Counts Player::play(Lease &lease, const Check &check, const std::function<void(u32)> &finished) {
    Counts counts;
    u32 round = 0, combination = 0, done = 0;
    for (const Operation &one : program_.operations) {
        if (one.kind == PREDICT) {
            check();
            lease.update();
            run(*dealt(u32(lease.held().size()))[round++], lease.held(), counts);
            counts.evaluations += one.size;
            continue;
        }
        const Combination &made = combinations_[combination++];
        combine(made.sources, made.rows, made.targets, elements_);
        if (one.finished > done) finished(done = one.finished);
    }
    return counts;
}

}  // namespace driffusion
