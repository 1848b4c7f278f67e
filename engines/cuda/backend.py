"""Lanes on NVIDIA GPUs: slots and combinations at home, model calls on every lane, whole rounds as CUDA graphs.

The first lane's device is the *home*: it holds every slot and combines. Combinations do not run when they are asked for
but when the round's model calls are known (`rounds`). A round that comes again is replayed as a graph; one whose
operations are the very objects that were played before is found by their identity, with its numbers ready to send.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from engines.base import Array, LaneCall, Measurements, Rows
from engines.cuda.cache import RoundCache
from engines.cuda.driver import LANE_TIMEOUT, SPIN_SECONDS, Device, Driver, abandon
from engines.cuda.kernels import MAX_OUTPUTS, Kernels
from engines.cuda.memory import Memory, Staging, Tensor, narrow, shapes_of, widen
from engines.cuda.peers import staged_pairs
from engines.cuda.progress import Progress
from engines.cuda.reductions import Reductions
from engines.cuda.rounds import TABLE_FLOATS, TABLE_ROUNDS, Key, Lane, LaneNetwork, RoundGraph, Rounds, Table
from engines.errors import DeviceError, NonFiniteError
from engines.trace import span

log = logging.getLogger(__name__)


class Family:
    """What all backends on the same lanes share: lanes that hang."""

    def __init__(self) -> None:
        self.hung: set[int] = set()


class CudaBackend:
    """Plays a sampler on lanes of one or several GPUs; see engines.base.Backend.

    dtype: how latents are stored, float16, bfloat16 or float32. graphs: replay rounds as CUDA graphs where the networks
    allow it. home: the lane whose device holds the latents. sibling_of: another backend on the same networks, for
    another image at the same time; the streams of lanes are shared, so that a lane's work stays in one order.
    lane_timeout: seconds without progress after which a lane counts as hanging.
    """

    def __init__(
        self, driver: Driver, networks: Sequence[LaneNetwork], dtype: str, cache: Path, *, graphs: bool = True,
        home: int = 0, sibling_of: CudaBackend | None = None, lane_timeout: float = LANE_TIMEOUT,
    ) -> None:  # fmt: skip
        self._driver, self._dtype, self._graphs, self.lane_timeout = driver, dtype, graphs, lane_timeout
        by_ordinal = (
            {lane.device.ordinal: lane.device for lane in sibling_of._lanes}
            if sibling_of
            else {ordinal: driver.device(ordinal) for ordinal in sorted({one.device for one in networks})}
        )
        self._home, self._devices = by_ordinal[networks[home].device], list(by_ordinal.values())
        self._memory = memory = Memory(driver, self._home)
        self._family: Family = sibling_of._family if sibling_of else Family()
        self._kernels = {ordinal: Kernels(driver, device, dtype, cache) for ordinal, device in by_ordinal.items()}
        words = memory.pinned(4 * (1 + len(networks))).view(np.uint32)
        words[:] = 0
        streams = [lane.stream for lane in sibling_of._lanes] if sibling_of else [None] * len(networks)
        self._lanes: list[Lane] = [
            self._lane(number, network, by_ordinal[network.device], stream)
            for number, (network, stream) in enumerate(zip(networks, streams, strict=True))
        ]
        self._main = self._lanes[home].stream
        self._queries = {device.ordinal: (memory.stream(device), memory.event(device)) for device in self._devices}
        self._staged: tuple[tuple[int, int], ...] = (
            sibling_of._staged if sibling_of else staged_pairs(driver, self._devices)
        )
        self._table = Table(
            memory.allocate(self._home, 4 * TABLE_ROUNDS * TABLE_FLOATS), memory.allocate(self._home, 8),
            memory.allocate(self._home, 4), words.ctypes.data,
        )  # fmt: skip
        self._uploads = memory.stream(self._home)
        self._uploaded = [memory.event(self._home) for _ in range(TABLE_ROUNDS)]
        self._played = [memory.event(self._home) for _ in range(2)]  # of the halves of the table
        self._idle = memory.event(self._home)
        self._pinned_table = memory.pinned(4 * TABLE_ROUNDS * TABLE_FLOATS).view(np.float32).reshape(TABLE_ROUNDS, -1)
        away = {ordinal: one for ordinal, one in self._queries.items() if ordinal != self._home.ordinal}
        self._transfers = Staging(memory, self._main, away, self._settle)
        kernels = self._kernels[self._home.ordinal]
        self._reductions = Reductions(driver, memory, self._home, kernels, self._main, self._settle)
        self._rounds = Rounds(memory, self._lanes, self._main, kernels, self._table, self._staged)
        self._progress = Progress(words)
        self._clear_counters()
        api = driver.api
        self._set_current, self._upload_now = api.cuCtxSetCurrent, api.cuMemcpyHtoDAsync
        self._record, self._wait_for, self._launch = api.cuEventRecord, api.cuStreamWaitEvent, api.cuGraphLaunch
        self._copied = {"peer": 0, "staged": 0}
        self._cache = RoundCache(self._rounds, memory, self._lanes, self._settle)
        self._stray: Sequence[Lane] = ()  # with work that home does not wait for
        self._pending: list[tuple[Sequence[str], Array, Sequence[str]]] = []
        self._ids: list[int] = []
        self._pending_floats = self._clock = 0

    # --- the verbs of a backend ----------------------------------------------------------------------------------

    @property
    def lanes(self) -> int:
        """How many calls can run at the same time."""
        return len(self._lanes)

    def bind(
        self, shape: tuple[int, ...], timesteps: Sequence[float], conditioning: Sequence[Mapping[str, Array]]
    ) -> None:
        """See Backend.bind. Memory, rounds and graphs of a few shapes stay."""
        self._pending, self._ids, self._pending_floats = [], [], 0
        self._settle()
        self._clear(self._table.state, 1)  # the next round is the first of the table
        self._clear(self._table.flag, 1)
        self._progress.restart()
        self._timesteps = tuple(float(t) for t in timesteps)
        self._shape = self._cache.bind(tuple(shape), self._dtype, shapes_of(conditioning), self._timesteps)
        self._conditioning = [dict(one) for one in conditioning]
        by_ordinal = {device.ordinal: device for device in self._devices}
        for (ordinal, branches), tensors in self._shape.shared.items():
            self._fill(by_ordinal[ordinal], branches, tensors)

    def write(self, slot: str, value: Array) -> None:
        """See Backend.write."""
        self._flush(())
        self._transfers.upload(self._home, self._shape.slot(self._shape.row(slot)), narrow(value, self._dtype))

    def read(self, slot: str) -> Array:
        """See Backend.read. NonFiniteError when it is not finite: what was once NaN stays so in all that is made of it.

        Drafts that a sampler rejects may overflow, and do not matter.
        """
        self._flush(())
        raw = self._transfers.download(self._shape.slot(self._shape.index[slot]), self._shape.bytes)
        value = widen(raw, self._dtype).reshape(self._shape.shape)
        if not np.isfinite(value).all():
            raise NonFiniteError("a latent became NaN or infinite on the GPU: no image can be made of it")
        return value

    def predict(self, calls: Sequence[LaneCall]) -> None:
        """See Backend.predict. Returns before the calls have run."""
        self._flush(calls)

    def combine(self, sources: Sequence[str], rows: Rows, targets: Sequence[str]) -> None:
        """See Backend.combine. More outputs than registers hold become several launches."""
        if len(targets) <= MAX_OUTPUTS:
            self._add(sources, rows, targets)
            return
        table = np.asarray(rows, np.float32)
        moving = {slot: f"{slot}/moving" for slot in targets if slot in sources}  # still read by later launches
        for start in range(0, len(targets), MAX_OUTPUTS):
            part = slice(start, start + MAX_OUTPUTS)
            self._add(sources, table[part], [moving.get(slot, slot) for slot in targets[part]])
        aliased = list(moving)
        for start in range(0, len(aliased), MAX_OUTPUTS):
            slots = aliased[start : start + MAX_OUTPUTS]
            self._add([moving[slot] for slot in slots], np.eye(len(slots), dtype=np.float32), slots)

    def distances(self, pairs: Sequence[tuple[str, str]]) -> list[float]:
        """See Backend.distances; the host waits."""
        self._flush(())  # gives slots their memory
        return self._reductions.distances([(self._slot(a), self._slot(b)) for a, b in pairs], self._shape.elements)

    def inner_products(self, products: Sequence[tuple[Sequence[str], Rows]]) -> list[float]:
        """See Backend.inner_products; the host waits."""
        self._flush(())  # gives slots their memory
        located = [([self._slot(slot) for slot in sources], rows) for sources, rows in products]
        return self._reductions.inner_products(located, self._shape.elements)

    def _slot(self, slot: str) -> int:
        return self._shape.slot(self._shape.index[slot])

    def _timed(self, calls: Sequence[LaneCall]) -> float:
        """From an idle device to an idle device, with what a round costs beside its calls."""
        self._flush(())
        self._settle()
        start = time.perf_counter()
        self.predict(calls)
        self._settle()
        return time.perf_counter() - start

    @property
    def measurements(self) -> Measurements:
        """See Backend.measurements. The host does not wait for rounds, and knows neither spans nor a critical path.

        Contexts are those of home's lane, so that the backends on the same lanes add up.
        """
        contexts = next(lane.network.contexts for lane in self._lanes if lane.stream is self._main)
        counts = self._cache.counts | {"contexts": contexts}
        return Measurements(
            self._timed, copied=self._copied, staged=self._staged, counts=counts, stalled=self._progress.stalled
        )

    def settle(self) -> None:
        """See Backend.settle."""
        self._settle()

    @property
    def sharing(self) -> None:
        """See Backend.sharing: a round's addresses and coefficients are those of one image."""

    def dead(self) -> list[int]:
        """See Backend.dead: lanes of devices that were lost, and lanes that hang."""
        lost = {device.ordinal for device in self._devices if self._failed(device)}
        return [lane.number for lane in self._lanes if lane.device.ordinal in lost or lane.number in self._family.hung]

    def close(self) -> None:
        """Waits for the lanes and frees their memory; keeps it where a lane hangs: freeing would wait for it."""
        try:
            if not self._family.hung:
                self._settle()
        except DeviceError as error:  # a lost device: there is nothing to wait for
            log.warning("%s", error)
        if self._family.hung:
            log.error("a lane hangs: the memory of its model stays taken until this process ends")
            abandon(self)
            return
        self._cache.close()
        for kernels in self._kernels.values():
            kernels.close()
        self._memory.close()

    @property
    def hangs(self) -> bool:
        """Whether a lane hangs: then nothing on its device may be freed."""
        return bool(self._family.hung)

    # --- rounds --------------------------------------------------------------------------------------------------

    def _add(self, sources: Sequence[str], rows: Rows, targets: Sequence[str]) -> None:
        size = len(sources) * len(targets)
        if self._pending_floats + size > TABLE_FLOATS // 2:
            self._flush(())
        table = rows if isinstance(rows, np.ndarray) else np.asarray(rows, np.float32)
        self._pending.append((sources, table, targets))
        self._ids += (id(sources), id(table), id(targets))
        self._pending_floats += size

    def _flush(self, calls: Sequence[LaneCall]) -> None:
        """Plays what is pending and then the calls."""
        pending = self._pending
        if not pending and not calls:
            return
        planned = self._cache.planned.get((id(calls), *self._ids))
        self._pending, self._ids, self._pending_floats = [], [], 0
        try:
            if planned is not None:
                self._play(planned.round, planned.source, planned.bytes)
            else:
                self._play_anew(pending, calls)
        except ValueError as error:  # of the enumeration of statuses, which has no such number
            raise DeviceError(f"a round failed with a status that cuda-python does not know ({error})") from error

    def _play_anew(self, pending: list[tuple[Sequence[str], Array, Sequence[str]]], calls: Sequence[LaneCall]) -> None:
        """A round that nobody has asked for in these words: finds or compiles it, and remembers the words."""
        self._driver("cuCtxSetCurrent", self._home.context)  # another network may have run on this thread
        shape = self._shape
        key: Key = (
            tuple(
                (tuple(shape.index[s] for s in sources), tuple(shape.row(t) for t in targets))
                for sources, _, targets in pending
            ),
            tuple(
                tuple((shape.index[branch.latent], shape.row(branch.output), branch.conditioning) for branch in call)
                for call in calls
            ),
        )
        one = self._cache.round(shape, key, self._fill)
        images = shape.shape[0]
        times = [np.repeat([self._timesteps[branch.step] for branch in call], images) for call in calls if call]
        parts = [rows.T.ravel() for _, rows, _ in pending] + one.identities + times
        data = np.concatenate(parts, dtype=np.float32)
        if calls and type(calls) is tuple and all(_lasting(asked) for asked in pending):
            known = (id(calls), *(id(part) for asked in pending for part in asked))
            planned = self._cache.remember(one, data, known, (pending, calls))
            self._play(one, planned.source, planned.bytes)
            return
        self._keep_pace()
        entry = self._pinned_table[self._progress.issued % TABLE_ROUNDS]
        entry[: data.size] = data
        self._play(one, entry.ctypes.data, data.nbytes)

    def _play(self, one: RoundGraph, source: int, size: int) -> None:
        """Sends the round's numbers ahead on a stream of their own, then the round: at most six driver calls."""
        progress, main = self._progress, self._main
        issued = progress.issued
        if progress.waiting >= 2:
            self._keep_pace()
        entry = issued % TABLE_ROUNDS
        half, place = divmod(entry, TABLE_ROUNDS // 2)
        self._stray = one.lanes  # until it is enqueued to its end
        failed = self._set_current(self._home.context)[0]
        if place == 0:  # this half is read by rounds that the device may not have begun yet
            failed = failed or self._wait_for(self._uploads, self._played[half], 0)[0]
        at = self._table.data + 4 * TABLE_FLOATS * entry
        failed = failed or self._upload_now(at, source, size, self._uploads)[0]
        failed = failed or self._record(self._uploaded[entry], self._uploads)[0]
        failed = failed or self._wait_for(main, self._uploaded[entry], 0)[0]
        if failed:
            raise self._driver.error("cuMemcpyHtoDAsync", failed)
        if one.graph is None and one.runs and self._graphs and one.capturable:
            self._cache.capture(one, self._clock)
        with span(one.name):
            if one.graph is None:
                self._rounds.enqueue(one)
            elif failed := self._launch(one.graph, main)[0]:
                raise self._driver.error("cuGraphLaunch", failed)
        if place == TABLE_ROUNDS // 2 - 1 and (failed := self._record(self._played[half], main)[0]):
            raise self._driver.error("cuEventRecord", failed)
        self._stray = ()
        progress.issue(one)
        one.runs += 1
        one.last = self._clock = self._clock + 1
        for kind, copies in one.copies.items():
            self._copied[kind] += copies

    def _keep_pace(self) -> None:
        """Waits while the device has enough to do: lanes are given back, and errors seen, after no more than that."""
        start, ready = time.perf_counter(), self._driver.api.CUresult.CUDA_SUCCESS
        while self._progress.waiting >= self._progress.allowed():
            with self._memory.on(self._home):
                status = self._driver.function("cuStreamQuery")(self._main)[0]
            if status not in (ready, self._driver.api.CUresult.CUDA_ERROR_NOT_READY):
                raise self._driver.error("cuStreamQuery", status)
            self._check_progress("a round")
            if time.perf_counter() - start > SPIN_SECONDS:
                time.sleep(0.0001)

    # --- waiting -------------------------------------------------------------------------------------------------

    def _settle(self) -> None:
        """Waits until home has done everything; lanes have then, too. DeviceError when another device was lost.

        Home may not notice: waiting for a lost device ends, and home goes on with what lay there before. After a round
        that was not enqueued to its end, home waits for no lane, so that the host does.
        """
        errors: list[DeviceError] = []
        stray = [(lane.stream, lane.done, lane.device, f"lane {lane.number}") for lane in self._stray]
        stray += [(lane.carrier, lane.arrived, self._home, "copies") for lane in self._stray if lane.carrier]
        if stray:
            stray.append((self._rounds.side, self._rounds.turned, self._home, "counting"))
        for one in stray:
            try:
                self._wait(*one)
            except DeviceError as error:  # the others are waited for all the same
                errors.append(error)
        self._stray = ()
        self._wait(self._main, self._idle, self._home, f"the work on {self._home.name}")
        for device in self._devices:
            if device is not self._home and self._failed(device):
                with self._memory.on(device):
                    self._driver("cuStreamQuery", self._queries[device.ordinal][0])
        if errors:
            raise errors[0]
        self._transfers.used = 0
        self._cache.retire()
        for lane in self._lanes:
            lane.network.trim(partial(self._idle_now, lane))

    def _idle_now(self, lane: Lane) -> bool:
        """Whether nothing runs on a lane, which may be another image's by now."""
        with self._memory.on(lane.device):
            return not self._driver.function("cuStreamQuery")(lane.stream)[0]

    def _wait(self, stream: Any, event: Any, device: Device, what: str) -> None:
        """Waits for a stream, for as long as there is progress."""
        busy, start = self._driver.api.CUresult.CUDA_ERROR_NOT_READY, time.perf_counter()
        with self._memory.on(device):
            self._driver("cuEventRecord", event, stream)
            query = self._driver.function("cuEventQuery")
            while (status := query(event)[0]) == busy:
                waited = time.perf_counter() - start
                self._check_progress(what, waited)
                if waited > SPIN_SECONDS:
                    time.sleep(0.0001)
        if status:
            raise self._driver.error("cuEventQuery", status)

    def _check_progress(self, what: str, waited: float = 0.0) -> None:
        """DeviceError when nothing has ended for too long; it names the lanes that the round under way waits for."""
        if (self._progress.stalled() or waited) <= self.lane_timeout:
            return
        self._family.hung.update(self._progress.late() or self._waiting_for())
        named = ", ".join(f"lane {n} (cuda:{self._lanes[n].device.ordinal})" for n in sorted(self._family.hung))
        raise DeviceError(
            f"{what} did not end within {self.lane_timeout:g} s: {named} hangs or is far too slow; start the program "
            "again to get its memory back, or allow more with --lane-timeout"
        )

    def _waiting_for(self) -> list[int]:
        """Lanes of devices that have not taken what was sent to them outside rounds; home's, when there are none."""
        busy, found = self._driver.api.CUresult.CUDA_ERROR_NOT_READY, []
        for lane in self._lanes:
            with self._memory.on(lane.device):
                status = self._driver.function("cuStreamQuery")(self._queries[lane.device.ordinal][0])[0]
            found += [lane.number] if status == busy else []
        return found or [lane.number for lane in self._lanes if lane.stream is self._main]

    def _failed(self, device: Device) -> bool:
        """An error that a lost device once gave comes again with every call, also on streams that nothing runs on."""
        try:
            self._driver("cuCtxSetCurrent", device.context)
            status = self._driver.function("cuStreamQuery")(self._queries[device.ordinal][0])[0]
            self._driver("cuCtxSetCurrent", self._home.context)
        except DeviceError:
            return True
        results = self._driver.api.CUresult
        return status not in (results.CUDA_SUCCESS, results.CUDA_ERROR_NOT_READY)

    # --- devices -------------------------------------------------------------------------------------------------

    def _lane(self, number: int, network: LaneNetwork, device: Device, stream: Any) -> Lane:
        stream, state = stream or self._memory.stream(device), self._memory.allocate(device, 8)
        return Lane(
            number, network, device, self._kernels[device.ordinal], stream, self._memory.event(device), state
        )  # fmt: skip

    def _clear(self, pointer: int, words: int) -> None:
        with self._memory.on(self._home):
            self._driver("cuMemsetD32Async", pointer, 0, words, self._main)

    def _clear_counters(self) -> None:
        """Sets what kernels count in to zero, on streams of this backend's own, and waits for it.

        A lane's stream belongs to whoever holds the lane: another backend on it may be capturing a graph just now.
        """
        counters = [(self._home, self._table.state), *((lane.device, lane.state) for lane in self._lanes)]
        for device, pointer in counters:
            with self._memory.on(device):
                self._driver("cuMemsetD32Async", pointer, 0, 2, self._queries[device.ordinal][0])
        for device in self._devices:
            self._wait(*self._queries[device.ordinal], device, f"the first work on {device.name}")

    def _fill(self, device: Device, branches: Sequence[int], tensors: Mapping[str, Tensor]) -> None:
        """Sets the conditioning of a batch: one block of images per branch."""
        for name, tensor in tensors.items():
            value = np.concatenate([self._conditioning[branch][name] for branch in branches])
            self._transfers.upload(device, tensor.pointer, narrow(value, self._dtype))


def _lasting(asked: tuple[Sequence[str], Array, Sequence[str]]) -> bool:
    """Whether a combination's parts cannot change, so that their identity says what they are."""
    sources, rows, targets = asked
    return type(sources) is tuple and type(targets) is tuple and not rows.flags.writeable
