"""Image metrics for real models: FID, CLIP score, PickScore, HPSv2.1 and LPIPS, with weights from a local folder.

Nothing is downloaded. The folder that `--weights` names holds what the wanted metrics need:

    clip/         a CLIP model as transformers saves it, for instance openai/clip-vit-large-patch14
    pickscore/    yuvalkirstain/PickScore_v1, with the processor of laion/CLIP-ViT-H-14-laion2B-s32B-b79K
    hpsv2.1/      HPSv2.1 converted to transformers' CLIP format, with the same processor
    inception.pt  TorchScript of FID's Inception: `forward(images, return_features=True)` on 0 … 255, as NVIDIA's
                  inception-2015-12-05.pt
    vgg16.pt      TorchScript of LPIPS' VGG: `forward(images, resize_images=False, return_lpips=True)` whose squared
                  differences add up to the distance, as NVIDIA's vgg16.pt

`--coco` is a folder with `annotations/captions_NAME.json` and the images in `NAME/`, as MS-COCO comes.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from engines.errors import ParameterError

CLIPS = {"clip": "clip", "pickscore": "pickscore", "hpsv2.1": "hpsv2.1"}
METRICS = ("fid", *CLIPS)
BATCH = 16


@dataclass(frozen=True)
class Coco:
    """Captions with their images, one caption per image, in an order that a seed draws."""

    captions: tuple[str, ...]
    images: tuple[Path, ...]

    @classmethod
    def read(cls, folder: Path, count: int, seed: int) -> Coco:
        """ParameterError where the folder is not laid out as MS-COCO is, or has fewer images than wanted."""
        files = sorted((folder / "annotations").glob("captions_*.json"))
        if len(files) != 1:
            raise ParameterError(
                "coco", f"{folder} must have one annotations/captions_NAME.json, and the images in NAME/"
            )
        try:
            found = json.loads(files[0].read_text(encoding="utf-8"))
            names = {int(image["id"]): str(image["file_name"]) for image in found["images"]}
            first: dict[int, str] = {}
            for annotation in found["annotations"]:
                first.setdefault(int(annotation["image_id"]), str(annotation["caption"]).strip())
        except (KeyError, TypeError, ValueError) as error:
            raise ParameterError("coco", f"{files[0]} is not MS-COCO's captions file ({error!r})") from None
        images = folder / files[0].stem.removeprefix("captions_")
        usable = [number for number in sorted(first) if number in names and (images / names[number]).is_file()]
        if len(usable) < count:
            raise ParameterError("coco", f"{count} captions with images are needed, {folder} has {len(usable)}")
        chosen = np.random.default_rng(seed).permutation(usable)[:count].tolist()
        return cls(tuple(first[n] for n in chosen), tuple(images / names[n] for n in chosen))


@dataclass
class Judges:
    """The wanted metrics over local weights; each is loaded when it is first asked. LPIPS is asked where it is there.

    ParameterError where weights or a reference are missing.
    """

    metrics: Sequence[str] = ()
    weights: Path | None = None
    coco: Coco | None = None
    _clips: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.metrics and self.weights is None:
            raise ParameterError("weights", f"{', '.join(self.metrics)} need --weights FOLDER: see bench/metrics.py")
        for name in self.metrics:
            wanted = (self.weights or Path()) / ("inception.pt" if name == "fid" else CLIPS[name])
            if not wanted.exists():
                raise ParameterError("weights", f"{name} needs {wanted}, which is not there: see bench/metrics.py")
        if "fid" in self.metrics and self.coco is None:
            raise ParameterError("coco", "fid compares with real images: give their folder with --coco")

    def scores(self, images: Sequence[Image.Image], prompts: Sequence[str]) -> dict[str, list[float]]:
        """Per image, every wanted metric of an image and its prompt; larger is better."""
        return {name: self._clip_scores(name, images, prompts) for name in self.metrics if name in CLIPS}

    def fid(self, images: Sequence[Image.Image]) -> float | None:
        """The Fréchet distance to the reference's images, if it is wanted. It depends on how many there are."""
        if "fid" not in self.metrics:
            return None
        self._fid.reset()
        for image in images:
            self._fid.update(_tensor(image)[None], real=False)
        return float(self._fid.compute())

    @property
    def lpips_reason(self) -> str | None:
        """Why LPIPS is not measured; None where it is."""
        return None if self.weights and (self.weights / "vgg16.pt").is_file() else "no vgg16.pt in --weights"

    def lpips(self, images: Sequence[Image.Image], references: Sequence[Image.Image]) -> list[float] | None:
        """Per pair, the learned perceptual distance; None where its weights are not there."""
        if self.lpips_reason:
            return None
        import torch

        found = []
        with torch.no_grad():
            for pair in zip(images, references, strict=True):
                a, b = (self._vgg(_tensor(p)[None].float(), resize_images=False, return_lpips=True) for p in pair)
                found.append(float((a - b).square().sum()))
        return found

    @cached_property
    def _vgg(self) -> Any:
        return _script((self.weights or Path()) / "vgg16.pt")

    @cached_property
    def _fid(self) -> Any:
        import torch
        from torchmetrics.image.fid import FrechetInceptionDistance

        script = _script((self.weights or Path()) / "inception.pt")

        class Features(torch.nn.Module):
            """What torchmetrics asks for features."""

            def __init__(self) -> None:
                super().__init__()
                self.script = script
                self.num_features = int(self(torch.zeros(1, 3, 299, 299, dtype=torch.uint8)).shape[-1])

            def forward(self, images: Any) -> Any:
                """(n, 3, h, w) uint8 to (n, features)."""
                with torch.no_grad():
                    return self.script(images, return_features=True)

        metric = FrechetInceptionDistance(feature=Features(), reset_real_features=False)
        assert self.coco is not None
        for path in self.coco.images:
            with Image.open(path) as image:
                metric.update(_tensor(image.convert("RGB"))[None], real=True)
        return metric

    def _clip_scores(self, name: str, images: Sequence[Image.Image], prompts: Sequence[str]) -> list[float]:
        import torch

        model, processor = self._clip(name)
        found: list[float] = []
        for start in range(0, len(images), BATCH):
            rows = slice(start, start + BATCH)
            inputs = processor(
                text=list(prompts[rows]), images=list(images[rows]), return_tensors="pt", padding="max_length",
                truncation=True,
            )  # fmt: skip
            with torch.no_grad():
                out = model(**inputs)
            cosines = torch.nn.functional.cosine_similarity(out.image_embeds, out.text_embeds)
            scale = float(model.logit_scale.detach().exp()) if name == "pickscore" else 100.0
            found += (scale * cosines).tolist()
        return [max(score, 0.0) for score in found] if name == "clip" else found

    def _clip(self, name: str) -> Any:
        if name not in self._clips:
            from transformers import AutoProcessor, CLIPModel

            folder = (self.weights or Path()) / CLIPS[name]
            try:
                model = CLIPModel.from_pretrained(folder, local_files_only=True, use_safetensors=True).eval()
                self._clips[name] = model, AutoProcessor.from_pretrained(folder, local_files_only=True)
            except (OSError, ValueError) as error:
                reason = str(error).splitlines()[0]
                raise ParameterError("weights", f"{folder} is no CLIP model with its processor: {reason}") from None
        return self._clips[name]


def _tensor(image: Image.Image) -> Any:
    """(3, h, w) uint8."""
    import torch

    return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()


def _script(path: Path) -> Any:
    import torch

    try:
        return torch.jit.load(path, map_location="cpu").eval()  # type: ignore[no-untyped-call]
    except RuntimeError as error:
        raise ParameterError("weights", f"{path} is no TorchScript file: {str(error).splitlines()[0]}") from None
