"""`python -m runtime.serve`: OpenAI's image API, the Open Inference Protocol and a page, in front of one pipeline.

The event loop never waits for the engine: images are made on threads that share the lanes, started in the order of
the requests, and cancelled between two rounds when their clients disconnect. Errors have the shape of their protocol.
"""

from __future__ import annotations

import argparse
import logging
import math
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, fields
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from urllib.parse import urlsplit

from engines.command import Parser, exit_code
from engines.errors import EngineError
from engines.store import BUILD
from runtime.call import Call
from runtime.pipeline import Pipeline
from runtime.sampling.schedulers import SCHEDULERS
from runtime.serve.access import ANY, Access, host_name
from runtime.serve.limits import Limits
from runtime.serve.logs import Formatter
from runtime.serve.service import Service

log = logging.getLogger("runtime.serve")
PROTOCOLS = ("runtime.serve.openai.server", "runtime.serve.kserve.server")
KEYS_VARIABLE = "DRIFFUSION_API_KEYS"


def listen(host: str, port: int, option: str = "--port") -> socket.socket:
    """The port, taken before seconds are spent on loading; clients that connect meanwhile wait in the backlog."""
    try:
        listener = socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except (OSError, OverflowError) as error:
        raise EngineError(f"cannot listen on {host}:{port}: {error}: choose another with {option}") from error
    # connections inherit it; without, the end of every answer waits up to 40 ms for the client's delayed ACK
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return listener


def serve(
    model: str, devices: str, build: Path, host: str, port: int, scheduler: str | None, limits: Limits, access: Access,
    grpc_port: int | None = None, shared_memory: bool = False, cuda_shared_memory: bool = False,
) -> None:  # fmt: skip
    """Loads, then answers until a signal. The exit code is 1 when Ctrl-C was pressed again or a lane hangs."""
    if grpc_port is not None:
        check_grpc_port(host, grpc_port)
    if cuda_shared_memory:
        from runtime.serve.kserve.server import check_cuda

        check_cuda()
    with listen(host, port) as listener:
        # 0.2 s of imports, while the runtime reads the model outside the interpreter's lock;
        # not as a daemon: a process that fails to load must not end in the middle of an import
        threading.Thread(target=lambda: [import_module(one) for one in PROTOCOLS]).start()
        pipeline = Pipeline.load(model, devices, build, limits.lane_seconds)
        usual = max(pipeline.manifest.sizes.width, pipeline.manifest.sizes.height)
        if usual > limits.side:
            message = f"--max-side {limits.side} rules out the usual images of {pipeline.manifest.model}"
            raise EngineError(f"{message}: choose at least {usual}")
        # the first request would pay for first-time allocations, and find out whether the model can use the scheduler
        pipeline.run(Call("", num_inference_steps=1, scheduler=scheduler))
        log.info("%s on %s", pipeline.manifest.model, ", ".join(map(str, pipeline.devices)))
        address = f"[{host}]" if ":" in host else host
        log.info("http://%s:%d (Ctrl-C stops)", address, listener.getsockname()[1])
        from runtime.serve.kserve.server import KServe
        from runtime.serve.openai.server import LATE_SECONDS, Server

        service = Service(pipeline, limits, scheduler)
        grpc = None if grpc_port is None else f"{address}:{grpc_port}"
        memory = [kind for kind, allowed in (("system", shared_memory), ("cuda", cuda_shared_memory)) if allowed]
        server = Server(service, access, [KServe(service, access, grpc, memory)])
        server.run([listener])
        closing = threading.Thread(target=pipeline.close, daemon=True)
        if not server.force_exit and not service.queue.depth:
            closing.start()
            closing.join(LATE_SECONDS)
        if closing.ident is None or closing.is_alive():
            os._exit(1)  # a thread of the engine may be in a long round, or in one that never ends


