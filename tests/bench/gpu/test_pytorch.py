"""PyTorch's parts on imaginary GPUs: the network runs on the processor, in the order of an imaginary stream."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch

from bench.gpu import pytorch
from bench.gpu.engine import FASTEST, distance, make_image, schedule
from bench.gpu.parts import NotPossibleError
from bench.gpu.pytorch import Baseline, on_cpu
from bench.gpu.unet import UNet, shapes_unet
from engines.base import Array
from engines.cuda.driver import Driver
from engines.host import FunctionLane, HostBackend
from runtime.sampling.operations import Options
from runtime.sampling.schedule import Schedule
from tests.libcuda.lanes import FunctionNetwork
from tests.libcuda.machine import Machine

pytestmark = pytest.mark.imaginary_gpus
Play = Callable[..., list[dict[str, Any]]]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Networks as small as these are slower on many."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def on_imaginary_gpus(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch lanes whose networks run on the processor, when the imaginary stream comes to them."""

    def network(model: UNet, device: int, *, captured: bool = True, inside: bool = False) -> FunctionNetwork:
        return FunctionNetwork(machine, device, on_cpu(model), capturable=inside)

    monkeypatch.setattr(pytorch, "TorchNetwork", network)
    monkeypatch.setattr(pytorch, "_opened", Driver)
    monkeypatch.setattr(UNet, "to", lambda self, *where: self)
    monkeypatch.setattr(Baseline, "capture", lambda self: self)

    class OnCpu(Baseline):
        def __init__(
            self, unet: UNet, words: Array, plan: Schedule, shape: tuple[int, ...], dtype: str, device: str
        ) -> None:
            assert device == "cuda:0"
            super().__init__(unet, words, plan, shape, dtype, "cpu")

    monkeypatch.setattr(pytorch, "Baseline", OnCpu)


def test_pytorchs_own_loop_makes_the_same_image() -> None:
    """The baseline is honest only if it makes the image that sequential makes."""
    plan, words = schedule(7), pytorch._words(32, 128)
    host = HostBackend([FunctionLane(on_cpu(shapes_unet()))])
    wanted = make_image(host, pytorch.SHAPE, words, "sequential", Options(), plan)
    host.close()
    noise = np.random.default_rng(1).standard_normal(pytorch.SHAPE, np.float32)
    baseline = Baseline(shapes_unet(), words, plan, pytorch.SHAPE, "float32", "cpu")
    for _ in range(2):  # the second image starts anew
        assert distance(baseline.image(noise)[0], wanted.latents) < 1e-4


@pytest.mark.usefixtures("on_imaginary_gpus")
def test_one_lane(play: Play) -> None:
    rows = play("one-lane-of-shapes")
    assert [row["network"] for row in rows] == ["a graph of its own", "streams", "the round's graph"]
    assert all(row["distance_to_cpu"] < 1e-4 for row in rows)


@pytest.mark.slow
@pytest.mark.usefixtures("on_imaginary_gpus")
def test_every_sampler(play: Play) -> None:
    rows = play("samplers-on-shapes", (2,))
    assert {row["scheduler"] for row in rows} == {"ddim", "ddpm"}
    assert all(row["distance_to_cpu"] < 1e-3 for row in rows)


@pytest.mark.slow
@pytest.mark.usefixtures("on_imaginary_gpus")
def test_speed_beside_both_baselines(play: Play) -> None:
    rows = play("speed-of-shapes", (2,))
    names = ["torch, eager", "torch, CUDA graph", *(mode for mode, _ in FASTEST)]
    assert [row["what"] for row in rows] == names
    last = rows[-1]
    assert set(last["speedups"]) == {"torch, eager", "torch, CUDA graph", "one lane, sequential"}
    assert last["share_of_floor"]["median"] > 0
    assert rows[2]["drift"] == 0


def test_without_a_gpu_in_pytorch(play: Play) -> None:
    if torch.cuda.is_available():
        pytest.skip("this PyTorch has a GPU")
    with pytest.raises(NotPossibleError, match="finds no GPU"):
        play("one-lane-of-shapes")
