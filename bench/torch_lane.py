"""A PyTorch model as a lane, for benchmarks on machines without another runtime: captured once, then replayed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from engines.cuda.memory import Tensor
from engines.cuda.rounds import Enqueue, Stateless

_KINDS = {"float16": "<f2", "float32": "<f4"}


class _Memory:
    """Device memory as PyTorch takes it."""

    def __init__(self, tensor: Tensor) -> None:
        self.__cuda_array_interface__ = {
            "shape": tensor.shape, "typestr": _KINDS[tensor.dtype], "data": (tensor.pointer, False), "version": 3,
        }  # fmt: skip


class TorchNetwork(Stateless):
    """`model(sample, timestep, **conditioning) → output` on one device; see engines.cuda.rounds.LaneNetwork.

    A binding is captured as a graph of PyTorch's own, in its own memory pool, so that it needs no launch of single
    kernels; rounds then go through streams. With `inside` the model's kernels become part of the round's graph instead:
    PyTorch's allocator knows nothing of that capture, so all that the model needs must be in its cache by then.
    """

    def __init__(self, model: Callable[..., Any], device: int, *, captured: bool = True, inside: bool = False) -> None:
        self.device, self.capturable = device, inside
        self._model, self._captured = model, captured and not inside
        self._pool: Any = None

    def bind(self, inputs: Mapping[str, Tensor], output: Tensor, stream: Any) -> Enqueue:
        """See rounds.LaneNetwork."""
        import torch

        device = torch.device("cuda", self.device)
        own = torch.cuda.ExternalStream(int(stream), device)  # type: ignore[no-untyped-call]
        arrays = {name: torch.as_tensor(_Memory(tensor), device=device) for name, tensor in inputs.items()}
        into = torch.as_tensor(_Memory(output), device=device)
        sample, timestep = arrays.pop("sample"), arrays.pop("timestep")

        @torch.no_grad()
        def run() -> None:
            into.copy_(self._model(sample, timestep, **arrays))

        with torch.cuda.stream(own):
            for _ in range(3):  # libraries choose their algorithms outside of a capture; the output is in use yet
                with torch.no_grad():
                    self._model(sample, timestep, **arrays)
        own.synchronize()
        if self._captured:
            graph = torch.cuda.CUDAGraph()
            self._pool = self._pool or torch.cuda.graph_pool_handle()  # its graphs run one after another
            with torch.cuda.graph(graph, pool=self._pool, stream=own):
                run()
            work: Callable[[], None] = graph.replay
        else:
            work = run

        def enqueue() -> None:
            with torch.cuda.stream(own):
                work()

        return enqueue
