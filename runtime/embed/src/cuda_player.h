// Plays a program on GPUs: slots at home, the GPU of the lane that a request owns; the host enqueues and waits for the
// round before the last one, so that a request can be cancelled and `finished` is at most one round ahead.
//
// Failures, as in engines/cuda/backend.py: after an error in a round all lanes are waited for; a device that was lost is an
// error of every image that it had a part in; a lane that hangs is named, and ends the engine.
#pragma once
#include <functional>
#include <map>
#include <atomic>
#include <memory>
#include <mutex>
#include <set>
#include <tuple>
#include <vector>

#include "cuda_combine.h"
#include "cuda_lanes.h"
#include "cuda_output.h"
#include "player.h"

namespace driffusion::cuda {

// The denoiser of one lane. `inputs` are in the network's order; batches of any size follow each other on one stream.
class DeviceNetwork {
   public:
    virtual ~DeviceNetwork() = default;
    struct Buffer {
        CUdeviceptr data;
        u32 dtype;
        std::vector<i64> shape;
    };
    // Enqueues a call; the lane's context is current. Throws Error.
    virtual void enqueue(const std::vector<Buffer> &inputs, const Buffer &output, CUstream stream) = 0;
};

// What a network is made of: names and types of the inputs in the network's order, then of the output.
using OpenSession = std::function<std::unique_ptr<Session>()>;
struct NetworkSource {
    OpenSession session;
    std::string plan, library;  // of TensorRT
    std::vector<std::string> names;
    std::vector<u32> dtypes;
};

// How networks get onto GPUs in place of TensorRT, set before an engine opens one; tests put models of the imaginary machine here.
using NetworkFactory = std::function<std::unique_ptr<DeviceNetwork>(const Gpu &, const NetworkSource &)>;
void set_network_factory(NetworkFactory factory);
// Error with UNSUPPORTED where no plan is named.
std::unique_ptr<DeviceNetwork> open_network(const Gpu &gpu, const NetworkSource &source);

struct Lane {
    Gpu gpu;
    std::unique_ptr<DeviceNetwork> network;
    Stream stream;
};

// Which pairs of the lanes' GPUs copy directly.
class Pairs {
   public:
    explicit Pairs(const std::vector<std::unique_ptr<Lane>> &lanes);
    bool direct(const Gpu &from, const Gpu &to) const { return direct_.count({from.ordinal(), to.ordinal()}) > 0; }

   private:
    std::set<std::pair<int, int>> direct_;
};

// Lanes that hang, known to all players of an engine: it makes no further image, and keeps its memory on GPUs.
class Hangs {
   public:
    explicit Hangs(double seconds) : seconds(seconds) {}
    const double seconds;  // without an end of a round after which a lane hangs
    bool any() const { return any_.load(); }
    void add(const std::string &message);
    void check() const;  // Error with what was added first

   private:
    std::atomic<bool> any_{false};
    mutable std::mutex mutex_;
    std::string message_;
};

class Player : public driffusion::Player {
   public:
    Player(const Program &program, const std::vector<std::unique_ptr<Session>> &none, Workers &workers, const std::vector<std::unique_ptr<Lane>> &lanes, const Pairs &pairs, Hangs &hangs, u32 own);
    ~Player() override;

    void bind(u32 images, double guidance, std::vector<Conditioning> branches) override;
    void upload() override;
    void download() override;
    Counts play(Lease &lease, const Check &check, const std::function<void(u32)> &finished) override;
    // Between play and finish.
    void send(Output &output, const Gpu &to);
    void finish() override;

   private:
    // Values of the host on a lane's GPU: sent once, and again where they have changed since.
    struct Sent {
        DeviceMemory memory;
        std::unique_ptr<PinnedMemory> staging;
        std::size_t bytes = 0;
        u64 request = 0;
    };
    struct Place {  // this player's memory on a lane
        DeviceMemory sample, output;
        std::vector<std::unique_ptr<Link>> there, back;  // by row of the batch
        std::map<Key, std::vector<Sent>> conditioning;  // by the branches of a call
        std::map<Key, Sent> timesteps;                  // by its steps
        std::unique_ptr<Event> ended[2], idle;          // of calls of even and odd rounds
    };
    CUdeviceptr at(u32 row) const { return slots_.get() + std::size_t(row) * elements_ * sizeof(float); }
    Place &place(u32 lane);
    CUdeviceptr sent(Sent &one, const Lane &lane, const std::vector<float> &values);
    void enqueue(u32 lane, const std::vector<Branch> &call, const Event &ended);
    void round(const Operation &operation, const std::vector<u32> &held, Counts &counts);
    void await(u32 lane, const Gpu &gpu, const Event &event, CUstream stream);
    void settle();
    void drain() noexcept;
    template <typename Body>
    void settled(Body body);
    [[noreturn]] void hung(const Hang &error);
    void check_lanes() const;

    const std::vector<std::unique_ptr<Lane>> &gpu_lanes_;
    const Pairs &pairs_;
    Hangs &hangs_;
    const u32 own_;
    const Gpu home_;
    Kernels kernels_;
    u64 request_ = 0;
    bool busy_ = false;  // something may still use this memory
    u32 made_ = 0;  // rounds of this request
    DeviceMemory slots_;
    std::unique_ptr<PinnedMemory> staging_;
    std::unique_ptr<Combinations> device_combinations_;
    std::map<u32, Place> places_;
    std::unique_ptr<Event> begun_[2], rounds_[2];
    std::vector<u32> asked_[2];  // the lanes of the last even and odd round
    std::unique_ptr<Event> idle_;
    std::unique_ptr<PinnedMemory> flag_;
    Stream main_;
};

}  // namespace driffusion::cuda
