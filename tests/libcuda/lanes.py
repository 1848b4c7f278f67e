"""Networks of the CUDA backend on the imaginary machine: a function of arrays as a lane's model."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engines.base import Array
from engines.cuda.kernels import BYTES
from engines.cuda.memory import Tensor, narrow
from engines.cuda.rounds import Enqueue, Stateless
from engines.errors import DeviceError
from tests.libcuda.machine import Machine, Range

Model = Callable[[Array, Array, Mapping[str, Array]], Array]


def extent(tensor: Tensor) -> Range:
    """Where a tensor is."""
    return tensor.pointer, int(np.prod(tensor.shape)) * BYTES[tensor.dtype]


def view(machine: Machine, tensor: Tensor) -> NDArray[Any]:
    """The content of a tensor; bfloat16 as uint16."""
    raw = machine.view(*extent(tensor))
    return raw.view("uint16" if tensor.dtype == "bfloat16" else tensor.dtype).reshape(tensor.shape)


def floats(machine: Machine, tensor: Tensor) -> Array:
    """A copy of a tensor as float32."""
    array = view(machine, tensor)
    wide = (array.astype(np.uint32) << 16).view(np.float32) if tensor.dtype == "bfloat16" else array
    return np.array(wide, np.float32)


def checked(status: int) -> None:
    """What networks do with a status of the driver."""
    if status:
        raise DeviceError(f"the model failed with status {status}: the device was lost")


class FunctionNetwork(Stateless):
    """`model(sample, timestep, conditioning)` as one call on a lane; without a model, a call that costs nothing."""

    def __init__(self, machine: Machine, device: int, model: Model | None, *, capturable: bool = True) -> None:
        self.machine, self.device, self.model, self.capturable = machine, device, model, capturable

    def bind(self, inputs: Mapping[str, Tensor], output: Tensor, stream: Any) -> Enqueue:
        def run() -> None:
            assert self.model is not None
            values = {name: floats(self.machine, tensor) for name, tensor in inputs.items()}
            result = self.model(values.pop("sample"), values.pop("timestep"), values)
            view(self.machine, output)[...] = narrow(result, output.dtype)

        reads = [extent(tensor) for tensor in inputs.values()]
        enqueue = self.machine.work(stream, run if self.model else None, reads, [extent(output)])
        return lambda: checked(enqueue())
