"""`python -m bench loadtest URL`: open-loop load on a server or a cluster, with every image compared by its seed.

Requests are sent when they are due, whatever was answered until then, and latencies count from that moment. They come
from a Poisson process, or from a trace: a file with a JSON object per line, `at` in seconds and the fields of a
request, as `{"at": 0.2, "prompt": "a red star", "seed": 7, "num_inference_steps": 20}`. Every image must be the one
that this machine makes of the same fields, up to 2 of 255. With `--against`, lone requests to both servers take turns:
what the first one adds.
"""

from __future__ import annotations

import argparse
import base64
import http.client
import io
import json
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
from PIL import Image
from tqdm import tqdm

from bench.models import model_arguments
from bench.statistics import bootstrap, percentiles
from engines.errors import EngineError, ParameterError
from runtime.pipeline import Pipeline
from runtime.provenance import load_average

SECONDS = 300.0  # that an answer may take
WITHIN = 2  # of 255: images whose rounds were shared with others may round otherwise
AT_ONCE = 512  # requests without an answer; later ones wait, which is told as lateness
FIELDS = ("prompt", "negative_prompt", "seed", "num_inference_steps", "guidance_scale", "mode", "k", "scheduler")
MODES = ("sequential", "conservative", "aggressive")
REFUSED = {429, 503}  # an honest answer to too much load


@dataclass
class Answer:
    """`status` 0 is none, with the reason; `late` is how long after its time it was sent."""

    late: float
    seconds: float
    status: int
    pixels: np.ndarray | None = None
    reason: str = ""


def arguments(parser: argparse.ArgumentParser) -> None:
    """The command line."""
    parser.add_argument("url", help="of the server, as http://127.0.0.1:8000")
    model_arguments(parser)
    parser.add_argument("--trace", type=Path, help="file of requests; without, a Poisson process")
    parser.add_argument("--rate", type=float, default=2.0, help="requests per second, without --trace")
    parser.add_argument("--requests", type=int, default=100, help="without --trace")
    parser.add_argument("--steps", type=int, default=20, help="without --trace")
    parser.add_argument("--key", help="of the server, where it wants one")
    parser.add_argument("--against", metavar="URL", help="another server of the same model: what the first one adds")
    parser.add_argument("--pairs", type=int, default=60, help="of lone requests, with --against")


def measure(
    url: str, model: str, build: Path, devices: str, trace: Path | None, rate: float, requests: int, steps: int,
    key: str | None, against: str | None, pairs: int,
) -> list[dict[str, Any]]:  # fmt: skip
    """Measures and returns the rows of the result file; `failed` where an image is wrong or an answer is missing."""
    if min(requests, steps, pairs) < 1 or not 0 < rate < np.inf:
        raise ParameterError("rate", "rate, requests, steps and pairs must be positive")
    pipeline = Pipeline.load(model, devices, build)
    try:
        asked = poisson(rate, requests, steps, pipeline.manifest.examples or ("",)) if trace is None else read(trace)
        ask(url, asked[0], key)  # the first answer pays for connections; an error here is said before any load
        answers = play(url, asked, key)
        rows = [row(asked, answers, wrong(pipeline, asked, answers))]
        if against is not None:
            rows.append(added(url, against, asked[0], key, pairs))
    finally:
        pipeline.close()
    shared = {"url": url, "model": model, "trace": trace and trace.name, "load_average": load_average()}
    return [one | shared for one in rows]


def poisson(rate: float, requests: int, steps: int, prompts: Sequence[str]) -> list[dict[str, Any]]:
    """Arrivals, always the same: modes, steps and prompts in turns."""
    times = np.cumsum(np.random.default_rng(0).exponential(1 / rate, requests))
    return [
        {
            "at": float(at), "prompt": prompts[n % len(prompts)], "seed": n, "mode": MODES[n % len(MODES)],
            "num_inference_steps": max(1, round(steps * (0.5, 1.0, 1.5, 1.0)[n % 4])),
        }
        for n, at in enumerate(times)
    ]  # fmt: skip


def read(trace: Path) -> list[dict[str, Any]]:
    """A trace, by time; ParameterError names the first line that is none."""
    found = []
    for number, line in enumerate(trace.read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip():
            continue
        try:
            one = json.loads(line)
        except ValueError as error:
            raise ParameterError("trace", f"{trace}:{number}: {error}") from None
        if not isinstance(one, dict) or not isinstance(one.get("at"), int | float) or not 0 <= one["at"] < np.inf:
            raise ParameterError("trace", f"{trace}:{number}: a request is an object with the seconds `at` from 0 on")
        if unknown := one.keys() - {"at", *FIELDS}:
            raise ParameterError("trace", f"{trace}:{number}: there is no field {min(unknown)!r}: {', '.join(FIELDS)}")
        found.append({"prompt": "", "seed": 0} | one)
    if not found:
        raise ParameterError("trace", f"{trace} has no request")
    return sorted(found, key=lambda one: float(one["at"]))


def ask(url: str, fields: Mapping[str, Any], key: str | None) -> tuple[int, bytes]:
    """Status and body of one request; OSError or HTTPException where there is none."""
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.netloc:
        raise EngineError(f"{url!r} is no address of a server: write http://HOST:PORT")
    kind = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
    connection = kind(parts.netloc, timeout=SECONDS)
    headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {})
    body = json.dumps({name: value for name, value in fields.items() if name != "at"})
    try:
        connection.request("POST", f"{parts.path.rstrip('/')}/v1/images/generations", body, headers)
        response = connection.getresponse()
        return response.status, response.read()
    finally:
        connection.close()


