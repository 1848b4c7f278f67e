// Streams and events.
#include "machine.h"

using namespace imaginary;

namespace {

CUresult make_stream(Function function, CUstream *made) {
    return call(function, CONTEXT, [&] {
        Stream *stream = create<Stream>(current());
        static const int speeds[] = {1, 20, 400};
        stream->speed = speeds[machine.random() % 3];
        machine.streams.push_back(stream);
        *made = handle_of<CUstream>(stream);
        return CUDA_SUCCESS;
    });
}

// What a call on a stream finds before anything else.
CUresult look_up(CUstream handle, Function function, Stream **found) {
    *found = find<Stream>(handle, NAMES[function]);
    return *found ? usable((*found)->context) : CUDA_ERROR_INVALID_HANDLE;
}

CUresult look_up(CUevent handle, Function function, Event **found) {
    *found = find<Event>(handle, NAMES[function]);
    return *found ? usable((*found)->context) : CUDA_ERROR_INVALID_HANDLE;
}

bool forbidden_in_capture(Stream *stream, Function function) {
    if (stream->capture) invalidate(stream->capture, NAMES[function], "asks for the progress of a capturing stream");
    return stream->capture != nullptr;
}

bool captured(Event *event, Function function) {
    if (!event->capture) return false;
    violate("%s: the event was last recorded in a capture", NAMES[function]);
    if (event->capture->active) invalidate(event->capture, NAMES[function], "asks for an event of the capture");
    return true;
}

void host_learns(const Clock &clock, int chain) {
    join(machine.host, clock);
    machine.host_chain = std::max(machine.host_chain, chain);
}

CUresult join_capture(Stream *stream, Event *event) {
    const CapturePointer capture = event->capture;
    if (capture->active) notice_other_thread(capture, "cuStreamWaitEvent");
    if (!capture->active) {
        violate("cuStreamWaitEvent: the event was last recorded in a capture that has ended");
        if (stream->capture) invalidate(stream->capture, "cuStreamWaitEvent", "waits for an event of an ended capture");
        return CUDA_ERROR_INVALID_VALUE;
    }
    if (capture->invalid) return CUDA_ERROR_STREAM_CAPTURE_INVALIDATED;
    if (stream->capture && stream->capture != capture) {
        invalidate(capture, "cuStreamWaitEvent", "would merge two captures");
        invalidate(stream->capture, "cuStreamWaitEvent", "would merge two captures");
        return CUDA_ERROR_STREAM_CAPTURE_MERGE;
    }
    if (!stream->capture) {
        stream->capture = capture;
        stream->branch = static_cast<int>(capture->streams.size());
        stream->tail.clear();
        capture->streams.push_back(stream);
    }
    stream->tail.insert(event->nodes.begin(), event->nodes.end());
    return CUDA_SUCCESS;
}

}  // namespace

CUresult cuStreamCreate(CUstream *stream, unsigned int) { return make_stream(F_cuStreamCreate, stream); }

CUresult cuStreamCreateWithPriority(CUstream *stream, unsigned int, int) {
    return make_stream(F_cuStreamCreateWithPriority, stream);
}

CUresult cuStreamDestroy_v2(CUstream handle) {
    return call(F_cuStreamDestroy, CONTEXT, [&] {
        Stream *stream = find<Stream>(handle, "cuStreamDestroy");
        if (!stream) return CUDA_ERROR_INVALID_HANDLE;
        if (stream->capture) invalidate(stream->capture, "cuStreamDestroy", "destroys a capturing stream");
        stream->alive = false;  // queued work still runs
        return CUDA_SUCCESS;
    });
}

CUresult cuStreamQuery(CUstream handle) {
    return call(F_cuStreamQuery, DRIVER | NO_CAPTURE, [&] {
        Stream *stream;
        if (const CUresult status = look_up(handle, F_cuStreamQuery, &stream)) return status;
        if (forbidden_in_capture(stream, F_cuStreamQuery)) return CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED;
        if (stream->queue.empty()) return host_learns(stream->clock, stream->chain), CUDA_SUCCESS;
        advance();
        return CUDA_ERROR_NOT_READY;
    });
}

CUresult cuStreamSynchronize(CUstream handle) {
    return call(F_cuStreamSynchronize, DRIVER | NO_CAPTURE, [&] {
        Stream *stream;
        if (const CUresult status = look_up(handle, F_cuStreamSynchronize, &stream)) return status;
        if (forbidden_in_capture(stream, F_cuStreamSynchronize)) return CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED;
        if (const CUresult status = wait_until([&] { return stream->queue.empty(); }, "cuStreamSynchronize")) return status;
        host_learns(stream->clock, stream->chain);
        return usable(stream->context);
    });
}

CUresult cuStreamWaitEvent(CUstream on, CUevent of, unsigned int) {
    return call(F_cuStreamWaitEvent, DRIVER, [&] {
        Stream *stream;
        Event *event = find<Event>(of, "cuStreamWaitEvent");
        if (const CUresult status = look_up(on, F_cuStreamWaitEvent, &stream)) return status;
        if (!event) return CUDA_ERROR_INVALID_HANDLE;
        const bool something = event->capture || event->asked;  // that it would wait for
        if (something && machine.ignored && machine.ignored(stream->handle, event->handle)) return CUDA_SUCCESS;
        if (event->capture) return join_capture(stream, event);
        if (stream->capture) {
            notice_other_thread(stream->capture, "cuStreamWaitEvent");
            if (stream->capture->invalid) return CUDA_ERROR_STREAM_CAPTURE_INVALIDATED;
            invalidate(stream->capture, "cuStreamWaitEvent", "waits for an event from outside the capture");
            return CUDA_ERROR_STREAM_CAPTURE_ISOLATION;
        }
        if (!event->asked) return CUDA_SUCCESS;  // never recorded: nothing to wait for
        join(stream->clock, event->clock);
        stream->chain = std::max(stream->chain, event->chain);
        Operation operation;
        operation.type = Operation::WAIT;
        operation.event = event;
        operation.version = event->asked;
        stream->queue.push_back(std::move(operation));
        return CUDA_SUCCESS;
    });
}

