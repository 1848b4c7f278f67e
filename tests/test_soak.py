"""The server for a long time and in bad company: right images, every request answered once, nothing kept."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from engines.store import BUILD, Bundle
from runtime.pipeline import Pipeline
from tests.client import GENERATE, PROMPT, ask, connect, decoded, events, launched, process, wait_for
from tests.copies import contents

MODES = ("sequential", "conservative", "aggressive", "srds", "adaptive")
SEEDS, STEPS = 12, 8


def resident(process: subprocess.Popen[bytes]) -> int:
    """Bytes of memory that a process has."""
    return int(Path(f"/proc/{process.pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@dataclass
class Crowd:
    """Clients that ask for random images in random ways, and what became of it."""

    port: int
    right: dict[tuple[str, int], np.ndarray]
    outcomes: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)

    def one(self, number: int) -> None:
        """One request: streamed or not, awaited or left, valid or not."""
        rng = np.random.default_rng(number)
        mode, seed = str(rng.choice(MODES)), int(rng.integers(SEEDS))
        body = {"prompt": PROMPT, "mode": mode, "seed": seed, "k": 2, "num_inference_steps": STEPS}
        way = str(rng.choice(["whole", "stream", "leave", "long", "bad"], p=[0.45, 0.2, 0.15, 0.1, 0.1]))
        with connect(self.port) as client:
            try:
                getattr(self, way)(client, body, rng)
            except httpx.HTTPError as error:
                self.wrong.append(f"{way}: {error!r}")

    def ask(self, way: str, client: httpx.Client, body: dict[str, Any]) -> httpx.Response:
        """Waits after a full queue, as it is told to: most requests are to be accepted."""
        response = client.post(GENERATE, json=body)
        self.outcomes[f"{way} {response.status_code}"] += 1
        if response.status_code == 429:
            time.sleep(min(2.0, float(response.headers["retry-after"])))
        return response

    def whole(self, client: httpx.Client, body: dict[str, Any], rng: np.random.Generator) -> None:
        response = self.ask("whole", client, body)
        if response.status_code == 200:
            self.check(body, response.json()["data"][0]["b64_json"])
        elif response.status_code not in (429, 504):
            self.wrong.append(response.text)

    def stream(self, client: httpx.Client, body: dict[str, Any], rng: np.random.Generator) -> None:
        response = self.ask("stream", client, {**body, "stream": True, "partial_images": int(rng.integers(4))})
        if response.status_code == 200:
            last = events(response)[-1]
            if last["type"] == "image_generation.completed":
                self.check(body, last["b64_json"])
            elif last["error"]["code"] != "deadline_exceeded":
                self.wrong.append(response.text)
        elif response.status_code not in (429, 504):
            self.wrong.append(response.text)

    def leave(self, client: httpx.Client, body: dict[str, Any], rng: np.random.Generator) -> None:
        try:
            client.post(GENERATE, json={**body, "stream": bool(rng.integers(2))}, timeout=float(rng.uniform(0.01, 0.5)))
            self.outcomes["left too late"] += 1
        except httpx.TimeoutException:
            self.outcomes["left"] += 1

    def long(self, client: httpx.Client, body: dict[str, Any], rng: np.random.Generator) -> None:
        """Does not end before the server's deadline."""
        response = self.ask("long", client, {**body, "mode": "sequential", "num_inference_steps": 900})
        if response.status_code not in (429, 504):
            self.wrong.append(f"{response.status_code} for 900 steps")

    def bad(self, client: httpx.Client, body: dict[str, Any], rng: np.random.Generator) -> None:
        bodies = [
            b'{"prompt": "a \xff"}', b'{"prompt": "' + b"a" * 10_000_000 + b'"}', b"[" * 100_000, b"",
            b'{"prompt": "a", "mode": "magic"}',
        ]  # fmt: skip
        content = bodies[int(rng.integers(len(bodies)))]
        try:
            response = client.post(GENERATE, content=content, headers={"Content-Type": "application/json"})
            self.outcomes[f"bad {response.status_code}"] += 1
            if response.status_code not in (400, 413, 429):
                self.wrong.append(response.text)
        except (httpx.WriteError, httpx.RemoteProtocolError):
            self.outcomes["bad cut"] += 1  # the answer comes before the end of a body that is too long
            assert len(content) > 1_000_000

    def check(self, body: dict[str, Any], image: str) -> None:
        if np.abs(decoded(image) - self.right[body["mode"], body["seed"]]).max() > 2:
            self.wrong.append(f"another image for {body}")


