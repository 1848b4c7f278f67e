"""What is kept from image to image is right, found again, and bounded."""

from __future__ import annotations

import numpy as np
import pytest

from engines.base import Branch
from engines.cuda import cache
from runtime.sampling.operations import Options
from tests.engines.cuda.test_backend import CASES, distance, left, open_cuda, reference, run, schedule

pytestmark = pytest.mark.imaginary_gpus


@pytest.fixture(autouse=True)
def _few_copies_at_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("engines.cuda.peers.PAIR_BYTES", (64,))


def test_many_kinds_of_images_leave_a_bounded_number_of_rounds_and_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Graphs make room for others when they have not been used for long, and every image is right meanwhile."""
    monkeypatch.setattr(cache, "STALE", 12)
    monkeypatch.setattr(cache, "ROUNDS", 1)  # the least, of which there are 32
    monkeypatch.setattr(cache, "GRAPHS", 1)
    machine, backend = open_cuda((0, 1), seed=2)
    most = {"rounds": 0, "graphs": 0}
    for turn in range(3):
        for mode, options, steps, name in CASES:
            shape = (1 + (turn + steps) % 4, 2, 3, 3)
            for _ in range(2):
                plan = schedule(steps, name)
                got = run(backend, mode, options, plan, shape=shape)
                assert distance(got, reference(mode, options, plan, shape=shape)) < 1e-5
                counts = backend.measurements.counts
                most = {kind: max(count, counts[kind]) for kind, count in most.items()}
                assert len(backend._cache._shapes) <= cache.SHAPES
    assert most["rounds"] == 32 and most["graphs"] == 8, most
    assert machine.calls("cuGraphExecDestroy") > 8, "none made room for another"
    backend.close()
    left(machine)


def test_srds_replays_its_graphs_image_after_image() -> None:
    """Slots keep their addresses: nothing is compiled or captured after the second image, whatever comes between."""
    machine, backend = open_cuda((0, 0), seed=3)
    plan, between = schedule(25), schedule(6)
    for n in range(4):
        run(backend, "srds", Options(k=2), plan)
        run(backend, "aggressive", Options(k=3), between)
        if n == 1:
            compiled, captured = backend.measurements.counts["rounds"], machine.calls("cuGraphInstantiate")
    assert (backend.measurements.counts["rounds"], machine.calls("cuGraphInstantiate")) == (compiled, captured)


def test_a_round_that_comes_once_is_not_captured() -> None:
    machine, backend = open_cuda((0, 0), seed=4)
    run(backend, "srds", Options(k=2), schedule(25))
    assert machine.calls("cuGraphInstantiate") < backend.measurements.counts["rounds"] / 3


def test_only_what_cannot_change_is_known_by_identity() -> None:
    """The same array with other numbers is another combination, and timesteps belong to the image."""
    _, backend = open_cuda((0,), seed=5)
    shape, words = (1, 1, 2, 3), [{"encoder_hidden_states": np.ones((1, 2, 2), np.float32)}]
    calls = ((Branch("y", 0, "out", 0),),)
    sources, targets, rows = ("x",), ("y",), np.ones((1, 1), np.float32)
    found = []
    for factor, timestep, frozen in ((1, 10, False), (3, 10, False), (3, 10, True), (3, 10, True), (3, 500, True)):
        rows.setflags(write=True)
        rows[0, 0] = factor
        rows.setflags(write=not frozen)
        backend.bind(shape, [timestep], words)
        backend.write("x", np.full(shape, 0.5, np.float32))
        backend.combine(sources, rows, targets)
        backend.predict(calls)
        found.append(float(backend.read("y").mean()))
        found.append(float(backend.read("out").mean()))
    assert np.allclose(found[::2], [0.5, 1.5, 1.5, 1.5, 1.5])
    assert found[3] == found[5] == found[7] != found[9] and found[1] != found[3]


def test_the_data_of_rounds_has_a_place_for_so_much(monkeypatch: pytest.MonkeyPatch) -> None:
    """When it is full it begins anew, and no copy that is still to come reads what is overwritten."""
    monkeypatch.setattr(cache, "PLANNED_BYTES", 2048)
    _, backend = open_cuda((0, 1), seed=6, eager=0)
    for steps in (9, 12, 9, 12):
        plan, options = schedule(steps), Options(k=2)
        assert distance(run(backend, "aggressive", options, plan), reference("aggressive", options, plan)) < 1e-5
