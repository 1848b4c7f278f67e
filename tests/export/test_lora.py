"""LoRA files: fused into the weights by diffusers and peft, or refused in one message."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from engines.errors import ExportError
from engines.manifest import Manifest
from export.__main__ import main
from tests.tiny import lora_file, weights

pytestmark = pytest.mark.filterwarnings("ignore")  # diffusers and transformers, about themselves


def diffusers_with(folder: Path, *loras: tuple[Path, float]) -> Any:
    """The diffusers pipeline with the denoiser that would be exported."""
    import diffusers

    from export.loading import load, open_source
    from export.lora import Lora

    source = open_source(folder, [Lora(file, scale) for file, scale in loras])
    return diffusers.DiffusionPipeline.from_pretrained(folder, unet=load(source, ["unet"], "fp32").unet)


def test_a_lora_is_added_to_the_weights_in_its_scale(tiny: Callable[[str], Path], tmp_path: Path) -> None:
    from safetensors.numpy import load_file

    folder, plain = tiny("sd1"), weights(tiny("sd1"))
    files = [lora_file(folder, tmp_path / f"{name}.safetensors", seed) for seed, name in enumerate(("one", "two"))]
    both = weights(folder, (files[0], 0.8), (files[1], -0.5))
    changed = 0
    for name, before in plain.items():
        wanted = before.astype(np.float64)
        for file, scale in zip(files, (0.8, -0.5), strict=True):
            pieces = load_file(file)
            down = pieces.get("unet." + name.replace(".weight", ".lora_A.weight"))
            if down is not None:
                up = pieces["unet." + name.replace(".weight", ".lora_B.weight")]
                wanted = wanted + scale * up.astype(np.float64) @ down.astype(np.float64)
                changed += 1
        assert np.abs(both[name] - wanted).max() <= 1e-5 * max(1.0, np.abs(wanted).max()), name
    assert changed == 2 * sum(name.endswith("lora_A.weight") for name in load_file(files[0]))
    again = weights(folder)
    assert all(np.array_equal(again[name], plain[name]) for name in plain), "a LoRA stayed in the folder"


def test_a_lora_reaches_the_text_encoder(tiny: Callable[[str], Path], tmp_path: Path) -> None:
    folder = tiny("sd1")
    file = lora_file(folder, tmp_path / "text.safetensors", 3, text=True)
    before, after = weights(folder, part="text_encoder"), weights(folder, (file, 1.0), part="text_encoder")
    assert sum(not np.array_equal(before[name], after[name]) for name in before) == 6  # two of each of three layers


@pytest.mark.slow
def test_the_baseline_of_benchmarks_has_the_lora_too(
    tiny: Callable[[str], Path], tmp_path: Path, rng: np.random.Generator
) -> None:
    import torch

    from bench.torch_baseline import Setting, TorchBaseline, Wanted

    folder, noise = tiny("sd2"), rng.standard_normal((1, 4, 16, 16), np.float32)
    file = lora_file(folder, tmp_path / "a lora.safetensors", 0)
    found = []
    for loras in ((), ((file, 0.8),)):
        theirs = diffusers_with(folder, *loras)
        options = {"num_inference_steps": 3, "guidance_scale": 4.0, "output_type": "latent"}
        wanted = theirs("a star", latents=torch.from_numpy(noise.copy()), **options).images.numpy()
        baseline = TorchBaseline(Wanted(str(folder), loras=tuple((str(one), scale) for one, scale in loras)), 120)
        try:
            _, latents = baseline.image("a star", noise, Setting("ddim", 3, 4.0))
        finally:
            baseline.close()
        np.testing.assert_allclose(latents, wanted, atol=1e-5 * np.abs(wanted).max())
        found.append(latents)
    plain, fused = found
    assert not np.allclose(plain, fused, rtol=1e-3)


@pytest.mark.parametrize(("folder", "of"), [("sd1", "sdxl"), ("sdxl", "sd1"), ("sd1", "sd3"), ("sd3", "sd1")])
def test_a_lora_of_another_family_is_refused(folder: str, of: str, tiny: Callable[[str], Path], tmp_path: Path) -> None:
    file = lora_file(tiny(of), tmp_path / "other.safetensors", 0)
    with pytest.raises(ExportError, match=r"other\.safetensors does not fit .*, a StableDiffusion"):
        weights(tiny(folder), (file, 1.0), part="text_encoder")


@pytest.mark.slow
def test_a_lora_is_in_its_own_bundle_alone(least: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from export.families import STABLE_DIFFUSION

    networks = {name: STABLE_DIFFUSION.networks[name] for name in ("text_encoder", "denoiser", "vae_decoder")}
    monkeypatch.setattr(
        "export.loading.Source.family", property(lambda self: replace(STABLE_DIFFUSION, networks=networks))
    )
    file = lora_file(least, tmp_path / "one.safetensors", 0)
    files: dict[str, dict[str, bytes]] = {}
    for run, words in {"before": [], "fused": ["--lora", f"{file}:0.8"], "after": []}.items():
        command = ["export", str(least), *words, "--devices", "cpu", "--build", str(tmp_path / run)]
        monkeypatch.setattr("sys.argv", command)
        assert main() == 0
        (bundle,) = (tmp_path / run).glob("[!.]*")
        assert bundle.name == ("least+one:0.8" if words else "least")
        files[run] = {path.name: path.read_bytes() for path in bundle.iterdir() if path.suffix == ".onnx"}
    assert files["before"] == files["after"], "byte for byte"
    changed = {name for name, content in files["fused"].items() if content != files["before"][name]}
    assert changed == {"denoiser.onnx"} and len(files["after"]) == 3
    manifest = Manifest.read(tmp_path / "fused" / "least+one:0.8")
    assert manifest.origin == f"{least} LORA={file}:0.8"
