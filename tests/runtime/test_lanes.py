"""Several requests at once: who waits for whom, which lanes they have, and the same images whatever happens."""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest

from engines.base import Array
from engines.host import FunctionLane, HostBackend
from runtime.lane_policy import BATCHED, ELASTIC, Policy
from runtime.lanes import Lanes
from runtime.pipeline import Pipeline
from runtime.sampling.execute import denoise
from runtime.sampling.operations import Options
from tests.engines.cuda.test_backend import model, schedule

PROMPT = "a large red star at the left on blue background"
USUAL = tuple(0.2 + 0.8 / lanes for lanes in range(1, 9))  # seconds by number of lanes


# --- who waits for whom ----------------------------------------------------------------------------------------------


class OneAtATime:
    """A lane that notices when two images are on it, and how often it ran."""

    def __init__(self, pause: float = 0.0) -> None:
        self.busy, self.runs, self.pause = threading.Lock(), 0, pause

    def __call__(self, sample: Array, timestep: Array, conditioning: Mapping[str, Array]) -> Array:
        assert self.busy.acquire(blocking=False), "two images on one lane"
        try:
            time.sleep(self.pause)
            self.runs += 1
            return model(sample, timestep, conditioning)
        finally:
            self.busy.release()


def opened(models: list[OneAtATime], policy: Policy = ELASTIC) -> Lanes:
    first = HostBackend([FunctionLane(one) for one in models])
    lanes = Lanes(len(models), lambda lane: first.sibling() if lane else first)
    lanes.policy = policy
    return lanes


def image(lanes: Lanes, seed: int, mode: str = "aggressive", steps: int = 12, **more: Any) -> tuple[Array, Any]:
    rng = np.random.default_rng(seed)
    noise = rng.standard_normal((1, 2, 3, 3), np.float32)
    conditioning = [{"encoder_hidden_states": rng.standard_normal((1, 3, 2), np.float32)} for _ in range(2)]
    options, plan = Options(k=3), schedule(steps)
    with lanes.lease(USUAL, **more) as lease:
        found = denoise(
            lease.backend, noise, conditioning, plan, mode, options, 3.0, seed, lambda done: None, play=lease.play
        )
        return found[0], lease


@pytest.mark.parametrize("policy", [ELASTIC, BATCHED], ids=["divided", "batched"])
@pytest.mark.parametrize("count", [1, 2, 3, 5])
def test_many_images_on_any_lanes_are_what_they_are_alone(count: int, policy: Policy, rng: np.random.Generator) -> None:
    models = [OneAtATime(0.0002) for _ in range(count)]
    lanes, modes = opened(models, policy), ["sequential", "conservative", "aggressive", "srds", "adaptive"]
    alone = {n: image(lanes, n, modes[n % 5])[0] for n in range(10)}
    order = rng.permutation(40) % 10
    with ThreadPoolExecutor(2 * count + 1) as pool:
        made = list(pool.map(lambda n: image(lanes, n, modes[n % 5]), order.tolist()))
    for n, (latents, lease) in zip(order, made, strict=True):
        assert np.abs(latents - alone[n]).max() < 1e-4 * np.abs(alone[n]).max()
        assert 1 <= lease.lane_rounds / lease.rounds <= count
    assert not lanes.running and not lanes.waiting and all(one.runs for one in models)


def test_a_request_that_is_cancelled_while_another_is_on_its_lane_touches_no_lane() -> None:
    """The other one may be capturing its round just then."""
    lanes, settled = opened([OneAtATime(), OneAtATime()]), []
    for lane, backend in enumerate(lanes._backends):
        backend.settle = lambda lane=lane: settled.append(lane)  # type: ignore[method-assign,misc]

    def cancelled() -> None:
        if lanes.running == 2:
            raise InterruptedError

    with lanes.lease(USUAL) as first:
        with pytest.raises(InterruptedError), lanes.lease(USUAL, cancelled):
            pass
        assert first.held == (0, 1) and settled == []
    assert settled == [0]


def test_a_lone_image_has_all_lanes_and_gives_half_when_another_comes() -> None:
    models = [OneAtATime(0.002), OneAtATime(0.002)]
    lanes = opened(models)
    _, lease = image(lanes, 0)
    assert lease.lane_rounds == 2 * lease.rounds
    with ThreadPoolExecutor(1) as pool:
        long = pool.submit(image, lanes, 1, "sequential", 400)
        while not lanes.running:
            time.sleep(0.001)
        time.sleep(0.05)
        start = time.monotonic()
        _, short = image(lanes, 2, "sequential", 3)
        waited = time.monotonic() - start
        assert not long.done(), "it did not wait for the long one"
        _, lease = long.result()
    assert short.lane_rounds == short.rounds == 3
    assert lease.rounds < lease.lane_rounds < 2 * lease.rounds
    assert waited < 400 * 0.004


def test_a_request_that_is_limited_to_one_lane_uses_the_one_that_it_owns() -> None:
    """The others go to requests that may use them; `used` names the lanes of the rounds."""
    models = [OneAtATime(0.001) for _ in range(3)]
    lanes = opened(models)
    with lanes.lease(USUAL) as first:
        assert (first.own, first.held) == (0, (0, 1, 2))
        with ThreadPoolExecutor(1) as pool:
            limited = pool.submit(image, lanes, 5, most=1)
            while lanes.running < 2:
                time.sleep(0.001)
            lanes.update(first)
            wanted, lease = limited.result()
        assert (lease.own, lease.used, lease.lane_rounds) == (1, {1}, lease.rounds) and not first.used
        assert models[1].runs >= lease.rounds and not models[0].runs and not models[2].runs
    alone, lease = image(lanes, 5)
    assert np.abs(alone - wanted).max() < 1e-4 * np.abs(alone).max() and lease.used == {0, 1, 2}


