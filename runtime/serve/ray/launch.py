"""`python -m runtime.serve --cluster`: the application on a Ray cluster that is there, until a signal."""

from __future__ import annotations

import logging
import re
import signal
import socket
import threading
from collections.abc import Iterable

import ray
from ray import serve
from ray._private.services import canonicalize_bootstrap_address  # nothing public says what `auto` is
from ray.serve.exceptions import RayServeException

from engines.errors import EngineError
from runtime.serve.ray.application import make_application, nodes
from runtime.serve.ray.settings import Settings, check_nodes

log = logging.getLogger("runtime.serve")
APPLICATION = "driffusion"
AUTO = "auto"
CONNECT_SECONDS = 5.0
ERROR = re.compile(r"^\s*(?:ray\.exceptions\.\S+?: .*?|engines\.errors\.)\w+Error(?:\(\w+\))?: (.+)$", re.MULTILINE)


def run(settings: Settings, address: str, host: str, port: int, application: str = APPLICATION) -> None:
    """Deploys, and deletes the application after Ctrl-C or SIGTERM, once accepted requests are finished.

    EngineError where there is no cluster, no node with what a replica owns, or an engine that does not load.
    """
    for name in ("ray", "ray.serve"):
        logging.getLogger(name).setLevel(logging.WARNING)
    join(address)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # with Ray's own the process would abort
    try:
        check_nodes(settings, nodes())
        if application in serve.status().applications:
            raise EngineError(f"the application {application!r} is on this cluster already: end the one that runs")
        if not serve.status().proxies:  # else its port is settled
            port = free_port(host, port)
        serve.start(proxy_location="EveryNode", http_options={"host": host, "port": port})
        try:
            serve.run(make_application(settings), name=application, route_prefix="/")
        except RayServeException as error:
            told = str(error).strip().rpartition("Exception: ")[2]  # of the controller, with its traceback
            raise EngineError(f"{told} Delete the other one, or serve the models of both by one") from None
        except RuntimeError as error:
            left = serve.status().applications.get(application)
            serve.delete(application)
            messages = () if left is None else (one.message for one in left.deployments.values())
            raise EngineError(reason([*messages, str(error)])) from None
        if not answers(host, port):
            serve.delete(application)
            raise EngineError(f"Ray Serve runs on this cluster with another port than {port}: give it with --port")
        models = ", ".join(model.name for model in settings.models)
        log.info("%s on every node of the cluster: http://%s:%d (Ctrl-C stops)", models, host, port)
        try:
            threading.Event().wait()
        finally:
            log.info("Shutting down: accepted requests are finished first, within %g s", settings.served.drain)
            serve.delete(application)
            if not serve.status().applications:
                serve.shutdown()  # frees the port
    finally:
        ray.shutdown()


def free_port(host: str, port: int) -> int:
    """The port, or for 0 any free one; EngineError where another program has it, of which Ray speaks late."""
    try:
        with socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET) as free:
            return int(free.getsockname()[1])
    except (OSError, OverflowError) as error:
        raise EngineError(f"cannot listen on {host}:{port}: {error}: choose another with --port") from None


def answers(host: str, port: int) -> bool:
    """Whether a proxy of this machine is on that port; those of a Serve that runs already stay where they are."""
    address = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    try:
        socket.create_connection((address, port), CONNECT_SECONDS).close()
    except OSError:
        return False
    return True


def join(address: str) -> None:
    """Makes this process a driver of the cluster at HOST:PORT, or `auto`; EngineError where none answers."""
    where = "on this machine" if address == AUTO else f"at {address}"
    try:
        if address == AUTO:  # $RAY_ADDRESS, or what the last `ray start` of this machine left, which may be over
            address = canonicalize_bootstrap_address(AUTO)
            where = f"at {address}"
        # Ray's own client tries for minutes, and then ends the process
        host, _, number = address.rpartition(":")
        socket.create_connection((host, int(number)), CONNECT_SECONDS).close()
        ray.init(address=address, log_to_driver=False, logging_level=logging.WARNING)
    except (OSError, OverflowError, ValueError, RuntimeError) as error:
        raise EngineError(
            f"there is no Ray cluster {where} ({first_line(str(error))}): start one with `ray start --head`, or give "
            "the address of one with --cluster HOST:PORT"
        ) from None


def reason(messages: Iterable[str]) -> str:
    """What an engine said of its failure, out of Ray's reports with their tracebacks."""
    given = list(messages)
    for message in given:
        if found := ERROR.findall(message):
            return str(found[-1])
    return first_line(next(filter(None, given), "the application did not start"))


def first_line(text: str) -> str:
    """Of a message."""
    return text.strip().partition("\n")[0]
