"""Exports: refused with a reason, equal to their source, whole or not there, and not made twice."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import onnxruntime
import pytest
from numpy.typing import NDArray
from tokenizers import Tokenizer

from engines.manifest import MANIFEST, Manifest
from engines.ort import Session
from engines.store import PARTIAL, Bundle
from export import bundle, spec
from export.__main__ import main
from export.bundle import up_to_date
from export.spec import EMBEDDED, ExportSpec
from tests.copies import DAMAGES, contents, cut_in_half, flip_last_byte, small_copy

NETWORKS = ("text_encoder", "denoiser", "vae_decoder", "vae_encoder")
WEIGHTS = (
    "text_encoder/model.safetensors",
    "unet/diffusion_pytorch_model.safetensors",
    "vae/diffusion_pytorch_model.safetensors",
)
Feeds = dict[str, NDArray[Any]]


@pytest.fixture
def source(tmp_path: Path) -> Iterator[Path]:
    """A copy of the embedded model's diffusers folder, to be damaged."""
    folder = tmp_path / "source" / "copied"
    shutil.copytree(EMBEDDED["shapes"], folder)
    yield folder
    shutil.rmtree(folder)  # pytest keeps the folders of its last three runs


@pytest.fixture
def previous(shapes: Bundle, tmp_path: Path) -> Iterator[Path]:
    """The bundle of an earlier export of `source`; its manifest names another source."""
    copy = small_copy(shapes, tmp_path / "build" / "copied")
    copy.manifest.model_copy(update={"source": "earlier"}).write(copy.folder)
    yield copy.folder
    shutil.rmtree(copy.folder)


@pytest.fixture(scope="module")
def loading() -> ModuleType:
    """`export.loading`, imported before a test captures the stream that the libraries log to."""
    from export import loading

    return loading


def identity(folder: Path) -> str:
    return ExportSpec("shapes", folder).identity()


def export(monkeypatch: pytest.MonkeyPatch, model: Path | str, build: Path) -> int:
    monkeypatch.setattr(sys, "argv", ["export", str(model), "--build", str(build)])
    return main()


def message(printed: str) -> str:
    """The one error of a run; the libraries' progress bars and warnings may come before it."""
    *before, last = printed.splitlines()
    assert last.startswith("error: ")
    assert [line for line in before if line.startswith("error: ") or "Traceback" in line] == []
    return last


def leftovers(build: Path) -> list[Path]:
    return list(build.rglob(f"{PARTIAL}*"))


# refused


