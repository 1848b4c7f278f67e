"""Memory on GPUs with the real tritonclient, over both transports; the driver is the imaginary one.

The client's helper that allocates calls the CUDA runtime library, which needs a real driver: `exported` replaces it.
"""

# covers: runtime/serve/kserve/regions.py, runtime/serve/kserve/server.py

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import tritonclient.grpc
import tritonclient.http
from tritonclient.utils import InferenceServerException
from tritonclient.utils.cuda_shared_memory import get_raw_handle

from engines.errors import EngineError
from runtime.pipeline import Pipeline
from runtime.serve.kserve.server import KServe, check_cuda
from runtime.serve.limits import Limits
from runtime.serve.openai.server import Server
from runtime.serve.service import Service
from tests.client import PROMPT, running, until
from tests.libcuda.conftest import Cuda
from tests.libcuda.exporter import Exported, exported
from tests.libcuda.machine import Machine

SIZE, GPU = 30_000, 1
gpus = pytest.mark.imaginary_gpus


@pytest.fixture(params=[tritonclient.http, tritonclient.grpc], ids=["http", "grpc"])
def library(request: pytest.FixtureRequest) -> Any:
    return request.param


@pytest.fixture
def cuda() -> Cuda:
    return Cuda(Machine(2))


@pytest.fixture
def kserve(pipeline: Pipeline) -> KServe:
    return KServe(Service(pipeline, Limits()), grpc="127.0.0.1:0", memory=["cuda"])


@pytest.fixture
def address(library: Any, kserve: KServe, cuda: Cuda) -> Iterator[str]:
    """Whatever a test leaves registered, the server closes: nothing is open on the GPUs afterwards."""
    before = cuda.machine.live()
    server = Server(kserve.model.service, guests=[kserve])
    with running(server) as port:
        until(lambda: server.started)
        where = port if library is tritonclient.http else kserve.grpc_port
        yield f"127.0.0.1:{where}"
    assert cuda.machine.live() == before


@pytest.fixture
def client(library: Any, address: str) -> Iterator[Any]:
    with library.InferenceServerClient(address) as connected:
        yield connected


def raw(cuda: Cuda, theirs: Exported) -> bytes:
    """As the client makes it of what the CUDA runtime gave."""
    handle = cuda.api.CUipcMemHandle()
    ctypes.memmove(handle.getPtr(), theirs.handle, 64)
    made: bytes = get_raw_handle(SimpleNamespace(_cuda_shm_handle=handle))
    return made


def prompt(library: Any) -> Any:
    made = library.InferInput("prompt", [1], "BYTES")
    made.set_data_from_numpy(np.array([PROMPT], object))
    return made


def given(library: Any, **numbers: int) -> list[Any]:
    """Inputs whose values lie in region r, one after another."""
    made = [prompt(library)]
    for index, name in enumerate(numbers):
        made.append(library.InferInput(name, [1], "INT64"))
        made[-1].set_shared_memory("r", 8, offset=8 * index)
    return made


def image_in(library: Any, size: int = SIZE - 64, offset: int = 64) -> Any:
    made = library.InferRequestedOutput("image")
    made.set_shared_memory("r", size, offset=offset)
    return made


@gpus
def test_pixels_and_inputs_on_a_gpu(library: Any, client: Any, cuda: Cuda, pipeline: Pipeline) -> None:
    expected = pipeline.generate(PROMPT, num_inference_steps=3, seed=9)
    pixels = np.stack([np.asarray(one) for one in expected.images])
    with exported(SIZE, GPU, np.array([3, 9], np.int64).tobytes()) as theirs:
        client.register_cuda_shared_memory("r", raw(cuda, theirs), GPU, SIZE)
        outputs = [library.InferRequestedOutput("latents"), image_in(library)]
        made = client.infer("shapes", given(library, steps=3, seed=9), outputs=outputs)
        there = np.frombuffer(theirs.content(), np.uint8)
        assert np.array_equal(there[64 : 64 + pixels.size].reshape(pixels.shape), pixels)
        assert not there[64 + pixels.size :].any(), "beyond the image is not written"
        assert np.array_equal(made.as_numpy("latents"), expected.latents)
        status = client.get_cuda_shared_memory_status()
        facts = status[0] if isinstance(status, list) else status.regions["r"]
        if library is tritonclient.http:
            assert facts == {"name": "r", "device_id": GPU, "byte_size": SIZE}
        else:
            assert (facts.name, facts.device_id, facts.byte_size) == ("r", GPU, SIZE)
        client.unregister_cuda_shared_memory("r")
        with pytest.raises(InferenceServerException, match="no region 'r'"):
            client.infer("shapes", given(library, steps=3, seed=9), outputs=outputs)


@gpus
def test_regions_that_are_refused(library: Any, client: Any, cuda: Cuda) -> None:
    with exported(SIZE, GPU) as theirs:
        handle = raw(cuda, theirs)
        for arguments, word in (
            (("r", handle, GPU, SIZE + 1), "ends at"), (("r", handle, GPU, 0), "byte_size"),
            (("r", handle, 0, SIZE), "on GPU 1, not on GPU 0"), (("r", handle, 2, SIZE), "there is no GPU 2"),
            (("r", b"QUJD", GPU, SIZE), "64 bytes, not 3"),
            (("r" * 300, handle, GPU, SIZE), "200"),
        ):  # fmt: skip
            with pytest.raises(InferenceServerException, match=word):
                client.register_cuda_shared_memory(*arguments)
        client.register_cuda_shared_memory("r", handle, GPU, SIZE)
        with pytest.raises(InferenceServerException, match="registered already"):
            client.register_cuda_shared_memory("r", handle, GPU, SIZE)
        with pytest.raises(InferenceServerException, match="system shared memory is off"):
            client.get_system_shared_memory_status("r")
        client.unregister_cuda_shared_memory("r")
    with pytest.raises(InferenceServerException, match="cannot be opened"):
        client.register_cuda_shared_memory("gone", handle, GPU, SIZE)


@gpus
def test_parts_that_are_refused_and_a_region_in_use(
    library: Any, client: Any, address: str, cuda: Cuda, kserve: KServe
) -> None:
    with exported(SIZE, GPU) as theirs:
        client.register_cuda_shared_memory("r", raw(cuda, theirs), GPU, SIZE)
        client.register_cuda_shared_memory("again", raw(cuda, theirs), GPU, SIZE)
        latents = library.InferRequestedOutput("latents")
        latents.set_shared_memory("again", 600, offset=SIZE - 600)
        for outputs, word in (
            ([image_in(library, SIZE, 1)], "ends at"), ([image_in(library, 8)], "has 8"),
            ([image_in(library), latents], "overlap"),
        ):  # fmt: skip
            with pytest.raises(InferenceServerException, match=word):
                client.infer("shapes", [prompt(library)], outputs=outputs)
        steps = library.InferInput("steps", [1], "INT64")
        steps.set_data_from_numpy(np.array([150]))
        with ThreadPoolExecutor(1) as pool, library.InferenceServerClient(address) as other:
            image = pool.submit(other.infer, "shapes", [prompt(library), steps], outputs=[image_in(library)])
            until(lambda: kserve.model.service.queue.depth == 1)
            with pytest.raises(InferenceServerException, match="in use"):
                client.unregister_cuda_shared_memory("r")
            image.result(60)
        client.unregister_cuda_shared_memory()
        assert not kserve.model.regions.status("cuda")


def test_without_a_gpu_the_option_is_refused() -> None:
    with pytest.raises(EngineError, match=r"--cuda-shared-memory needs an NVIDIA GPU, but .*: leave it out"):
        check_cuda()
