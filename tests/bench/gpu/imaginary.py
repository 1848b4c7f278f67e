"""Parts on the imaginary driver in processes of their own: `imaginary:NAME` is the part NAME on a machine of two GPUs.

The process needs the environment of `tests.libcuda`. A rule of the driver that the part breaks is its failure.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from bench.gpu.parts import PARTS, Row, Settings


def __getattr__(name: str) -> Any:
    found = {part.slug.replace("-", "_"): part for part in PARTS}
    if name not in found:
        raise AttributeError(name)

    def run(settings: Settings) -> Iterator[Row]:
        from tests.libcuda.machine import Machine, know_kernels

        know_kernels()
        machine = Machine(2, seed=1)
        yield from found[name].load()(settings)
        machine.forgive() if name == "capture" else machine.check()  # it asks for what may be forbidden

    return run
