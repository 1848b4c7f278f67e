"""`python -m bench kserve`: what a protocol adds to a call in the same process: KServe v2 beside OpenAI's JSON.

Images of 512 × 512 pixels of a model of which nothing is computed, by a client in a process of its own, in turns with
calls: KServe with outputs in shared memory, as binary data over HTTP, as raw contents over gRPC; PNG in OpenAI's JSON.
All of it once with an idle engine, and once while another process keeps it busy. It needs the packages of `dev`.
"""

from __future__ import annotations

import argparse
import http.client
import json
import multiprocessing
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from bench.models import EMBEDDED
from bench.statistics import bootstrap
from engines.errors import EngineError, ParameterError
from engines.store import BUILD, Bundle
from runtime.pipeline import Pipeline
from runtime.provenance import load_average
from runtime.serve.__main__ import listen
from runtime.serve.limits import Limits
from runtime.serve.service import Service

SIDE, STEPS, MODE = 512, 4, "sequential"
WAYS = ("http shared memory", "grpc shared memory", "http binary", "grpc wire", "openai json")
BUSY_STEPS = 20
Ask = Callable[[], None]


def arguments(parser: argparse.ArgumentParser) -> None:
    """The command line."""
    parser.add_argument("--model", default=EMBEDDED, help="an exported model, of which nothing is computed")
    parser.add_argument("--build", type=Path, default=BUILD, help="folder of the bundles")
    parser.add_argument("--lanes", type=int, default=2)
    parser.add_argument("--pairs", type=int, default=200, help="requests and calls of each way, in turns")


# --- the server's process --------------------------------------------------------------------------------------------


def large(bundle: Bundle) -> Bundle:
    """The bundle with images of 512²: a model of which nothing is computed has any size."""
    sizes = bundle.manifest.sizes.model_copy(update={"most": max(SIDE, bundle.manifest.sizes.most)})
    return replace(bundle, manifest=bundle.manifest.model_copy(update={"sizes": sizes}))


@contextmanager
def serving(pipeline: Pipeline) -> Iterator[tuple[int, int]]:
    """The server in a thread of this process; its ports for HTTP and gRPC."""
    with listen("127.0.0.1", 0) as listener:
        from runtime.serve.kserve.server import KServe
        from runtime.serve.openai.server import Server

        service = Service(pipeline, Limits())
        kserve = KServe(service, grpc="127.0.0.1:0", memory=["system"])
        server = Server(service, guests=[kserve])
        thread = threading.Thread(target=server.run, args=([listener],), name="server")
        thread.start()
        try:
            while not server.started:
                time.sleep(0.01)
            assert kserve.grpc_port is not None
            yield int(listener.getsockname()[1]), kserve.grpc_port
        finally:
            server.should_exit = True
            thread.join()


@contextmanager
def child(target: Callable[..., None], *given: Any) -> Iterator[Connection]:
    """Another process, which has not this one's lock; it ends when its connection does."""
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=target, args=(there, *given), daemon=True)
    process.start()
    there.close()
    try:
        if not here.poll(60) or here.recv() != "ready":
            raise EngineError("a client process did not start: see its message above")
        yield here
    finally:
        here.close()
        process.join(20)
        process.terminate()


def turns(pipeline: Pipeline, client: Connection, prompt: str, pairs: int, bar: Any) -> dict[str, list[float]]:
    """Seconds of each way and of the call, in turns."""
    order, seconds = np.random.default_rng(0), {way: list[float]() for way in ("call", *WAYS)}
    for _ in range(pairs):
        for way in order.permutation(list(seconds)):
            if way == "call":
                start = time.perf_counter()
                pipeline.generate(prompt, mode=MODE, num_inference_steps=STEPS, width=SIDE, height=SIDE)
                seconds[way].append(time.perf_counter() - start)
            else:
                client.send(str(way))
                answer = client.recv()
                if not isinstance(answer, float):
                    raise EngineError(f"{way} failed: {answer}")
                seconds[way].append(answer)
        bar.update()
    return seconds


def rows_of(seconds: dict[str, list[float]], *, busy: bool) -> list[dict[str, Any]]:
    """What each way adds to the median of calls beside it."""
    call = np.asarray(seconds["call"])
    rows: list[dict[str, Any]] = []
    for way, taken in seconds.items():
        added = (np.asarray(taken) - np.median(call)) * 1e3
        p95 = float(np.quantile(taken, 0.95) - np.quantile(call, 0.95)) * 1e3
        rows.append({
            "name": "latency", "way": way, "busy": busy, "requests": len(taken),
            "milliseconds": {"p50": _two(np.median(taken) * 1e3), "p95": _two(np.quantile(taken, 0.95) * 1e3)},
            "added": {key: _two(value) for key, value in bootstrap(added.tolist()).items()} | {"p95": _two(p95)},
        })  # fmt: skip
    return rows


def _two(value: float) -> float:
    return round(float(value), 2)


def measure(model: str, build: Path, lanes: int, pairs: int) -> list[dict[str, Any]]:
    """Measures and returns the rows of the result file."""
    if min(lanes, pairs) < 1:
        raise ParameterError("pairs", "lanes and pairs must be positive")
    pipeline = Pipeline(large(Bundle.open(model, build)), f"null*{lanes}")
    prompt = (pipeline.manifest.examples or ("",))[0]
    rows: list[dict[str, Any]] = []
    try:
        with (
            serving(pipeline) as ports,
            child(client_process, ports, pipeline.manifest.model, prompt) as client,
            tqdm(total=2 * pairs, desc="bench kserve", unit="turn") as bar,
        ):
            turns(pipeline, client, prompt, 3, tqdm(disable=True))  # warms up
            for busy in (False, True):
                with ExitStack() as stack:
                    if busy:
                        stack.enter_context(child(busy_process, ports[0], prompt))
                    rows += rows_of(turns(pipeline, client, prompt, pairs, bar), busy=busy)
    finally:
        pipeline.close()
    shared = {"model": model, "devices": f"null*{lanes}", "side": SIDE, "steps": STEPS,
              "load_average": round(load_average(), 2)}  # fmt: skip
    return [row | shared for row in rows]


