"""What the READMEs say: commands are run, numbers come from committed results, links lead somewhere."""

from __future__ import annotations

import inspect
import re
import shlex
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from pydantic import BaseModel

from bench import moves
from bench.page.document import anchor
from bench.page.options import TABLES as OPTION_TABLES
from bench.page.tables import RESULTS, block, load, readmes, rebuilt
from engines.cuda.progress import AHEAD_SECONDS
from engines.errors import ParameterError
from engines.store import Bundle
from runtime.__main__ import arguments as runtime_arguments
from runtime.auto import CONFIDENCE, COVERED, SAME_PSNR
from runtime.call import OPTIONS
from runtime.pipeline import Pipeline
from runtime.serve.__main__ import arguments as serve_arguments
from runtime.serve.health import RETRIES
from runtime.serve.openai import schema
from tests import ROOT
from tests.client import process, wait_for
from tests.runtime.embed.building import built
from tests.runtime.embed.building import command as compile_command

READMES = readmes()
TEXTS = {path.relative_to(ROOT).as_posix(): path.read_text() for path in READMES}
BLOCKS: list[tuple[str, str]] = [
    (name, text)
    for name, readme in {**TEXTS, "CONTRIBUTING.md": (ROOT / "CONTRIBUTING.md").read_text()}.items()
    for text in re.findall(r"```(?:bash|python|c|cpp)\n(.*?)```", readme, re.DOTALL)
]
# which block a test below runs, by words that only it has
RUN = (
    "make engines\n",
    "/v1/images/generations",
    "/v1/images/edits",
    "from openai",
    "import tritonclient.http",
    "import tritonclient.grpc",
    '-m runtime "a large red star',
    'pipe.generate("a small green ring',
    'mode="conservative",\n    k=4',
    "runtime.sampling.function",
    "engines verify shapes",
    "driffusion::engine engine",
    "runtime.serve --model shapes --devices",
)
# why a block is not run; its `make` lines are resolved with --dry-run and its options are parsed
EXPLAINED = {
    "driffusion::engine model": "is compiled and run by tests/runtime/embed/test_examples.py",
    "make engines MODEL=owner/name": "needs the hub; tests/export/test_loading.py exports folders, LoRA and sizes",
    "LORA='style.safetensors:0.8 detail": "needs LoRA files; tests/export/test_loading.py fuses some",
    "make engines DEVICES=cuda:0,cuda:1": "needs GPUs; tests/engines/cuda has simulated ones",
    "machine.forgive()": "shows the shape of a test; tests/libcuda and tests/engines/cuda are full of them",
    "ray start --head": "is run by tests/runtime/serve/ray/test_commands.py, in `make test-cluster`",
    "serve deploy": "is run by tests/runtime/serve/ray/test_commands.py, in `make test-cluster`",
    "--within 60": "needs GPUs; tests/bench/gpu runs its parts on imaginary ones",
    "pre-commit install": "changes the checkout; tests/test_commands.py runs the hooks",
}


def find(containing: str) -> str:
    """The one code block of all READMEs with this text."""
    found = [text for _, text in BLOCKS if containing in text]
    assert len(found) == 1, f"{len(found)} blocks with {containing!r}"
    return found[0]


def here(command: str, port: int = 8000) -> str:
    """A README's command for another folder and a free port; the interpreter is the one of this test."""
    return command.replace(".venv/bin/python", sys.executable).replace("127.0.0.1:8000", f"127.0.0.1:{port}")


def lines(text: str) -> list[str]:
    """The commands of a block: continued lines joined, comments cut off."""
    return [line.split("  #")[0].strip() for line in text.replace("\\\n", " ").splitlines() if line.strip()]


def prose(text: str) -> str:
    """A README without what is made for it and without code."""
    text = re.sub(r"<!-- (bench|options):.*?<!-- /\1 -->", "", text, flags=re.DOTALL)
    return re.sub(r"`[^`]*`", "", re.sub(r"```.*?```", "", text, flags=re.DOTALL))


