#include "lanes.h"

#include <algorithm>
#include <chrono>

namespace driffusion {
namespace {

constexpr double WAIT_FACTOR = 1.1;  // lanes of one image wait for each other after every round, which the times of calls do not show
constexpr auto POLL = std::chrono::milliseconds(50);

}  // namespace

double call_seconds(const std::vector<Cost> &measured, double branches) {
    if (measured.empty()) return branches;
    if (branches > measured.back().branches) return measured.back().seconds * branches / measured.back().branches;
    if (branches <= measured.front().branches) return measured.front().seconds;
    auto above = std::find_if(measured.begin(), measured.end(), [branches](const Cost &cost) { return cost.branches >= branches; });
    auto below = above - 1;
    return below->seconds + (above->seconds - below->seconds) * (branches - below->branches) / (above->branches - below->branches);
}

u32 at_once(const std::vector<const Seconds *> &images, u32 lanes) {
    auto per_second = [](const Seconds &seconds, u32 share) { return 1 / (seconds[share - 1] * (share > 1 ? WAIT_FACTOR : 1.0)); };
    u32 most = std::min(lanes, u32(images.size())), best = most;
    if (most < 2) return most;
    double least = 0;
    for (u32 number = 1; number <= most; ++number) {
        u32 share = lanes / number, extra = lanes % number;
        double busy = 0;
        for (const Seconds *one : images) {
            busy += 1 / ((number - extra) * per_second(*one, share) + (extra ? extra * per_second(*one, share + 1) : 0.0));
        }
        if (number == 1 || busy < least) least = busy, best = number;
    }
    return best;
}

std::map<u32, std::vector<u32>> divide(u32 lanes, const std::vector<u32> &owned) {
    std::map<u32, std::vector<u32>> found;
    for (u32 lane : owned) found[lane] = {lane};
    for (u32 lane = 0, turn = 0; lane < lanes; ++lane) {
        if (found.count(lane)) continue;
        found[owned[turn++ % owned.size()]].push_back(lane);
    }
    return found;
}

Lease::Lease(Lanes &lanes, Seconds seconds, const Check &check) : lanes_(lanes), seconds_(std::move(seconds)) {
    lanes_.admit(*this, check);
    try {
        lanes_.wait_for_own(*this, check);
    } catch (...) {
        lanes_.release(*this);
        throw;
    }
}

Lease::~Lease() { lanes_.release(*this); }

void Lease::update() {
    if (version_ == lanes_.version_.load()) return;
    std::lock_guard<std::mutex> lock(lanes_.mutex_);
    std::vector<u32> mine = lanes_.share(*this), given;
    for (u32 lane : held_) {
        if (std::find(mine.begin(), mine.end(), lane) == mine.end()) given.push_back(lane);
    }
    lanes_.give_back(*this, given);
    lanes_.take(*this);
    if (!given.empty()) lanes_.changed_.notify_all();
}

void Lanes::wake() {
    std::lock_guard<std::mutex> lock(mutex_);
    changed_.notify_all();
}

bool Lanes::may_enter(const Lease &lease) const {
    if (queue_.front() != &lease) return false;
    std::vector<const Seconds *> there;
    for (const Lease *one : leases_) there.push_back(&one->seconds_);
    for (const Lease *one : queue_) there.push_back(&one->seconds_);
    if (there.size() > 2 * count_) there.resize(2 * count_);
    return leases_.size() < at_once(there, count_);
}

void Lanes::admit(Lease &lease, const Check &check) {
    std::unique_lock<std::mutex> lock(mutex_);
    queue_.push_back(&lease);
    auto leave_queue = [&] {
        queue_.erase(std::find(queue_.begin(), queue_.end(), &lease));
        changed_.notify_all();
    };
    try {
        while (!may_enter(lease)) {
            changed_.wait_for(lock, POLL);
            lock.unlock();
            check();
            lock.lock();
        }
        auto taken = [this](u32 lane) {
            return std::any_of(leases_.begin(), leases_.end(), [lane](const Lease *one) { return one->own_ == lane; });
        };
        while (taken(lease.own_)) ++lease.own_;
        leases_.push_back(&lease);
        ++version_;
    } catch (...) {
        if (!lock.owns_lock()) lock.lock();
        leave_queue();
        throw;
    }
    leave_queue();
}

void Lanes::wait_for_own(Lease &lease, const Check &check) {
    // the owned lane may be in a round of another image, which gives it back after that
    std::unique_lock<std::mutex> lock(mutex_);
    take(lease);
    while (holder_[lease.own_] != &lease) {
        changed_.wait_for(lock, POLL);
        lock.unlock();
        check();
        lock.lock();
        take(lease);
    }
}

void Lanes::release(Lease &lease) {
    std::lock_guard<std::mutex> lock(mutex_);
    leases_.erase(std::find(leases_.begin(), leases_.end(), &lease));
    ++version_;
    give_back(lease, lease.held_);
    changed_.notify_all();
}

std::vector<u32> Lanes::share(const Lease &lease) const {
    std::vector<u32> owned;
    for (const Lease *one : leases_) owned.push_back(one->own_);
    return divide(count_, owned)[lease.own_];
}

void Lanes::take(Lease &lease) {
    std::vector<u32> mine = share(lease);
    for (u32 lane : mine) {
        if (!holder_[lane]) holder_[lane] = &lease;
    }
    lease.held_.clear();
    for (u32 lane = 0; lane < count_; ++lane) {
        if (holder_[lane] == &lease) lease.held_.push_back(lane);
    }
    std::sort(mine.begin(), mine.end());
    if (lease.held_ == mine) lease.version_ = version_;  // else some are in a round of another: look again before the next
}

void Lanes::give_back(Lease &lease, const std::vector<u32> &lanes) {
    for (u32 lane : std::vector<u32>(lanes)) {
        holder_[lane] = nullptr;
        lease.held_.erase(std::find(lease.held_.begin(), lease.held_.end(), lane));
    }
}

}  // namespace driffusion
