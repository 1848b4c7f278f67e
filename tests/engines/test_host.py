"""Lanes in host memory: really concurrent, exact in place, and unharmed by a failing lane."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pytest

from engines.base import Array, Branch, combine
from engines.errors import DeviceError
from engines.host import FunctionLane, HostBackend, Model


def host(*models: Model, images: int = 1) -> HostBackend:
    backend = HostBackend([FunctionLane(model) for model in models])
    conditioning = [{"c": np.full((images, 2), c, np.float32)} for c in (1.0, 2.0)]
    backend.bind((images, 4, 3, 3), (10.0, 20.0, 30.0), conditioning)
    return backend


def echo(sample: Array, timestep: Array, conditioning: Mapping[str, Array]) -> Array:
    """Tells apart which latent, timestep and conditioning a row was given."""
    return sample + timestep.reshape(-1, 1, 1, 1) + 1000 * conditioning["c"][:, :1].reshape(-1, 1, 1, 1)


def test_lanes_run_at_the_same_time() -> None:
    """Each lane waits for the other inside its model: lanes that took turns would never meet."""
    meeting = threading.Barrier(3, timeout=20)

    def meet(sample: Array, timestep: Array, conditioning: Mapping[str, Array]) -> Array:
        meeting.wait()
        return sample

    backend = host(meet, meet, meet)
    backend.write("x", np.ones((1, 4, 3, 3), np.float32))
    backend.predict([[Branch("x", 0, f"n{lane}", 0)] for lane in range(3)])
    assert (backend.read("n2") == 1).all()
    backend.close()


@pytest.mark.parametrize("images", [1, 2, 3])
@pytest.mark.parametrize("lanes", [1, 2, 3])
def test_every_row_gets_its_own_latent_timestep_and_conditioning(
    images: int, lanes: int, rng: np.random.Generator
) -> None:
    backend = host(*[echo] * lanes, images=images)
    values = {name: rng.standard_normal((images, 4, 3, 3), np.float32) for name in ("a", "b")}
    for name, value in values.items():
        backend.write(name, value)
    for order in (1, -1):  # the second time, every lane must notice that its rows changed places
        branches = [Branch(name, step, f"{name}{step}{c}", c) for name in "ab" for step in (0, 2) for c in (0, 1)][
            ::order
        ]
        backend.predict([branches[lane::lanes] for lane in range(lanes)])
        for branch in branches:
            expected = values[branch.latent] + (10, 20, 30)[branch.step] + 1000 * (branch.conditioning + 1)
            np.testing.assert_allclose(backend.read(branch.output), expected, rtol=1e-6)
    backend.close()


def test_a_new_image_never_sees_the_last_ones_conditioning() -> None:
    backend = host(echo)
    for c in (1.0, 5.0):
        backend.bind((1, 4, 3, 3), (10.0,), [{"c": np.full((1, 2), c, np.float32)}])
        backend.write("x", np.zeros((1, 4, 3, 3), np.float32))
        backend.predict([[Branch("x", 0, "n", 0)]])
        assert (backend.read("n") == 10 + 1000 * c).all()
    backend.close()


def test_a_failing_lane_is_reported_after_all_stopped_and_the_next_image_is_right() -> None:
    broken = threading.Event()
    broken.set()

    def sometimes(sample: Array, timestep: Array, conditioning: Mapping[str, Array]) -> Array:
        if broken.is_set():
            raise DeviceError("lane lost")
        return sample

    backend = host(echo, sometimes)
    backend.write("x", np.ones((1, 4, 3, 3), np.float32))
    calls = [[Branch("x", 0, "n0", 0)], [Branch("x", 0, "n1", 1)]]
    with pytest.raises(DeviceError, match="lane lost"):
        backend.predict(calls)
    assert backend.dead() == [1]
    broken.clear()
    backend.predict(calls)
    assert (backend.read("n1") == 1).all() and (backend.read("n0") == 1011).all()
    backend.close()


def test_a_wait_that_is_interrupted_does_not_harm_the_next_round(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C can strike twice: also while the interrupted round is being waited for."""
    held = threading.Event()

    def slow(sample: Array, timestep: Array, conditioning: Mapping[str, Array]) -> Array:
        assert held.wait(20)
        return 2 * sample

    backend = host(echo, slow)
    calls = [[Branch("x", 0, "n0", 0)], [Branch("x", 0, "n1", 1)]]
    backend.write("x", np.ones((1, 4, 3, 3), np.float32))
    get = backend._done.get

    def interrupted() -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(backend, "_done", Results(interrupted, backend._done))
    with pytest.raises(KeyboardInterrupt):
        backend.predict(calls)
    monkeypatch.setattr(backend, "_done", Results(get, backend._done))
    held.set()
    backend.bind((1, 4, 3, 3), (10.0,), [{"c": np.full((1, 2), c, np.float32)} for c in (1.0, 2.0)])
    backend.write("x", np.full((1, 4, 3, 3), 3, np.float32))
    backend.predict(calls)
    assert (backend.read("n1") == 6).all()
    backend.close()