# --- commands --------------------------------------------------------------------------------------------------------


def test_every_code_block_is_run_or_explained() -> None:
    for name, text in BLOCKS:
        known = [words for words in (*RUN, *EXPLAINED) if words in text]
        assert len(known) == 1, f"{name}: {known} for\n{text}"
    for words in (*RUN, *EXPLAINED):
        find(words)


def test_every_make_line_resolves() -> None:
    commands = [line for _, text in BLOCKS for line in lines(text) if line.startswith("make ")]
    assert len(commands) > 5
    for command in commands:
        run = subprocess.run([*shlex.split(command), "--dry-run"], cwd=ROOT, capture_output=True, text=True)
        assert run.returncode == 0, f"{command}: {run.stderr}"


def test_every_command_line_is_understood() -> None:
    parsers = {"runtime": runtime_arguments, "runtime.serve": serve_arguments}
    parsed = 0
    for _, text in BLOCKS:
        for line in lines(text):
            words = shlex.split(line)
            if words[:2] == [".venv/bin/python", "-m"] and words[2] in parsers:
                parsers[words[2]]().parse_args(words[3:])
                parsed += 1
    assert parsed >= 4


def test_every_target_exists() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = {target for text in TEXTS.values() for target in re.findall(r"`make ([a-z-]+)", text)}
    assert named and named <= targets, named - targets


def test_ci_runs_the_command_that_the_readme_says() -> None:
    assert "make test-all" in TEXTS["README.md"] and "make test-all" in (ROOT / ".ci" / "run").read_text()


