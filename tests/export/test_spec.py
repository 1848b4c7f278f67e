"""What to export, as it is written on the command line, and the names and hashes that follow from it."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from engines.errors import ParameterError
from export.spec import EMBEDDED, ExportSpec, parse_loras, parse_sides, resolve
from tests import ROOT
from tests.tiny import lora_file

pytestmark = pytest.mark.filterwarnings("ignore")  # diffusers and transformers, about themselves


def test_the_identity_depends_on_what_is_fused_how_and_in_which_order(
    tiny: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = tiny("sd1")
    files = [lora_file(folder, tmp_path / f"{name}.safetensors", seed) for seed, name in enumerate(("one", "two"))]
    same = Path(shutil.copy(files[0], tmp_path / "renamed.safetensors"))
    one, two = ((file, 1.0) for file in files)
    several = [(), (one,), (two,), (one, two), (two, one), ((files[0], 0.5),)]
    found = [ExportSpec("x", folder, loras).identity() for loras in several]
    assert len(set(found)) == len(several)
    assert ExportSpec("x", folder, ((same, 1.0),)).identity() == found[1], "the content counts, not the name"


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("missing.safetensors", "there is no LoRA file missing.safetensors"),
        ("file.safetensors:much", "the scale behind the colon must be a number"),
        ("file.safetensors:11", "between -10 and 10"),
        ("file.bin", "must be safetensors"),
    ],
)
def test_lora_words_that_cannot_be(word: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("file.safetensors", "file.bin"):
        (tmp_path / name).touch()
    with pytest.raises(ParameterError, match=message):
        parse_loras([word])


def test_lora_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.safetensors").touch()
    assert parse_loras(["a.safetensors", "a.safetensors:0.8", "a.safetensors:-1e-1"]) == tuple(
        (Path("a.safetensors"), scale) for scale in (1.0, 0.8, -0.1)
    )


def test_make_and_the_export_give_a_bundle_the_same_name(checkout: Path) -> None:
    words = ["MODEL=some/folder/sd15/", "LORA=a/one.safetensors:0.8 two.safetensors", "SIZES=512-1024"]
    run = ["make", "--dry-run", "--always-make", "engines", "DEVICES=cpu", *words]
    printed = subprocess.run(run, cwd=checkout, capture_output=True, text=True, check=True).stdout
    assert 'engines build "sd15+one:0.8+two"' in printed
    assert "--lora a/one.safetensors:0.8 two.safetensors --sizes 512-1024" in printed
    from export.spec import lora_name

    assert lora_name(["a/one.safetensors:0.8", "two.safetensors"]) == "+one:0.8+two"


def test_sizes() -> None:
    assert parse_sides(None) is None and parse_sides("512") == (512, 512) and parse_sides("256-768") == (256, 768)
    for text in ("512x512", "768-256", "big", "-5"):
        with pytest.raises(ParameterError, match="SIDE or LEAST-MOST"):
            parse_sides(text)


def test_a_name_that_the_hub_cannot_give(tmp_path: Path, checkout: Path) -> None:
    run = [sys.executable, "-m", "export", "nobody/nothing", "--build", str(tmp_path)]
    environment = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "hub"), "PATH": "/usr/bin:/bin"}
    done = subprocess.run(run, cwd=checkout, env=environment, capture_output=True, text=True, check=False)
    last = done.stderr.strip().splitlines()[-1]
    assert done.returncode == 1 and last.startswith("error: nobody/nothing is no folder, and the hub cannot give it")
    assert "HF_HUB_OFFLINE is set" in last and "give the path of a folder" in last


def test_a_model_in_the_hubs_cache_is_found_without_network(
    tiny: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cached = tmp_path / "hub" / "models--someone--sd1"
    shutil.copytree(tiny("sd1"), cached / "snapshots" / ("0" * 40))
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text("0" * 40)
    script = "import sys; from export.spec import resolve; print(*resolve(sys.argv[1]))"
    environment = {"HF_HUB_OFFLINE": "1", "HF_HUB_CACHE": str(tmp_path / "hub"), "PATH": "/usr/bin:/bin"}
    run = [sys.executable, "-c", script, "someone/sd1"]
    done = subprocess.run(run, cwd=ROOT, env=environment, capture_output=True, text=True)
    model, folder = done.stdout.strip().split(" ", 1)
    assert model == "someone/sd1" and Path(folder).resolve() == (cached / "snapshots" / ("0" * 40)).resolve()


def test_an_existing_folder_is_never_looked_up(tiny: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("socket.socket.connect", lambda *_: pytest.fail("the network was used"))
    monkeypatch.chdir(tiny("sd1").parent.parent)
    model, folder = resolve(str(tiny("sd1").relative_to(tiny("sd1").parent.parent)))
    assert model == str(tiny("sd1")) and folder.is_dir()


def test_what_makes_a_bundle_again(tiny: Callable[[str], Path], tmp_path: Path) -> None:
    folder, file = tiny("sd1"), lora_file(tiny("sd1"), tmp_path / "one.safetensors", 0)
    assert ExportSpec("shapes", EMBEDDED["shapes"]).origin == "shapes"
    assert ExportSpec("sd1", folder, sides=(64, 128)).origin == f"{folder} SIZES=64-128"
    assert ExportSpec("sd1", folder, ((file, 0.5),)).origin == f"{folder} LORA={file}:0.5"
    cached = tmp_path / "hub" / "snapshots" / "0123"
    assert ExportSpec("sd1", cached, model="someone/sd1").origin == "someone/sd1", "not where the hub's cache has it"


def test_a_link_has_a_name_of_its_own(tiny: Callable[[str], Path], tmp_path: Path, checkout: Path) -> None:
    link = tmp_path / "mine"
    link.symlink_to(tiny("sd1"))
    assert resolve(str(link)) == (str(link), link)
    for model, name in ((link, "mine"), (".", checkout.name)):
        run = ["make", "--dry-run", "--always-make", "engines", "DEVICES=cpu", f"MODEL={model}"]
        printed = subprocess.run(run, cwd=checkout, capture_output=True, text=True, check=True).stdout
        assert f'engines build "{name}"' in printed
