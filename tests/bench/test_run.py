"""The benchmark's own arithmetic, and that its floor replays exactly the calls of the engine."""

from __future__ import annotations

import http.client
import itertools
import json
import re
import sys
import threading
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bench import __main__ as command
from bench import kernel
from bench.energy import Meter
from bench.floor import enqueued, replay
from bench.models import checkpoint, named_devices, one_lane, prompts, scenes
from bench.run import PARTS, Clock, Contender, _recorded
from bench.run import table as run_table
from bench.serve import Load, ask, compared, serving
from bench.serve import table as serve_table
from bench.statistics import bootstrap, interval, mean, median, middle, percentiles, ratio, scaled
from bench.torch_baseline import NotPossibleHereError, TorchBaseline, Wanted
from bench.torch_baseline import Setting as TorchSetting
from engines.base import Array
from engines.devices import parse_devices
from engines.errors import EngineError, ParameterError
from engines.host import FunctionLane, HostBackend
from engines.manifest import Manifest
from engines.runtimes import RUNTIMES
from engines.store import Bundle
from export.shapes.data import Scene, random_scene
from export.spec import EMBEDDED, ExportSpec
from runtime.distances import drift
from runtime.pipeline import Pipeline
from runtime.sampling.execute import denoise, execute
from runtime.sampling.noise import gaussian
from runtime.sampling.operations import STATE, Options
from runtime.sampling.program import program
from runtime.sampling.schedulers import make_schedule


def test_held_out_captions_never_occur_in_training(rng: np.random.Generator) -> None:
    def triples(asked: list[Scene]) -> set[tuple[str, str, str]]:
        return {(s.colour, s.kind, s.place) for scene in asked for s in scene.shapes}

    seen = triples([random_scene(rng, 1 + n % 2) for n in range(4000)])
    asked = triples(scenes(1, 300, 0) + scenes(2, 300, 0))
    assert len(asked) > 20 and not seen & asked


@pytest.mark.parametrize("mode", ["sequential", "conservative", "adaptive"])
@pytest.mark.parametrize("lanes", [1, 2, 3, 5])
def test_the_replay_makes_every_call_and_keeps_rounds_apart(mode: str, lanes: int, manifest: Manifest) -> None:
    log: list[tuple[int, int]] = []
    lock = threading.Lock()

    def counting(number: int) -> FunctionLane:
        def model(sample: Array, timestep: Array, conditioning: object) -> Array:
            with lock:
                log.append((number, len(sample)))
            return np.tanh(sample)

        return FunctionLane(model)

    schedule = make_schedule(manifest, "ddim", 13)
    backend = HostBackend([counting(number) for number in range(lanes)])
    backend.bind((1, 4, 2, 2), schedule.timesteps, [{}, {}])
    backend.write(STATE, np.ones((1, 4, 2, 2), np.float32))
    counts = execute(program(mode, schedule, Options(3, tolerance=0.01), 4.0), backend, lambda finished: None)
    played, rounds = log.copy(), backend.played
    log.clear()
    assert replay(backend) > 0
    assert len(rounds) == counts.rounds and len(log) == len(played) == counts.calls
    start = 0
    for calls in rounds:
        expected = {(number, len(call)) for number, call in enumerate(calls) if call}
        assert set(log[start : start + len(expected)]) == expected == set(played[start : start + len(expected)])
        start += len(expected)
    backend.close()


def test_ratios_and_percentiles() -> None:
    assert percentiles([1, 2, 3, 4, 5]) == {"p20": 1.8, "p50": 3.0, "p80": 4.2, "p90": 4.6, "p99": 4.96}
    assert ratio([2.0, 4.0, 6.0], [1.0, 2.0, 3.0]) == {"median": 2.0, "low": 2.0, "high": 2.0}
    spread = ratio(list(np.linspace(1, 2, 50)), [1.0] * 50)
    assert 1 < spread["low"] < spread["median"] < spread["high"] < 2
    assert scaled(spread, 0.5)["median"] == pytest.approx(spread["median"] / 2)
    assert [values[middle(values)] for values in ([3.0], [4.0, 1.0], [5.0, 1.0, 3.0])] == [3.0, 1.0, 3.0]
    assert (median([]), interval(None)) == (None, "") and interval(ratio([2.0], [1.0])) == "2.00 (2.00–2.00)"