@pytest.fixture(scope="module")
def server(shapes: Bundle) -> Iterator[int]:
    """The README's second command, and the port it answers on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = int(probe.getsockname()[1])
    command = find("make engines\n").splitlines()[1]
    process = subprocess.Popen([*here(command).split(), "--port", str(port)], cwd=ROOT)
    try:
        for _ in range(600):
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health/ready", timeout=5)
                break
            except OSError:  # refused, not ready yet, or too busy to answer in time
                assert process.poll() is None, "the server stopped"
                time.sleep(0.1)
        yield port
    finally:
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 0


def is_image(path: Path) -> bool:
    with Image.open(path) as image:
        return image.size == (64, 64)


def python(code: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """Runs code with the packages of this tree from another folder, where it may leave files."""
    paths = f"import sys; sys.path.insert(0, {str(ROOT)!r})\n"
    return subprocess.run([sys.executable, "-c", paths + code], cwd=folder, capture_output=True, text=True, check=False)


def test_make_engines_has_nothing_left_to_do(shapes: Bundle) -> None:
    command = find("make engines\n").splitlines()[0]
    run = subprocess.run(command.split(), cwd=ROOT, capture_output=True, text=True, check=True)
    assert "up to date" in run.stdout and "exported to" not in run.stdout


def test_the_curl_commands_make_images(server: int, tmp_path: Path) -> None:
    for path, image in (("generations", "star.png"), ("edits", "edited.png")):
        command = here(find(f"/v1/images/{path}"), server)
        run = subprocess.run(command, shell=True, cwd=tmp_path, check=True, capture_output=True)
        assert is_image(tmp_path / image) and not run.stdout


def test_the_openai_example_streams(server: int, tmp_path: Path) -> None:
    run = python(here(find("from openai"), server), tmp_path)
    kinds = [line.split()[0] for line in run.stdout.splitlines()]
    assert kinds == ["image_generation.partial_image"] * 3 + ["image_generation.completed"], run.stderr


def test_tritons_client_makes_an_image(server: int, tmp_path: Path) -> None:
    run = python(here(find("import tritonclient.http"), server), tmp_path)
    assert run.stdout == "(1, 64, 64, 3) (1, 4, 16, 16)\n", run.stderr


def test_tritons_client_finds_an_image_in_its_shared_memory(shapes: Bundle, tmp_path: Path) -> None:
    log, options = tmp_path / "log", ("--grpc-port", "0", "--shared-memory")
    with process(shapes, log, *options) as (running, _):
        port = wait_for(r"gRPC on port (\d+)", log, running)[1]
        code = find("import tritonclient.grpc").replace(":8001", f":{port}").replace("/pixels", f"/pixels-{port}")
        run = python(code, tmp_path)
    assert run.stdout == "(1, 64, 64, 3)\n", run.stderr


def test_the_page_is_served(server: int) -> None:
    page = urllib.request.urlopen(f"http://127.0.0.1:{server}/", timeout=10).read().decode()
    assert "<html" in page and "caption" in page.lower()


def test_the_command_line_makes_an_image(shapes: Bundle, tmp_path: Path) -> None:
    command = here(find('-m runtime "a large red star')).replace("star.png", str(tmp_path / "star.png"))
    subprocess.run(command, shell=True, cwd=ROOT, check=True)
    assert is_image(tmp_path / "star.png")


@pytest.mark.parametrize(
    ("words", "image"),
    [('pipe.generate("a small green ring', "ring.png"), ('mode="conservative",\n    k=4', "cross.png")],
)
def test_the_python_examples_make_images(words: str, image: str, shapes: Bundle, tmp_path: Path) -> None:
    run = python(find(words), tmp_path)
    assert run.returncode == 0 and run.stdout, run.stderr
    assert is_image(tmp_path / image)


def test_the_cpp_example_draws_what_python_draws(shapes: Bundle, pipeline: Pipeline, tmp_path: Path) -> None:
    """With the program that the README's own command writes, and the library that the embedding's tests build."""
    (command,) = re.findall(r"`python -m (runtime program [^`]*)`", TEXTS["README.md"])
    words = [str(tmp_path / word) if word == "star.program" else word for word in shlex.split(command)]
    subprocess.run([sys.executable, "-m", *words], cwd=ROOT, check=True, capture_output=True)
    (tmp_path / "star.cc").write_text(find("driffusion::engine engine"))
    library, headers = built().parent, ROOT / "runtime" / "embed" / "include"
    link = ("-L", library, "-ldriffusion", f"-Wl,-rpath,{library}")
    warnings = ("-std=c++17", "-Wall", "-Wextra", "-Werror")
    compile_command("c++", *warnings, "-I", headers, tmp_path / "star.cc", "-o", tmp_path / "star", *link)
    (tmp_path / "build").mkdir()
    (tmp_path / "build" / "shapes").symlink_to(shapes.folder)
    compile_command(tmp_path / "star", cwd=tmp_path)
    own = pipeline.generate("a large red star at the left on blue background", mode="aggressive")
    with Image.open(tmp_path / "star.ppm") as image:
        assert np.abs(np.asarray(image, int) - np.asarray(own.images[0], int)).max() <= 2


def test_the_library_example_runs() -> None:
    run = python(find("runtime.sampling.function"), ROOT)
    assert run.returncode == 0 and run.stdout.strip().endswith("8 rounds, 20 evaluations"), run.stderr


def test_the_engines_commands_run(shapes: Bundle) -> None:
    for line in lines(find("engines verify shapes")):
        run = subprocess.run(here(line), shell=True, cwd=ROOT, capture_output=True, text=True)
        assert run.returncode == 0 and run.stdout and not run.stderr


# --- tables and numbers ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TEXTS)
def test_tables_are_those_of_results_and_options(name: str) -> None:
    assert rebuilt(TEXTS[name]) == TEXTS[name], "run `python -m bench report`"


def test_tables_stand_where_they_belong() -> None:
    made = re.compile(r"<!-- ((?:bench|options):[a-z0-9-]+) -->")
    found = {kind: name for name, text in TEXTS.items() for kind in made.findall(text)}
    assert {kind: name for kind, name in found.items() if name == "README.md"} == {
        "bench:summary": "README.md",
        "bench:gpus": "README.md",
    }
    assert {f"options:{name}" for name in OPTION_TABLES} <= found.keys()
    assert all(
        f"bench:{path.stem}" in found for path in RESULTS.glob("*.json") if path.stem in {"run", "quality", "serve"}
    )
    with pytest.raises(ParameterError, match="no table is called"):
        block("nonsense")


def test_the_summary_has_five_rows_from_one_machine() -> None:
    table = block("summary").splitlines()[3:-1]
    assert len(table) == 5
    seconds = [row["seconds"]["p50"] for row in load("run")["rows"] if "seconds" in row]
    for line in table:
        assert any(f"{value:.3f}" == line.split(" | ")[2] for value in seconds)


@pytest.mark.parametrize("name", ["run", "scenario", "simulate", "quality", "drafts", "kernel", "serve"])
def test_result_files_carry_their_circumstances(name: str) -> None:
    result = load(name)
    assert result["schema_version"] == 2 and result["commit"] and result["host"]["cores"] and result["versions"]
    assert result["rows"]


def sdxl_fits(tried: str) -> bool:
    """Whether the test of a start's memory tries these cards."""
    return tried in (ROOT / "tests" / "engines" / "tensorrt" / "test_contexts.py").read_text()


