"""Judges of images, proved on tiny stand-ins: random CLIP models and scripted feature extractors in their formats."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from bench import __main__ as command
from bench.metrics import CLIPS, Coco, Judges
from engines.errors import ParameterError
from engines.store import Bundle
from runtime.distances import psnr, ssim

pytest.importorskip("torchmetrics")
SIDE = 32


@pytest.fixture
def images(rng: np.random.Generator) -> list[Image.Image]:
    return [Image.fromarray(rng.integers(0, 256, (SIDE, SIDE, 3), np.uint8)) for _ in range(6)]


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as `--weights` wants it, of random models small enough to run in a moment."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel, CLIPProcessor, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("weights")
    words = ["<|startoftext|>", "<|endoftext|>", "<unk>", "a", "red", "blue", "star", "ring", "large"]
    raw = Tokenizer(models.WordLevel({word: n for n, word in enumerate(words)}, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=raw, unk_token="<unk>", pad_token="<|endoftext|>", eos_token="<|endoftext|>",
        model_max_length=8,
    )  # fmt: skip
    small = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = small | {"vocab_size": len(words), "max_position_embeddings": 8, "eos_token_id": 1, "bos_token_id": 0}
    for number, name in enumerate(CLIPS.values()):
        torch.manual_seed(number)
        config = CLIPConfig(
            text_config=text, vision_config=small | {"image_size": SIDE, "patch_size": 8}, projection_dim=8
        )
        CLIPModel(config).save_pretrained(folder / name)
        size = {"height": SIDE, "width": SIDE}
        images = CLIPImageProcessorPil(size={"shortest_edge": SIDE}, crop_size=size)
        CLIPProcessor(images, tokenizer).save_pretrained(folder / name)

    class Inception(torch.nn.Module):
        def forward(self, images: torch.Tensor, return_features: bool = False) -> torch.Tensor:
            return torch.nn.functional.adaptive_avg_pool2d(images.float(), 2).flatten(1) / 255

    class Vgg(torch.nn.Module):
        def forward(self, images: torch.Tensor, resize_images: bool = True, return_lpips: bool = False) -> torch.Tensor:
            return torch.nn.functional.avg_pool2d(images, 4).flatten(1) / 255

    for name, module in (("inception.pt", Inception()), ("vgg16.pt", Vgg())):
        torch.jit.script(module).save(str(folder / name))  # type: ignore[no-untyped-call]
    return folder


@pytest.fixture
def coco(tmp_path: Path, rng: np.random.Generator) -> Path:
    """A folder as MS-COCO comes, with a caption too many and an image that is missing."""
    folder = tmp_path / "coco"
    (folder / "annotations").mkdir(parents=True)
    (folder / "val").mkdir()
    images = [{"id": n, "file_name": f"{n:04}.png"} for n in range(7)]
    for image in images[:-1]:
        pixels = rng.integers(0, 256, (40, 48, 3), np.uint8)
        Image.fromarray(pixels).save(folder / "val" / str(image["file_name"]))
    captions = [{"image_id": n, "caption": f" a red star {n}"} for n in range(7)]
    found = {"images": images, "annotations": [*captions, {"image_id": 0, "caption": "another"}]}
    (folder / "annotations" / "captions_val.json").write_text(json.dumps(found))
    return folder


def test_scores_are_those_of_the_models_one_image_at_a_time(weights: Path, images: list[Image.Image]) -> None:
    import torch
    from transformers import AutoProcessor, CLIPModel

    prompts = ["a large red star", "a small blue ring"] * 3
    judges = Judges([*CLIPS], weights)
    found = judges.scores(images, prompts)
    for name, scores in found.items():
        model, processor = CLIPModel.from_pretrained(weights / name), AutoProcessor.from_pretrained(weights / name)
        alone = []
        for image, prompt in zip(images, prompts, strict=True):  # one at a time: batches change nothing
            inputs = processor(
                text=[prompt], images=[image], return_tensors="pt", padding="max_length", truncation=True
            )
            with torch.no_grad():
                alone.append(float(model(**inputs).logits_per_image))
        scale = 1.0 if name == "pickscore" else 100 / float(model.logit_scale.detach().exp())
        wanted = [scale * one for one in alone]
        np.testing.assert_allclose(scores, [max(one, 0) for one in wanted] if name == "clip" else wanted, rtol=1e-4)
    assert judges.scores(images, prompts[::-1])["pickscore"] != found["pickscore"]


def test_fid_is_the_distance_of_two_gaussians(weights: Path, coco: Path, images: list[Image.Image]) -> None:
    from scipy.linalg import sqrtm

    reference = Coco.read(coco, 6, 0)
    judges = Judges(["fid"], weights, reference)
    real = [Image.open(path).convert("RGB") for path in reference.images]

    def moments(images: list[Image.Image]) -> tuple[Any, Any]:
        pools = [np.asarray(i, float).reshape(2, i.height // 2, 2, i.width // 2, 3).mean((1, 3)) / 255 for i in images]
        features = np.stack([pool.transpose(2, 0, 1).ravel() for pool in pools])
        return features.mean(0), np.cov(features.T)

    (a, s), (b, t) = moments(real), moments(images)
    wanted = np.sum((a - b) ** 2) + np.trace(s + t - 2 * np.real(sqrtm(s @ t)))
    assert judges.fid(images) == pytest.approx(wanted, rel=2e-2, abs=1e-5)
    assert judges.fid(real) == pytest.approx(0, abs=1e-4) and Judges().fid(images) is None


def test_distances_are_zero_of_equal_images_and_grow(weights: Path, images: list[Image.Image]) -> None:
    judges = Judges([], weights)
    assert judges.lpips(images, images) == [0.0] * 6
    near = [Image.fromarray((np.asarray(p) // 2 + 64).astype(np.uint8)) for p in images]
    apart, far = judges.lpips(near, images), judges.lpips(images[::-1], images)
    assert apart and far and min(apart) > 0 and min(far) > 0
    assert Judges().lpips(images, images) is None and "vgg16.pt" in (Judges().lpips_reason or "")
    assert psnr(images, images) == 99.0 and ssim(images[0], images[0]) == pytest.approx(1)
    assert psnr(images[:1], images[1:2]) < 15 and ssim(images[0], images[1]) < 0.5


def test_coco_is_read_once_per_image_in_an_order_of_the_seed(coco: Path) -> None:
    found = Coco.read(coco, 6, 3)
    assert sorted(found.captions) == [f"a red star {n}" for n in range(6)]
    assert [path.stem for path in found.images] == [f"{int(caption[-1]):04}" for caption in found.captions]
    assert Coco.read(coco, 6, 3) == found and Coco.read(coco, 6, 4) != found


def test_what_is_missing_is_named(weights: Path, coco: Path, tmp_path: Path) -> None:
    for arguments, message in (
        ((["clip"], None), "need --weights"), ((["clip"], tmp_path), "clip needs"), ((["fid"], weights), "--coco"),
    ):  # fmt: skip
        with pytest.raises(ParameterError, match=message):
            Judges(*arguments)
    with pytest.raises(ParameterError, match="7 captions with images are needed"):
        Coco.read(coco, 7, 0)
    with pytest.raises(ParameterError, match="annotations/captions_NAME"):
        Coco.read(tmp_path, 1, 0)
    (coco / "annotations" / "captions_val.json").write_text('{"images": 3}')
    with pytest.raises(ParameterError, match="is not MS-COCO's"):
        Coco.read(coco, 1, 0)
    (tmp_path / "clip").mkdir()
    with pytest.raises(ParameterError, match="is no CLIP model"):
        Judges(["clip"], tmp_path).scores([Image.new("RGB", (8, 8))], ["a"])
    (tmp_path / "vgg16.pt").write_text("nothing")
    with pytest.raises(ParameterError, match="is no TorchScript file"):
        Judges([], tmp_path).lpips([Image.new("RGB", (8, 8))], [Image.new("RGB", (8, 8))])


@pytest.mark.slow
def test_quality_with_every_metric(
    shapes: Bundle, weights: Path, coco: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """The whole command, on MS-COCO's captions: the model draws shapes, but the harness does not know that."""
    monkeypatch.setattr("bench.quality.WORK", tmp_path / "work")
    target = tmp_path / "quality.json"
    arguments = ["quality", "--coco", str(coco), "--weights", str(weights), "--metrics", "fid", *CLIPS, "--images", "3",
                 "--steps", "6", "--json", str(target)]  # fmt: skip
    monkeypatch.setattr("sys.argv", ["bench", *arguments])
    assert command.main() == 0
    shown = capsys.readouterr().out
    assert "pickscore − sequential" in shown and "FID" in shown and "LPIPS" in shown
    rows = json.loads(target.read_text())["rows"]
    first, last = rows[0], next(row for row in rows if row["name"] == "sequential, 2 steps")
    assert first["lpips"]["median"] == 0 and first["metrics"]["clip"]["minus_sequential"]["mean"] == 0
    assert last["lpips"]["median"] > 0 and last["fid"] != first["fid"] and "caption_accuracy" not in first
    assert (
        set(first["metrics"]) == set(CLIPS) and last["metrics"]["hpsv2.1"]["low"] <= last["metrics"]["hpsv2.1"]["high"]
    )