@contextmanager
def watched(port: int) -> Iterator[list[str]]:
    """Asks for readiness and metrics all the time; yields what was wrong with them."""
    wrong, end = list[str](), threading.Event()

    def watch() -> None:
        with connect(port) as client:
            while not end.is_set():
                for path in ("/health/ready", "/health/live", "/metrics"):
                    response = client.get(path)
                    if response.status_code != 200:
                        wrong.append(f"{path}: {response.status_code} {response.text}")
                time.sleep(0.2)

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield wrong
    finally:
        end.set()
        thread.join()


def crowded(shapes: Bundle, pipeline: Pipeline, log: Path, requests: int, clients: int, seconds: float) -> Crowd:
    """Lets a crowd at a server of its own and looks at what it left behind."""
    alone = {
        (mode, seed): np.asarray(
            pipeline.generate(PROMPT, mode=mode, seed=seed, k=2, num_inference_steps=STEPS).images[0], float
        )
        for mode in MODES
        for seed in range(SEEDS)
    }
    with process(shapes, log, "--timeout", str(seconds), "--queue", "12") as (server, port), connect(port) as client:
        crowd = Crowd(port, alone)
        with watched(port) as unready, ThreadPoolExecutor(clients) as pool:
            list(pool.map(crowd.one, range(requests)))
        assert not crowd.wrong and not unready
        deadline = time.monotonic() + 30
        while "driffusion_queue_depth 0.0" not in client.get("/metrics").text and time.monotonic() < deadline:
            time.sleep(0.1)
        counted = {
            line.split('"')[1]: float(line.rsplit(" ", 1)[1])
            for line in client.get("/metrics").text.splitlines()
            if line.startswith("driffusion_requests_total")
        }
        assert "driffusion_queue_depth 0.0" in client.get("/metrics").text
        assert set(counted) <= {"200", "400", "413", "429", "499", "504"}, counted
        assert sum(counted.values()) == requests, f"every request once: {counted}, {crowd.outcomes}"
        for mode, seed in (("aggressive", 3), ("sequential", 0)):
            made = ask(client, mode=mode, seed=seed, k=2, num_inference_steps=STEPS)["data"][0]["b64_json"]
            assert np.array_equal(decoded(made), alone[mode, seed]), "alone again, it is what it was"
        server.send_signal(signal.SIGTERM)
        assert server.wait(60) == 0
    assert "Traceback" not in log.read_text() and "ERROR" not in log.read_text()
    return crowd


def test_a_small_crowd(shapes: Bundle, pipeline: Pipeline, tmp_path: Path) -> None:
    crowded(shapes, pipeline, tmp_path / "log", 30, 8, 3)


@pytest.mark.soak
@pytest.mark.timeout(1800)
def test_five_hundred_requests_of_sixteen_clients(shapes: Bundle, pipeline: Pipeline, tmp_path: Path) -> None:
    crowd = crowded(shapes, pipeline, tmp_path / "log", 500, 16, 6)
    print(dict(crowd.outcomes))
    assert crowd.outcomes["whole 200"] > 100, "too few images were made to say anything"


def grown(shapes: Bundle, log: Path, warm_up: int, images: int, clients: int) -> tuple[int, int]:
    """Resident bytes after a warm-up, and after so many more images of 4 steps."""
    with process(shapes, log) as (server, port):

        def some(number: int) -> None:
            with connect(port) as client:
                for n in range(number, number + 25):
                    ask(client, num_inference_steps=4, seed=n, mode=MODES[n % 5], k=1 + n % 3, n=1 + (n % 7 == 0))

        def many(count: int) -> int:
            with ThreadPoolExecutor(clients) as pool:
                list(pool.map(some, range(0, count, 25)))
            return resident(server)

        return many(warm_up), many(images)


@pytest.mark.soak
@pytest.mark.timeout(1800)
def test_two_thousand_images_leave_nothing_behind(shapes: Bundle, tmp_path: Path) -> None:
    # every thread and every lane meets its largest call by chance: after 400 images some have not yet
    before, after = grown(shapes, tmp_path / "log", 1000, 2000, 4)
    print(f"resident after warm-up {before / 1e6:.1f} MB, after 2,000 images {after / 1e6:.1f} MB")
    assert after < 1.05 * before


# --- what a killed process leaves ------------------------------------------------------------------------------------


# what its log says last when it is killed: it is importing, loading the networks and warming up, or taking requests
PHASES = {"importing": r"\| +numpy\n", "loading": r"\| +onnxruntime\n", "serving": r"Application startup complete"}