def moves_gain(link: str, said: float) -> bool:
    gain = max(row["gain"] for row in moves.measure() if row["link"] == link)
    return said == pytest.approx(100 * gain, abs=0.01)


def test_drafts_end_about_twice_as_close() -> None:
    assert "about twice as close" in " ".join(TEXTS["runtime/README.md"].split())
    rows = load("drafts")["rows"]
    gains = []
    for row in rows:
        if row["drafts"] == "corrected":
            same = {key: row[key] for key in ("steps", "guidance_scale", "mode", "k")}
            (frozen,) = [r for r in rows if r["drafts"] == "frozen" and all(r[key] == same[key] for key in same)]
            gains.append(frozen["drift"]["median"] / row["drift"]["median"])
    assert 1.6 < np.median(gains) < 2.6


# every quantity in prose, outside of tables and code: what makes it true
QUANTITIES: dict[tuple[str, str], Callable[[], bool]] = {
    ("bench/README.md", "95 %"): lambda: "(0.025, 0.975)" in (ROOT / "bench" / "statistics.py").read_text(),
    ("bench/README.md", "99 dB"): lambda: load("quality")["rows"][0]["psnr"]["median"] == 99,
    ("bench/README.md", "50 ms"): lambda: all(
        row["evaluation"] >= 0.05 for row in load("simulate")["rows"] if row.get("name") == "SD 1.5 on V100"
    ),
    ("bench/README.md", "99 %"): lambda: "CONFIDENCE = 0.99" in (ROOT / "bench" / "formats.py").read_text(),
    ("engines/README.md", "8 µs"): lambda: all(
        row["us"] <= 8 for row in load("host")["rows"] if row["when"] == "now" and "us" in row
    ),
    ("engines/README.md", "15 GB"): lambda: sdxl_fits("(24, True), (14, False)"),
    ("engines/README.md", "24 GB"): lambda: sdxl_fits("(24, True), (14, False)"),
    ("engines/README.md", "10 ms"): lambda: inspect.signature(moves.measure).parameters["call_seconds"].default == 0.01,
    ("engines/README.md", "20 ms"): lambda: AHEAD_SECONDS == 0.02,
    ("engines/README.md", "0.1 %"): lambda: moves_gain("NVLink", 0.1),
    ("engines/README.md", "0.35 %"): lambda: moves_gain("PCIe 4", 0.35),
    ("runtime/README.md", "50 dB"): lambda: SAME_PSNR == 50,
    ("runtime/README.md", "99 %"): lambda: COVERED == 0.99,
    ("runtime/README.md", "95 %"): lambda: CONFIDENCE == 0.95,
    ("runtime/serve/README.md", "2 seconds"): lambda: RETRIES[0] == 2,
    ("runtime/serve/README.md", "10 seconds"): lambda: RETRIES[1] == 10,
    ("runtime/serve/README.md", "60 seconds"): lambda: RETRIES[2:] == (60.0,),
}
QUANTITY = re.compile(r"\d[\d.,]*\s(?:%|dB|ms|µs|GB|MB|MiB|times|seconds)(?!\w)|\d[\d.,]*×(?!\d)")