@pytest.mark.parametrize(("interval_of", "name"), [(bootstrap, "median"), (mean, "mean")])
def test_intervals_cover_what_they_claim(interval_of: Any, name: str, rng: np.random.Generator) -> None:
    """Of samples whose true middle is 10, about 95 % of the intervals hold it; they shrink as samples grow."""
    found = [interval_of(rng.normal(10, 2, 40).tolist(), draws=400) for _ in range(300)]
    assert 0.88 < np.mean([one["low"] <= 10 <= one["high"] for one in found]) < 0.995
    assert all(one["low"] <= one[name] <= one["high"] for one in found)
    wide, narrow = (interval_of(rng.normal(10, 2, count).tolist()) for count in (20, 2000))
    assert narrow["high"] - narrow["low"] < wide["high"] - wide["low"]


def counting_lanes(lanes: int) -> HostBackend:
    return HostBackend([FunctionLane(lambda sample, timestep, _: np.tanh(sample)) for _ in range(lanes)])


@pytest.mark.parametrize("mode", ["sequential", "aggressive", "adaptive"])
@pytest.mark.parametrize("lanes", [1, 2])
def test_the_parts_of_a_round_add_up(
    mode: str, lanes: int, manifest: Manifest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a clock that ticks once whenever it is read, no tick of the calling thread between two marks is lost."""
    ticks = itertools.count()
    monkeypatch.setattr("bench.run.time.perf_counter", lambda: float(next(ticks)))
    backend, clock = counting_lanes(lanes), Clock()
    marks: list[str] = []

    def marking(part: str) -> None:
        marks.append(part)
        clock(part)

    backend.mark = marking
    start = float(next(ticks))
    schedule = make_schedule(manifest, "ddim", 9)
    noise = np.ones((1, 4, 2, 2), np.float32)
    options = Options(3, tolerance=0.01)
    _, counts = denoise(backend, noise, [{}, {}], schedule, mode, options, 4.0, 0, lambda finished: None)
    end = float(next(ticks))
    backend.close()
    assert marks[0] == "before" and marks[-1] == "copy" and marks.count("lanes") == counts.rounds
    split = clock.split(end - start, backend.measurements.critical_path_seconds or 0.0)
    assert set(split) == set(PARTS) and sum(split.values()) == pytest.approx(end - start)
    inside = sum(clock.parts.values())
    assert inside == pytest.approx(end - start, abs=3), "all but the way in and out is seen by the marks"
    assert split["python"] - clock.parts["python"] == pytest.approx(end - start - inside)
    assert all(split[part] >= 0 for part in PARTS)


def test_a_replay_of_lanes_that_order_themselves_repeats_the_calls(manifest: Manifest) -> None:
    backend = counting_lanes(2)
    rounds = _recorded(backend)
    schedule = make_schedule(manifest, "ddim", 5)
    noise = np.ones((1, 4, 2, 2), np.float32)
    _, counts = denoise(backend, noise, [{}, {}], schedule, "aggressive", Options(2), 4.0, 0, lambda finished: None)
    vars(backend).pop("predict")
    assert len(rounds) == counts.rounds and list(rounds) == list(backend.played)
    assert enqueued(backend, rounds) > 0 and len(backend.played) == 2 * counts.rounds
    backend.close()


def test_a_short_run_writes_a_result_file(
    shapes: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    target = tmp_path / "run.json"
    modes = ["sequential", "conservative", "aggressive", "srds", "adaptive"]
    arguments = ["run", "--steps", "4", "--images", "2", "--warmup", "1", "--guidance", "1", "--no-torch"]
    refused = ["run", "--steps", "4", "--images", "1", "--warmup", "0", "--guidance", "1", "--no-torch", "--schedulers"]
    monkeypatch.setattr("sys.argv", ["bench", *refused, "dpm++2m", "--modes", "srds", "aggressive"])
    assert command.main() == 0 and "not possible here: srds cannot run dpm++2m" in capsys.readouterr().out
    monkeypatch.setattr("sys.argv", ["bench", *arguments, "--modes", *modes, "--json", str(target)])
    assert command.main() == 0
    rows = json.loads(target.read_text())["rows"]
    assert [row["baseline"] for row in rows] == ["one lane", "one session", "openvino", *[None] * 5]
    assert [row["asked_mode"] for row in rows[3:]] == modes
    if not RUNTIMES["openvino"].installed:
        assert "OpenVINO is not installed" in rows.pop(2)["reason"]
    assert rows[2]["drift"]["median"] < 1e-4 and rows[0]["speedups"]["one lane"]["median"] == 1
    for row in rows:
        assert row["images"] == 2 and row["share_of_floor"]["median"] > 0 and set(row["seconds"]) >= {"p20", "p99"}
        split = row["us_per_round"]
        assert sum(split[part] for part in PARTS) == pytest.approx(split["total"], abs=0.5)
        assert row["speedup_in_rounds"] == pytest.approx(4 / row["rounds"], abs=1e-3)
        assert row["joules"] is None and "processor" in row["joules_reason"]
    shown = capsys.readouterr().out
    assert "aggressive, 2 lanes" in shown and "not measurable here" in shown


def test_a_baseline_that_is_not_possible_keeps_its_row() -> None:
    contender = Contender("diffusers", "diffusers", None, lambda *_: (0.0, np.zeros(0, np.float32), None))
    contender.reason = "too slow"
    row = contender.row({"model": "m", "scheduler": "s", "steps": 1, "guidance_scale": 1.0}, {})
    assert row["status"] == "not possible here" and row["reason"] == "too slow"
    assert "not possible here: too slow" in run_table([row])


@pytest.mark.parametrize("sides", [None, (512, 1024)])
@pytest.mark.parametrize(
    "loras", [(), (("one.safetensors", 0.8),), (("one.safetensors", 1.0), ("two two.safetensors", -2))]
)
@pytest.mark.parametrize("folder", ["models/my model", "shapes"])
def test_a_checkpoint_is_its_folder_and_its_loras_however_it_was_exported(
    folder: str, loras: Any, sides: Any, manifest: Manifest, tmp_path: Path
) -> None:
    where = EMBEDDED["shapes"] if folder == "shapes" else tmp_path / folder
    files = tuple((tmp_path / file, scale) for file, scale in loras)
    origin = ExportSpec("any", where, files, sides, cache=bool(sides)).origin
    found = checkpoint(manifest.model_copy(update={"origin": origin}))
    assert Path(found.folder) == where and found.loras == tuple((str(file), scale) for file, scale in files)


@pytest.mark.slow
def test_a_checkpoint_that_is_not_there_is_a_reason() -> None:
    with pytest.raises(NotPossibleHereError, match="nowhere"):
        TorchBaseline(Wanted("/nowhere/at/all"), 100)
    with pytest.raises(NotPossibleHereError, match=r"not loaded within 0\.01 s"):
        TorchBaseline(Wanted("/nowhere/at/all"), 0.01)


@pytest.mark.slow
def test_diffusers_draws_the_same_image(pipeline: Pipeline) -> None:
    baseline = TorchBaseline(Wanted(checkpoint(pipeline.manifest).folder), 120)
    try:
        noise = gaussian(5, 0, 0, pipeline.latent_shape)[None]
        for scheduler, guidance in (("ddim", 4.0), ("euler", 1.0)):
            seconds, latents = baseline.image("a large red star", noise, TorchSetting(scheduler, 6, guidance))
            ours = pipeline.generate(
                "a large red star", latents=noise, mode="sequential", scheduler=scheduler, num_inference_steps=6,
                guidance_scale=guidance,
            )  # fmt: skip
            assert seconds > 0 and drift(ours.latents, latents) < 1e-4
    finally:
        baseline.close()


@pytest.mark.parametrize("k", [1, 2, 5])
def test_one_combination_is_the_separate_operations(k: int, rng: np.random.Generator) -> None:
    block = kernel.Block(k, seed=int(rng.integers(1 << 30)))
    inputs = rng.standard_normal((1 + 2 * k, 37))
    separate = np.stack(block.separately(inputs[0], inputs[1 : 1 + k], inputs[1 + k :]))
    np.testing.assert_allclose(block.rows().astype(np.float64) @ inputs, separate, rtol=1e-4, atol=1e-5)


def test_kernel_measures_and_says_what(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(kernel, "SECONDS", 1e-5)
    monkeypatch.setattr(kernel, "LATENTS", {"shapes": (4, 16, 16)})
    target = tmp_path / "kernel.json"
    monkeypatch.setattr("sys.argv", ["bench", "kernel", "--k", "2", "--repeats", "2", "--json", str(target)])
    assert command.main() == 0 and "HostBackend.combine, cpu, float32" in capsys.readouterr().out
    (row,) = json.loads(target.read_text())["rows"]
    assert (
        row["error"] < 1e-5 and (row["inputs"], row["outputs"]) == (5, 3) and set(row["speedup"]) == {"numpy", "torch"}
    )
    monkeypatch.setattr("sys.argv", ["bench", "kernel", "--device", "cuda:7"])
    assert command.main() == 1 and "use cpu or cuda:0" in capsys.readouterr().err


def test_result_files_have_a_row_per_line_and_no_nan() -> None:
    result = {"schema_version": 2, "host": {"cores": 2}, "rows": [{"a": 1}, {"b": [1, 2]}]}
    text = command.dumped(result)
    assert json.loads(text) == result and '[\n{"a": 1},\n{"b": [1, 2]}\n]' in text
    with pytest.raises(ValueError, match="not JSON compliant"):
        command.dumped(result | {"rows": [{"a": float("nan")}]})


def test_alone_it_lists_what_there_is(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("sys.argv", ["bench"])
    assert command.main() == 0
    shown = capsys.readouterr().out
    assert all(re.search(rf"^    {name}\s", shown, re.MULTILINE) for name in command.COMMANDS)


def test_auto_is_what_it_stands_for_and_has_a_first_lane(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("engines.devices._auto", lambda: "cpu*3")
    assert named_devices("auto") == "cpu*3" and named_devices("cuda:0*4") == "cuda:0*4"
    monkeypatch.setattr("engines.devices._auto", lambda: "cuda:0,cuda:1")
    assert named_devices("auto") == "cuda:0,cuda:1"
    assert [one_lane(d) for d in ("cpu*3", "cuda:1,cuda:0", "cuda:0@bf16*4")] == ["cpu@1", "cuda:1", "cuda:0@bf16"]


def test_prompts_come_from_captions_examples_or_a_file(manifest: Manifest, shapes: Bundle, tmp_path: Path) -> None:
    assert prompts(shapes.manifest, 3) == [scene.caption() for scene in scenes(1, 3, 0)]
    assert prompts(manifest.model_copy(update={"examples": ("a", "b")}), 3) == ["a", "b", "a"]
    file = tmp_path / "prompts.txt"
    file.write_text("one\n\n two \n")
    assert prompts(shapes.manifest, 3, file=file) == ["one", "two", "one"]
    file.write_text("\n")
    with pytest.raises(ParameterError, match="has no lines"):
        prompts(shapes.manifest, 1, file=file)


class _Nvml:
    """What the driver's library says of two GPUs, the other way round than CUDA counts them."""

    class NVMLError(Exception):
        pass

    def __init__(self, millijoules: list[int]) -> None:
        self.millijoules = millijoules

    def nvmlInit(self) -> None: ...

    def nvmlDeviceGetHandleByPciBusId(self, place: bytes) -> int:
        return 1 - int(place)

    def nvmlDeviceGetTotalEnergyConsumption(self, handle: int) -> int:
        self.millijoules[handle] += 1500 * (handle + 1)
        return self.millijoules[handle]


def test_joules_are_those_of_the_gpus_in_use(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", _Nvml([0, 10_000]))

    def place(number: int) -> bytes:
        return str(number).encode()

    def used(devices: str) -> float:
        meter = Meter(parse_devices(devices), place)
        before, after = meter.joules(), meter.joules()
        assert meter.reason is None and before is not None and after is not None
        return after - before

    assert [used(one) for one in ("cuda:0", "cuda:1*2", "cuda:0,cuda:1")] == pytest.approx([3.0, 1.5, 4.5])
    assert "processor lanes" in (Meter(parse_devices("cpu*2")).reason or "")


def test_without_a_driver_joules_have_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    class Broken(_Nvml):
        def nvmlInit(self) -> None:
            raise self.NVMLError("no driver")

    monkeypatch.setitem(sys.modules, "pynvml", Broken([]))
    meter = Meter(parse_devices("cuda:0"))
    assert "no driver" in (meter.reason or "") and meter.joules() is None
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert Meter(parse_devices("cuda:0")).reason == "nvidia-ml-py is missing"


@pytest.mark.usefixtures("usual_costs")
def test_serving_is_measured_with_every_policy(
    shapes: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    target = tmp_path / "serve.json"
    options = [
        "--clients",
        "1",
        "3",
        "--turns",
        "2",
        "--seconds",
        "0.3",
        "--steps",
        "3",
        "--pairs",
        "2",
        "--starts",
        "1",
    ]
    monkeypatch.setattr("sys.argv", ["bench", "serve", *options, "--json", str(target)])
    assert command.main() == 0
    rows = json.loads(target.read_text())["rows"]
    loads = {(row["clients"], row["policy"]): row for row in rows if row["name"] == "load"}
    assert set(loads) == {
        (clients, policy) for clients in (1, 3) for policy in ("batched", "elastic", "all lanes", "one lane")
    }
    assert loads[1, "elastic"]["lanes_per_round"] == loads[3, "all lanes"]["lanes_per_round"] == 2
    assert loads[1, "one lane"]["lanes_per_round"] == 1 <= loads[3, "elastic"]["lanes_per_round"] < 2
    assert loads[1, "batched"]["lanes_per_round"] == 2
    assert [row["clients"] for row in rows if row["name"] == "batched against the better"] == [1, 3]
    (start,) = (row for row in rows if row["name"] == "start")
    assert start["times"] == 1 and start["seconds"]["p50"] > 0 and start["cpu_seconds"] > 0.3, (
        "of the child's, waited for"
    )
    said = capsys.readouterr().out
    assert "HTTP adds" in said and f"ready {start['seconds']['p50']:.2f} s after its start" in said


def test_shared_calls_are_compared_with_the_better_policy_in_throughput_p50_and_p95() -> None:
    def load(*latencies: float) -> Load:
        made = Load()
        for _ in range(3):
            made.add(np.cumsum(latencies).tolist(), latencies, [2.0] * len(latencies))
        return made

    loads = {"batched": load(1, 1, 2), "all lanes": load(1, 1, 9), "one lane": load(2, 2, 2)}
    row = compared(1, loads)
    assert (row["better_throughput"], row["better_latency"], row["better_latency_p95"]) == (
        "one lane", "all lanes", "one lane"
    )  # fmt: skip
    assert row["latency_p50"] == {"median": 1.0, "low": 1.0, "high": 1.0}
    assert row["latency_p95"]["low"] == row["latency_p95"]["median"] == pytest.approx(1.9 / 2)
    added = {"name": "overhead", "milliseconds": {"p50": 1.0, "low": 1.0, "high": 1.0, "p95": 1.0}}
    text = serve_table([*(one.row(1, policy) for policy, one in loads.items()), row, added])
    assert "p50 1.00 (1.00–1.00), p95 0.95 (0.95–0.95) |" in text


def test_a_turn_with_a_single_answer_has_a_rate() -> None:
    load = Load()
    load.add([3.0], [0.5], [2.0])
    load.add([1.0, 3.0, 2.0], [1.0, 1.0, 1.0], [2.0, 2.0, 2.0])
    assert load.throughput == [2.0, 1.0]


def test_a_benchmark_that_fails_leaves_no_server(pipeline: Pipeline) -> None:
    with (
        pytest.raises(EngineError, match="a request failed with 400"),
        serving(pipeline) as port,
        closing(http.client.HTTPConnection("127.0.0.1", port)) as connection,
    ):
        ask(connection, prompt="")
    assert "server" not in {thread.name for thread in threading.enumerate()}
