"""ONNX Runtime's CUDA provider as lanes: for machines without TensorRT, and only where it is asked for by name.

Weights are loaded once per lane, and what a session enqueues cannot become part of a graph.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import onnxruntime

from engines.base import Array, Progress
from engines.cuda import driver as cuda
from engines.cuda.backend import CudaBackend
from engines.cuda.driver import LANE_TIMEOUT, Driver, abandon
from engines.cuda.kernels import CACHE
from engines.cuda.memory import Tensor
from engines.cuda.rounds import Enqueue, Stateless
from engines.devices import LaneSpec
from engines.errors import DeviceError
from engines.manifest import DENOISER
from engines.store import Bundle, Plan

PROVIDER = "CUDAExecutionProvider"


def trouble() -> str | None:
    """See load.RuntimeModule."""
    return cuda.available()


def wanted(bundle: Bundle, runtime: str) -> dict[str, list[dict[str, str]]]:
    """See load.RuntimeModule: ONNX Runtime compiles for a GPU when it opens a model."""
    return {}


def build_missing(
    bundle: Bundle, lanes: Sequence[LaneSpec], progress: Progress | None = None
) -> dict[str, Plan | None]:
    """See load.RuntimeModule: nothing to build."""
    return {}


def open_session(model: str, name: str, device: int, stream: Any = None) -> onnxruntime.InferenceSession:
    """A session that really runs on the GPU: by itself ONNX Runtime would fall back to the processor in silence."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    settings: dict[str, Any] = {"device_id": device}
    if stream is not None:
        settings["user_compute_stream"] = str(int(stream))
    session = None
    if hasattr(onnxruntime, "preload_dlls"):
        onnxruntime.preload_dlls()  # CUDA and cuDNN that pip installed are not where the loader looks
    if PROVIDER in onnxruntime.get_available_providers():
        try:
            session = onnxruntime.InferenceSession(model, options, providers=[(PROVIDER, settings)])
        except Exception as error:  # the library raises many types of its own
            raise DeviceError(f"{name} cannot be loaded on cuda:{device} by ONNX Runtime: {error}") from error
    if session is None or session.get_providers()[0] != PROVIDER:
        raise DeviceError(
            f"{name}: ONNX Runtime has no working CUDA provider here: install the extra `gpu` in place of `cpu` "
            "(pip uninstall onnxruntime, then pip install --editable '.[gpu]'), or use --devices cpu"
        )
    return session


class ProviderNetwork(Stateless):
    """The noise predictor of one lane."""

    capturable = False

    def __init__(self, model: str, name: str, output: str, device: int) -> None:
        self.device = device
        self._model, self._name, self._output = model, name, output
        self._session: onnxruntime.InferenceSession | None = None

    def bind(self, inputs: Mapping[str, Tensor], output: Tensor, stream: Any) -> Enqueue:
        """See cuda.Network. The session is opened here, on the lane's stream."""
        session = self._session = self._session or open_session(self._model, self._name, self.device, stream)
        binding = session.io_binding()
        for name, tensor in inputs.items():
            binding.bind_input(name, "cuda", self.device, np.dtype(tensor.dtype), tensor.shape, tensor.pointer)
        dtype = np.dtype(output.dtype)
        binding.bind_output(self._output, "cuda", self.device, dtype, output.shape, output.pointer)
        options = onnxruntime.RunOptions()
        options.add_run_config_entry("disable_synchronize_execution_providers", "1")

        def enqueue() -> None:
            try:
                session.run_with_iobinding(binding, options)
            except Exception as error:  # the library raises many types of its own
                raise DeviceError(f"{self._name} failed in ONNX Runtime: {error}") from error

        return enqueue

    def close(self) -> None:
        """Lets go of the session, which holds the lane's stream."""
        self._session = None


class ProviderSession:
    """A network that runs once per image, from host memory to host memory."""

    def __init__(self, model: str, name: str, device: int, dtypes: Mapping[str, str]) -> None:
        self._session, self._name, self._dtypes = open_session(model, name, device), name, dtypes

    def run(self, **inputs: np.ndarray) -> dict[str, Array]:
        """See load.Runner."""
        feeds = {name: np.asarray(value, self._dtypes[name]) for name, value in inputs.items()}
        try:
            found = self._session.run(None, feeds)
        except Exception as error:  # the library raises many types of its own
            raise DeviceError(f"{self._name} failed in ONNX Runtime: {error}") from error
        names = [output.name for output in self._session.get_outputs()]
        return {name: np.asarray(value, np.float32) for name, value in zip(names, found, strict=True)}


class Engines:
    """A loaded model on GPUs: text encoder and VAE decoder on the first lane's device, and the lanes."""

    def __init__(
        self, bundle: Bundle, lanes: Sequence[LaneSpec], driver: Driver | None = None, *,
        lane_timeout: float = LANE_TIMEOUT,
    ) -> None:  # fmt: skip
        self._own, driver = driver is None, driver or Driver()
        self._driver = driver
        ordinals = [lane.gpu for lane in lanes if lane.gpu is not None]
        devices = {ordinal: driver.device(ordinal) for ordinal in ordinals}
        models = {network: str(bundle.onnx(network)) for network in bundle.manifest.usual}

        def once(network: str) -> ProviderSession:
            dtypes = {one.name: one.dtype for one in bundle.manifest.networks[network].inputs}
            return ProviderSession(models[network], network, ordinals[0], dtypes)

        self.runners = {network: once(network) for network in models if network != DENOISER}
        output = bundle.manifest.networks[DENOISER].outputs[0]
        self._networks = [ProviderNetwork(models[DENOISER], DENOISER, output.name, ordinal) for ordinal in ordinals]
        name = devices[ordinals[0]].name.replace(" ", "-")
        self.plan_folder = bundle.folder / f"onnxruntime-{onnxruntime.__version__}-{name}"
        self.plan_folder.mkdir(exist_ok=True)
        self._siblings: list[CudaBackend] = []
        self._open = partial(
            CudaBackend, driver, self._networks, output.dtype, CACHE / "kernels", lane_timeout=lane_timeout
        )
        self.backend = self._open()

    def sibling(self, home: int) -> CudaBackend:
        """See load.Engines. A lane's session stays on the stream that all of them share."""
        self._siblings.append(self._open(home=home, sibling_of=self.backend))
        return self._siblings[-1]

    def close(self) -> None:
        """Waits for the lanes and frees their memory."""
        for backend in (*self._siblings, self.backend):
            backend.close()
        if self.backend.hangs:
            abandon(self._networks, dict(self.runners))
            return
        for network in self._networks:
            network.close()
        self.runners.clear()
        if self._own:
            self._driver.close()