def on_cluster(
    model: str, devices: str, build: Path, host: str, port: int, scheduler: str | None, limits: Limits, access: Access,
    address: str, replicas: tuple[int, int], grpc_port: int | None = None, **memory: bool,
) -> None:  # fmt: skip
    """The same service as replicas on a Ray cluster; `memory` is the shared memory that it does not offer."""
    for name, given in {"grpc_port": grpc_port is not None, **memory}.items():
        if given:
            raise EngineError(f"--{name.replace('_', '-')} is of a single server: a cluster answers over HTTP")
    if not installed("ray"):
        raise EngineError("--cluster needs ray: pip install --editable '.[cluster]'")
    from runtime.serve.ray.launch import run
    from runtime.serve.ray.settings import read_settings

    one = {"model": model, "devices": devices, "scheduler": scheduler, "replicas": replicas}
    settings = read_settings({"models": (one,), "build": build.resolve(), "limits": asdict(limits), **asdict(access)})
    run(settings, address, host, port)


def installed(package: str) -> bool:
    """Whether it can be imported; nothing is."""
    try:
        return find_spec(package) is not None
    except ValueError:  # it was ruled out
        return False


def check_grpc_port(host: str, port: int) -> None:
    """EngineError, before seconds are spent on loading, where gRPC is not installed or the port is taken."""
    from runtime.serve.kserve.server import check_grpc

    check_grpc()
    listen(host, port, "--grpc-port").close()


