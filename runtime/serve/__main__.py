"""`python -m runtime.serve`: OpenAI's image API and a page to try it, in front of one pipeline.

The event loop never waits for the engine: images are made on worker threads that share the lanes, begun in the order
of the requests, and given up between two rounds when nobody waits for them any more. Every error is answered in
OpenAI's shape.
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

import uvicorn

from engines.errors import EngineError
from engines.store import BUILD
from runtime.pipeline import Pipeline
from runtime.serve.limits import Limits
from runtime.serve.logs import Formatter
from runtime.serve.openai.app import make_app
from runtime.serve.openai.connection import limited_connection
from runtime.serve.service import Service

log = logging.getLogger("runtime.serve")
LATE_SECONDS = 5.0  # for the last bytes, and for the lanes to stop
KEYS_VARIABLE = "DRIFFUSION_API_KEYS"


def listen(host: str, port: int) -> socket.socket:
    """The port, taken before seconds are spent on loading; who connects meanwhile waits for the answer."""
    try:
        listener = socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except (OSError, OverflowError) as error:
        raise EngineError(f"cannot listen on {host}:{port}: {error}: choose another with --port") from error
    # connections inherit it; without, the end of every answer waits 40 ms for the client to confirm its beginning
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return listener


class Server(uvicorn.Server):
    """Answers until a signal; then it refuses what is new and finishes what it took, unless Ctrl-C is pressed again."""

    def __init__(self, service: Service) -> None:
        connection, late = limited_connection(service.limits), int(LATE_SECONDS)
        config = uvicorn.Config(make_app(service), http=connection, log_config=None, timeout_graceful_shutdown=late)
        super().__init__(config)
        self._service = service
        self._draining = False

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Begins the end, or hurries it."""
        if not self._draining:
            self._draining = True
            threading.Thread(target=self._drain, daemon=True).start()
        elif sig == signal.SIGINT:
            self.should_exit = self.force_exit = True

    def _drain(self) -> None:
        seconds = self._service.limits.drain
        end = time.monotonic() + seconds
        log.info("Shutting down: %d requests are finished first, within %g s", self._service.jobs.depth, seconds)
        late = self._service.jobs.drain(seconds)
        if late:
            log.warning("%d requests were given up after %g s", late, seconds)
        self.config.timeout_graceful_shutdown = math.ceil(max(end - time.monotonic(), LATE_SECONDS))  # to send answers
        self.should_exit = True


def serve(model: str, devices: str, build: Path, host: str, port: int, limits: Limits) -> None:
    """Loads, then answers until a signal. The exit code is 1 when Ctrl-C was pressed again or a lane hangs."""
    with listen(host, port) as listener:
        pipeline = Pipeline.load(model, devices, build)
        usual = max(pipeline.manifest.sizes.width, pipeline.manifest.sizes.height)
        if usual > limits.side:
            message = f"--max-side {limits.side} rules out the usual images of {pipeline.manifest.model}"
            raise EngineError(f"{message}: choose at least {usual}")
        pipeline.generate("", num_inference_steps=1)  # or the first request would pay for first-time allocations
        log.info("%s on %s", pipeline.manifest.model, ", ".join(map(str, pipeline.devices)))
        address = f"[{host}]" if ":" in host else host
        log.info("http://%s:%d (Ctrl-C stops)", address, listener.getsockname()[1])
        service = Service(pipeline, limits)
        server = Server(service)
        server.run([listener])
        closing = threading.Thread(target=pipeline.close, daemon=True)
        if not server.force_exit and not service.jobs.depth:
            closing.start()
            closing.join(LATE_SECONDS)
        if closing.ident is None or closing.is_alive():
            os._exit(1)  # a thread of the engine may be in a long round, or in one that never ends


def read_keys(path: Path | None) -> tuple[str, ...]:
    """The API keys of a file and of the environment."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines() if path else []
    except (OSError, UnicodeDecodeError) as error:
        raise EngineError(f"the API keys cannot be read: {error}") from error
    keys = tuple(key.strip() for key in [*lines, *os.environ.get(KEYS_VARIABLE, "").split(",")] if key.strip())
    if path and not keys:
        raise EngineError(f"{path} holds no API key: write one per line, or leave --api-keys out")
    return keys


def arguments() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m runtime.serve", description=__doc__)
    parser.add_argument("--model", default="shapes", help="an exported model's name, or its bundle folder")
    parser.add_argument("--devices", default="auto", help="auto, cpu, cpu*LANES, cuda:0,cuda:1, cuda:0*LANES")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8000, help="0 takes any free one")
    parser.add_argument("--build", type=Path, default=BUILD, help="folder of the bundles")
    parser.add_argument("--api-keys", type=Path, help=f"file with one key per line; also ${KEYS_VARIABLE}, by commas")
    for option, name, text in (
        ("--queue", "queue", "requests that may wait; more get 429"),
        ("--timeout", "seconds", "seconds until a request gets 504, or 408 while it arrives"),
        ("--connections", "connections", "open connections; requests on more get 503"),
        ("--drain", "drain", "seconds to finish what was accepted, after SIGTERM or Ctrl-C"),
        ("--lane-timeout", "lane_seconds", "seconds of one round after which the server is no longer ready"),
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
    try:
        keys = read_keys(options.pop("api_keys"))
        own = {field.name: options.pop(field.name) for field in fields(Limits) if field.name in options}
        with suppress(KeyboardInterrupt):  # while it loads
            serve(**options, limits=Limits(**own, keys=keys))
    except EngineError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
