"""The container as far as it goes without Docker, NVIDIA's base image and a GPU: what it copies, installs, starts."""
# covers: Dockerfile, .dockerignore

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from fnmatch import fnmatch
from pathlib import Path

import pytest

from engines.store import BUILD, Bundle
from runtime.serve.__main__ import arguments
from tests import ROOT

TEXT = (ROOT / "Dockerfile").read_text()
LINES = [re.sub(r"\s*\\\n\s*", " ", line) for line in re.findall(r"^[A-Z]+ (?:.|\\\n)*?[^\\]$", TEXT, re.MULTILINE)]
STAGES: dict[str, list[tuple[str, str]]] = {}
for line in LINES:
    word, _, rest = line.partition(" ")
    if word == "FROM":
        STAGES[rest.rpartition(" AS ")[2]] = []
    elif STAGES:
        STAGES[list(STAGES)[-1]].append((word, rest))


def of(stage: str, word: str) -> list[str]:
    return [rest for name, rest in STAGES[stage] if name == word]


def test_the_linter_finds_nothing() -> None:
    linter = Path(sys.executable).parent / "hadolint"
    done = subprocess.run(
        [linter, "--failure-threshold", "style", "Dockerfile"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_it_runs_as_nobody_and_is_told_to_end() -> None:
    words = [word for word, _ in STAGES["server"]]
    assert of("server", "USER") == ["10001"]
    assert words.index("USER") > max(n for n, word in enumerate(words) if word in ("RUN", "COPY"))
    assert of("server", "STOPSIGNAL") == ["SIGTERM"]
    assert of("server", "VOLUME") == ["/engines"]


def test_what_it_starts_is_a_command_of_this_server() -> None:
    command = json.loads(of("server", "CMD")[0])  # the exec form: the signal reaches Python itself
    assert command[:3] == ["python", "-m", "runtime.serve"]
    options = arguments().parse_args(command[3:])
    assert (str(options.build), options.host, options.port) == ("/engines", "0.0.0.0", 8000)


def ignored(path: str) -> bool:
    """Whether the last pattern of `.dockerignore` that a path or a folder above it meets leaves it out."""
    answer = False
    for pattern in (ROOT / ".dockerignore").read_text().splitlines():
        if pattern and not pattern.startswith("#"):
            kept, name = pattern.startswith("!"), pattern.removeprefix("!")
            parts = path.split("/")
            above = ["/".join(parts[: n + 1]) for n in range(len(parts))]
            if any(fnmatch(one, name) or fnmatch(one, name.removeprefix("**/")) for one in (*above, *parts[-1:])):
                answer = not kept
    return answer


def copied(stage: str, target: Path) -> None:
    """Copies into a folder what a stage takes from the checkout, through `.dockerignore`."""
    for rest in of(stage, "COPY"):
        if rest.startswith("--from"):
            continue
        *sources, goal = shlex.split(rest)
        for source in sources:
            assert (ROOT / source).exists(), f"COPY {source}: there is no such file"
            files = [ROOT / source] if (ROOT / source).is_file() else sorted((ROOT / source).rglob("*"))
            for file in files:
                name = file.relative_to(ROOT).as_posix()
                if file.is_file() and not ignored(name):
                    (target / name).parent.mkdir(parents=True, exist_ok=True)
                    shutil.copy(file, target / name)
        assert goal.strip("/") in (".", *(str(Path(source).parent) for source in sources), *sources)


def test_what_is_not_copied_does_not_travel() -> None:
    assert ignored("README.md")
    assert ignored("build/shapes/manifest.json")
    assert ignored(".git/config")
    assert ignored("tests/tiny.py")
    assert not ignored("engines/cuda/backend.py")
    assert not ignored("kernels/combine.cu")


def test_the_copied_files_serve_and_end_on_a_signal(shapes: Bundle, tmp_path: Path) -> None:
    """The container's own command and health check, on processor cores, with nothing but what the image has."""
    copied("server", tmp_path)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    command = [sys.executable, *json.loads(of("server", "CMD")[0])[1:]]
    command += ["--devices", "cpu@1", "--port", str(port), "--build", str(BUILD), "--host", "127.0.0.1"]
    check = of("server", "HEALTHCHECK")[0].partition(" CMD ")[2].replace(":8000/", f":{port}/")
    health = [sys.executable, *json.loads(check)[1:]]
    environment = {
        **os.environ,
        "PYTHONDONTWRITEBYTECODE": "1",
        "PYTHONPATH": "",
        "XDG_CACHE_HOME": str(tmp_path / "cache"),
    }
    process = subprocess.Popen(command, cwd=tmp_path, env=environment, stderr=subprocess.PIPE, text=True)
    try:
        deadline = time.monotonic() + 60
        while subprocess.run(health, cwd=tmp_path, capture_output=True).returncode:
            assert process.poll() is None, process.communicate()[1]
            assert time.monotonic() < deadline, "it was not healthy within a minute"
            time.sleep(0.3)
        process.send_signal(signal.SIGTERM)
        _, log = process.communicate(timeout=30)
    finally:
        process.kill()
    assert process.returncode == 0, log
    code = (
        "import bench.gpu, bench.gpu.runtimes, bench.gpu.engine, bench.gpu.pytorch, bench.gpu.capture, bench.gpu.copies"
    )
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, check=True)


def pins(*extras: str) -> list[str]:
    """What the container's own line writes for some extras."""
    (text,) = of("pins", "ENV")
    program = shlex.split(text)[0].removeprefix("PINS=").replace("\\n", "\n")
    program = re.sub(r"sep='\n'", r"sep='\\n'", program)
    done = subprocess.run(
        [sys.executable, "-c", program, *extras], cwd=ROOT, capture_output=True, text=True, check=True
    )
    return done.stdout.splitlines()


def test_everything_that_is_installed_is_pinned() -> None:
    for extras in (("cuda", "trt", "cluster"), ("cuda", "rtx"), ("cpu", "export")):
        found = pins(*extras)
        assert all(re.fullmatch(r"[\w.-]+(\[[\w,]+\])?==[\w.]+", pin) for pin in found), found
    assert {"fastapi", "tensorrt-cu13", "cuda-python"} <= {pin.partition("==")[0] for pin in pins("cuda", "trt")}
    assert "torch" not in {pin.partition("==")[0] for pin in pins("cuda", "rtx")}


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_the_pins_are_found_together(tmp_path: Path) -> None:
    """In a fresh environment; without TensorRT's libraries, which are on NVIDIA's own index."""
    subprocess.run([sys.executable, "-m", "venv", tmp_path / "venv"], check=True)
    (tmp_path / "requirements.txt").write_text("\n".join(pins("cuda")) + "\n")
    command = [str(tmp_path / "venv" / "bin" / "python"), "-m", "pip", "install", "--quiet", "--dry-run"]
    command += ["--report", "-", "--requirement", str(tmp_path / "requirements.txt")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    names = {one["metadata"]["name"] for one in json.loads(done.stdout)["install"]}
    assert {"cuda-bindings", "fastapi", "numpy", "tokenizers"} <= names
    assert "torch" not in names