def play(url: str, asked: Sequence[Mapping[str, Any]], key: str | None) -> list[Answer]:
    """Sends all requests in their time, and returns their answers in the same order."""
    start = time.perf_counter() + 0.1

    def send(fields: Mapping[str, Any]) -> Answer:
        due = start + fields["at"]
        sent = time.perf_counter()
        try:
            status, body = ask(url, fields, key)
        except (OSError, http.client.HTTPException) as error:
            return Answer(sent - due, time.perf_counter() - due, 0, reason=repr(error))
        seconds = time.perf_counter() - due
        if status != 200:
            return Answer(sent - due, seconds, status, reason=body.decode(errors="replace")[:200])
        return Answer(sent - due, seconds, status, pixels(body))

    with ThreadPoolExecutor(min(AT_ONCE, len(asked))) as pool, tqdm(total=len(asked), desc="bench loadtest") as bar:
        running = []
        for fields in asked:
            time.sleep(max(0.0, start + fields["at"] - time.perf_counter()))
            running.append(pool.submit(send, fields))
            running[-1].add_done_callback(lambda _: bar.update())
        return [one.result() for one in running]


def pixels(body: bytes) -> np.ndarray:
    """The image of an answer."""
    (item,) = json.loads(body)["data"]
    with Image.open(io.BytesIO(base64.b64decode(item["b64_json"]))) as image:
        return np.asarray(image.convert("RGB"))


def wrong(pipeline: Pipeline, asked: Sequence[Mapping[str, Any]], answers: Sequence[Answer]) -> list[int]:
    """The requests whose images this machine makes differently of the same fields."""
    found, made = [], dict[str, np.ndarray]()
    for number, (fields, answer) in enumerate(zip(asked, answers, strict=True)):
        if answer.pixels is None:
            continue
        options = {name: value for name, value in fields.items() if name not in ("at", "prompt")}
        same = json.dumps([fields["prompt"], options], sort_keys=True)
        if same not in made:
            made[same] = np.asarray(pipeline.generate(fields["prompt"], **options).images[0])
        ours, theirs = made[same].astype(int), answer.pixels.astype(int)
        if ours.shape != theirs.shape or np.abs(ours - theirs).max() > WITHIN:
            found.append(number)
    return found


def row(asked: Sequence[Mapping[str, Any]], answers: Sequence[Answer], differ: Sequence[int]) -> dict[str, Any]:
    """Of the result file."""
    good = [one.seconds for one in answers if one.status == 200]
    lost = [one for one in answers if one.status != 200 and one.status not in REFUSED]
    span = max(fields["at"] + one.seconds for fields, one in zip(asked, answers, strict=True))
    outcomes = Counter(str(one.status) if one.status else "none" for one in answers)
    return {
        "name": "load", "status": "failed" if differ or lost or not good else "ok", "requests": len(asked),
        "outcomes": dict(sorted(outcomes.items())), "images_per_second": round(len(good) / span, 3),
        "seconds": percentiles(good) if good else None, "late_seconds": round(max(one.late for one in answers), 4),
        "compared": len(good), "wrong": list(differ), "reasons": sorted({one.reason for one in lost})[:3],
    }  # fmt: skip


def added(url: str, against: str, fields: Mapping[str, Any], key: str | None, pairs: int) -> dict[str, Any]:
    """Milliseconds that the first URL takes longer than the second for the same lone request, in turns."""
    differences, lone = list[float](), {"first": list[float](), "second": list[float]()}
    for number in range(pairs + 1):
        seconds = {}
        for name, where in (("first", url), ("second", against))[:: 1 if number % 2 else -1]:
            start = time.perf_counter()
            status, body = ask(where, {**fields, "seed": number}, key)
            seconds[name] = time.perf_counter() - start
            if status != 200:
                raise EngineError(f"{where} answered {status}: {body.decode(errors='replace')[:200]}")
        if number:  # the first pair pays for connections and allocations
            differences.append((seconds["first"] - seconds["second"]) * 1e3)
            for name, value in seconds.items():
                lone[name].append(value * 1e3)
    found = bootstrap(differences)
    return {
        "name": "added", "status": "ok", "against": against, "pairs": pairs,
        "milliseconds": {"p50": round(float(np.median(differences)), 2), "low": round(found["low"], 2),
                         "high": round(found["high"], 2), "p95": round(float(np.quantile(differences, 0.95)), 2)},
        "alone_p50": {name: round(float(np.median(values)), 2) for name, values in lone.items()},
    }  # fmt: skip


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The load as one line, and what the first URL adds."""
    lines = []
    for one in rows:
        if one["name"] == "load":
            outcomes = ", ".join(f"{count} × {status}" for status, count in one["outcomes"].items())
            lines.append(f"{one['requests']} requests: {outcomes}; {one['images_per_second']:.2f} images per second")
            if one["seconds"]:
                lines.append("seconds: " + ", ".join(f"{name} {value:.3f}" for name, value in one["seconds"].items()))
            lines.append(
                f"{one['compared']} images compared by seed, {len(one['wrong'])} wrong; "
                f"sent at most {one['late_seconds'] * 1e3:.0f} ms late"
            )
            lines += one["reasons"]
        else:
            ms = one["milliseconds"]
            lines.append(
                f"Added to {one['against']}: {ms['p50']:.1f} ms at the median ({ms['low']:.1f} to {ms['high']:.1f}), "
                f"{ms['p95']:.1f} ms at p95."
            )
    return "\n".join(lines)
