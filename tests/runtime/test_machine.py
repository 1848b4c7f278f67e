"""Lanes that stop working: what is made again, what is left out, and how lost lanes come back."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from engines.devices import parse_devices
from engines.errors import DeviceError, NonFiniteError
from engines.host import HostBackend
from engines.load import load
from engines.manifest import DENOISER
from engines.store import Bundle
from runtime.machine import Machine, probe_inputs
from runtime.pipeline import Pipeline
from tests.runtime.test_lanes import USUAL

PROMPT = "a large red star at the left on blue background"


def test_a_probe_needs_no_image_and_no_text(shapes: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its inputs are those of the denoiser by the manifest, the same every time, and every lane gets them."""
    manifest = shapes.manifest
    sample, others = probe_inputs(manifest)
    specs = {spec.name: spec for spec in manifest.networks[DENOISER].inputs}
    axes = manifest.latent_axes(manifest.sizes.width, manifest.sizes.height, 1)
    for name, value in {"sample": sample, **others}.items():
        assert value.shape == specs.pop(name).resolve(axes) and value.dtype == np.float32 and value.std() > 0.5
    assert set(specs) == {"timestep"}
    assert np.array_equal(sample, probe_inputs(manifest)[0])

    machine = Machine(shapes, parse_devices("cpu*2"))
    monkeypatch.setattr(machine.runners["text_encoder"], "run", refuse)
    assert machine.probe() and machine.probe()
    assert isinstance(machine.prober, HostBackend) and machine.lanes.busy()[1] > 0
    one, two = (machine.prober.read(f"output {lane}") for lane in range(2))
    assert np.abs(one - two).max() < 1e-5 * np.abs(one).max() and np.abs(one).max() > 0

    monkeypatch.setattr("runtime.machine.probe_inputs", lambda manifest: (np.full_like(sample, np.nan), others))
    with pytest.raises(NonFiniteError, match="a lane answered"):
        machine.probe()
    assert not machine.lost, "it answers, and is not lost"
    machine.close()


class Broken:
    """A session that can still be bound."""

    def __init__(self, session: Any) -> None:
        self.io_binding = session.io_binding

    def run_with_iobinding(self, _: Any) -> None:
        raise DeviceError("burnt out")


def break_lane(pipeline: Pipeline, number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """One lane alone, also where lanes share a session."""
    lane = pipeline.machine.engines.backend._lanes[number]  # type: ignore[attr-defined]
    session = lane._session
    broken = SimpleNamespace(session=Broken(session.session), spec=session.spec, network=session.network)
    monkeypatch.setattr(lane, "_session", broken)


@pytest.mark.usefixtures("usual_costs")
def test_lanes_that_die_under_load_cost_no_image(shapes: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    pipeline = Pipeline(shapes, "cpu*3")
    options: dict[str, Any] = {"mode": "aggressive", "num_inference_steps": 8}
    alone = [pipeline.generate(PROMPT, seed=seed, **options) for seed in range(5)]
    with ThreadPoolExecutor(5) as pool:
        made = [pool.submit(pipeline.generate, PROMPT, seed=seed, **options) for seed in range(5)]
        while pipeline.lanes.running < 2:
            time.sleep(0.001)

        break_lane(pipeline, 1, monkeypatch)
        results = [one.result() for one in made]
    assert pipeline.lost == ("cpu/1",) and pipeline.lanes.count == 2
    for a, b in zip(alone, results, strict=True):
        assert b.report.k == 3, "what was asked does not depend on what is left"
        assert np.abs(np.asarray(a.images[0], int) - np.asarray(b.images[0], int)).max() <= 2
    assert any("burnt out" in text for one in results for text in one.report.warnings)
    pipeline.close()


def test_a_lost_lane_comes_back(shapes: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    pipeline = Pipeline(shapes, "cpu*2")
    options: dict[str, Any] = {"mode": "aggressive", "num_inference_steps": 6, "seed": 4}
    assert pipeline.revive(), "nothing is lost"
    before = pipeline.generate(PROMPT, **options)
    break_lane(pipeline, 1, monkeypatch)
    pipeline.generate(PROMPT, **options)
    assert pipeline.lost == ("cpu/1",)
    with monkeypatch.context() as patch:
        patch.setattr(
            "runtime.machine.load", lambda bundle, lanes, _: refuse() if len(lanes) > 1 else load(bundle, lanes)
        )
        assert not pipeline.revive() and pipeline.lost == ("cpu/1",)
        assert pipeline.generate(PROMPT, **options).report.lanes == 1, "the others go on"
    assert pipeline.revive() and not pipeline.lost and pipeline.lanes.count == 2
    after = pipeline.generate(PROMPT, **options)
    assert after.report.lanes == 2 and np.array_equal(after.latents, before.latents)
    pipeline.close()


def refuse() -> None:
    raise DeviceError("it is still broken")


def test_a_probe_finds_a_dead_lane_before_an_image_does(shapes: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    pipeline = Pipeline(shapes, "cpu*2")
    assert pipeline.probe() and pipeline.probe()
    with pipeline.lanes.lease(USUAL):
        assert not pipeline.probe(), "it does not wait for images"

    def broken() -> None:
        raise DeviceError("burnt out")

    assert isinstance(pipeline.machine.prober, HostBackend)
    monkeypatch.setattr(pipeline.machine.prober._lanes[0], "bind", lambda inputs, output: broken, raising=False)
    pipeline.machine.prober._bound.clear()
    with pytest.raises(DeviceError, match="burnt out"):
        pipeline.probe()
    assert pipeline.lost == ("cpu/0",) and pipeline.probe()
    assert len(pipeline.generate(PROMPT, num_inference_steps=3).images) == 1
    pipeline.close()
