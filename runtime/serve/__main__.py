"""`python -m runtime.serve`: OpenAI's image API and a page to try it, in front of one pipeline.

The event loop never waits for the engine: images are made on threads that share the lanes, started in the order of
the requests, and cancelled between two rounds when their clients disconnect. Every error is answered in OpenAI's shape.
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
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import fields
from pathlib import Path
from types import FrameType
from typing import Any
from urllib.parse import urlsplit

import uvicorn

from engines.command import Parser, exit_code
from engines.errors import EngineError
from engines.store import BUILD
from runtime.call import Call
from runtime.pipeline import Pipeline
from runtime.sampling.schedulers import SCHEDULERS
from runtime.serve.access import ANY, Access, host_name
from runtime.serve.kserve.http import add_routes
from runtime.serve.kserve.model import Model
from runtime.serve.kserve.regions import Regions
from runtime.serve.limits import Limits
from runtime.serve.logs import Formatter
from runtime.serve.openai.app import make_app
from runtime.serve.openai.connection import limited_connection
from runtime.serve.service import Service

log = logging.getLogger("runtime.serve")
LATE_SECONDS = 5.0  # for the last bytes, and for the lanes to stop
KEYS_VARIABLE = "DRIFFUSION_API_KEYS"


def listen(host: str, port: int) -> socket.socket:
    """The port, taken before seconds are spent on loading; clients that connect meanwhile wait in the backlog."""
    try:
        listener = socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except (OSError, OverflowError) as error:
        raise EngineError(f"cannot listen on {host}:{port}: {error}: choose another with --port") from error
    # connections inherit it; without, the end of every answer waits up to 40 ms for the client's delayed ACK
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return listener


class Server(uvicorn.Server):
    """Answers until a signal; then it refuses new requests and finishes accepted ones. A second Ctrl-C ends it."""

    def __init__(
        self, service: Service, access: Access | None = None, grpc: str | None = None, shared_memory: bool = False
    ) -> None:
        """`grpc`: HOST:PORT of gRPC; none without."""
        self._access, self._grpc, self._model = access or Access(), grpc, Model(service, Regions(allowed=shared_memory))
        self.grpc_port: int | None = None
        app = make_app(service, self._access)
        add_routes(app, self._model)
        config = uvicorn.Config(
            app, http=limited_connection(service.limits), log_config=None, ws="none",
            timeout_graceful_shutdown=int(LATE_SECONDS),
        )  # fmt: skip
        super().__init__(config)
        self._service = service
        self._draining = False
        self._rpc: Any = None

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Opens gRPC first: who can reach HTTP can reach both."""
        if self._grpc is not None:
            try:
                from runtime.serve.kserve.rpc import make_server
            except ImportError as error:
                raise EngineError(
                    f"--grpc-port needs grpcio ({error}): pip install driffusion-engine[kserve]"
                ) from error
            self._rpc, self.grpc_port = make_server(self._model, self._access, self._grpc)
            await self._rpc.start()
            log.info("gRPC on port %d", self.grpc_port)
        await super().startup(sockets)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Ends both."""
        if self._rpc is not None:
            await self._rpc.stop(0 if self.force_exit else self.config.timeout_graceful_shutdown)
        await super().shutdown(sockets)
        self._model.regions.close()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Starts draining; on a second SIGINT ends at once."""
        if not self._draining:
            self._draining = True
            threading.Thread(target=self._drain, daemon=True).start()
        elif sig == signal.SIGINT:
            self.should_exit = self.force_exit = True

    def _drain(self) -> None:
        seconds = self._service.limits.drain
        end = time.monotonic() + seconds
        log.info("Shutting down: %d requests are finished first, within %g s", self._service.queue.depth, seconds)
        late = self._service.queue.drain(seconds)
        if late:
            log.warning("%d requests were cancelled after %g s", late, seconds)
        self.config.timeout_graceful_shutdown = math.ceil(max(end - time.monotonic(), LATE_SECONDS))  # to send answers
        self.should_exit = True


def serve(
    model: str, devices: str, build: Path, host: str, port: int, scheduler: str | None, limits: Limits, access: Access,
    grpc_port: int | None = None, shared_memory: bool = False,
) -> None:  # fmt: skip
    """Loads, then answers until a signal. The exit code is 1 when Ctrl-C was pressed again or a lane hangs."""
    with listen(host, port) as listener:
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
        service = Service(pipeline, limits, scheduler)
        server = Server(
            service, access, None if grpc_port is None else f"{address}:{grpc_port}", shared_memory=shared_memory
        )
        server.run([listener])
        closing = threading.Thread(target=pipeline.close, daemon=True)
        if not server.force_exit and not service.queue.depth:
            closing.start()
            closing.join(LATE_SECONDS)
        if closing.ident is None or closing.is_alive():
            os._exit(1)  # a thread of the engine may be in a long round, or in one that never ends


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
    parser.add_argument("--grpc-port", type=int, help="the Open Inference Protocol over gRPC; 0 takes any free one")
    parser.add_argument(
        "--shared-memory",
        action="store_true",
        help="let clients of the Open Inference Protocol name their shared memory",
    )
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
        ("--max-prompt", "prompt", "characters of a prompt"),
        ("--max-side", "side", "pixels of width and of height"),
        ("--max-steps", "steps", "num_inference_steps"),
        ("--max-n", "n", "images of one request"),
    ):
        default = getattr(Limits, name)
        kind = at_least_zero if isinstance(default, float) or name == "queue" else at_least_one
        parser.add_argument(option, dest=name, type=kind(type(default)), default=default, help=f"{text}; {default}")
    return parser


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
        with suppress(KeyboardInterrupt):  # while it loads
            serve(**options, limits=limits, access=access)

    return exit_code(run)


if __name__ == "__main__":
    sys.exit(main())