def read_keys(path: Path | None) -> tuple[str, ...]:
    """The API keys of a file, one per line, and of the environment. Lines that begin with # are comments."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines() if path else []
        lines = [line for line in lines if not line.lstrip().startswith("#")]
    except (OSError, UnicodeDecodeError) as error:
        raise EngineError(f"the API keys cannot be read: {error}") from error
    keys = tuple(key.strip() for key in [*lines, *os.environ.get(KEYS_VARIABLE, "").split(",")] if key.strip())
    if path and not keys:
        raise EngineError(f"{path} holds no API key: write one per line, or leave --api-keys out")
    return keys


def arguments() -> argparse.ArgumentParser:
    """The command line."""
    parser = Parser(prog="python -m runtime.serve", description=__doc__)
    parser.add_argument("--model", default="shapes", help="an exported model's name, or its bundle folder")
    parser.add_argument("--devices", default="auto", help="auto, cpu, cpu*LANES, cuda:0,cuda:1, cuda:0*LANES")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8000, help="0 takes any free one")
    parser.add_argument(
        "--grpc-port", type=int, help="the Open Inference Protocol over gRPC, too; 0 takes any free port"
    )
    parser.add_argument(
        "--shared-memory", action="store_true",
        help="let clients of the Open Inference Protocol register system shared memory of this machine",
    )  # fmt: skip
    parser.add_argument(
        "--cuda-shared-memory", action="store_true", help="let them register memory of this machine's NVIDIA GPUs"
    )
    parser.add_argument(
        "--cluster", nargs="?", const="auto", metavar="ADDRESS",
        help="replicas on the Ray cluster at HOST:PORT, or on that of this machine, in place of a server of its own",
    )  # fmt: skip
    parser.add_argument("--replicas", type=span, help="with --cluster: how many, as 2, or 1-4 as requests come; 1")
    parser.add_argument("--build", type=Path, default=BUILD, help="folder of the bundles")
    parser.add_argument("--scheduler", help=f"of requests that name none: {', '.join(SCHEDULERS)}; the model's own")
    parser.add_argument("--api-keys", type=Path, help=f"file with one key per line; also ${KEYS_VARIABLE}, by commas")
    parser.add_argument(
        "--allowed-hosts", type=by_comma, default=(), metavar="NAMES",
        help="names by commas that clients may use for this server, * for any; loopback names always may",
    )  # fmt: skip
    parser.add_argument(
        "--allow-origin", type=site, action="append", default=[], metavar="ORIGIN",
        help="another site whose pages may use this server, as https://example.com, or *; may be given several times",
    )  # fmt: skip
    parser.add_argument(
        "--priorities", action="store_true", help="let requests name a priority; without it that is 400"
    )
    for option, name, text in (
        ("--queue", "queue", "requests that may wait; more get 429"),
        ("--timeout", "seconds", "seconds until a request gets 504, or 408 while it arrives"),
        ("--connections", "connections", "open connections; requests on more get 503, idle ones are closed"),
        ("--drain", "drain", "seconds to finish accepted requests after SIGTERM or Ctrl-C; then they get 503"),
        (
            "--lane-timeout",
            "lane_seconds",
            "seconds without progress after which a lane hangs, and a GPU's is lost",
        ),
        ("--max-body", "body", "bytes of a request"),
        ("--max-upload", "upload", "bytes of a request with an image"),
        ("--max-answer", "answer", "bytes of an answer of the Open Inference Protocol"),
        ("--max-prompt", "prompt", "characters of a prompt"),
        ("--max-side", "side", "pixels of width and of height"),
        ("--max-steps", "steps", "num_inference_steps"),
        ("--max-n", "n", "images of one request"),
    ):
        default = getattr(Limits, name)
        kind = at_least_zero if isinstance(default, float) or name == "queue" else at_least_one
        parser.add_argument(option, dest=name, type=kind(type(default)), default=default, help=f"{text}; {default}")
    return parser


def span(text: str) -> tuple[int, int]:
    """A number, or a range of numbers, from 1 on."""
    least, _, most = text.partition("-")
    if not least.isdecimal() or not (most or least).isdecimal() or not 1 <= int(least) <= int(most or least):
        raise argparse.ArgumentTypeError(f"{text} is no number or range from 1 on: write 2, or 1-4")
    return int(least), int(most or least)


def by_comma(text: str) -> tuple[str, ...]:
    """The host names of a list; without ports, which the check ignores."""
    return tuple(name if name == ANY else host_name(name) for name in text.replace(" ", "").split(",") if name)


def site(text: str) -> str:
    """An origin as browsers send it, or `*`."""
    parts = urlsplit(text)
    if text != ANY and (
        parts.scheme not in ("http", "https") or not parts.netloc or f"{parts.scheme}://{parts.netloc}" != text
    ):
        raise argparse.ArgumentTypeError(f"{text} is no origin: write https://HOST or https://HOST:PORT, or *")
    return text


def at_least_zero(kind: type[float]) -> Callable[[str], float]:
    """A finite number that is not negative, for the command line."""

    def number(text: str) -> float:
        value = kind(text)
        if not 0 <= value < math.inf:
            raise argparse.ArgumentTypeError(f"{text} is not 0 or more")
        return value

    return number


def at_least_one(kind: type[float]) -> Callable[[str], float]:
    """A whole number of at least 1, for the command line."""

    def number(text: str) -> float:
        value = kind(text)
        if value < 1:
            raise argparse.ArgumentTypeError(f"{text} is not 1 or more")
        return value

    return number


def main() -> int:
    """The command line; exit code 1 with one message when it cannot serve, 0 after Ctrl-C or SIGTERM."""
    options = vars(arguments().parse_args())
    handler = logging.StreamHandler()
    handler.setFormatter(Formatter())
    logging.basicConfig(level=logging.INFO, handlers=[handler])
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # KeyboardInterrupt, as for Ctrl-C

    def run() -> None:
        limits = Limits(**{field.name: options.pop(field.name) for field in fields(Limits)})
        access = Access.of_server(
            options["host"], read_keys(options.pop("api_keys")), options.pop("allowed_hosts"),
            tuple(options.pop("allow_origin")),
        )  # fmt: skip
        address, replicas = options.pop("cluster"), options.pop("replicas")
        if address is None and replicas is not None:
            raise EngineError("--replicas is of --cluster: a server of its own is one")
        with suppress(KeyboardInterrupt):  # while it loads
            if address is None:
                serve(**options, limits=limits, access=access)
            else:
                on_cluster(**options, limits=limits, access=access, address=address, replicas=replicas or (1, 1))

    return exit_code(run)


if __name__ == "__main__":
    sys.exit(main())