CUresult cuEventCreate(CUevent *made, unsigned int flags) {
    return call(F_cuEventCreate, CONTEXT, [&] {
        Event *event = create<Event>(current());
        event->timing = !(flags & CU_EVENT_DISABLE_TIMING);
        *made = handle_of<CUevent>(event);
        return CUDA_SUCCESS;
    });
}

CUresult cuEventDestroy_v2(CUevent handle) {
    return call(F_cuEventDestroy, CONTEXT, [&] {
        Event *event = find<Event>(handle, "cuEventDestroy");
        if (!event) return CUDA_ERROR_INVALID_HANDLE;
        event->alive = false;
        return CUDA_SUCCESS;
    });
}

CUresult cuEventRecord(CUevent of, CUstream on) {
    return call(F_cuEventRecord, DRIVER, [&] {
        Stream *stream;
        Event *event = find<Event>(of, "cuEventRecord");
        if (const CUresult status = look_up(on, F_cuEventRecord, &stream)) return status;
        if (!event) return CUDA_ERROR_INVALID_HANDLE;
        if (event->context != stream->context) {
            violate("cuEventRecord: the event is of another context than the stream");
            return CUDA_ERROR_INVALID_HANDLE;
        }
        if (stream->capture) {
            notice_other_thread(stream->capture, "cuEventRecord");
            if (stream->capture->invalid) return CUDA_ERROR_STREAM_CAPTURE_INVALIDATED;
            event->capture = stream->capture;
            event->nodes = stream->tail;
            return CUDA_SUCCESS;
        }
        event->capture = nullptr;
        join(stream->clock, machine.host);
        event->clock = stream->clock;
        event->chain = std::max(stream->chain, machine.host_chain);
        Operation operation;
        operation.type = Operation::RECORD;
        operation.event = event;
        operation.version = ++event->asked;
        stream->queue.push_back(std::move(operation));
        return CUDA_SUCCESS;
    });
}

CUresult cuEventQuery(CUevent handle) {
    return call(F_cuEventQuery, DRIVER | NO_CAPTURE, [&] {
        Event *event;
        if (const CUresult status = look_up(handle, F_cuEventQuery, &event)) return status;
        if (captured(event, F_cuEventQuery)) return CUDA_ERROR_CAPTURED_EVENT;
        if (event->done >= event->asked) return host_learns(event->clock, event->chain), CUDA_SUCCESS;
        if (!advance() && !may_hang()) {
            violate("cuEventQuery: the host waits for an event, and no stream can go on");
            return CUDA_ERROR_UNKNOWN;
        }
        return CUDA_ERROR_NOT_READY;
    });
}

CUresult cuEventSynchronize(CUevent handle) {
    return call(F_cuEventSynchronize, DRIVER | NO_CAPTURE, [&] {
        Event *event;
        if (const CUresult status = look_up(handle, F_cuEventSynchronize, &event)) return status;
        if (captured(event, F_cuEventSynchronize)) return CUDA_ERROR_CAPTURED_EVENT;
        const auto done = [&] { return event->done >= event->asked; };
        if (const CUresult status = wait_until(done, "cuEventSynchronize")) return status;
        host_learns(event->clock, event->chain);
        return usable(event->context);
    });
}

CUresult cuEventElapsedTime_v2(float *milliseconds, CUevent first, CUevent last) {
    return call(F_cuEventElapsedTime, DRIVER, [&] {
        const Event *start = find<Event>(first, "cuEventElapsedTime"), *end = find<Event>(last, "cuEventElapsedTime");
        if (!start || !end || !start->asked || !end->asked) return CUDA_ERROR_INVALID_HANDLE;
        if (!start->timing || !end->timing) {
            violate("cuEventElapsedTime: an event was made without timing");
            return CUDA_ERROR_INVALID_HANDLE;
        }
        if (start->done < start->asked || end->done < end->asked) return CUDA_ERROR_NOT_READY;
        *milliseconds = 1e-3f * (1 + end->at - start->at);
        return CUDA_SUCCESS;
    });
}

CUresult cuCtxSynchronize() {
    return call(F_cuCtxSynchronize, CONTEXT, [&] {
        bool capturing = false;
        for (const CapturePointer &capture : machine.captures)
            for (const Stream *stream : capture->streams)
                if (capture->active && stream->context == current()) {
                    invalidate(capture, "cuCtxSynchronize", "waits for all streams, one of which is capturing");
                    capturing = true;
                }
        if (capturing) return CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED;
        const auto idle = [] {
            for (const Stream *stream : machine.streams)
                if (stream->context == current() && !stream->queue.empty()) return false;
            return true;
        };
        if (const CUresult status = wait_until(idle, "cuCtxSynchronize")) return status;
        for (const Stream *stream : machine.streams)
            if (stream->context == current()) host_learns(stream->clock, stream->chain);
        return usable(current());
    });
}