@pytest.mark.slow
def test_a_scenario_with_judges_has_mlperfs_scores(
    shapes: Bundle, weights: Path, coco: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "scenario.json"
    arguments = ["scenario", "offline", "--coco", str(coco), "--weights", str(weights), "--samples", "4"]
    arguments += ["--steps", "3", "--min-queries", "4", "--mode", "sequential", "--output", str(tmp_path)]
    arguments += ["--json", str(target)]
    monkeypatch.setattr("sys.argv", ["bench", *arguments, "--window", "CLIP_SCORE:0:100", "--window", "FID_SCORE:0:"])
    assert command.main() == 0
    (row,) = json.loads(target.read_text())["rows"]
    assert row["quality"]["FID_SCORE"] > 0 and 0 <= row["quality"]["CLIP_SCORE"] <= 100
    assert "caption_accuracy" not in row["quality"], "the captions are MS-COCO's"
    (scores,) = tmp_path.glob("open/unofficial/results/*/shapes/Offline/accuracy/accuracy.txt")
    assert "'CLIP_SCORE': '" in scores.read_text() and "'FID_SCORE': '" in scores.read_text()


def test_what_only_the_checker_can_do_is_refused_for_other_prompts(
    shapes: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "prompts.txt"
    file.write_text("a house\n")
    monkeypatch.setattr("sys.argv", ["bench", "quality", "--full", "--prompts", str(file)])
    assert command.main() == 1 and "--full is of captions that the checker knows" in capsys.readouterr().err
