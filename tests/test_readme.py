"""What the README says is run as it stands, and its numbers are those of the committed result files."""

from __future__ import annotations

import re
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image

from bench import moves
from bench.page.tables import RESULTS, load, rebuilt
from engines.store import Bundle
from runtime.serve.__main__ import arguments
from runtime.serve.openai.schema import UNSUPPORTED, EditBody
from tests import ROOT

README = ROOT / "README.md"
BLOCKS = re.findall(r"```(bash|python)\n(.*?)```", README.read_text(), re.DOTALL)


def block(containing: str) -> str:
    """The one code block of the README with this text."""
    (found,) = [text for _, text in BLOCKS if containing in text]
    return str(found)


def here(command: str, port: int = 8000) -> str:
    """A README command as run from another folder and on a free port; the interpreter is the one of this test."""
    return command.replace(".venv/bin/python", sys.executable).replace("127.0.0.1:8000", f"127.0.0.1:{port}")


@pytest.fixture(scope="module")
def server(shapes: Bundle) -> Iterator[int]:
    """The README's second command, and the port it answers on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = int(probe.getsockname()[1])
    command = block("make engines\n").splitlines()[1]
    process = subprocess.Popen([*here(command).split(), "--port", str(port)], cwd=ROOT)
    try:
        for _ in range(600):
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health/ready", timeout=5)
                break
            except (urllib.error.URLError, ConnectionError):
                assert process.poll() is None, "the server stopped"
                time.sleep(0.1)
        yield port
    finally:
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 0


def is_image(path: Path) -> bool:
    with Image.open(path) as image:
        return image.size == (64, 64)


def test_make_engines_has_nothing_left_to_do(shapes: Bundle) -> None:
    command = block("make engines\n").splitlines()[0]
    run = subprocess.run(command.split(), cwd=ROOT, capture_output=True, text=True, check=True)
    assert "up to date" in run.stdout and "exported to" not in run.stdout


def test_the_curl_commands_make_images(server: int, tmp_path: Path) -> None:
    for path, image in (("generations", "star.png"), ("edits", "edited.png")):
        command = here(block(f"/v1/images/{path}"), server)
        run = subprocess.run(command, shell=True, cwd=tmp_path, check=True, capture_output=True)
        assert is_image(tmp_path / image) and not run.stdout


def test_the_readme_has_every_option_and_field_of_the_server() -> None:
    text = (ROOT / "runtime" / "serve" / "README.md").read_text()
    options = {option for action in arguments()._actions for option in action.option_strings if len(option) > 2}
    fields = {*EditBody.model_fields, *UNSUPPORTED}
    missing = [name for name in (options - {"--help"}) | fields if not re.search(rf"`{name}\b", text)]
    assert not missing


def test_the_openai_example_streams(server: int) -> None:
    code = here(block("from openai"), server)
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    kinds = [line.split()[0] for line in run.stdout.splitlines()]
    assert kinds == ["image_generation.partial_image"] * 3 + ["image_generation.completed"]


def test_the_page_is_served(server: int) -> None:
    page = urllib.request.urlopen(f"http://127.0.0.1:{server}/", timeout=10).read().decode()
    assert "<html" in page and "caption" in page.lower()


def test_the_command_line_makes_a_image(shapes: Bundle, tmp_path: Path) -> None:
    command = here(block('-m runtime "a large red star')).replace("star.png", str(tmp_path / "star.png"))
    subprocess.run(command, shell=True, cwd=ROOT, check=True)
    assert is_image(tmp_path / "star.png")


def test_the_python_example_makes_a_image(shapes: Bundle, tmp_path: Path) -> None:
    code = block("Pipeline.load").replace("ring.png", str(tmp_path / "ring.png"))
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
    assert is_image(tmp_path / "ring.png")


def test_the_library_example_runs() -> None:
    run = subprocess.run(
        [sys.executable, "-c", block("runtime.sampling.function")], cwd=ROOT, capture_output=True, text=True
    )
    assert run.returncode == 0 and run.stdout.strip().endswith("8 rounds, 20 evaluations"), run.stderr


def test_the_gate_runs_the_readmes_test_command() -> None:
    assert "make test-all" in README.read_text() and "make test-all" in (ROOT / ".ci" / "run").read_text()


def test_every_target_of_the_readme_exists() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = set(re.findall(r"`make ([a-z-]+)", README.read_text()))
    assert named and named <= targets, named - targets


def test_numbers_are_those_of_the_result_files() -> None:
    assert rebuilt(README.read_text()) == README.read_text(), "run `python -m bench report`"


@pytest.mark.parametrize("name", ["run", "scenario", "simulate", "quality", "drafts", "kernel", "serve"])
def test_result_files_carry_their_circumstances(name: str) -> None:
    result = load(name)
    assert result["schema_version"] == 1 and result["commit"] and result["host"]["cores"] and result["versions"]
    assert result["rows"]


def test_what_the_readme_says_of_moves_is_what_they_cost() -> None:
    gains: dict[str, float] = {}
    for row in moves.measure():
        gains[row["link"]] = max(gains.get(row["link"], 0.0), row["gain"])
    said = re.search(r"gains at most ([\d.]+) % of a\s+round over NVLink and ([\d.]+) % over PCIe", README.read_text())
    assert said, "the README says what moving latents otherwise would gain"
    for words, link in zip(said.groups(), ("NVLink", "PCIe 4"), strict=True):
        assert float(words) == pytest.approx(100 * gains[link], abs=0.01)


def test_the_images_of_the_readme_exist() -> None:
    for path in re.findall(r"!\[.*?\]\((.*?)\)", README.read_text()):
        assert (ROOT / path).is_file() and (ROOT / path).is_relative_to(RESULTS)
