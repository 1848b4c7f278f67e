"""What machine this is: packages, the driver, the GPUs, and whether the first one works at all."""

from __future__ import annotations

import platform
import shutil
import subprocess
import time
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version

import numpy as np

from bench.gpu.device import DeviceBench
from bench.gpu.parts import Row, Settings, open_driver
from runtime.provenance import result_file

PACKAGES = (
    "cuda-python", "cuda-bindings", "cuda-core", "nvidia-cuda-nvrtc", "nvidia-cudnn-cu13", "nvidia-ml-py", "tensorrt",
    "tensorrt_cu13", "tensorrt-rtx", "tensorrt_rtx_cu13", "torch", "diffusers", "onnxruntime", "onnxruntime-gpu",
    "numpy", "pydantic", "pillow", "filelock", "tokenizers",
)  # fmt: skip
ATTRIBUTES = (
    "MULTIPROCESSOR_COUNT", "CLOCK_RATE", "MEMORY_CLOCK_RATE", "GLOBAL_MEMORY_BUS_WIDTH", "L2_CACHE_SIZE",
    "MAX_SHARED_MEMORY_PER_BLOCK_OPTIN", "ASYNC_ENGINE_COUNT", "CONCURRENT_KERNELS", "COMPUTE_MODE",
    "UNIFIED_ADDRESSING", "STREAM_PRIORITIES_SUPPORTED", "COMPUTE_PREEMPTION_SUPPORTED", "MEMORY_POOLS_SUPPORTED",
    "ECC_ENABLED", "PCI_BUS_ID",
)  # fmt: skip
CARD_FACTS = ("pcie.link.gen.max", "pcie.link.width.max", "power.limit", "clocks.max.sm", "mig.mode.current")


def installed(settings: Settings) -> Iterator[Row]:
    """Packages and GPUs; opens no context. The first figure is the frame of the result file."""
    yield {key: value for key, value in result_file([]).items() if key in ("commit", "host", "versions")}
    yield {"python": platform.python_version(), "system": platform.platform()}
    for package in PACKAGES:
        try:
            yield {"package": package, "version": version(package)}
        except PackageNotFoundError:
            yield {"package": package, "version": "missing"}
    from engines.nvidia import gpus

    for number, one in enumerate(gpus()):
        yield {"gpu": number, "name": one.name, "capability": list(one.capability), "driver": one.driver}
    for arguments in (["-L"], [f"--query-gpu={','.join(CARD_FACTS)}", "--format=csv"], ["topo", "-m"]):
        if shutil.which("nvidia-smi"):
            run = subprocess.run(["nvidia-smi", *arguments], capture_output=True, text=True, timeout=20)
            yield {"nvidia-smi": " ".join(arguments), "output": (run.stdout or run.stderr).strip()}


def device(settings: Settings) -> Iterator[Row]:
    """Every GPU: its facts, and bytes that go there and back through a context of it."""
    driver = open_driver()
    attribute = driver.api.CUdevice_attribute
    yield {"cuda": driver("cuDriverGetVersion"), "gpus": driver.count}
    for ordinal in range(driver.count):
        name, capability = driver.describe(ordinal)
        handle = driver("cuDeviceGet", ordinal)
        row: Row = {"gpu": ordinal, "name": name, "capability": list(capability)}
        for label in ATTRIBUTES:
            status, *values = driver.api.cuDeviceGetAttribute(
                getattr(attribute, f"CU_DEVICE_ATTRIBUTE_{label}"), handle
            )
            row[label.lower()] = int(values[0]) if not status else None
        yield row
        start = time.perf_counter()
        bench = DeviceBench(driver, settings.cache, "float32", ordinal)
        opened = time.perf_counter() - start
        free, total = driver("cuMemGetInfo")
        value = np.random.default_rng().integers(0, 256, (1 << 16) + 3, np.uint8)
        pointers = [bench.allocate(value.nbytes) for _ in range(2)]
        bench.to_device(pointers[0], value)
        bench.copy(pointers[1], pointers[0], value.nbytes)
        same = bool(np.array_equal(bench.to_host(pointers[1], value.nbytes), value))
        bench.close()
        yield {
            "gpu": ordinal,
            "context_seconds": opened,
            "free_bytes": free,
            "total_bytes": total,
            "bytes_come_back": same,
        }
        assert same, f"cuda:{ordinal} gave other bytes back than it was given"
