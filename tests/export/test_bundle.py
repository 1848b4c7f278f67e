"""An export whole: sizes, memory, interruption, names that are taken."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from engines.errors import DeviceError, ExportError, ParameterError
from engines.manifest import MANIFEST
from engines.store import Bundle
from export.bundle import check_name, export, finished
from export.spec import ExportSpec, resolve

pytestmark = pytest.mark.filterwarnings("ignore")  # diffusers and transformers, about themselves


def test_sizes_that_a_model_cannot_do(copied: Path, tmp_path: Path) -> None:
    asked = ExportSpec("copied", copied, sides=(30, 64))
    with pytest.raises(ParameterError, match="multiples of 8 from 8 to 1024, not 30-64"):
        export(asked, tmp_path / "build" / "copied", asked.identity(), "fp32")


def test_too_little_memory_is_said_before_the_work(
    copied: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the first networks could be exported."""
    from export import to_onnx

    real = to_onnx.memory
    monkeypatch.setattr(to_onnx, "memory", lambda name, *rest: 10**15 if name == "denoiser" else real(name, *rest))
    monkeypatch.setattr(to_onnx, "export_network", lambda *_: pytest.fail("it began"))
    asked = ExportSpec("copied", copied)
    with pytest.raises(DeviceError, match=r"exporting denoiser of copied needs about 1000000\.0 GB of memory"):
        export(asked, tmp_path / "build" / "copied", asked.identity(), "fp32")
    assert not list((tmp_path / "build").glob(".partial*"))


@pytest.mark.parametrize("failure", [KeyboardInterrupt(), DeviceError("memory ended")])
def test_an_interrupted_export_goes_on(
    failure: BaseException, least: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    from export import to_onnx

    made: list[str] = []
    real = to_onnx.export_network

    def interrupted(name: str, *rest: Any) -> Any:
        if len(made) == 1 and name == "denoiser":
            (rest[1] / "what a kill leaves").mkdir()
            raise failure
        made.append(name)
        return real(name, *rest)

    monkeypatch.setattr(to_onnx, "export_network", interrupted)
    from export.families import STABLE_DIFFUSION
    from export.to_onnx import STAGES

    networks = {name: STABLE_DIFFUSION.networks[name] for name in ("text_encoder", "denoiser", "vae_decoder")}
    monkeypatch.setattr("export.loading.Source.family", property(lambda self: family(networks)))
    asked, target = ExportSpec("least", least), tmp_path / "build" / "least"
    with pytest.raises(type(failure)):
        export(asked, target, asked.identity(), "fp32")
    (kept,) = (tmp_path / "build").glob(".partial-*")
    assert finished(kept, "text_encoder") and not finished(kept, "denoiser") and not target.exists()
    made.append("interrupted once")
    export(asked, target, asked.identity(), "fp32")
    assert made == ["text_encoder", "interrupted once", "denoiser", "vae_decoder"], (
        "only what was missing is exported again"
    )
    assert (target / MANIFEST).is_file() and not list((tmp_path / "build").glob(".partial-*"))
    assert not Bundle.open(str(target)).damaged_sources()
    assert not list(target.glob("*.done")) and not list(target.glob("*/"))
    shown = capsys.readouterr().err
    for network in ("text_encoder", "denoiser"):
        assert all(f"{network} {stage}" in shown for stage in STAGES)
    assert "12/12" in shown


def family(networks: dict[str, Any]) -> Any:
    from dataclasses import replace

    from export.families import STABLE_DIFFUSION

    return replace(STABLE_DIFFUSION, networks=networks)


def test_no_model_takes_the_place_of_another(copied: Path, tmp_path: Path) -> None:
    taken = Path(shutil.copytree(copied, tmp_path / "shapes"))
    with pytest.raises(ExportError, match="shapes is the name of an embedded model"):
        resolve(str(taken))
    target = tmp_path / "build" / "x-fp16"
    target.mkdir(parents=True)
    there = Bundle.open("shapes").manifest.model_copy(update={"model": "x", "precision": "fp16"})
    there.write(target)
    check_name(target, ExportSpec("x", copied), "fp16")
    check_name(tmp_path / "build" / "other", ExportSpec("other", copied), "fp32")
    with pytest.raises(ExportError, match="holds x in fp16: give the folder another name"):
        check_name(target, ExportSpec("x-fp16", copied), "fp32")
