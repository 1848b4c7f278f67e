// Which operations may overlap, and which of them meet in memory.
//
// Every stream is a track, and so is every branch of the graphs that are launched on it. An operation's clock says how
// far every track has surely come when it starts. It is known when the operation is asked for: from the stream's order,
// events that are waited for, edges of graphs, and what the host has seen to be over. Two operations that touch the same
// bytes, one of them writing, must be ordered by their clocks, whatever order they happened to run in.
#include "machine.h"

namespace imaginary {

void join(Clock &into, const Clock &from) {
    if (into.size() < from.size()) into.resize(from.size());
    for (size_t n = 0; n < from.size(); ++n)
        if (into[n] < from[n]) into[n] = from[n];
}

int track_of(Stream *stream, int branch) {
    while (static_cast<int>(stream->tracks.size()) <= branch) stream->tracks.push_back(machine.tracks++);
    return stream->tracks[branch];
}

// The place of the next operation on a track, given that `stream->clock` is what comes before it.
Stamp stamp(Stream *stream, int track, bool model) {
    Stamp made;
    join(stream->clock, machine.host);
    stream->chain = std::max(stream->chain, machine.host_chain) + model;
    if (machine.ticks.size() <= static_cast<size_t>(track)) machine.ticks.resize(track + 1);
    if (stream->clock.size() <= static_cast<size_t>(track)) stream->clock.resize(track + 1);
    made.track = track;
    made.tick = stream->clock[track] = ++machine.ticks[track];
    made.clock = stream->clock;
    made.chain = stream->chain;
    machine.longest_chain = std::max(machine.longest_chain, stream->chain);
    return made;
}

static bool ended(const Clock &clock, const Record &record) {
    return static_cast<size_t>(record.track) < clock.size() && clock[record.track] >= record.tick;
}

bool host_knows(const Record &record) { return ended(machine.host, record); }

void check_races(const Work &work, const std::vector<Access> &accesses, const Stamp &when) {
    if (!machine.races) return;
    for (const Access &access : accesses) {
        Allocation *allocation = allocation_at(access.low, access.high - access.low);
        if (!allocation) continue;
        std::vector<Record> &history = allocation->history;
        size_t kept = 0;
        for (size_t n = 0; n < history.size(); ++n) {
            const Record record = history[n];
            const bool meet = record.low < access.high && access.low < record.high;
            const bool same = record.track == when.track && record.tick == when.tick;
            if (meet && !same && (record.write || access.write) && !ended(when.clock, record))
                violate(
                    "race: %s %s what %s %s, and neither waits for the other (in an allocation of %zu bytes %s)",
                    work.what, access.write ? "writes" : "reads", record.what, record.write ? "writes" : "reads",
                    allocation->size, allocation->device < 0 ? "on the host" : "on a device");
            const bool inside = access.low <= record.low && record.high <= access.high;
            const bool replaced = inside && !same && (access.write || (!record.write && record.track == when.track));
            if (!replaced) history[kept++] = record;
        }
        history.resize(kept);
        history.push_back({access.low, access.high, access.write, when.track, when.tick, work.what});
    }
}

}  // namespace imaginary
