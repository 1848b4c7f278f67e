"""What runs models on which devices: one line per runtime; its module is imported when a model is compiled or opened.

A further runtime is one module with what `load.RuntimeModule` lists, and one line in `RUNTIMES`.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass


@dataclass(frozen=True)
class Runtime:
    """`device` and `option` are how a device string names it: `cuda:0@onnxruntime`.

    title: for reports. precisions: what it computes in, its default first. exported: the type of the bundles that it
    takes, where that is always the same. package: what must be installed, by the name
    under which it is imported. by_default: whether a device string that names no runtime may mean it, the first of its
    device that is installed. threads: whether its lanes share the processor's cores. caches: whether
    its lanes can run a denoiser in two parts, with features of other evaluations.
    """

    module: str
    device: str
    option: str
    title: str
    precisions: tuple[str, ...]
    package: str | None = None
    by_default: bool = True
    threads: bool = False
    exported: str | None = None
    caches: bool = False

    @property
    def installed(self) -> bool:
        """Whether its package is there, asked without importing it."""
        return self.package is None or importlib.util.find_spec(self.package) is not None


_GPU = ("fp16", "bf16", "fp32")
RUNTIMES: dict[str, Runtime] = {
    "tensorrt": Runtime("engines.tensorrt.run", "cuda", "tensorrt", "TensorRT, CUDA graphs", _GPU, "tensorrt"),
    "tensorrt_rtx": Runtime(
        "engines.tensorrt.run", "cuda", "tensorrt_rtx", "TensorRT-RTX, CUDA graphs", _GPU, "tensorrt_rtx"
    ),
    "onnxruntime-cuda": Runtime(
        "engines.cuda.onnxruntime", "cuda", "onnxruntime", "ONNX Runtime", ("fp16", "fp32"), "onnxruntime", False
    ),
    "onnxruntime": Runtime(
        "engines.ort", "cpu", "onnxruntime", "ONNX Runtime", ("fp32",), "onnxruntime", threads=True, caches=True
    ),
    "openvino": Runtime(
        "engines.openvino", "cpu", "openvino", "OpenVINO", ("fp32", "bf16"), "openvino", False, True, "fp32"
    ),
    "null": Runtime("engines.null", "null", "null", "nothing computed", ("fp32",)),
}
DEVICES = tuple(dict.fromkeys(runtime.device for runtime in RUNTIMES.values()))
PRECISIONS = tuple(dict.fromkeys(kind for runtime in RUNTIMES.values() for kind in reversed(runtime.precisions)))


def default_runtime(device: str) -> str:
    """The runtime of a kind of device where none is named: the first that is installed, or the one to install."""
    names = [name for name, runtime in RUNTIMES.items() if runtime.device == device and runtime.by_default]
    return next((name for name in names if RUNTIMES[name].installed), names[0])