def test_quantities_in_prose_are_true() -> None:
    found = {(name, said) for name, text in TEXTS.items() for said in QUANTITY.findall(prose(text))}
    assert found == QUANTITIES.keys()
    wrong = [key for key, true in QUANTITIES.items() if not true()]
    assert not wrong


# --- structure -------------------------------------------------------------------------------------------------------


def test_the_readme_is_short() -> None:
    assert len(TEXTS["README.md"].splitlines()) <= 200


def test_the_first_screen_has_what_strangers_ask_for() -> None:
    first = "\n".join(TEXTS["README.md"].splitlines()[:32])
    assert "](LICENSE)" in first and "](#gpus)" in first and first.count("![") == 1 and "bench:summary" in first
    assert ("](Dockerfile)" in first) == (ROOT / "Dockerfile").is_file()


def test_every_field_and_option_of_the_server_is_documented() -> None:
    text = TEXTS["runtime/serve/README.md"]
    bodies = [one for one in vars(schema).values() if isinstance(one, type) and issubclass(one, BaseModel)]
    fields = {field for body in bodies for field in body.model_fields} | set(schema.UNSUPPORTED)
    options = {option for action in serve_arguments()._actions for option in action.option_strings if len(option) > 2}
    missing = [name for name in (options - {"--help"}) | fields if not re.search(rf"`{name}\b", text)]
    assert not missing
    assert all(f"| `{name}` |" in TEXTS["runtime/README.md"] for name in OPTIONS)


def anchors(text: str) -> set[str]:
    return {anchor(head) for head in re.findall(r"^#+ (.+)$", text, re.MULTILINE)}


@pytest.mark.parametrize("name", [*TEXTS, "CONTRIBUTING.md"])
def test_links_and_images_lead_somewhere(name: str) -> None:
    text = (ROOT / name).read_text()
    for target in re.findall(r"\]\(([^)]+)\)", text):
        path, _, name_there = target.partition("#")
        if not target.startswith("http"):
            found = (ROOT / name).parent / path if path else ROOT / name
            assert found.exists(), f"{name}: {target}"
            assert not name_there or name_there in anchors(found.read_text()), f"{name}: {target}"


@pytest.mark.parametrize("name", [*TEXTS, "CONTRIBUTING.md"])
def test_named_files_exist(name: str) -> None:
    """Paths in backticks, from the root or from the README's own folder."""
    text = re.sub(r"```.*?```", "", (ROOT / name).read_text(), flags=re.DOTALL)
    folder = (ROOT / name).parent
    for path in re.findall(r"`([\w./-]+(?:\.(?:py|cu|md|yaml|toml|cc|h)|/))`", text):
        found = (ROOT / path).exists() or (folder / path).exists() or path.startswith("build/")
        assert found, f"{name}: {path}"


def test_named_tests_exist() -> None:
    """Which test proves what: `engines/test_x.py::test_name`, from the folder of tests."""
    texts = [path.read_text() for path in (ROOT / "tests").rglob("*.md")]
    named = [name for text in texts for name in re.findall(r"`([\w/]+\.py)::(\w+)`", text)]
    assert len(named) > 20
    for path, test in named:
        file = ROOT / "tests" / path
        assert file.is_file() and f"\ndef {test}(" in file.read_text(), f"there is no test {path}::{test}"
