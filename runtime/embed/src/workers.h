// One thread per lane but the first, and the hand-over of a round's calls to them and back.
#pragma once
#include <signal.h>

#include <atomic>
#include <condition_variable>
#include <exception>
#include <functional>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

#include "program.h"

namespace driffusion {

// Counts down to zero; who waits spins for a moment before it sleeps.
class Countdown {
   public:
    void set(u32 number) { left_.store(number, std::memory_order_seq_cst); }
    void done();
    void wait(double spin_seconds);

   private:
    std::atomic<u32> left_{0};
    std::atomic<bool> sleeping_{false};
    std::mutex mutex_;
    std::condition_variable changed_;
};

struct Job {
    std::function<void()> run;  // throws what went wrong
    std::exception_ptr error;
    double started = 0, ended = 0;
    Countdown *countdown = nullptr;

    void perform() noexcept;
};

class Workers {
   public:
    Workers(u32 lanes, double spin_seconds);
    ~Workers();
    Workers(const Workers &) = delete;
    Workers &operator=(const Workers &) = delete;

    // Runs jobs[n] on lane lanes[n], the first of them in the calling thread, and waits for all; throws the first error.
    void run(const std::vector<u32> &lanes, std::vector<Job> &jobs, Countdown &countdown);

   private:
    struct Worker {
        std::atomic<Job *> posted{nullptr};
        std::atomic<bool> sleeping{false};
        std::mutex mutex;
        std::condition_variable changed;
        std::thread thread;
    };
    void loop(Worker &worker);
    void post(Worker &worker, Job *job);
    void stop();

    double spin_seconds_;
    std::vector<std::unique_ptr<Worker>> workers_;
};

// While it lives, this thread and those that it starts take no signals: a host's signals are handled by its own threads.
class SignalsBlocked {
   public:
    SignalsBlocked();
    ~SignalsBlocked();
    SignalsBlocked(const SignalsBlocked &) = delete;
    SignalsBlocked &operator=(const SignalsBlocked &) = delete;

   private:
    sigset_t before_;
};

double now();  // seconds of a clock that never goes back

}  // namespace driffusion