class Results:
    """A queue of results with another way of getting them."""

    def __init__(self, get: Callable[[], Any], queue: Any) -> None:
        self.get, self._queue = get, queue

    def put(self, result: Any) -> None:
        self._queue.put(result)


def test_closed_lanes_say_so() -> None:
    backend = host(echo, echo)
    backend.write("x", np.ones((1, 4, 3, 3), np.float32))
    backend.close()
    with pytest.raises(DeviceError, match="the model is closed: load it again"):
        backend.predict([[Branch("x", 0, "n0", 0)], [Branch("x", 0, "n1", 1)]])


@pytest.mark.parametrize("sides", [(3, 3), (33, 31), (64, 32), (65, 90)])
@pytest.mark.parametrize("inputs", [1, 2, 5, 33, 67])
def test_combine_equals_float64_in_place_and_for_any_number_of_slots(
    inputs: int, sides: tuple[int, int], rng: np.random.Generator
) -> None:
    backend = HostBackend([FunctionLane(echo)])
    backend.bind((1, 4, *sides), [7.0, 3.0], [{}])
    values = rng.standard_normal((inputs, 1, 4, *sides)).astype(np.float32)
    names = [f"slot {n}" for n in range(inputs)]
    for name, value in zip(names, values, strict=True):
        backend.write(name, value)
    rows = rng.standard_normal((inputs, inputs))
    backend.combine(names, rows.tolist(), names[::-1])  # every target is a source of another row
    expected = np.tensordot(rows, values.astype(np.float64), 1)
    scale = np.tensordot(np.abs(rows), np.abs(values.astype(np.float64)), 1)
    for name, value, size in zip(names[::-1], expected, scale, strict=True):
        assert (np.abs(backend.read(name) - value) <= 4 * np.finfo(np.float32).eps * (size + 1)).all()
    backend.close()


@pytest.mark.parametrize("elements", [2, 7, 31, 257, 1024])
def test_a_row_of_combine_has_the_same_bits_whatever_stands_beside_it(elements: int, rng: np.random.Generator) -> None:
    inputs = rng.standard_normal((9, elements)).astype(np.float32)
    rows = rng.standard_normal((5, 9)).astype(np.float32)
    rows[:, 4] = 0
    together = combine(inputs, rows)
    rest = [0, 1, 2, 3, 5, 6, 7, 8]
    for m in range(5):
        np.testing.assert_array_equal(combine(inputs[rest], rows[m : m + 1, rest])[0], together[m])
    np.testing.assert_array_equal(combine(inputs, [[0, 0, 2, 0, 0, 0, 0, 0, 0]])[0], 2 * inputs[2])


def test_distance_is_the_relative_norm(rng: np.random.Generator) -> None:
    backend = host(echo)
    a, b = rng.standard_normal((2, 1, 4, 3, 3)).astype(np.float32)
    backend.write("a", a)
    backend.write("b", b)
    found = backend.distances([("a", "b"), ("b", "b")])
    assert found == [pytest.approx(np.linalg.norm(a - b) / np.linalg.norm(b), rel=1e-5), 0]
    backend.close()


def test_inner_products_are_of_combinations(rng: np.random.Generator) -> None:
    backend = host(echo)
    latents = rng.standard_normal((3, 1, 4, 13, 17)).astype(np.float32)
    backend.bind(latents[0].shape, [0.0], [{}])
    for name, value in zip("abc", latents, strict=True):
        backend.write(name, value)
    rows = rng.standard_normal((2, 2)).astype(np.float32)
    found = backend.inner_products([(("c", "a"), rows), (("b",), [[1.0], [2.0]])])
    a, b, c = latents.reshape(3, -1).astype(np.float64)
    x, y = rows.astype(np.float64) @ np.stack([c, a])
    assert found == pytest.approx([x @ y, x @ x, y @ y, 2 * b @ b, b @ b, 4 * b @ b], rel=1e-5)
    backend.close()
