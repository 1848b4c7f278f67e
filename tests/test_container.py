"""The container for processor cores, really built and run: by buildah, from a root file system that mmdebstrap makes.

No base image has to be pulled and no daemon to run; both programs are Debian's and want to be root.
"""
# covers: Dockerfile, .dockerignore

from __future__ import annotations

import base64
import io
import json
import os
import shutil
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests import ROOT

pytestmark = [pytest.mark.container, pytest.mark.timeout(1800)]

# what the machine's own pip is told: certificates, indexes and folders of wheels, at the same places in the build
HOST = ("/etc/ssl/certs", "/etc/pip.conf", "/etc/xdg/pip", os.environ.get("PIP_FIND_LINKS", ""))

ENVIRONMENT = {**os.environ, "STORAGE_DRIVER": "vfs", "BUILDAH_ISOLATION": "chroot", "BUILDAH_FORMAT": "docker"}


def buildah(*arguments: str, **options: object) -> str:
    """One command of buildah, without a daemon and without namespaces of its own; its standard output."""
    done = subprocess.run(
        ["buildah", *arguments], cwd=ROOT, env=ENVIRONMENT, stdout=subprocess.PIPE, text=True, **options  # type: ignore[call-overload]
    )  # fmt: skip
    assert done.returncode == 0, f"buildah {arguments[0]} ended with {done.returncode}"
    return str(done.stdout).strip()


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    missing = [name for name in ("buildah", "mmdebstrap") if shutil.which(name) is None]
    if missing or os.geteuid():
        pytest.fail(f"install {' and '.join(missing)} and be root" if missing else "be root")
    root = tmp_path_factory.mktemp("root") / "debian.tar"
    subprocess.run(
        ["mmdebstrap", "--quiet", "--variant=minbase", "--include=ca-certificates", "bookworm", root], check=True
    )
    base, tag = "localhost/driffusion-test-base", "localhost/driffusion-test"
    container = buildah("from", "scratch")
    buildah("add", "--quiet", container, str(root), "/")
    buildah("commit", "--quiet", "--rm", container, base)
    told = [f"--volume={path}:{path}:ro" for path in HOST if path and Path(path).exists()]
    told += [f"--env={name}={value}" for name, value in os.environ.items() if name.startswith("PIP_")]
    told += ["--env=PIP_RETRIES=0"]  # an index that this machine cannot reach is asked once
    values = {"BASE": base, "PYTHON": "python3.11", "EXTRAS": "cpu", "DEVICES": "cpu"}
    buildah(
        "build", "--quiet", *told, *(f"--build-arg={name}={value}" for name, value in values.items()), "--tag", tag, "."
    )
    yield tag
    buildah("rmi", "--force", tag, base)


def test_what_the_image_says_of_itself(image: str) -> None:
    told = json.loads(buildah("inspect", "--type=image", image))["Docker"]["config"]
    assert told["User"] == "10001"
    assert told["StopSignal"] == "SIGTERM"
    assert list(told["Volumes"]) == ["/engines"]
    assert "/health/ready" in " ".join(told["Healthcheck"]["Test"])


def test_it_is_small_and_has_no_compiler_of_models(image: str) -> None:
    """PyTorch exported the model in a stage of its own and must not be in what is served."""
    container = buildah("from", image)
    try:
        place = Path(buildah("mount", container))
        packages = {path.name for path in (place / "opt/venv/lib/python3.11/site-packages").iterdir()}
        size = sum(path.lstat().st_size for path in place.rglob("*") if path.is_file() and not path.is_symlink())
    finally:
        buildah("rm", container)
    assert {"onnxruntime", "fastapi"} <= packages
    assert not {"torch", "diffusers", "transformers"} & packages
    assert size < 700e6, f"{size / 1e6:.0f} MB"


def test_a_user_without_rights_draws_an_image_and_a_signal_ends_it(image: str) -> None:
    """The commands at the head of the Dockerfile: engines are compiled into the volume, then the server starts."""
    container = buildah("from", image)
    try:
        place = Path(buildah("mount", container))
        before = written(place)
        engines = ["python", "-m", "engines", "build", "--devices", "auto", "--build", "/engines"]
        buildah("run", container, "--", *engines)
        with socket.create_server(("127.0.0.1", 0)) as listener:
            port = listener.getsockname()[1]
        command = json.loads(buildah("inspect", container))["Docker"]["config"]["Cmd"]
        command[command.index("--port") + 1] = str(port)
        command[command.index("--host") + 1] = "127.0.0.1"
        process = subprocess.Popen(["buildah", "run", container, "--", *command], env=ENVIRONMENT)
        try:
            wait(process, f"http://127.0.0.1:{port}/health/ready")
            server = process_of(port)
            assert owner(server) == 10001
            check_image(f"http://127.0.0.1:{port}/v1/images/generations")
            os.kill(server, signal.SIGTERM)
            assert process.wait(60) == 0
        finally:
            process.kill()
        assert written(place) == before, "it wrote outside its volume, which a read-only root file system forbids"
    finally:
        buildah("rm", container)


def written(place: Path) -> dict[Path, int]:
    """When each file that the image's own folders have was written last."""
    folders = [place / name for name in ("app", "opt", "home", "usr", "var")]
    return {path: path.lstat().st_mtime_ns for folder in folders for path in folder.rglob("*")}


def process_of(port: int) -> int:
    """The process of the server itself: signals that buildah gets do not reach it, those of a container engine do."""
    for path in Path("/proc").glob("[0-9]*"):
        words = (path / "cmdline").read_bytes().split(b"\0")
        if str(port).encode() in words and b"buildah" not in b" ".join(words):
            return int(path.name)
    raise AssertionError("there is no such process")


def owner(process: int) -> int:
    return int(Path(f"/proc/{process}/status").read_text().split("Uid:")[1].split()[0])


def check_image(url: str) -> None:
    """Asks for a red star at the left, and looks for one there."""
    body = {"prompt": "a red star at the left", "seed": 3}
    request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=60) as answer:
        data = base64.b64decode(json.load(answer)["data"][0]["b64_json"])
    pixels = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"), np.int16)
    red = (pixels[..., 0] > 150) & (pixels[..., 1] < 110) & (pixels[..., 2] < 110)
    assert red.mean() > 0.02
    assert np.argwhere(red).mean(0)[1] < pixels.shape[1] / 2


def wait(process: subprocess.Popen[bytes], url: str) -> None:
    """Until a server says that it is ready."""
    deadline = time.monotonic() + 60
    while True:
        assert process.poll() is None, f"it ended with {process.returncode}"
        assert time.monotonic() < deadline, "it was not ready within a minute"
        try:
            with urllib.request.urlopen(url, timeout=5):
                return
        except (urllib.error.URLError, OSError):
            time.sleep(0.3)
