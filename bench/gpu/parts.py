"""What a part of the check is: what it runs, how long it may take, and how it says that it cannot run here."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from engines.cuda.kernels import CACHE

if TYPE_CHECKING:
    from engines.cuda.driver import Driver

Row = dict[str, Any]


class NotPossibleError(Exception):
    """A part that this machine has no means for; the message says what is missing."""


@dataclass(frozen=True)
class Settings:
    """What every part is told. `rehearsal` asks for few sizes, steps and repeats: on imaginary GPUs time means nothing.

    `lanes` are the numbers of lanes that are measured on the first GPU.
    """

    lanes: tuple[int, ...] = (1, 2, 4)
    rehearsal: bool = False
    cache: Path = CACHE / "kernels"

    @property
    def steps(self) -> int:
        """Of one image."""
        return 8 if self.rehearsal else 50

    @property
    def repeats(self) -> int:
        """Of one timing; the first ones warm up."""
        return 1 if self.rehearsal else 7


Work = Callable[[Settings], Iterator[Row]]


@dataclass(frozen=True)
class Part:
    """`target` is `module:function`, imported in the part's own process; `seconds` is its limit."""

    name: str
    target: str
    seconds: float
    question: str

    @property
    def slug(self) -> str:
        """The name of its files."""
        return "".join(character if character.isalnum() else "-" for character in self.name.lower()).strip("-")

    def load(self) -> Work:
        """The function behind it."""
        module, _, function = self.target.partition(":")
        work: Work = getattr(importlib.import_module(module), function)
        return work


MACHINE, DEVICE = "machine", "device"
# In the order of what is decided by the answer: the first minute must be enough for the design's open questions.
PARTS = (
    Part(MACHINE, "bench.gpu.machine:installed", 60, "What is this machine, and what is installed?"),
    Part(DEVICE, "bench.gpu.machine:device", 60, "Does the driver open a context, allocate and copy?"),
    Part("capture", "bench.gpu.capture:questions", 60, "What may become part of a graph, also between devices?"),
    Part("TensorRT loads", "bench.gpu.runtimes:tensorrt", 120, "Does TensorRT build and run a plan on this card?"),
    Part("TensorRT-RTX loads", "bench.gpu.runtimes:tensorrt_rtx", 120, "Does TensorRT-RTX, on this card?"),
    Part("ONNX Runtime loads", "bench.gpu.runtimes:onnxruntime", 90, "Does ONNX Runtime's CUDA provider run?"),
    Part("kernel correctness", "bench.gpu.kernel:correct", 120, "Is the kernel right against float64?"),
    Part("one lane of shapes", "bench.gpu.pytorch:one_lane", 120, "Is an image of shapes the CPU's image?"),
    Part("peer copies", "bench.gpu.copies:peers", 120, "Which pairs of GPUs copy directly, and correctly?"),
    Part("samplers on copies", "bench.gpu.engine:samplers", 300, "Is every sampler's image the CPU lanes' image?"),
    Part("shapes on TensorRT", "bench.gpu.runtimes:shapes_on_tensorrt", 400, "Prompts to pixels on TensorRT plans?"),
    Part("shapes on TensorRT-RTX", "bench.gpu.runtimes:shapes_on_tensorrt_rtx", 400, "The same on TensorRT-RTX?"),
    Part("samplers on shapes", "bench.gpu.pytorch:samplers", 300, "The same with the trained network behind lanes?"),
    Part("engine overhead", "bench.gpu.engine:overhead", 300, "What does a round cost beside the model?"),
    Part("copies", "bench.gpu.copies:rates", 120, "How fast are copies of one latent, and of many bytes?"),
    Part("kernel bandwidth", "bench.gpu.kernel:bandwidth", 180, "How near to a copy's bandwidth is the kernel?"),
    Part("speed of shapes", "bench.gpu.pytorch:speed_of_shapes", 300, "Against PyTorch's graphs, and the floor?"),
    Part("speed of an SD 1.5 network", "bench.gpu.pytorch:speed_of_large", 500, "The same at Stable Diffusion's size?"),
    Part("shapes on ONNX Runtime", "bench.gpu.runtimes:shapes_on_onnxruntime", 300, "Prompts to pixels on CUDA lanes?"),
)  # fmt: skip


def open_driver() -> Driver:
    """The CUDA driver; NotPossibleError where there is no GPU, or a driver that is too old."""
    from engines.cuda.driver import Driver, available
    from engines.errors import EngineError

    reason = available()
    if reason:
        raise NotPossibleError(reason)
    try:
        return Driver()
    except EngineError as error:
        raise NotPossibleError(str(error)) from error
