// Captures and graphs.
#include "machine.h"

namespace imaginary {

void invalidate(const CapturePointer &capture, const char *function, const char *why) {
    if (!capture->active) return;
    violate("%s ends a capture: it %s", function, why);
    capture->invalid = true;
}

CUresult refuse_during_capture(Function function, CUresult status) {
    const auto me = std::this_thread::get_id();
    bool refused = false;
    for (const CapturePointer &capture : machine.captures) {
        if (!capture->active || capture_mode == CU_STREAM_CAPTURE_MODE_RELAXED) continue;
        const bool mine = capture->thread == me && capture->mode != CU_STREAM_CAPTURE_MODE_RELAXED;
        const bool everyones = capture->mode == CU_STREAM_CAPTURE_MODE_GLOBAL && capture_mode == CU_STREAM_CAPTURE_MODE_GLOBAL;
        if (!mine && !everyones) continue;
        invalidate(capture, NAMES[function], mine ? "may not be called by the thread that captures"
                                                  : "may be called by no thread during a global capture");
        refused = true;
    }
    return refused ? status : CUDA_SUCCESS;
}

void notice_other_thread(const CapturePointer &capture, const char *function) {
    if (capture->mode == CU_STREAM_CAPTURE_MODE_RELAXED || capture->thread == std::this_thread::get_id()) return;
    violate("%s: another thread captures the stream, whose graph takes this in", function);
}

CUresult capture_node(Stream *stream, WorkPointer work) {
    Capture &capture = *stream->capture;
    notice_other_thread(stream->capture, work->what);
    if (capture.invalid) return CUDA_ERROR_STREAM_CAPTURE_INVALIDATED;
    capture.nodes.push_back({std::move(work), stream->tail, stream->branch});
    stream->tail = {static_cast<int>(capture.nodes.size()) - 1};
    return CUDA_SUCCESS;
}

void leave_capture(const CapturePointer &capture) {
    capture->active = false;
    for (Stream *stream : capture->streams) stream->capture = nullptr, stream->tail.clear();
    auto &all = machine.captures;
    all.erase(std::remove(all.begin(), all.end(), capture), all.end());
}

// Whether everything that other streams were given ends before what the first stream does next.
static bool joined(const Capture &capture) {
    std::set<int> seen;
    std::vector<int> todo(capture.origin->tail.begin(), capture.origin->tail.end());
    while (!todo.empty()) {
        const int node = todo.back();
        todo.pop_back();
        if (seen.insert(node).second)
            todo.insert(todo.end(), capture.nodes[node].needs.begin(), capture.nodes[node].needs.end());
    }
    return seen.size() == capture.nodes.size();
}

// Whether a node can run now: its context, its module and its memory are still there.
static CUresult runnable(const Work &work) {
    if (!work.context->alive || (work.module && !work.module->alive)) {
        violate("cuGraphLaunch: a %s was destroyed after the graph was made", work.context->alive ? "module" : "context");
        return CUDA_ERROR_INVALID_VALUE;
    }
    for (const Access &access : work.accesses)
        if (!allocation_at(access.low, access.high - access.low)) {
            violate("cuGraphLaunch: memory of a node (%s) was freed after the graph was made", work.what);
            return CUDA_ERROR_INVALID_VALUE;
        }
    return usable(work.context);
}

static std::unique_ptr<Replay> replay(Executable *executable, Stream *stream) {
    auto made = std::make_unique<Replay>();
    made->executable = executable;
    made->left = executable->nodes.size();
    made->number = executable->launched++;
    join(stream->clock, machine.host);
    join(stream->clock, executable->end);
    const Clock start = stream->clock;
    const int chain = std::max({stream->chain, machine.host_chain, executable->chain});
    Clock end = start;
    int longest = chain;
    for (size_t n = 0; n < executable->nodes.size(); ++n) {
        const Node &node = executable->nodes[n];
        stream->clock = start;
        stream->chain = chain;
        for (const int need : node.needs) {
            join(stream->clock, made->stamps[need].clock);
            stream->chain = std::max(stream->chain, made->stamps[need].chain);
        }
        made->stamps.push_back(stamp(stream, track_of(stream, node.branch), node.work->model));
        made->stamps.back().watched = watch(*node.work);
        made->missing.push_back(static_cast<int>(node.needs.size()));
        if (node.needs.empty()) made->ready.push_back(static_cast<int>(n));
        join(end, stream->clock);
        longest = std::max(longest, stream->chain);
    }
    executable->end = stream->clock = end;
    executable->chain = stream->chain = longest;
    return made;
}

}  // namespace imaginary

using namespace imaginary;

CUresult cuStreamBeginCapture_v2(CUstream handle, CUstreamCaptureMode mode) {
    return call(F_cuStreamBeginCapture, DRIVER, [&] {
        Stream *stream = find<Stream>(handle, "cuStreamBeginCapture");
        if (!stream) return CUDA_ERROR_INVALID_HANDLE;
        if (const CUresult status = usable(stream->context)) return status;
        if (stream->capture) {
            violate("cuStreamBeginCapture: the stream is capturing already");
            return CUDA_ERROR_INVALID_VALUE;
        }
        auto capture = std::make_shared<Capture>();
        capture->origin = stream;
        capture->mode = mode;
        capture->thread = std::this_thread::get_id();
        capture->streams.push_back(stream);
        machine.captures.push_back(capture);
        stream->capture = capture;
        stream->branch = 0;
        stream->tail.clear();
        return CUDA_SUCCESS;
    });
}

