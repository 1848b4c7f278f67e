// Several images at once on disjoint lanes, by the rule of `runtime/lane_policy.py` and `runtime/lanes.py`.
#pragma once
#include <atomic>
#include <condition_variable>
#include <deque>
#include <functional>
#include <map>
#include <mutex>
#include <vector>

#include "program.h"

namespace driffusion {

// Seconds of an image on 1 … L lanes, by its model calls; entry n − 1 is for n lanes.
using Seconds = std::vector<double>;
using Check = std::function<void()>;  // throws when an image is no longer wanted

u32 at_once(const std::vector<const Seconds *> &images, u32 lanes);
std::map<u32, std::vector<u32>> divide(u32 lanes, const std::vector<u32> &owned);
// Linear between what was measured, in proportion beyond it.
double call_seconds(const std::vector<Cost> &measured, double branches);

class Lanes;

// A request's hold on lanes: it owns one until it is finished, and borrows those that nobody owns.
class Lease {
   public:
    Lease(Lanes &lanes, Seconds seconds, const Check &check);
    ~Lease();
    Lease(const Lease &) = delete;
    Lease &operator=(const Lease &) = delete;

    u32 own() const { return own_; }
    const std::vector<u32> &held() const { return held_; }
    // Between two rounds: gives back lanes that belong to others now, and takes those that are free.
    void update();

   private:
    friend class Lanes;
    Lanes &lanes_;
    Seconds seconds_;
    u32 own_ = 0;
    u64 version_ = ~u64(0);  // of the division that `held_` is of
    std::vector<u32> held_;
};

class Lanes {
   public:
    explicit Lanes(u32 count) : count_(count), holder_(count) {}
    u32 count() const { return count_; }
    void wake();  // who waits looks again whether it is still wanted

   private:
    friend class Lease;
    void admit(Lease &lease, const Check &check);
    void wait_for_own(Lease &lease, const Check &check);
    void release(Lease &lease);
    bool may_enter(const Lease &lease) const;
    std::vector<u32> share(const Lease &lease) const;
    void take(Lease &lease);
    void give_back(Lease &lease, const std::vector<u32> &lanes);

    const u32 count_;
    std::mutex mutex_;
    std::condition_variable changed_;
    std::deque<Lease *> queue_;
    std::vector<Lease *> leases_;  // in the order in which they were admitted
    std::vector<Lease *> holder_;   // by lane
    std::atomic<u64> version_{0};
};

}  // namespace driffusion