@pytest.mark.parametrize("when", [*PHASES, "working"])
def test_a_killed_server_leaves_engines_and_no_lock(when: str, shapes: Bundle, tmp_path: Path) -> None:
    before, log = contents(shapes.folder), tmp_path / "killed"
    if when == "working":
        with process(shapes, log) as (server, port), connect(port) as client, ThreadPoolExecutor(1) as pool:
            made = pool.submit(ask, client, num_inference_steps=900)
            _until(lambda: "driffusion_requests_running 1.0" in client.get("/metrics").text)
            server.kill()
            assert isinstance(made.exception(), httpx.HTTPError)
    else:
        with launched(shapes, log) as server:
            wait_for(PHASES[when], log, server)
            server.kill()
            assert server.wait(20) == -signal.SIGKILL
        *_, last = [phase for phase, pattern in PHASES.items() if re.search(pattern, log.read_text())]
        assert last == when
    assert contents(shapes.folder) == before
    with process(shapes, tmp_path / "log") as (server, port), connect(port) as client:
        assert ask(client)["data"]
        build = [sys.executable, "-m", "engines", "build", "shapes"]
        again = subprocess.run(build, capture_output=True, text=True, timeout=100, check=True)
        assert "up to date" in again.stdout, "nobody waits for a lock of a killed process"
    assert BUILD.is_dir()


FULL = Path("/dev/full")


@pytest.mark.skipif(not FULL.exists(), reason="the device that is always full is Linux's")
def test_a_disk_that_is_full_stops_no_image(shapes: Bundle, tmp_path: Path) -> None:
    """The server writes nothing but its log, and goes on without that."""
    command = [sys.executable, "-m", "runtime.serve", "--model", str(shapes.folder), "--devices", "cpu*2", "--port"]
    with connect(free := _free_port()) as client, FULL.open("w") as full:
        server = subprocess.Popen([*command, str(free)], stderr=full)
        try:
            _until(lambda: client.get("/health/ready").status_code == 200)
            for seed in range(3):
                assert ask(client, seed=seed)["data"]
            server.send_signal(signal.SIGTERM)
            assert server.wait(30) in (0, 120)  # Python's own exit code when it cannot flush what it printed
        finally:
            server.kill()
            server.wait()


def _free_port() -> int:
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _until(true: Callable[[], bool]) -> None:
    for _ in range(300):
        try:
            if true():
                return
        except httpx.HTTPError:
            pass
        time.sleep(0.1)
    raise AssertionError("it never was")


@pytest.mark.soak
@pytest.mark.usefixtures("usual_costs")
def test_two_thousand_images_in_shared_calls(pipeline: Pipeline) -> None:
    """Random modes, steps, schedulers, guidance, numbers of images and lanes; a tenth is cancelled, a tenth has
    a callback that fails. Every image is within 2 of 255 of the one that its request gives alone.
    """

    class LeftError(Exception):
        pass

    def leave(*_: object) -> None:
        raise LeftError

    def options(number: int) -> dict[str, Any]:
        rng = np.random.default_rng(number)
        mode = str(rng.choice(MODES))
        schedulers = ["ddim", "euler"] if mode == "srds" else ["ddim", "euler", "dpm++2m"]
        return {
            "mode": mode, "num_inference_steps": int(rng.integers(3, 12)), "guidance_scale": float(rng.uniform(1, 6)),
            "scheduler": str(rng.choice(schedulers)), "seed": number, "lanes": int(rng.integers(1, 3)),
            "num_images_per_prompt": int(rng.integers(1, 4)),
        }  # fmt: skip

    different = 60
    alone = [pipeline.generate(PROMPT, **options(number)) for number in range(different)]
    images, shared, left, before = 0, 0, 0, pipeline.lanes.shared()
    random = np.random.default_rng()

    def one(fate: float) -> tuple[int, int, int]:
        number = int(fate * 1e9) % different
        way: dict[str, Any] = {}
        if fate < 0.2:
            way = {"before_round": leave} if fate < 0.1 else {"callback_on_step_end": leave}
        try:
            made = pipeline.generate(PROMPT, **options(number), **way)
        except LeftError:
            return 0, 0, 1
        for a, b in zip(made.images, alone[number].images, strict=True):
            assert np.abs(np.asarray(a, int) - np.asarray(b, int)).max() <= 2, options(number)
        return len(made.images), made.report.shared_rounds, 0

    with ThreadPoolExecutor(12) as pool:
        while images < 2000:
            for found in pool.map(one, random.uniform(size=60).tolist()):
                images, shared, left = images + found[0], shared + found[1], left + found[2]
    calls, rows = (pipeline.lanes.shared()[kind] - before[kind] for kind in ("calls", "rows"))
    print(f"{images} images, {left} left early, {shared} shared rounds, {rows / calls:.2f} rows per shared call")
    assert left > 0 and shared > 0 and rows > 2 * calls
    assert (pipeline.lanes.running, pipeline.lanes.waiting) == (0, 0)
