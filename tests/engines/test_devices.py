"""What `--devices` means, on a machine of four cores."""

from __future__ import annotations

import os

import pytest

from engines import devices, load
from engines.devices import LaneSpec, parse_devices, precision
from engines.errors import DeviceError
from engines.runtimes import DEVICES, RUNTIMES, Runtime

FORMS = r"use auto, cpu, cpu@THREADS, cpu\*LANES"


@pytest.fixture(autouse=True)
def four_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "cores", lambda: 4)


@pytest.fixture(autouse=True)
def tensorrt_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Runtime, "installed", property(lambda self: self.package != "tensorrt_rtx"))


@pytest.mark.parametrize(
    ("text", "lanes", "threads"),
    [
        ("auto", 4, 1), ("cpu", 1, 4), ("cpu@1", 1, 1), ("cpu@3", 1, 3), ("cpu@4", 1, 4),
        ("cpu*1", 1, 4), ("cpu*2", 2, 2), ("cpu*3", 3, 1), ("cpu*4", 4, 1), ("cpu*9", 9, 1), ("cpu*64", 64, 1),
    ],
)  # fmt: skip
def test_a_device_string_means_lanes_that_share_the_cores(text: str, lanes: int, threads: int) -> None:
    assert parse_devices(text) == tuple(LaneSpec("cpu", n, threads) for n in range(lanes))


