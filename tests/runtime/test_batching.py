"""Rounds of several requests in shared calls: the same images, fair turns, and nobody pays for what others do."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest

from engines.base import Array, Backend, Branch, Entry
from engines.errors import DeviceError
from engines.host import FunctionLane, HostBackend
from runtime.batching import Batcher, Player
from runtime.lane_policy import BatchSizes, batch_sizes
from runtime.lanes import Lanes, Lease
from runtime.pipeline import Pipeline
from runtime.sampling.execute import denoise
from runtime.sampling.operations import Options
from tests.engines.cuda.test_backend import model, schedule

PROMPT = "a large red star at the left on blue background"
MODES = ("sequential", "conservative", "aggressive", "srds", "adaptive")
SIZES = BatchSizes(fills=8, largest=8)
SLOW = (1.0, 1.0)  # seconds by number of lanes


@dataclass
class Recorder:
    """A model on one lane that notes the rows of its calls, and fails when it is told to."""

    seconds: float = 0.0
    rows: list[int] = field(default_factory=list)
    broken: Exception | None = None

    def __call__(self, sample: Array, timestep: Array, conditioning: Mapping[str, Array]) -> Array:
        time.sleep(self.seconds)
        self.rows.append(len(sample))
        if self.broken is not None:
            raise self.broken
        return model(sample, timestep, conditioning)


def opened(models: list[Recorder]) -> Lanes:
    first = HostBackend([FunctionLane(one) for one in models])
    return Lanes(len(models), lambda lane: first.sibling() if lane else first)


def image(
    lanes: Lanes, seed: int, mode: str = "sequential", steps: int = 12, images: int = 1, guidance: float = 3.0,
    shape: tuple[int, ...] = (2, 3, 3), done: Callable[[int], None] = lambda done: None, scale: float = 1.0,
    sizes: BatchSizes = SIZES, **more: Any,
) -> tuple[Array, Lease]:  # fmt: skip
    rng = np.random.default_rng(seed)
    noise = rng.standard_normal((images, *shape), np.float32) * np.float32(scale)
    conditioning = [{"encoder_hidden_states": rng.standard_normal((images, 3, 2), np.float32)} for _ in range(2)]
    rows = (2 if guidance > 1 else 1) * images
    with lanes.lease(SLOW, rows=rows, sizes=sizes, **more) as lease:
        found, _ = denoise(
            lease.backend, noise, conditioning, schedule(steps), mode, Options(k=3), guidance, seed, done,
            play=lease.play,
        )  # fmt: skip
        return found, lease


def near(found: Array, wanted: Array) -> bool:
    return bool(np.abs(found - wanted).max() < 1e-4 * np.abs(wanted).max())


@pytest.mark.parametrize("count", [1, 2, 3])
def test_a_random_mix_gives_the_images_that_each_request_gives_alone(count: int, rng: np.random.Generator) -> None:
    """Modes, steps, guidance, sizes, several images, limits to few lanes; some cancel, some callbacks fail."""
    models = [Recorder(0.0003) for _ in range(count)]
    lanes = opened(models)

    class LeftError(Exception):
        pass

    def asked(number: int) -> dict[str, Any]:
        mine = np.random.default_rng(number)
        return {
            "mode": str(mine.choice(MODES)), "steps": int(mine.integers(3, 20)), "images": int(mine.integers(1, 4)),
            "guidance": float(mine.choice([1.0, 3.0])), "most": int(mine.integers(1, count + 1)),
            "shape": ((2, 3, 3), (2, 5, 4))[int(mine.integers(2))],
        }  # fmt: skip

    wanted = {number: image(lanes, number, **asked(number))[0] for number in range(12)}

    def one(turn: int) -> bool:
        number = turn % 12
        if turn % 5 == 3:  # leaves before some round, or its callback fails
            left = iter(range(1 + turn % 3))

            def leave(*done: int) -> None:
                if next(left, None) is None:
                    raise LeftError

            way: dict[str, Any] = {"done": leave} if turn % 2 else {"before_round": leave}
            try:
                image(lanes, number, **asked(number), **way)
            except LeftError:
                return True
            return bool(asked(number)["steps"] < 7)  # it ended sooner
        return near(image(lanes, number, **asked(number))[0], wanted[number])

    with ThreadPoolExecutor(10) as pool:
        assert all(pool.map(one, rng.permutation(72).tolist()))
    assert (lanes.running, lanes.waiting) == (0, 0)
    assert max(max(one.rows) for one in models) > 6, "calls were shared"
    assert lanes.shared()["rows"] > lanes.shared()["calls"] > 0


def test_nan_in_one_request_touches_no_other() -> None:
    lanes = opened([Recorder(0.001), Recorder(0.001)])
    wanted = [image(lanes, seed)[0] for seed in range(4)]
    with ThreadPoolExecutor(5) as pool, np.errstate(invalid="ignore"):
        bad = pool.submit(image, lanes, 9, "sequential", 12, scale=np.nan)
        made = list(pool.map(lambda seed: image(lanes, seed), range(4)))
    assert np.isnan(bad.result()[0]).all()
    assert all(lease.player is not None and lease.player.shared_rounds for _, lease in made)
    assert all(near(found, alone) for (found, _), alone in zip(made, wanted, strict=True))


def test_a_lone_request_has_all_lanes_and_its_bytes_and_gets_them_back() -> None:
    lanes = opened([Recorder(0.002), Recorder(0.002)])
    wanted, lease = image(lanes, 1)
    assert lease.lane_rounds == 2 * lease.rounds and lease.player is not None and not lease.player.shared_rounds
    with ThreadPoolExecutor(2) as pool:
        long = pool.submit(image, lanes, 2, "sequential", 150)
        while not lanes.running:
            time.sleep(0.001)
        short = image(lanes, 1)[1]
        assert not long.done(), "the short one did not wait for the long one"
        lease = long.result()[1]
    assert short.player is not None and short.player.shared_rounds == short.rounds == 12
    assert lease.player is not None and 0 < lease.player.shared_rounds < 100, "afterwards it is alone again"
    again, _ = image(lanes, 1)
    assert np.array_equal(again, wanted)


def test_full_calls_before_a_queue() -> None:
    """Two lanes with calls of eight rows: eight guided requests run at once, the ninth waits for one of them."""
    models = [Recorder(0.01), Recorder(0.01)]
    lanes = opened(models)
    with ThreadPoolExecutor(9) as pool:
        made = [pool.submit(image, lanes, seed, "sequential", 15) for seed in range(9)]
        while lanes.running < 8:
            time.sleep(0.001)
        time.sleep(0.02)
        assert (lanes.running, lanes.waiting) == (8, 1)
        for one in made:
            one.result()
    full = [rows for one in models for rows in one.rows]
    assert max(full) == 8 and np.mean([rows for rows in full if rows > 1]) > 5, "the ninth is alone in the end"


def test_no_request_waits_more_than_its_share() -> None:
    """One request of 999 steps among many short ones, which pass it by. While a round waits, no other request begins
    more than one round after it; the times that threads take between two rounds are left out.
    """
    lanes = opened([Recorder(0.0005), Recorder(0.0005)])
    batcher, passed, begun = lanes.batcher, list[int](), dict[Player, dict[Player, int]]()
    begin, start = Player.begin, batcher._start

    def beginning(player: Player, *more: Any) -> None:
        begun[player] = {}
        begin(player, *more)

    def starting(lane: int, able: Sequence[Player], *more: Any) -> None:
        before = [player for player in able if len(player.waiting) == player.rows]  # nothing of the round has begun
        start(lane, able, *more)
        for player in before:
            if len(player.waiting) < player.rows:
                passed.append(max(begun.pop(player).values(), default=0))
                for others in begun.values():
                    others[player] = others.get(player, 0) + 1

    with pytest.MonkeyPatch.context() as patch, ThreadPoolExecutor(7) as pool:
        patch.setattr(Player, "begin", beginning)
        patch.setattr(batcher, "_start", starting)
        long = pool.submit(image, lanes, 0, "sequential", 999)
        while not lanes.running:
            time.sleep(0.001)
        short = [pool.submit(image, lanes, n, "sequential", 10) for n in range(1, 31)]
        for one in short:
            one.result()
        assert not long.done(), "30 × 10 rounds, six at a time, take less"
        made = long.result()[0]
    assert near(made, image(lanes, 0, "sequential", 999)[0])
    assert len(passed) > 300 and max(passed) <= 1


def test_an_urgent_request_is_admitted_to_lanes_that_others_fill() -> None:
    """Four requests of the usual priority fill the lane, a fifth waits; the urgent one passes it."""
    lanes = opened([Recorder(0.001)])
    with ThreadPoolExecutor(6) as pool:
        usual = [pool.submit(image, lanes, seed, "sequential", 100) for seed in range(5)]
        while (lanes.running, lanes.waiting) != (4, 1):
            time.sleep(0.001)
        found, _ = pool.submit(image, lanes, 9, "sequential", 10, priority=1).result()
        assert not any(one.done() for one in usual) and (lanes.running, lanes.waiting) == (4, 1)
        for one in usual:
            one.result()
    assert near(found, image(lanes, 9, "sequential", 10)[0])


def test_urgent_rounds_go_first_into_calls() -> None:
    """Each call takes one row; the first request is in one until the others wait."""
    blocked, begun, called = threading.Event(), threading.Event(), list[float]()

    def slow(sample: Array, timestep: Array, conditioning: Mapping[str, Array]) -> Array:
        called.append(float(conditioning["encoder_hidden_states"][0, 0, 0]))
        begun.set()
        assert blocked.wait(20)
        return model(sample, timestep, conditioning)

    first = HostBackend([FunctionLane(slow)])
    lanes = Lanes(1, lambda lane: first.sibling() if lane else first)
    with ThreadPoolExecutor(5) as pool:

        def submit(priority: int) -> None:
            few: dict[str, Any] = {"guidance": 1.0, "sizes": BatchSizes(8, 1), "priority": priority}
            pool.submit(image, lanes, priority, steps=2, **few)

        submit(5)
        assert begun.wait(20)
        for waiting, priority in enumerate((7, 9, 1, 2), 1):
            submit(priority)
            while len(lanes.batcher._waiting) < waiting:
                time.sleep(0.001)
        blocked.set()
    among = list(dict.fromkeys(called))
    for priority in (5, 1, 2, 7, 9):
        image(lanes, priority, steps=1, guidance=1.0)
    assert list(dict.fromkeys(called[10:])) == among


@pytest.mark.parametrize(("priority", "begins"), [(1, False), (5, True), (9, True)])
def test_a_full_call_waits_a_little_for_urgent_rounds_alone(priority: int, begins: bool) -> None:
    started: list[int] = []
    sharing = SimpleNamespace(start=lambda lane, taken, done: started.append(lane), kind=None)
    batcher = Batcher(1, lambda lane, seconds: None)
    waiting, _ = (
        batcher.join(cast(Backend, SimpleNamespace(sharing=sharing)), 1, BatchSizes(1, 4), 4, one)
        for one in (5, priority)
    )
    branches = [cast(Branch, None)] * 4
    waiting.begin(branches, [Entry(np.zeros((1, 2), np.float32), 0.0, {}, np.zeros((1, 2), np.float32))] * 4, 1)
    batcher._waiting.append(waiting)
    batcher._last[0] = 1e4
    seconds = batcher._fill(0)
    assert (seconds is None, started == [0]) == (begins, begins)
    assert seconds is None or 990 < seconds <= 1000, "a tenth of its last call"


def test_a_lane_that_fails_ends_the_rounds_that_were_on_it() -> None:
    models = [Recorder(0.001), Recorder(0.001)]
    lanes = opened(models)
    with ThreadPoolExecutor(4) as pool:
        made = [pool.submit(image, lanes, seed, "sequential", 200) for seed in range(4)]
        while lanes.shared()["calls"] < 6:
            time.sleep(0.001)
        models[1].broken = DeviceError("burnt out")
        errors = [one.exception() for one in made]
    assert any(isinstance(error, DeviceError) for error in errors)
    assert all(error is None or isinstance(error, DeviceError) for error in errors)
    assert lanes._backends[0].dead() == [1] and not lanes.running


def test_a_shared_call_that_does_not_end_is_seen() -> None:
    models = [Recorder(0.001), Recorder(0.001)]
    lanes = opened(models)
    with ThreadPoolExecutor(3) as pool:
        made = [pool.submit(image, lanes, seed, "sequential", 30) for seed in range(3)]
        while lanes.shared()["calls"] < 6:
            time.sleep(0.001)
        models[1].seconds = 0.5
        time.sleep(0.3)
        assert lanes.overdue(0.15) == (1,) and lanes.overdue(60) == ()
        models[1].seconds = 0.0
        for one in made:
            one.result()
    assert lanes.overdue(0.0) == ()


def test_batch_sizes_follow_the_measured_calls() -> None:
    assert batch_sizes(lambda rows: rows * 1.0) == BatchSizes(1, 16)
    assert batch_sizes(lambda rows: 1.0) == BatchSizes(16, 16), "a call costs the same however full"
    assert batch_sizes(lambda rows: rows**1.5) == BatchSizes(1, 1), "a full call costs more than two"
    curve = {1: 8.0, 2: 7.1, 4: 6.4, 8: 5.8}
    assert batch_sizes(lambda rows: rows * float(np.interp(rows, list(curve), list(curve.values())))) == BatchSizes(
        7, 16
    )


def test_a_batch_takes_the_conditioning_of_each_request_also_after_others() -> None:
    """One lane: requests follow each other in the same rows of the same bound batch."""
    lanes = opened([Recorder(0.001)])
    wanted = [image(lanes, seed, steps=6)[0] for seed in range(6)]
    for _ in range(3):
        with ThreadPoolExecutor(3) as pool:
            made = list(pool.map(lambda seed: image(lanes, seed, steps=6)[0], range(6)))
        assert all(near(a, b) for a, b in zip(made, wanted, strict=True))
    assert 0 < lanes.counts()["batches"] <= 16


@pytest.mark.usefixtures("usual_costs")
def test_random_requests_to_the_model_are_what_they_are_alone(pipeline: Pipeline, rng: np.random.Generator) -> None:
    """Within 2 of 255, whatever the neighbours."""

    def options(number: int) -> dict[str, Any]:
        mine = np.random.default_rng(number)
        mode = str(mine.choice(MODES))
        several = int(mine.integers(1, 3))
        scheduler = str(mine.choice(["ddim", "euler"] if mode == "srds" else ["ddim", "euler", "dpm++2m"]))
        return {
            "mode": mode, "num_inference_steps": int(mine.integers(4, 9)), "guidance_scale": float(mine.uniform(1, 6)),
            "scheduler": scheduler, "seed": number, "num_images_per_prompt": several,
        }  # fmt: skip

    alone = [pipeline.generate(PROMPT, **options(number)) for number in range(6)]
    with ThreadPoolExecutor(6) as pool:
        loaded = list(pool.map(lambda n: pipeline.generate(PROMPT, **options(n)), range(6)))
    for a, b in zip(alone, loaded, strict=True):
        for one, other in zip(a.images, b.images, strict=True):
            assert np.abs(np.asarray(one, int) - np.asarray(other, int)).max() <= 2
    assert any(result.report.shared_rounds for result in loaded)
