"""The command lines of `runtime` and `engines` as a user meets them."""

from __future__ import annotations

import io
import json
import os
import pickle
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from engines import __main__ as engines_command
from engines import ort
from engines.devices import machine
from engines.manifest import MANIFEST
from engines.store import PARTIAL, Bundle, plan_key
from runtime import __main__ as runtime_command
from runtime.sampling.noise import gaussian
from tests import ROOT
from tests.copies import NETWORK, NETWORKS, contents, cut_in_half, small_copy

PROMPT = "a large red star at the left on blue background"
ROW = {
    "model", "mode", "scheduler", "steps", "k", "lanes", "devices", "guidance_split", "rounds", "evaluations", "calls",
    "seconds",
}  # fmt: skip
Command = Callable[..., int]


@pytest.fixture
def draw(shapes: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Command:
    """`python -m runtime PROMPT ...` in this process and an empty folder, with two steps on one thread."""
    monkeypatch.chdir(tmp_path)

    def command(*arguments: str) -> int:
        quick = ["--build", str(shapes.folder.parent), "--devices", "cpu@1", "--steps", "2"]
        monkeypatch.setattr(sys, "argv", ["runtime", PROMPT, *quick, *arguments])
        return runtime_command.main()

    return command


@pytest.fixture
def bundle(shapes: Bundle, tmp_path: Path) -> Iterator[Bundle]:
    copy = small_copy(shapes, tmp_path / "build" / "shapes")
    yield copy
    shutil.rmtree(copy.folder)  # pytest keeps the folders of its last three runs


@pytest.fixture
def engines(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> Command:
    """`python -m engines ...` on the copied bundle in this process."""

    def command(*arguments: str) -> int:
        monkeypatch.setattr(sys, "argv", ["engines", *arguments, "--build", str(bundle.folder.parent)])
        return engines_command.main()

    return command


def python(checkout: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", *arguments], cwd=checkout, capture_output=True, text=True, check=False)


def initial_noise(shapes: Bundle, seed: int, images: int = 1) -> np.ndarray:
    manifest = shapes.manifest
    side = manifest.sizes.height // manifest.vae_scale_factor, manifest.sizes.width // manifest.vae_scale_factor
    return np.stack([gaussian(seed, image, 0, (manifest.latent_channels, *side)) for image in range(images)])


# the checkout


def test_the_hooks_are_valid_and_need_no_network(tmp_path: Path) -> None:
    config = ROOT / ".pre-commit-config.yaml"
    assert python(ROOT, "pre_commit", "validate-config", str(config)).returncode == 0
    assert re.findall(r"repo: (\S+)", config.read_text()) == ["local"]
    entries = [shlex.split(entry) for entry in re.findall(r"entry: (.+)", config.read_text())]
    assert len(entries) == 4 and all(words[0].startswith(".venv/bin/") for words in entries)
    untidy = tmp_path / "untidy.py"
    untidy.write_text("import os\nx = [1,2]\n")
    check, tidy = ([sys.executable, "-m", "ruff", *words[1:], str(untidy)] for words in entries[:2])
    assert subprocess.run(check, cwd=tmp_path, capture_output=True, check=False).returncode == 0
    subprocess.run(tidy, cwd=tmp_path, capture_output=True, check=True)
    assert untidy.read_text() == "x = [1, 2]\n", "an unused import goes, and the rest is formatted"


# runtime


def test_the_version_is_that_of_the_project(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["runtime", "--version"])
    with pytest.raises(SystemExit) as stopped:
        runtime_command.main()
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert stopped.value.code == 0 and capsys.readouterr().out == f"{project['name']} {project['version']}\n"


def test_an_image_and_its_report_are_written(shapes: Bundle, tmp_path: Path, checkout: Path) -> None:
    out, report = tmp_path / "star.png", tmp_path / "report.json"
    parallel = ["--devices", "cpu*2", "--mode", "conservative", "--k", "2", "--steps", "3"]
    done = python(checkout, "runtime", PROMPT, *parallel, "--out", str(out), "--report", str(report), "--quiet")
    assert done.returncode == 0 and done.stderr == ""
    assert done.stdout.splitlines()[0] == str(out) and "3 steps in 2 rounds on 2 lanes" in done.stdout
    with Image.open(out) as image:
        assert image.size == (shapes.manifest.sizes.width, shapes.manifest.sizes.height) and image.mode == "RGB"
    result = json.loads(report.read_text())
    assert result.keys() == {"schema_version", "commit", "host", "versions", "rows"} and result["schema_version"] == 2
    (row,) = result["rows"]
    assert row.keys() >= ROW
    assert (row["model"], row["mode"], row["scheduler"]) == ("shapes", "conservative", "ddim")
    assert (row["steps"], row["k"], row["lanes"], row["rounds"], row["evaluations"]) == (3, 2, 2, 2, 3)
    assert row["devices"] == "cpu/0,cpu/1" and row["guidance_split"] is True and row["calls"] >= row["rounds"]
    assert len([span for span in row["timeline"] if span["kind"] == "call"]) == row["calls"]
    assert row["seconds"].keys() == {"text", "wait", "denoise", "decode", "total"}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["report.json", "star.png"]


@pytest.mark.parametrize("name", ["image.png", "image.jpg", "image.JPEG", "image.webp"])
def test_the_image_has_the_format_of_its_name(name: str, draw: Command, tmp_path: Path) -> None:
    assert draw("--out", name) == 0
    with Image.open(tmp_path / name) as image:
        image.load()
        assert image.format == {"png": "PNG", "webp": "WEBP"}.get(name[6:], "JPEG")


def test_a_seed_repeats_byte_for_byte_and_another_differs(draw: Command, tmp_path: Path) -> None:
    for name, seed in (("zero", "0"), ("again", "0"), ("one", "1")):
        assert draw("--seed", seed, "--out", f"{name}.png", "--save-latents", f"{name}.npy", "--quiet") == 0
    for suffix in (".png", ".npy"):
        zero, again, one = ((tmp_path / f"{name}{suffix}").read_bytes() for name in ("zero", "again", "one"))
        assert zero == again != one


def test_latents_go_in_as_noise_and_come_out_finished(draw: Command, shapes: Bundle, tmp_path: Path) -> None:
    noise = initial_noise(shapes, seed=7)
    np.save(tmp_path / "noise.npy", noise)
    assert draw("--latents", "noise.npy", "--save-latents", "given.npy", "--out", "given.png") == 0
    assert draw("--seed", "7", "--save-latents", "drawn.npy", "--out", "drawn.png") == 0
    given = np.load(tmp_path / "given.npy")
    assert given.shape == noise.shape and given.dtype == np.float32 and not np.array_equal(given, noise)
    assert np.array_equal(given, np.load(tmp_path / "drawn.npy"))
    with Image.open(tmp_path / "given.png") as one, Image.open(tmp_path / "drawn.png") as other:
        assert one.tobytes() == other.tobytes() and one.text != other.text  # type: ignore[attr-defined]
    assert draw("--latents", "given.npy") == 0  # finished latents have the form of initial ones


def test_several_images_are_numbered_and_differ(draw: Command, tmp_path: Path) -> None:
    assert draw("--num-images-per-prompt", "2", "--quiet") == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["image-0.png", "image-1.png"]
    with Image.open(tmp_path / "image-0.png") as one, Image.open(tmp_path / "image-1.png") as other:
        assert one.tobytes() != other.tobytes()


SIZES = "32 to 128 pixels in steps of 16"
BAD: dict[str, tuple[list[str], list[str]]] = {
    "mode": (["--mode", "fast"], ["mode 'fast'", "sequential, conservative, aggressive"]),
    "drafts": (["--drafts", "thawed"], ["drafts 'thawed'", "frozen"]),
    "device": (["--devices", "gpu"], ["device 'gpu'", "auto, cpu, cpu@THREADS, cpu*LANES"]),
    "cuda": (["--devices", "cuda:99"], ["no cuda:99", "--devices auto or cpu"]),
    "scheduler": (["--scheduler", "nothing"], ["scheduler 'nothing'", "ddim"]),
    "model": (["--model", "nothing"], ["model 'nothing'", "make engines MODEL=nothing"]),
    "no steps": (["--steps", "0"], ["num_inference_steps", "1 to 1000", "0"]),
    "negative steps": (["--steps", "-1"], ["num_inference_steps", "1 to 1000", "-1"]),
    "more steps than trained": (["--steps", "1001"], ["num_inference_steps", "1 to 1000", "1001"]),
    "steps beyond the offset": (["--steps", "1000"], ["steps_offset 1", "use fewer steps"]),
    "negative tolerance": (["--tolerance", "-1"], ["tolerance", "at least 0", "-1"]),
    "tolerance nan": (["--tolerance", "nan"], ["tolerance", "finite", "nan"]),
    "blocks that do not fit": (
        ["--mode", "srds", "--steps", "12", "--blocks", "8"],
        ["12 steps", "8 blocks", "1, 2, 3, 4, 6, 12"],
    ),
    "more blocks than steps": (["--mode", "srds", "--steps", "12", "--blocks", "13"], ["blocks", "1 to 12", "13"]),
    "srds on a multistep scheduler": (
        ["--mode", "srds", "--scheduler", "dpm++2m", "--steps", "9"],
        ["srds", "history"],
    ),
    "drafts of few long steps": (["--mode", "aggressive", "--scheduler", "lcm", "--steps", "4"], ["lcm", "too long"]),
    "flow matching": (["--scheduler", "flow_euler"], ["flow_euler", "trained by flow matching"]),
    "large eta": (["--eta", "1.5"], ["eta", "from 0 to 1", "1.5"]),
    "eta of another scheduler": (["--eta", "0.5", "--scheduler", "euler"], ["eta belongs to ddim"]),
    "k of auto": (["--mode", "auto", "--k", "2"], ["auto chooses k"]),
    "no drafts": (["--mode", "aggressive", "--k", "0"], ["k must be", "1 to 1000", "0"]),
    "odd width": (["--width", "63"], ["width", SIZES, "63"]),
    "another width": (["--width", "144"], ["width=144", SIZES]),
    "odd height": (["--height", "-8"], ["height", SIZES, "-8"]),
    "another height": (["--height", "16"], ["height=16", SIZES]),
    "guidance nan": (["--guidance", "nan"], ["guidance_scale", "finite", "nan"]),
    "guidance inf": (["--guidance", "inf"], ["guidance_scale", "finite", "inf"]),
    "negative seed": (["--seed", "-2"], ["seed", "from -1", "-2"]),
    "large seed": (["--seed", str(2**64)], ["seed", str(2**64 - 1)]),
    "no images": (["--num-images-per-prompt", "0"], ["num_images_per_prompt", "1 to 64"]),
    "image's folder": (["--out", "nowhere/image.png"], ["nowhere/image.png", "create it first"]),
    "report's folder": (["--report", "nowhere/r.json"], ["nowhere/r.json", "create it first"]),
    "latents' folder": (["--save-latents", "nowhere/l.npy"], ["nowhere/l.npy", "create it first"]),
    "image's suffix": (["--out", "image.tiff"], ["image.tiff", ".png, .jpg or .webp"]),
    "no suffix": (["--out", "image"], ["image", ".png, .jpg or .webp"]),
}


def only_error(printed: str, words: list[str]) -> None:
    """One line, and it names what was wrong and what to do."""
    assert printed.count("\n") == 1 and printed.startswith("error: ")
    assert [word for word in words if word not in printed] == []


@pytest.mark.parametrize("case", BAD)
def test_a_bad_argument_is_refused_in_one_line_and_nothing_is_written(
    case: str, draw: Command, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments, words = BAD[case]
    assert draw(*arguments) == 1
    only_error(capsys.readouterr().err, words)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("case", ["mode", "device"])
def test_a_bad_argument_ends_the_process_with_exit_code_1(
    case: str, shapes: Bundle, tmp_path: Path, checkout: Path
) -> None:
    arguments, words = BAD[case]
    done = python(checkout, "runtime", PROMPT, "--out", str(tmp_path / "image.png"), *arguments)
    assert done.returncode == 1 and done.stdout == ""
    only_error(done.stderr, words)
    assert list(tmp_path.iterdir()) == []


def saved(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


def zipped() -> bytes:
    file = io.BytesIO()
    np.savez(file, noise=np.zeros((1, 4, 16, 16), np.float32))
    return file.getvalue()


GOOD = np.zeros((1, 4, 16, 16), np.float32)
BAD_LATENTS: dict[str, tuple[bytes | None, str]] = {
    "missing": (None, "cannot be read"),
    "empty": (b"", "cannot be read"),
    "text": (b"hello", "cannot be read"),
    "truncated": (saved(GOOD)[:-1], "cannot be read"),
    "truncated header": (saved(GOOD)[:40], "cannot be read"),
    "pickle": (pickle.dumps([1.0]), "cannot be read"),
    "broken archive": (zipped()[:100], "cannot be read"),
    "archive": (zipped(), "save one array of numbers"),
    "words": (saved(np.full(GOOD.shape, "x")), "save one array of numbers"),
    "complex": (saved(GOOD.astype(np.complex64)), "save one array of numbers"),
    "another shape": (saved(GOOD[0]), "must have shape (1, 4, 16, 16), not (4, 16, 16)"),
    "two images": (saved(GOOD.repeat(2, 0)), "must have shape (1, 4, 16, 16), not (2, 4, 16, 16)"),
    "nan": (saved(GOOD * np.float32("nan")), "NaN or infinity"),
}


@pytest.mark.parametrize("case", BAD_LATENTS)
def test_bad_latents_are_refused_in_one_line_and_nothing_is_written(
    case: str, draw: Command, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    content, words = BAD_LATENTS[case]
    path = tmp_path / "noise.npy"
    if content is not None:
        path.write_bytes(content)
    before = contents(tmp_path)
    assert draw("--latents", "noise.npy") == 1
    only_error(capsys.readouterr().err, [words])
    assert contents(tmp_path) == before


def test_a_model_without_plans_is_refused_with_the_command_that_compiles_it(
    shapes: Bundle, draw: Command, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.rmtree(small_copy(shapes, tmp_path / "build" / "shapes").folder / "plans")
    assert draw("--build", str(tmp_path / "build")) == 1
    only_error(capsys.readouterr().err, [f"no compiled {NETWORK}", "ever built here", "`make engines MODEL=shapes`"])
    assert not (tmp_path / "image.png").exists()


# engines


def test_list_shows_what_is_exported_and_what_fits_this_machine(
    bundle: Bundle, engines: Command, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    source = tmp_path / "compiled"
    source.write_text("compiled")
    other = bundle.add_plan(NETWORK, ort.plan_fields(bundle, NETWORK) | {"machine": "another"}, [source], 0.0)
    assert engines("list") == 0
    first, *lines = capsys.readouterr().out.splitlines()
    assert (
        first == "shapes  StableDiffusionPipeline  fp32  32 to 128 pixels in steps of 16"
        and len(lines) == len(NETWORKS) + 1
    )
    for line in lines:
        fits = "for another machine, version or export" if other.key in line else "fits this machine"
        assert line.endswith(fits) and any(name in line for name in NETWORKS)


def test_list_of_nothing_says_where_to_start(tmp_path: Path, checkout: Path) -> None:
    done = python(checkout, "engines", "list", "--build", str(tmp_path))
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == f"nothing is exported in {tmp_path} yet: start with `make engines`\n"


def test_build_compiles_what_is_missing_and_then_nothing(
    bundle: Bundle, engines: Command, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.rmtree(bundle.plan_folder(plan_key(ort.plan_fields(bundle, NETWORK))))
    assert engines("build") == 0
    compiled, there = capsys.readouterr().out.splitlines()
    assert compiled.startswith(f"shapes: {NETWORK} compiled in ") and there == f"shapes: {NETWORKS[1]} is up to date"
    before = contents(bundle.folder)
    assert engines("build", "shapes", "--devices", "cpu@1") == 0
    assert capsys.readouterr().out == "".join(f"shapes: {network} is up to date\n" for network in NETWORKS)
    assert contents(bundle.folder) == before


def test_verify_tells_damage_from_its_absence(
    bundle: Bundle, engines: Command, capsys: pytest.CaptureFixture[str]
) -> None:
    assert engines("verify") == 0
    assert capsys.readouterr().out == "every file is what its record says\n"
    path = bundle.folder / bundle.manifest.tokenizers[0].file.name
    cut_in_half(path)
    assert engines("verify", "shapes") == 1
    assert f"{path} was altered or truncated" in capsys.readouterr().out


def test_explain_names_the_plan_in_use_or_what_differs(
    bundle: Bundle, engines: Command, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert engines("explain") == 0
    printed = capsys.readouterr().out
    for network in NETWORKS:
        fields = ort.plan_fields(bundle, network)
        assert f"shapes/{network}: uses plan {plan_key(fields)}\n" in printed
        assert all(value in printed for value in fields.values())
    here = machine()
    monkeypatch.setattr(ort, "machine", lambda: "another CPU")
    assert engines("explain", "shapes") == 1
    assert f"shapes/{NETWORK}: machine: built for {here}, now another CPU\n" in capsys.readouterr().out


def test_gc_deletes_leftovers_and_keeps_what_fits(
    bundle: Bundle, engines: Command, capsys: pytest.CaptureFixture[str]
) -> None:
    before = contents(bundle.folder.parent)
    left = bundle.folder.parent / f"{PARTIAL}0123"
    left.mkdir()
    (left / "unet.onnx").write_text("half")
    assert engines("gc") == 0
    assert capsys.readouterr().out == f"deleted {left}\n"
    assert contents(bundle.folder.parent) == before and engines("verify") == 0


@pytest.mark.parametrize("command", ["list", "build", "verify", "explain", "gc"])
def test_an_engines_command_refuses_an_unknown_model_in_one_line(
    command: str, engines: Command, capsys: pytest.CaptureFixture[str]
) -> None:
    assert engines(command, "nothing") == 1
    printed = capsys.readouterr()
    assert printed.out == ""
    only_error(printed.err, ["'nothing'", "exported: shapes", "`make engines MODEL=nothing`"])


@pytest.mark.parametrize("command", ["list", "build", "verify", "explain", "gc"])
def test_an_engines_command_refuses_a_damaged_manifest_in_one_line(
    command: str, bundle: Bundle, engines: Command, capsys: pytest.CaptureFixture[str]
) -> None:
    cut_in_half(bundle.folder / MANIFEST)
    before = contents(bundle.folder)
    assert engines(command) == 1
    only_error(capsys.readouterr().err, [str(bundle.folder / MANIFEST), "`make engines MODEL=shapes`"])
    assert contents(bundle.folder) == before


def test_build_refuses_an_unknown_device_and_damaged_sources_before_it_starts(
    bundle: Bundle, engines: Command, capsys: pytest.CaptureFixture[str]
) -> None:
    assert engines("build", "--devices", "gpu") == 1
    only_error(capsys.readouterr().err, ["unknown device 'gpu'", "auto, cpu"])
    path = bundle.folder / bundle.manifest.networks[NETWORK].file.name
    cut_in_half(path)
    assert engines("build") == 1
    only_error(capsys.readouterr().err, [f"{path} was altered or truncated", "`make engines MODEL=shapes`"])


def test_an_engines_command_in_a_process_ends_with_exit_code_1(bundle: Bundle, checkout: Path) -> None:
    done = python(checkout, "engines", "verify", "nothing", "--build", str(bundle.folder.parent))
    assert (done.returncode, done.stdout) == (1, "")
    only_error(done.stderr, ["'nothing'", "exported: shapes"])


def test_bytes_that_are_no_text_are_one_line(tmp_path: Path) -> None:
    words: list[str | bytes] = [
        sys.executable,
        "-m",
        "runtime",
        b"a \xff star",
        "--quiet",
        "--out",
        str(tmp_path / "a.png"),
    ]
    run = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, env={**os.environ, "PYTHONUTF8": "1"})
    assert run.returncode == 1 and not list(tmp_path.iterdir())
    assert run.stderr == "error: prompt is no valid Unicode: it holds '\\udcff' at character 2: send UTF-8\n"


def test_a_full_disk_leaves_nothing(tmp_path: Path) -> None:
    """A limit on the size of files stands for a full disk; an image of this size takes more than 1 kB."""
    code = (
        "import resource, runpy, sys\n"
        "sys.argv = ['runtime', 'a star', '--steps', '1', '--quiet', '--out', sys.argv[1]]\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000)); runpy.run_module('runtime', run_name='__main__')"
    )
    words = [sys.executable, "-c", code, str(tmp_path / "a.png")]
    run = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 1 and "a.png cannot be written: File too large" in run.stderr
    assert not list(tmp_path.iterdir())
