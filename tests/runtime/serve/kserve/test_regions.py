"""System shared memory with the real tritonclient, over both transports."""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import tritonclient.grpc
import tritonclient.http
import tritonclient.utils.shared_memory as shm
from tritonclient.utils import InferenceServerException

from runtime.pipeline import Pipeline
from runtime.serve.kserve.server import KServe
from runtime.serve.limits import Limits
from runtime.serve.openai.server import Server
from runtime.serve.service import Service
from tests.client import PROMPT, running, until

SIZE = 1 << 20


@pytest.fixture(scope="module")
def kserve(pipeline: Pipeline) -> KServe:
    return KServe(Service(pipeline, Limits()), grpc="127.0.0.1:0", memory=["system"])


@pytest.fixture(scope="module")
def addresses(kserve: KServe) -> Iterator[dict[Any, str]]:
    server = Server(kserve.model.service, guests=[kserve])
    with running(server) as port:
        until(lambda: server.started)
        yield {tritonclient.http: f"127.0.0.1:{port}", tritonclient.grpc: f"127.0.0.1:{kserve.grpc_port}"}


@pytest.fixture(params=[tritonclient.http, tritonclient.grpc], ids=["http", "grpc"])
def library(request: pytest.FixtureRequest) -> Any:
    return request.param


@pytest.fixture
def client(library: Any, addresses: dict[Any, str]) -> Iterator[Any]:
    with library.InferenceServerClient(addresses[library]) as connected:
        yield connected
        connected.unregister_system_shared_memory()


@pytest.fixture
def memory() -> Iterator[tuple[str, Any]]:
    key = f"/driffusion-{uuid.uuid4().hex}"
    handle = shm.create_shared_memory_region("r", key, SIZE)
    yield key, handle
    shm.destroy_shared_memory_region(handle)


def prompt(library: Any) -> Any:
    made = library.InferInput("prompt", [1], "BYTES")
    made.set_data_from_numpy(np.array([PROMPT], object))
    return made


def test_pixels_and_inputs_in_shared_memory(library: Any, client: Any, memory: Any, pipeline: Pipeline) -> None:
    key, handle = memory
    expected = pipeline.generate(PROMPT, num_inference_steps=3, seed=9)
    shm.set_shared_memory_region(handle, [np.array([3, 9], np.int64)], offset=512)
    client.register_system_shared_memory("r", key, SIZE - 512, offset=512)
    given = [prompt(library)]
    for index, name in enumerate(("steps", "seed")):
        given.append(library.InferInput(name, [1], "INT64"))
        given[-1].set_shared_memory("r", 8, offset=8 * index)
    image = library.InferRequestedOutput("image")
    image.set_shared_memory("r", SIZE - 1024, offset=512)
    made = client.infer("shapes", given, outputs=[library.InferRequestedOutput("latents"), image])
    pixels = np.stack([np.asarray(one) for one in expected.images])
    assert np.array_equal(shm.get_contents_as_numpy(handle, np.uint8, pixels.shape, offset=1024), pixels)
    assert np.array_equal(made.as_numpy("latents"), expected.latents)
    status = client.get_system_shared_memory_status()
    assert len(status if isinstance(status, list) else status.regions) == 1


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (("r", "{key}", SIZE + 1), "ends at"), (("r", "{key}", SIZE, 1), "ends at"), (("r", "{key}", 0), "byte_size"),
        (("r", "/../etc/passwd", 8), "slashes"), (("r", "/..", 8), "slashes"),
        (("r", "/none-such", 8), "cannot be opened"),
        (("r", "{key}", 2**63 - 1, 2**63 - 1), "whole number"), (("r" * 300, "{key}", 8), "200"),
    ],
)  # fmt: skip
def test_regions_that_are_refused(client: Any, memory: Any, arguments: tuple[Any, ...], word: str) -> None:
    name, key, *numbers = arguments
    with pytest.raises(InferenceServerException, match=word):
        client.register_system_shared_memory(name, key.format(key=memory[0]), *numbers)


@pytest.mark.parametrize(
    ("parts", "word"),
    [
        ({"image": ("r", SIZE, 1)}, "ends at"), ({"image": ("r", 8, 0)}, "has 8"),
        ({"image": ("x", 8, 0)}, "register"),
        ({"image": ("r", 2**62, 0)}, "whole number"), ({"image": ("r", 600, 0), "latents": ("r", 600, 599)}, "overlap"),
        ({"image": ("r", 600, 0), "latents": ("again", 600, 599)}, "overlap"),
    ],
)  # fmt: skip
def test_parts_that_are_refused(library: Any, client: Any, memory: Any, parts: dict[str, Any], word: str) -> None:
    client.register_system_shared_memory("r", memory[0], SIZE)
    client.register_system_shared_memory("again", memory[0], SIZE)
    outputs = [library.InferRequestedOutput(name) for name in parts]
    for output, (region, size, offset) in zip(outputs, parts.values(), strict=True):
        output.set_shared_memory(region, size, offset=offset)
    with pytest.raises(InferenceServerException, match=word):
        client.infer("shapes", [prompt(library)], outputs=outputs)


def test_a_region_is_registered_once_and_known_until_it_is_unregistered(client: Any, memory: Any) -> None:
    client.register_system_shared_memory("r", memory[0], SIZE)
    with pytest.raises(InferenceServerException, match="registered already"):
        client.register_system_shared_memory("r", memory[0], SIZE)
    client.unregister_system_shared_memory("r")
    with pytest.raises(InferenceServerException, match="no region"):
        client.unregister_system_shared_memory("r")


def test_a_region_in_use_stays_and_shortened_memory_is_an_error(
    library: Any, client: Any, memory: Any, addresses: dict[Any, str], kserve: KServe
) -> None:
    key, _ = memory
    client.register_system_shared_memory("r", key, SIZE)
    image, steps = library.InferRequestedOutput("image"), library.InferInput("steps", [1], "INT64")
    image.set_shared_memory("r", SIZE)
    steps.set_data_from_numpy(np.array([200]))
    with ThreadPoolExecutor(1) as pool, library.InferenceServerClient(addresses[library]) as other:
        running = pool.submit(other.infer, "shapes", [prompt(library), steps], outputs=[image])

        until(lambda: kserve.model.service.queue.depth == 1)
        with pytest.raises(InferenceServerException, match="in use"):
            client.unregister_system_shared_memory("r")
        os.truncate(f"/dev/shm{key}", 1)
        with pytest.raises(InferenceServerException, match="shortened"):
            running.result(60)
    client.unregister_system_shared_memory("r")