@pytest.mark.parametrize("model", ["nothing", "/nothing/there"])
def test_an_unknown_model_is_refused_with_those_that_exist(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert export(monkeypatch, model, tmp_path / "build") == 1
    printed = capsys.readouterr()
    assert printed.out == "" and len(printed.err.splitlines()) == 1
    assert f"unknown model {model!r}: use shapes, the folder of a diffusers model, a checkpoint" in message(printed.err)
    assert contents(tmp_path) == {}


def write_index(text: str) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        (folder / "model_index.json").write_text(text)

    return write


def remove_index(folder: Path) -> None:
    (folder / "model_index.json").unlink()


def damage(file: str, how: Callable[[Path], None]) -> Callable[[Path], None]:
    return lambda folder: how(folder / file)


@pytest.mark.usefixtures("loading")
@pytest.mark.parametrize(
    ("words", "change"),
    [
        pytest.param(["is not a diffusers model", "model_index.json"], remove_index, id="no pipeline"),
        pytest.param(
            ["KandinskyPipeline", "exports StableDiffusionPipeline", "FluxPipeline"],
            write_index(json.dumps({"_class_name": "KandinskyPipeline"})),
            id="another family",
        ),
        pytest.param(["exports StableDiffusionPipeline"], write_index("{}"), id="no family"),
        pytest.param(["cannot be loaded"], write_index('{"_class_na'), id="truncated index"),
        pytest.param(["cannot be loaded"], damage("unet/config.json", cut_in_half), id="truncated config"),
        *(pytest.param(["cannot be loaded"], damage(file, cut_in_half), id=f"truncated {file}") for file in WEIGHTS),
        *(pytest.param(["cannot be loaded"], damage(file, Path.unlink), id=f"missing {file}") for file in WEIGHTS),
    ],
)
def test_a_source_that_cannot_be_exported_is_refused_and_the_earlier_export_stays(
    words: list[str],
    change: Callable[[Path], None],
    source: Path,
    previous: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    change(source)
    before = contents(previous.parent)
    assert export(monkeypatch, source, previous.parent) == 1
    line = message(capsys.readouterr().err)
    assert all(word in line for word in [str(source), *words])
    assert contents(previous.parent) == before and leftovers(previous.parent) == []


def test_a_full_disk_ends_an_export_with_advice_and_the_earlier_one_stays(
    loading: ModuleType,
    source: Path,
    previous: Path,
    shapes: Bundle,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def full(file: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    before = contents(previous.parent)
    monkeypatch.setattr(bundle, "finished", lambda partial, network: shapes.manifest.networks[network])
    monkeypatch.setattr(Path, "unlink", lambda path: None)
    monkeypatch.setattr(os, "fsync", full)
    assert export(monkeypatch, source, previous.parent) == 1
    assert "No space left on device" in (line := message(capsys.readouterr().err))
    assert "free some space and run it again" in line
    assert contents(previous.parent) == before and leftovers(previous.parent) == []


SMALL_FILES = """
import resource, runpy, sys
resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))
sys.argv = ["export", sys.argv[1], "--build", sys.argv[2]]
runpy.run_module("export", run_name="__main__")
"""


@pytest.mark.slow
def test_an_export_that_cannot_write_ends_with_one_message_and_the_earlier_one_stays(
    source: Path, previous: Path, checkout: Path
) -> None:
    before = contents(previous.parent)
    run = [sys.executable, "-c", SMALL_FILES, str(source), str(previous.parent)]
    done = subprocess.run(run, cwd=checkout, capture_output=True, text=True, check=False)
    assert done.returncode == 1 and "could not be written" in message(done.stderr)
    assert contents(previous.parent) == before and leftovers(previous.parent) == []


# not made twice


def test_an_export_that_is_up_to_date_imports_no_torch_and_changes_nothing(
    shapes: Bundle, tmp_path: Path, checkout: Path
) -> None:
    folder = tmp_path / "shapes"
    shutil.copytree(shapes.folder, folder, ignore=shutil.ignore_patterns("plans"))
    before = [(path, path.stat().st_mtime_ns) for path in sorted(folder.iterdir())]
    run = [sys.executable, "-X", "importtime", "-m", "export", "shapes", "--build", str(tmp_path)]
    done = subprocess.run(run, cwd=checkout, capture_output=True, text=True, check=True)
    imported = {line.rsplit("|", 1)[-1].strip() for line in done.stderr.splitlines()}
    assert "engines.store" in imported and not imported & {"torch", "diffusers", "transformers", "onnx"}
    assert done.stdout == f"shapes: the export in {folder} is up to date\n"
    assert [(path, path.stat().st_mtime_ns) for path in sorted(folder.iterdir())] == before
    shutil.rmtree(folder)


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("file", [MANIFEST, "tokenizer.json", "vae_decoder.onnx"])
def test_a_damaged_export_is_not_up_to_date(file: str, damage: str, shapes: Bundle, tmp_path: Path) -> None:
    copy = small_copy(shapes, tmp_path / "shapes")
    assert up_to_date(copy.folder, copy.manifest.source)
    DAMAGES[damage](copy.folder / file)
    assert not up_to_date(copy.folder, copy.manifest.source)


def test_an_export_of_another_source_is_not_up_to_date(shapes: Bundle) -> None:
    assert not up_to_date(shapes.folder, shapes.manifest.source + "x")


def rename_weights(folder: Path) -> None:
    path = folder / WEIGHTS[1]
    path.rename(path.with_stem("renamed"))


@pytest.mark.parametrize(
    "change",
    [
        *(pytest.param(damage(file, flip_last_byte), id=f"a byte of {file}") for file in WEIGHTS),
        pytest.param(damage("scheduler/scheduler_config.json", flip_last_byte), id="a config"),
        pytest.param(rename_weights, id="a name"),
    ],
)
def test_the_identity_of_a_source_depends_on(change: Callable[[Path], None], source: Path) -> None:
    before = identity(source)
    change(source)
    assert identity(source) != before


def test_the_identity_of_a_source_depends_on_the_packages(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = identity(source)
    monkeypatch.setattr(spec, "version", lambda package: "0")
    assert identity(source) != before


def test_the_identity_of_a_source_does_not_depend_on_its_place_or_its_readme(source: Path) -> None:
    (source / "README.md").write_text("words")
    assert identity(source) == identity(EMBEDDED["shapes"])


# equal to its source


@pytest.mark.parametrize("network", NETWORKS)
def test_the_manifest_states_parity_with_torch_within_its_bound(network: str, shapes: Bundle) -> None:
    parity = shapes.manifest.networks[network].parity
    assert parity.bound == 1e-4 and 0 <= parity.relative_error <= parity.bound
    assert len(set(parity.batches)) > 1 in parity.batches


def test_every_network_takes_any_batch_and_those_with_latents_any_size(shapes: Bundle) -> None:
    assert tuple(shapes.manifest.networks) == NETWORKS
    for name, network in shapes.manifest.networks.items():
        axes = {axis for one in (*network.inputs, *network.outputs) for axis in one.shape if isinstance(axis, str)}
        assert all(one.shape[0] == "batch" for one in (*network.inputs, *network.outputs))
        assert name == "text_encoder" or {"batch", "height", "width"} <= axes
        assert axes <= {"batch", "height", "width", "4*height", "4*width"}


def random_inputs(bundle: Bundle, network: str, batch: int, rng: np.random.Generator) -> Feeds:
    """Token ids, timesteps that differ within the batch, and normal numbers for everything else; a random size."""
    manifest = bundle.manifest
    words = Tokenizer.from_str(bundle.tokenizer(manifest.tokenizers[0]).decode()).get_vocab_size()
    width, height = (int(side) for side in rng.choice(range(32, 129, 16), 2))
    axes = manifest.latent_axes(width, height, batch)
    feeds: Feeds = {}
    for tensor in manifest.networks[network].inputs:
        shape = tensor.resolve(axes)
        if tensor.name == "input_ids":
            feeds[tensor.name] = rng.integers(words, size=shape)
        elif tensor.name == "clip_skip":
            feeds[tensor.name] = rng.integers(manifest.clip_skip + 1, size=shape)
        elif tensor.name == "timestep":
            feeds[tensor.name] = rng.choice(len(manifest.alphas_cumprod), batch, replace=False).astype(np.float32)
        else:
            feeds[tensor.name] = rng.standard_normal(shape, np.float32)
    return feeds


def assert_close(actual: NDArray[Any], expected: NDArray[Any], bound: float) -> None:
    """No element differs by more than `bound` times the largest expected one."""
    error, scale = np.abs(actual - expected).max(), np.abs(expected).max()
    assert np.isfinite(expected).all() and error <= bound * scale, f"{error} of {scale}"


@pytest.mark.parametrize("network", NETWORKS)
def test_a_batch_of_mixed_rows_equals_the_rows_one_by_one(
    network: str, shapes: Bundle, rng: np.random.Generator
) -> None:
    session = Session(shapes, network, 1)
    feeds = random_inputs(shapes, network, 5, rng)
    rows = [session.run(**{name: value[n : n + 1] for name, value in feeds.items()}) for n in range(5)]
    for name, value in session.run(**feeds).items():
        assert_close(value, np.concatenate([row[name] for row in rows]), 1e-5)


@pytest.fixture(scope="module")
def torch_networks(loading: ModuleType) -> dict[str, Any]:
    """The embedded model's modules in torch, by network."""
    source = loading.open_source(EMBEDDED["shapes"])
    networks = source.family.networks.items()
    return {name: make(loading.load(source, parts, "fp32")) for name, (parts, make) in networks}


@pytest.mark.slow
@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("batch", [1, 2, 5])
def test_onnx_equals_torch_on_fresh_inputs(
    batch: int, network: str, shapes: Bundle, torch_networks: dict[str, Any], rng: np.random.Generator
) -> None:
    import torch

    feeds = random_inputs(shapes, network, batch, rng)
    session = onnxruntime.InferenceSession(shapes.onnx(network), providers=["CPUExecutionProvider"])
    assert [value.name for value in session.get_inputs()] == [one.name for one in torch_networks[network].inputs]
    with torch.no_grad():
        inputs = (torch.from_numpy(feeds[one.name]) for one in torch_networks[network].inputs)
        expected = torch_networks[network].module.eval()(*inputs).numpy()
    assert_close(session.run(None, feeds)[0], expected, 1e-4)


def test_a_manifest_is_read_as_it_was_written(shapes: Bundle, tmp_path: Path) -> None:
    shapes.manifest.write(tmp_path)
    assert Manifest.read(tmp_path) == shapes.manifest
