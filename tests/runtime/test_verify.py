"""Certificates, the verify command, and what PNG files say of themselves."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from skimage.metrics import structural_similarity

from engines.errors import BundleError, ParameterError
from engines.store import BUILD
from runtime import Pipeline, __main__
from runtime.certificate import array_sha256, sameness
from runtime.distances import ssim
from runtime.png_text import parameters
from runtime.provenance import result_file
from runtime.sampling.operations import Options
from runtime.verify import verify

PROMPT = "a large red star at the left on blue background"


def reported(pipeline: Pipeline, path: Path, **options: Any) -> dict[str, Any]:
    report = pipeline.generate(**{"prompt": PROMPT, "num_inference_steps": 6, "seed": 3, **options}).report.to_dict()
    path.write_text(json.dumps(result_file([report])))
    return report


@pytest.mark.parametrize(
    ("mode", "options", "lanes", "wanted"),
    [
        ("sequential", Options(), 1, "identical"),
        ("sequential", Options(), 2, "exact"),
        ("srds", Options(), 2, "exact"),
        ("srds", Options(iterations=1), 2, "measured"),
        ("srds", Options(tolerance=0.1), 2, "measured"),
        ("adaptive", Options(k=3), 1, "exact"),
        ("adaptive", Options(k=3, tolerance=0.1), 1, "measured"),
        ("conservative", Options(k=3), 1, "measured"),
        ("aggressive", Options(k=1), 1, "measured"),
        ("speculative", Options(k=3), 1, "exact in distribution"),
    ],
)
def test_classes_of_sameness(mode: str, options: Options, lanes: int, wanted: str) -> None:
    assert sameness(mode, options, lanes) == wanted


@pytest.mark.parametrize(
    ("options", "closest"),
    [
        ({"mode": "sequential"}, 0.0),
        ({"mode": "srds", "num_inference_steps": 9}, 0.0),
        ({"mode": "adaptive", "k": 3}, 0.0),
        ({"mode": "aggressive", "k": 3, "num_images_per_prompt": 2}, 1e-4),
        ({"mode": "speculative", "k": 3, "scheduler": "ddpm", "num_inference_steps": 30}, 1e-4),
        ({"mode": "auto", "negative_prompt": "a ring", "width": 48, "height": 32, "guidance_scale": 3.0}, 0.0),
    ],
)
def test_an_image_is_made_again_and_held_against_the_sequential_one(
    pipeline: Pipeline, tmp_path: Path, options: dict[str, Any], closest: float
) -> None:
    report = reported(pipeline, tmp_path / "r.json", **options)
    found = verify(tmp_path / "r.json", "cpu*2", BUILD)
    assert found.sameness == report["certificate"]["sameness"]
    assert found.placement[0] == found.placement[1] and found.same
    assert found.floor.latents < 1e-5 and found.floor.psnr > 60
    if found.sameness in ("exact", "identical"):
        assert found.apart.latents < 1e-4 and found.apart.psnr > 60 and found.apart.ssim > 0.9999
    else:
        assert found.apart.latents >= closest
    assert f"class of sameness: {found.sameness}" in str(found)


def test_another_image_than_the_reported_one_is_seen(pipeline: Pipeline, tmp_path: Path) -> None:
    report = reported(pipeline, path := tmp_path / "r.json", mode="sequential")
    report["certificate"]["arguments"]["seed"] = 4
    path.write_text(json.dumps({"report": report}))  # as the server answers
    found = verify(path, "cpu*2", BUILD)
    assert not found.same and "not the same to the bit" in str(found)


def test_given_latents_are_asked_for_and_compared(pipeline: Pipeline, tmp_path: Path) -> None:
    latents = np.random.default_rng(1).standard_normal((1, *pipeline.latent_shape), np.float32)
    report = reported(pipeline, path := tmp_path / "r.json", mode="sequential", latents=latents)
    assert report["certificate"]["inputs"] == {"latents": array_sha256(latents)}
    with pytest.raises(ParameterError, match=r"made with latents, of which it holds the hash alone: .* --latents"):
        verify(path, "cpu*2", BUILD)
    with pytest.raises(ParameterError, match="these are not the latents"):
        verify(path, "cpu*2", BUILD, latents=latents + 1)
    assert verify(path, "cpu*2", BUILD, latents=latents).same


def test_what_cannot_be_verified_says_why(
    pipeline: Pipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    report = reported(pipeline, path := tmp_path / "r.json", mode="sequential")
    with pytest.raises(BundleError, match="there is no exported model 'shapes'"):
        verify(path, "cpu*2", tmp_path)
    shutil.copytree(BUILD / "shapes", tmp_path / "shapes")
    manifest = json.loads((tmp_path / "shapes" / "manifest.json").read_text())
    manifest["scheduler"]["beta_end"] *= 1.01
    (tmp_path / "shapes" / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(BundleError, match="the model shapes has changed since"):
        verify(path, "cpu*2", tmp_path)
    for content, said in (
        ("{", "cannot be read as a report"),
        ("[]", "holds no report with a certificate"),
        (json.dumps({"rows": [{"model": "shapes"}]}), "holds no report with a certificate"),
        (json.dumps(report | {"certificate": report["certificate"] | {"arguments": {"x": 1}}}), "another version"),
    ):
        path.write_text(content)
        monkeypatch.setattr(sys, "argv", ["runtime", "verify", str(path), "--devices", "cpu*2"])
        assert __main__.main() == 1
        error = capsys.readouterr().err
        assert said in error and error.count("\n") == 1


def test_png_files_say_how_they_were_made(pipeline: Pipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def draw(*words: str) -> dict[str, str]:
        out = tmp_path / "image.png"
        monkeypatch.setattr(sys, "argv", ["runtime", PROMPT, "--quiet", "--out", str(out), "--steps", "5", *words])
        assert __main__.main() == 0
        with Image.open(out) as image:
            return {str(name): str(value) for name, value in image.info.items()}

    words = ("--mode", "speculative", "--scheduler", "euler_a", "--k", "3", "--negative-prompt", "a ring: ünder, 星")
    said = draw(*words, "--devices", "cpu*2", "--seed", "8", "--guidance", "3.5")
    first, negative, last = said["parameters"].split("\n")
    assert (first, negative) == (PROMPT, "Negative prompt: a ring: ünder, 星")
    wanted = "Steps: 5, Sampler: Euler a, CFG scale: 3.5, Seed: 8, Size: 64x64, Model hash: "
    assert last.startswith(wanted) and "Model: shapes, Mode: speculative" in last
    certificate = json.loads(said["driffusion"])
    assert certificate["model_sha256"].startswith(last[len(wanted) :][:10])
    assert certificate["sameness"] == "exact in distribution" and certificate["arguments"]["negative_prompt"]
    assert not {"parameters", "driffusion"} & set(draw("--no-metadata", "--devices", "cpu*2"))


def test_each_image_of_a_call_names_its_own_prompt(pipeline: Pipeline) -> None:
    prompts = ["a small green ring", "a large red star"]
    report = pipeline.generate(prompts, num_images_per_prompt=2, num_inference_steps=2, mode="sequential").report
    texts = [parameters(report, n) for n in range(4)]
    assert [text.split("\n")[0] for text in texts] == [prompts[0], prompts[0], prompts[1], prompts[1]]
    assert all(f"Batch pos: {n}, Batch size: 4" in text for n, text in enumerate(texts))


def test_ssim_is_that_of_scikit_image(rng: np.random.Generator) -> None:
    a = rng.integers(0, 256, (37, 50, 3), np.uint8)
    b = np.clip(a + rng.normal(0, 40, a.shape), 0, 255).astype(np.uint8)
    wanted = structural_similarity(a, b, channel_axis=2)  # type: ignore[no-untyped-call]
    assert ssim(Image.fromarray(a), Image.fromarray(b)) == pytest.approx(wanted, abs=1e-9)