@pytest.mark.parametrize(("cores", "lanes", "threads"), [(1, 1, 1), (2, 2, 1), (8, 8, 1), (32, 8, 4)])
def test_auto_is_one_lane_per_core_up_to_eight(
    cores: int, lanes: int, threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(devices, "cores", lambda: cores)
    assert parse_devices("auto") == tuple(LaneSpec("cpu", n, threads) for n in range(lanes))


@pytest.mark.parametrize(
    "text",
    ["", "CPU", "Auto", "gpu", "cpu:0", "cpu@", "cpu*", "cpu@-1", "cpu@1.5", "cpu*2@1", "cpu,cpu", "cpu\n", "*2"],
)
def test_an_unknown_device_is_refused_with_the_forms_that_exist(text: str) -> None:
    with pytest.raises(DeviceError, match=f"unknown device.*{FORMS}"):
        parse_devices(text)


@pytest.mark.parametrize(
    ("text", "lanes"),
    [
        ("cuda:0", ["cuda:0/0"]), ("cuda:1,cuda:0", ["cuda:1/0", "cuda:0/0"]), ("cuda:0*2", ["cuda:0/0", "cuda:0/1"]),
        ("cuda:3,cuda:0*2,cuda:3", ["cuda:3/0", "cuda:0/0", "cuda:0/1", "cuda:3/1"]),
    ],
)  # fmt: skip
def test_gpus_have_lanes_of_their_own(text: str, lanes: list[str]) -> None:
    found = parse_devices(text)
    assert [str(lane) for lane in found] == lanes
    assert {lane.runtime for lane in found} == {"tensorrt"}
    assert precision(found) == "fp16"


def test_onnx_runtime_is_asked_for_by_name() -> None:
    assert [lane.runtime for lane in parse_devices("cuda:0@onnxruntime*2")] == ["onnxruntime-cuda"] * 2


@pytest.mark.parametrize("name", RUNTIMES)
def test_every_runtime_can_be_named(name: str) -> None:
    """A line in the table is all that a device string needs; its module has what a runtime's module must have."""
    runtime = RUNTIMES[name]
    device = "cuda:0" if runtime.device == "cuda" else runtime.device
    for kind in runtime.precisions:
        (lane,) = parse_devices(f"{device}@{runtime.option}@{kind}")
        assert (lane.device, lane.runtime, lane.precision) == (device, name, kind)
    (lane,) = parse_devices(f"{device}@{runtime.option}")
    assert lane.precision == runtime.precisions[0]
    parts = [one for one in vars(load.RuntimeModule) if not one.startswith("_")]
    assert set(parts) == {"trouble", "wanted", "build_missing", "Engines"}
    assert all(callable(getattr(load.module(name), part)) for part in parts)


def test_a_further_runtime_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(RUNTIMES, "new", Runtime("engines.null", "cpu", "new", "New", ("bf16",), threads=True))
    assert {(lane.runtime, lane.precision, lane.threads) for lane in parse_devices("cpu@new*2")} == {("new", "bf16", 2)}
    assert parse_devices("cpu@new@3")[0].threads == 3
    assert load.load.__module__ == "engines.load" and DEVICES == ("cuda", "cpu", "null")


def test_the_package_that_is_installed_is_meant(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Runtime, "installed", property(lambda self: self.package != "tensorrt"))
    assert parse_devices("cuda:0")[0].runtime == "tensorrt_rtx"
    assert parse_devices("cuda:0@tensorrt")[0].runtime == "tensorrt"


def test_a_type_that_a_runtime_lacks_is_refused_by_name() -> None:
    with pytest.raises(DeviceError, match=r"onnxruntime takes fp16 or fp32 on cuda devices, not bf16"):
        parse_devices("cuda:0@onnxruntime@bf16")


@pytest.mark.parametrize(
    "text", ["cuda", "cuda*2", "cuda:", "cuda:a", "cuda:0@", "cuda:0@torch", "cuda:0,cpu", "cuda:0,"]
)
def test_an_unknown_gpu_is_refused_with_the_forms_that_exist(text: str) -> None:
    with pytest.raises(DeviceError, match=r"unknown device .*: use auto, .*cuda:0\*LANES"):
        parse_devices(text)


@pytest.mark.parametrize(
    ("text", "runtime", "kind"),
    [
        ("cuda:0@bf16", "tensorrt", "bf16"), ("cuda:0@fp32*2", "tensorrt", "fp32"),
        ("cuda:0@onnxruntime@fp32", "onnxruntime-cuda", "fp32"), ("cuda:1@tensorrt@fp16", "tensorrt", "fp16"),
    ],
)  # fmt: skip
def test_gpus_compute_in_the_type_that_is_named(text: str, runtime: str, kind: str) -> None:
    assert {(lane.runtime, lane.precision) for lane in parse_devices(text)} == {(runtime, kind)}


@pytest.mark.parametrize("text", ["cuda:0,cuda:1@onnxruntime", "cuda:0@fp32,cuda:0", "cuda:0@bf16,cuda:1@fp16"])
def test_gpus_of_one_model_run_alike(text: str) -> None:
    with pytest.raises(DeviceError, match="all GPU lanes run alike"):
        parse_devices(text)


@pytest.mark.parametrize("text", ["cuda:0*0", "cuda:0*65", "cuda:0*40,cuda:1*40"])
def test_the_number_of_gpu_lanes_is_limited(text: str) -> None:
    with pytest.raises(DeviceError, match="between 1 and 64 lanes"):
        parse_devices(text)


@pytest.mark.parametrize("text", ["cpu@0", "cpu*0", "cpu@00"])
def test_no_lane_and_no_thread_is_refused(text: str) -> None:
    with pytest.raises(DeviceError, match="at least one lane with one thread"):
        parse_devices(text)


@pytest.mark.parametrize("text", ["cpu@5", "cpu@999999", "cpu*65", "cpu*999999"])
def test_more_than_the_machine_has_is_refused_with_what_it_has(text: str) -> None:
    with pytest.raises(DeviceError, match="may use 4 cores; lanes end at 64"):
        parse_devices(text)


def test_cores_are_those_that_this_process_may_use(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()  # of four_cores
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {3, 5, 7}, raising=False)
    assert devices.cores() == 3


def test_a_lane_is_written_as_device_and_number() -> None:
    assert [str(lane) for lane in parse_devices("cpu*2")] == ["cpu/0", "cpu/1"]
