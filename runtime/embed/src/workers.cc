#include "workers.h"

#include <pthread.h>

#include <chrono>
#include <utility>

namespace driffusion {
namespace {

Job stopping;  // its address alone is used

void relax() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
}

template <typename Ready>
bool spin(double seconds, Ready ready) {
    if (ready()) return true;
    for (double end = now() + seconds; now() < end;) {
        for (int n = 0; n < 32; ++n) {
            if (ready()) return true;
            relax();
        }
    }
    return ready();
}

}  // namespace

double now() { return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count(); }

SignalsBlocked::SignalsBlocked() {
    sigset_t all;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before_);
}

SignalsBlocked::~SignalsBlocked() { pthread_sigmask(SIG_SETMASK, &before_, nullptr); }

// A waiter sets `sleeping_` before it looks at the count for the last time, and `done` lowers the count before it looks
// at `sleeping_`: with sequential consistency one of the two sees the other.
void Countdown::done() {
    if (left_.fetch_sub(1, std::memory_order_seq_cst) == 1 && sleeping_.load(std::memory_order_seq_cst)) {
        std::lock_guard<std::mutex> lock(mutex_);
        changed_.notify_all();
    }
}

void Countdown::wait(double spin_seconds) {
    auto over = [this] { return left_.load(std::memory_order_seq_cst) == 0; };
    if (spin(spin_seconds, over)) return;
    std::unique_lock<std::mutex> lock(mutex_);
    sleeping_.store(true, std::memory_order_seq_cst);
    changed_.wait(lock, over);
    sleeping_.store(false, std::memory_order_seq_cst);
}

void Job::perform() noexcept {
    started = now();
    try {
        run();
        error = nullptr;
    } catch (...) {
        error = std::current_exception();
    }
    ended = now();
}

Workers::Workers(u32 lanes, double spin_seconds) : spin_seconds_(spin_seconds) {
    SignalsBlocked blocked;
    try {
        for (u32 lane = 1; lane < lanes; ++lane) {
            workers_.push_back(std::make_unique<Worker>());
            Worker &worker = *workers_.back();
            worker.thread = std::thread([this, &worker] { loop(worker); });
        }
    } catch (...) {
        stop();
        throw;
    }
}

Workers::~Workers() { stop(); }

void Workers::stop() {
    for (auto &worker : workers_) {
        if (!worker->thread.joinable()) continue;
        post(*worker, &stopping);
        worker->thread.join();
    }
}

void Workers::post(Worker &worker, Job *job) {
    worker.posted.store(job, std::memory_order_seq_cst);
    if (worker.sleeping.load(std::memory_order_seq_cst)) {
        std::lock_guard<std::mutex> lock(worker.mutex);
        worker.changed.notify_one();
    }
}

void Workers::loop(Worker &worker) {
    auto posted = [&worker] { return worker.posted.load(std::memory_order_seq_cst) != nullptr; };
    for (;;) {
        if (!spin(spin_seconds_, posted)) {
            std::unique_lock<std::mutex> lock(worker.mutex);
            worker.sleeping.store(true, std::memory_order_seq_cst);
            worker.changed.wait(lock, posted);
            worker.sleeping.store(false, std::memory_order_seq_cst);
        }
        Job *job = worker.posted.exchange(nullptr, std::memory_order_seq_cst);
        if (job == &stopping) return;
        Countdown *countdown = job->countdown;
        job->perform();
        countdown->done();  // the job may be gone after this
    }
}

void Workers::run(const std::vector<u32> &lanes, std::vector<Job> &jobs, Countdown &countdown) {
    countdown.set(u32(jobs.size()) - 1);
    for (std::size_t n = 1; n < jobs.size(); ++n) {
        jobs[n].countdown = &countdown;
        post(*workers_[lanes[n] - 1], &jobs[n]);
    }
    jobs[0].perform();
    countdown.wait(spin_seconds_);
    for (Job &job : jobs) {
        if (job.error) std::rethrow_exception(std::exchange(job.error, nullptr));
    }
}

}  // namespace driffusion
