// Streams advance one operation at a time, in any order that events and edges allow, when a driver call lets them.
#include "machine.h"

namespace imaginary {

CUresult submit(Stream *stream, WorkPointer work) {
    if (stream->capture) return capture_node(stream, std::move(work));
    Operation operation;
    operation.stamp = stamp(stream, track_of(stream, 0), work->model);
    operation.stamp.watched = watch(*work);
    operation.work = std::move(work);
    stream->queue.push_back(std::move(operation));
    return CUDA_SUCCESS;
}

void run_work(const Work &work, const Stamp &when) {
    Device &device = machine.devices[work.context->device];
    ++device.work_done;
    if (device.lost_after >= 0 && device.work_done > device.lost_after) break_context(work.context, device.lost_status);
    if (work.context->sticky || !work.context->alive) return;
    ++machine.time;
    if (!machine.computes) {
        if (work.tells_host) work.run(when);
        return;
    }
    std::vector<Access> accesses = work.accesses;
    const auto reachable = [&](size_t first) {
        for (size_t n = first; n < accesses.size(); ++n) {
            const Access &one = accesses[n];
            const Allocation *allocation = allocation_at(one.low, one.high - one.low);
            const char *why = visible(work.context, allocation);
            if (!why || (work.through_host && allocation)) continue;
            violate("%s touches %zu bytes at %#lx: %s", work.what, static_cast<size_t>(one.high - one.low),
                    static_cast<unsigned long>(one.low), why);
            break_context(work.context, CUDA_ERROR_ILLEGAL_ADDRESS);
            return false;
        }
        return true;
    };
    const size_t known = accesses.size();
    if (!reachable(0)) return;
    if (work.dynamic) work.dynamic(accesses);
    if (work.context->sticky || !reachable(known)) return;
    check_races(work, accesses, when);
    inside_callback = true;
    if (work.run) work.run(when);
    inside_callback = false;
}

static bool hangs(const Context *context) { return machine.devices[context->device].hangs; }

bool may_hang() {
    for (const Device &device : machine.devices)
        if (device.hangs) return true;
    return false;
}

bool broken() {
    for (const Device &device : machine.devices)
        if (device.context && device.context->sticky) return true;
    return false;
}

struct Choice {
    Stream *stream;
    int node;  // of the graph at the head of its queue, or −1
};

static void choices_of(Stream *stream, std::vector<Choice> &choices) {
    const Operation &head = stream->queue.front();
    switch (head.type) {
        case Operation::WAIT:
            if (head.event->done >= head.version) choices.push_back({stream, -1});
            return;
        case Operation::LAUNCH:
            if (head.replay->number != head.replay->executable->ended) return;  // another launch of it runs
            for (const int node : head.replay->ready)
                if (!hangs(head.replay->executable->nodes[node].work->context)) choices.push_back({stream, node});
            if (!head.replay->left) choices.push_back({stream, -1});
            return;
        default:
            if (!hangs(stream->context)) choices.push_back({stream, -1});
    }
}

static void run_node(Replay &replay, int node) {
    replay.ready.erase(std::find(replay.ready.begin(), replay.ready.end(), node));
    run_work(*replay.executable->nodes[node].work, replay.stamps[node]);
    --replay.left;
    for (const int follower : replay.executable->followers[node])
        if (!--replay.missing[follower]) replay.ready.push_back(follower);
}

bool advance() {
    static std::vector<Choice> choices;
    choices.clear();
    size_t kept = 0;
    unsigned long weights = 0;
    for (Stream *stream : machine.streams) {
        if (!stream->alive && stream->queue.empty()) continue;  // destroyed while it had work
        machine.streams[kept++] = stream;
        if (stream->queue.empty()) continue;
        const size_t before = choices.size();
        choices_of(stream, choices);
        weights += stream->speed * (choices.size() - before);
    }
    machine.streams.resize(kept);
    if (choices.empty()) return false;
    unsigned long at = machine.random() % weights;
    size_t n = 0;
    while (at >= static_cast<unsigned long>(choices[n].stream->speed)) at -= choices[n++].stream->speed;
    Stream *stream = choices[n].stream;
    Operation &head = stream->queue.front();
    if (choices[n].node >= 0) {
        run_node(*head.replay, choices[n].node);
        return true;
    }
    if (head.type == Operation::RECORD) {
        head.event->done = std::max(head.event->done, head.version);
        head.event->at = machine.time;
    } else if (head.type == Operation::WORK) {
        run_work(*head.work, head.stamp);
    } else if (head.type == Operation::LAUNCH) {
        ++head.replay->executable->ended;
    }
    stream->queue.pop_front();
    return true;
}

CUresult wait_until(const std::function<bool()> &done, const char *function) {
    while (!done())
        if (!advance()) {
            violate("%s waits for ever: %s", function, may_hang() ? "a device hangs" : "no stream can go on");
            return CUDA_ERROR_LAUNCH_TIMEOUT;
        }
    return CUDA_SUCCESS;
}

template <typename Test>
static bool any_queued(const Stream *stream, Test test) {
    for (const Operation &operation : stream->queue) {
        if (operation.work && test(*operation.work)) return true;
        if (operation.replay)
            for (const Node &node : operation.replay->executable->nodes)
                if (test(*node.work)) return true;
    }
    return false;
}

bool touches(const Stream *stream, uintptr_t low, uintptr_t high) {
    return any_queued(stream, [=](const Work &work) {
        for (const Access &access : work.accesses)
            if (access.low < high && low < access.high) return true;
        return false;
    });
}

bool uses(const Stream *stream, const Module *module) {
    return any_queued(stream, [=](const Work &work) { return work.module == module; });
}

}  // namespace imaginary
