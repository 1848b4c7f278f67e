// Plays a program's operations on lanes: one image (or several of one call) at a time, with memory that is kept.
#pragma once
#include <functional>
#include <map>
#include <memory>
#include <vector>

#include "lanes.h"
#include "ort.h"
#include "program.h"
#include "workers.h"

namespace driffusion {

// The denoiser's inputs by tensor, for one branch of guidance: (images, …) floats; empty for sample and timestep.
using Conditioning = std::vector<std::vector<float>>;

struct Counts {
    u32 rounds = 0, evaluations = 0, calls = 0;
    u64 lane_rounds = 0;
    double critical_seconds = 0;
};

class Player {
   public:
    Player(const Program &program, const std::vector<std::unique_ptr<Session>> &lanes, Workers &workers);
    virtual ~Player() = default;
    Player(const Player &) = delete;
    Player &operator=(const Player &) = delete;

    // Starts images: sets what does not change until they are finished. Memory stays while shapes stay.
    virtual void bind(u32 images, double guidance, std::vector<Conditioning> branches);
    // In host memory. Where slots lie elsewhere, `upload` sends the state and the noise there after they were written here,
    // and `download` fetches the state, before it is read here.
    float *slot(u32 number) { return row(rows_[number]); }
    virtual void upload() {}
    virtual void download() {}
    std::size_t slot_elements() const { return elements_; }
    // `check` is called before every round and may throw; `finished(steps)` when more steps are done.
    virtual Counts play(Lease &lease, const Check &check, const std::function<void(u32)> &finished);
    // Waits for what `play` may have left under way.
    virtual void finish() {}

   protected:
    struct Branch {
        u32 latent, output, conditioning, step;  // latent and output are rows
    };
    struct Bound {  // a call on its memory: rows themselves where they are neighbours, else a copy
        std::vector<u32> gather, scatter;
        std::vector<float> sample, output, timestep;
        std::vector<Value> values;
        std::vector<const OrtValue *> inputs;
        std::vector<OrtValue *> outputs;
    };
    struct Call {
        Bound *bound;
        std::vector<float> timesteps;
        u32 lane = 0;
    };
    struct Round {
        std::vector<Call> calls;
        std::vector<Job> jobs;
        std::vector<u32> lanes;
    };
    struct Combination {
        std::vector<const float *> sources;
        std::vector<float> rows;
        std::vector<float *> targets;
    };
    using Key = std::vector<u32>;

    float *row(u32 number) { return memory_.data() + std::size_t(number) * elements_; }
    void lay_out();
    void weigh(double guidance);
    void fill(const std::vector<u32> &branches, std::vector<std::vector<float>> &inputs);
    std::vector<std::unique_ptr<Round>> &dealt(u32 lanes);
    std::vector<std::vector<Branch>> shares(const Operation &operation, u32 lanes) const;
    std::unique_ptr<Round> deal(const Operation &operation, u32 lanes);
    Bound *bound(const std::vector<Branch> &branches);
    void run(Round &round, const std::vector<u32> &held, Counts &counts);

    const Program &program_;
    const std::vector<std::unique_ptr<Session>> &lanes_;
    Workers &workers_;
    Countdown countdown_;
    u32 images_ = 0, branches_ = 0;
    std::size_t elements_ = 0;  // of a slot
    double guidance_ = 0;
    std::vector<u32> rows_;  // by slot; the branches of an output follow each other at `strides_`
    std::vector<u32> strides_;
    std::vector<float> memory_;
    std::vector<Conditioning> conditioning_;
    std::map<Key, std::vector<std::vector<float>>> inputs_;  // by the branches of a call
    std::map<Key, std::unique_ptr<Bound>> bound_;
    std::map<u32, std::vector<std::unique_ptr<Round>>> dealt_;  // by the number of lanes
    std::vector<Combination> combinations_;
};

}  // namespace driffusion