CUresult cuStreamEndCapture(CUstream handle, CUgraph *graph) {
    return call(F_cuStreamEndCapture, DRIVER, [&] {
        *graph = nullptr;
        Stream *stream = find<Stream>(handle, "cuStreamEndCapture");
        if (!stream) return CUDA_ERROR_INVALID_HANDLE;
        const CapturePointer capture = stream->capture;
        if (!capture) {
            violate("cuStreamEndCapture: the stream is not capturing");
            return CUDA_ERROR_INVALID_VALUE;
        }
        if (capture->origin != stream) {
            invalidate(capture, "cuStreamEndCapture", "is called for another stream than the first");
            return CUDA_ERROR_STREAM_CAPTURE_UNMATCHED;
        }
        if (capture->mode != CU_STREAM_CAPTURE_MODE_RELAXED && capture->thread != std::this_thread::get_id()) {
            invalidate(capture, "cuStreamEndCapture", "is called by another thread");
            return CUDA_ERROR_STREAM_CAPTURE_WRONG_THREAD;
        }
        const bool whole = joined(*capture), invalid = capture->invalid;
        leave_capture(capture);
        if (invalid) return CUDA_ERROR_STREAM_CAPTURE_INVALIDATED;
        if (!whole) {
            violate("cuStreamEndCapture: a stream was given work that the first one does not wait for");
            return CUDA_ERROR_STREAM_CAPTURE_UNJOINED;
        }
        Graph *made = create<Graph>(nullptr);
        made->nodes = capture->nodes;
        *graph = handle_of<CUgraph>(made);
        return CUDA_SUCCESS;
    });
}

CUresult cuStreamIsCapturing(CUstream handle, CUstreamCaptureStatus *status) {
    return call(F_cuStreamIsCapturing, DRIVER, [&] {
        const Stream *stream = find<Stream>(handle, "cuStreamIsCapturing");
        if (!stream) return CUDA_ERROR_INVALID_HANDLE;
        *status = !stream->capture ? 0 : stream->capture->invalid ? 2 : 1;
        return CUDA_SUCCESS;
    });
}

CUresult cuThreadExchangeStreamCaptureMode(CUstreamCaptureMode *mode) {
    std::swap(*mode, capture_mode);
    return CUDA_SUCCESS;
}

CUresult cuGraphInstantiateWithFlags(CUgraphExec *executable, CUgraph handle, unsigned long long) {
    return call(F_cuGraphInstantiate, DRIVER, [&] {
        const Graph *graph = find<Graph>(handle, "cuGraphInstantiate");
        if (!graph) return CUDA_ERROR_INVALID_HANDLE;
        Executable *made = create<Executable>(nullptr);
        made->nodes = graph->nodes;
        made->followers.resize(made->nodes.size());
        for (size_t n = 0; n < made->nodes.size(); ++n)
            for (const int need : made->nodes[n].needs) made->followers[need].push_back(static_cast<int>(n));
        *executable = handle_of<CUgraphExec>(made);
        return CUDA_SUCCESS;
    });
}

CUresult cuGraphLaunch(CUgraphExec handle, CUstream on) {
    return call(F_cuGraphLaunch, DRIVER, [&] {
        Executable *executable = find<Executable>(handle, "cuGraphLaunch");
        Stream *stream = find<Stream>(on, "cuGraphLaunch");
        if (!executable || !stream) return CUDA_ERROR_INVALID_HANDLE;
        if (const CUresult status = usable(stream->context)) return status;
        if (stream->capture) {
            invalidate(stream->capture, "cuGraphLaunch", "launches a graph within a capture, which is not supported here");
            return CUDA_ERROR_NOT_SUPPORTED;
        }
        for (const Node &node : executable->nodes)
            if (const CUresult status = runnable(*node.work)) return status;
        Operation operation;
        operation.type = Operation::LAUNCH;
        operation.replay = replay(executable, stream);
        stream->queue.push_back(std::move(operation));
        return CUDA_SUCCESS;
    });
}

CUresult cuGraphDestroy(CUgraph handle) {
    return call(F_cuGraphDestroy, DRIVER, [&] {
        Graph *graph = find<Graph>(handle, "cuGraphDestroy");
        if (!graph) return CUDA_ERROR_INVALID_HANDLE;
        graph->alive = false;
        graph->nodes.clear();
        return CUDA_SUCCESS;
    });
}

CUresult cuGraphExecDestroy(CUgraphExec handle) {
    return call(F_cuGraphExecDestroy, DRIVER, [&] {
        Executable *executable = find<Executable>(handle, "cuGraphExecDestroy");
        if (!executable) return CUDA_ERROR_INVALID_HANDLE;
        bool known = executable->launched == executable->ended;
        for (size_t n = 0; machine.races && known && n < executable->end.size(); ++n)
            known = executable->end[n] <= (n < machine.host.size() ? machine.host[n] : 0);
        if (!known && !broken()) violate("cuGraphExecDestroy: the graph may still be running");
        executable->alive = false;
        return CUDA_SUCCESS;
    });
}