@pytest.mark.parametrize(
    ("priorities", "expected"), [([5] * 6, [0, 1, 2, 3, 4, 5]), ([5, 9, 1, 5, 1, 2], [2, 4, 5, 0, 3, 1])]
)
def test_first_come_first_served_within_a_priority(priorities: list[int], expected: list[int]) -> None:
    lanes, order, threads = opened([OneAtATime(0.001)]), [], []

    def make(n: int) -> None:
        image(lanes, n, steps=3, priority=priorities[n])
        order.append(n)

    with lanes.lease(USUAL):
        for n in range(6):
            threads.append(threading.Thread(target=make, args=(n,)))
            threads[-1].start()
            while lanes.waiting <= n:
                time.sleep(0.001)
    for thread in threads:
        thread.join()
    assert order == expected


class GoneError(Exception):
    pass


def test_who_gives_up_in_the_queue_or_between_rounds_leaves_nothing_behind() -> None:
    lanes = opened([OneAtATime(), OneAtATime()])
    wanted = image(lanes, 3)[0]
    rounds = iter(range(4))

    def leaves() -> None:
        if next(rounds, None) is None:
            raise GoneError

    def gone() -> None:
        raise GoneError

    with pytest.raises(GoneError):
        image(lanes, 1, before_round=leaves)
    with lanes.lease(USUAL), pytest.raises(GoneError):  # admitted, but its lane is lent
        image(lanes, 1, before_round=gone)
    single = opened([OneAtATime()])
    with single.lease(USUAL), pytest.raises(GoneError):
        image(single, 1, before_round=gone)
    assert not single.waiting
    assert (lanes.running, lanes.waiting) == (0, 0)
    again, lease = image(lanes, 3)
    assert np.array_equal(again, wanted) and lease.lane_rounds == 2 * lease.rounds


def test_nobody_is_admitted_while_someone_wants_to_be_alone() -> None:
    lanes = opened([OneAtATime(0.001), OneAtATime(0.001)])
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(image, lanes, 1, steps=60)
        while not lanes.running:
            time.sleep(0.001)
        with lanes.alone(wait=False) as free:
            assert not free
        with lanes.alone(wait=True):
            assert first.done() or not lanes.running
            later = pool.submit(image, lanes, 2)
            time.sleep(0.1)
            assert not later.done() and lanes.waiting == 1
        later.result(10)


def test_a_round_that_does_not_end_is_seen() -> None:
    lanes, held = opened([OneAtATime(), OneAtATime()]), threading.Event()
    hangs = HostBackend([FunctionLane(lambda *_: held.wait(20)), FunctionLane(model)])  # type: ignore[arg-type]
    lanes.replace(2, lambda lane: hangs)
    with ThreadPoolExecutor(1) as pool:
        stuck = pool.submit(image, lanes, 1)
        time.sleep(0.15)
        assert lanes.overdue(0.1) == (0, 1) and lanes.overdue(60) == ()
        held.set()
        assert stuck.exception() is not None
    assert lanes.overdue(0.0) == ()


def test_a_device_without_progress_is_seen_although_its_host_does_not_wait() -> None:
    lanes = opened([OneAtATime(), OneAtATime()])
    with lanes.lease((1.0, 0.6)) as lease:
        assert lanes.overdue(4.0) == ()
        lease.backend.measurements.stalled = lambda: 5.0
        assert lanes.overdue(4.0) == (0, 1) and lanes.overdue(6.0) == ()


def test_who_closes_waits_for_visitors_and_keeps_them_out() -> None:
    lanes, order = opened([OneAtATime()]), list[str]()
    with ThreadPoolExecutor(2) as pool:

        def close() -> None:
            with lanes.alone(wait=True):
                order.append("closed")
                time.sleep(0.1)
                order.append("opened")

        def visit() -> None:
            with lanes.visit():
                order.append("visited")

        with lanes.visit():
            with lanes.alone(wait=False) as free:
                assert free, "a probe does not wait for visitors"
            closing = pool.submit(close)
            time.sleep(0.1)
            later = pool.submit(visit)
            time.sleep(0.1)
            order.append("left")
        closing.result()
        later.result()
    assert order == ["left", "closed", "opened", "visited"]


# --- on the embedded model -------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("usual_costs")
@pytest.mark.parametrize("mode", ["sequential", "conservative", "aggressive", "srds"])
def test_load_changes_no_image(mode: str, pipeline: Pipeline) -> None:
    options: dict[str, Any] = {"mode": mode, "num_inference_steps": 9}
    alone = [pipeline.generate(PROMPT, seed=seed, **options) for seed in range(6)]
    with ThreadPoolExecutor(6) as pool:
        loaded = list(pool.map(lambda seed: pipeline.generate(PROMPT, seed=seed, **options), range(6)))
    for a, b in zip(alone, loaded, strict=True):
        assert (a.report.k, a.report.rounds) == (b.report.k, b.report.rounds) == (2, a.report.rounds)
        assert np.abs(np.asarray(a.images[0], int) - np.asarray(b.images[0], int)).max() <= 2
        if b.report.lanes_per_round == 2 and not b.report.shared_rounds:
            assert np.array_equal(a.latents, b.latents), "equal bytes for equal placement"
    assert max(result.report.shared_rounds for result in loaded)
    again = pipeline.generate(PROMPT, seed=0, **options)
    assert np.array_equal(again.latents, alone[0].latents)
