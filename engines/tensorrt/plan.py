"""What a TensorRT plan depends on, and which TensorRT package is installed."""

from __future__ import annotations

import importlib
from typing import Any

from engines.errors import DeviceError
from engines.nvidia import Gpu
from engines.store import Bundle

BATCHES = (1, 4, 16)  # smallest, the one that kernels are chosen for, largest; larger calls run in parts
PIXEL_BATCHES = (1, 1, 1)  # of a VAE, whose memory grows with pixels: 16 images of 2048 × 2048 would take 69 GB


def package(runtime: str) -> Any:
    """`tensorrt` or `tensorrt_rtx`, imported."""
    try:
        return importlib.import_module(runtime)
    except ImportError:
        raise DeviceError(
            "TensorRT is missing: pip install --editable '.[trt]' on data-centre cards, '.[rtx]' on RTX cards, "
            "or use --devices cuda:0@onnxruntime"
        ) from None


def runtime_name(trt: Any) -> str:
    """The package and its version, as plans record it."""
    return f"{trt.__name__} {trt.__version__}"


def plan_fields(bundle: Bundle, network: str, gpu: Gpu, runtime: str) -> dict[str, str]:
    """Everything that the compiled form of a network depends on."""
    sizes = bundle.manifest.sizes
    return {
        "network": network,
        "onnx_sha256": bundle.manifest.networks[network].sha256,
        "precision": bundle.manifest.precision,
        "runtime": runtime_name(package(runtime)),
        "gpu": gpu.name,
        "capability": f"{gpu.capability[0]}.{gpu.capability[1]}",
        "driver": gpu.driver,
        "batches": "-".join(map(str, batches(network))),
        "sides": f"{sizes.least}-{sizes.width}x{sizes.height}-{sizes.most}",
        "flags": "strongly typed, user allocation",
    }


def batches(network: str) -> tuple[int, int, int]:
    """Rows that a plan of a network takes: the fewest, those that kernels are chosen for, the most."""
    return PIXEL_BATCHES if network.startswith("vae_") else BATCHES