# --- the clients' processes ------------------------------------------------------------------------------------------


def client_process(orders: Connection, ports: tuple[int, int], model: str, prompt: str) -> None:
    """Asks in the way that it is told, and answers with the seconds, or with what went wrong."""
    with ExitStack() as stack:
        ways = clients(stack, ports, model, prompt)
        orders.send("ready")
        while True:
            try:
                ask = ways[orders.recv()]
            except EOFError:
                return
            start = time.perf_counter()
            try:
                ask()
            except (EngineError, OSError) as error:
                orders.send(str(error))
            else:
                orders.send(time.perf_counter() - start)


def clients(stack: ExitStack, ports: tuple[int, int], model: str, prompt: str) -> dict[str, Ask]:
    """A function for each of `WAYS` that returns when the pixels are there."""
    import tritonclient.grpc
    import tritonclient.http
    import tritonclient.utils.shared_memory as shm

    size, ways = SIDE * SIDE * 3, dict[str, Ask]()
    for name, library, port in (("http", tritonclient.http, ports[0]), ("grpc", tritonclient.grpc, ports[1])):
        client = stack.enter_context(library.InferenceServerClient(f"127.0.0.1:{port}"))
        region = shm.create_shared_memory_region(name, f"/bench-kserve-{name}", size)
        stack.callback(shm.destroy_shared_memory_region, region)
        client.register_system_shared_memory(name, f"/bench-kserve-{name}", size)
        wire, shared = library.InferRequestedOutput("image"), library.InferRequestedOutput("image")
        shared.set_shared_memory(name, size)

        def tensors(library: Any = library) -> list[Any]:
            arrays = {
                "prompt": np.array([prompt], object), "mode": np.array([MODE], object), "steps": np.array([STEPS]),
                "size": np.array([SIDE, SIDE]),
            }  # fmt: skip
            made = []
            for name, array in arrays.items():
                made.append(library.InferInput(name, list(array.shape), "BYTES" if array.dtype == object else "INT64"))
                made[-1].set_data_from_numpy(array)
            return made

        def by_wire(client: Any = client, wire: Any = wire, tensors: Any = tensors) -> None:
            pixels = client.infer(model, tensors(), outputs=[wire]).as_numpy("image")
            assert pixels.shape == (1, SIDE, SIDE, 3)

        def by_memory(client: Any = client, shared: Any = shared, tensors: Any = tensors, region: Any = region) -> None:
            client.infer(model, tensors(), outputs=[shared])
            assert shm.get_contents_as_numpy(region, np.uint8, [SIDE, SIDE, 3])[-1, -1, -1] > 0  # grey

        ways[f"{name} shared memory"], ways["http binary" if name == "http" else "grpc wire"] = by_memory, by_wire
    connection = http.client.HTTPConnection("127.0.0.1", ports[0])
    ways["openai json"] = lambda: decode(post(connection, prompt, STEPS, f"{SIDE}x{SIDE}"))
    return ways


def post(connection: http.client.HTTPConnection, prompt: str, steps: int, size: str) -> dict[str, Any]:
    """An answer of OpenAI's route."""
    body = {"prompt": prompt, "mode": MODE, "num_inference_steps": steps, "size": size}
    connection.request("POST", "/v1/images/generations", json.dumps(body), {"Content-Type": "application/json"})
    response = connection.getresponse()
    content: dict[str, Any] = json.loads(response.read())
    if response.status != 200:
        raise EngineError(f"a request failed with {response.status}: {content}")
    return content


def decode(answer: dict[str, Any]) -> None:
    """The pixels of an answer, as a client needs them."""
    import base64
    import io

    from PIL import Image

    with Image.open(io.BytesIO(base64.b64decode(answer["data"][0]["b64_json"]))) as image:
        assert np.asarray(image).shape == (SIDE, SIDE, 3)


def busy_process(orders: Connection, port: int, prompt: str) -> None:
    """Asks for one image after the other until its connection ends."""
    connection = http.client.HTTPConnection("127.0.0.1", port)
    post(connection, prompt, BUSY_STEPS, "auto")
    orders.send("ready")
    while not orders.poll():  # readable at its end
        post(connection, prompt, BUSY_STEPS, "auto")


def table(rows: Sequence[dict[str, Any]]) -> str:
    """One line per way: what it adds with an idle engine, and with a busy one."""
    lines = [
        "| way | added, ms p50 | added, ms p95 | while another client keeps the engine busy, ms p50 | ms p95 |",
        "|---|---|---|---|---|",
    ]
    by = {(row["way"], row["busy"]): row for row in rows}
    for way in WAYS:
        cells = []
        for busy in (False, True):
            added = by[way, busy]["added"]
            cells += [f"{added['median']:.2f} ({added['low']:.2f}–{added['high']:.2f})", f"{added['p95']:.2f}"]
        lines.append(f"| {way} | {' | '.join(cells)} |")
    idle, busy_call = (by["call", busy]["milliseconds"]["p50"] for busy in (False, True))
    more = f"The call itself takes {idle:.2f} ms at the median with an idle engine, {busy_call:.2f} ms with a busy one."
    return "\n".join([*lines, "", more])
