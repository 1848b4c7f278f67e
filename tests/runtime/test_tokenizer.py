"""Prompts to ids, against the pipelines of diffusers."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from engines.manifest import File, Tokenizer
from runtime.tokenizer import PromptTokenizer

pytestmark = pytest.mark.filterwarnings("ignore")  # diffusers and transformers, about themselves
PROMPTS = [
    "", "a red star", "a <cat-toy> on the left", "a <cat-toy>, two of <cat-toy>", "a <one> star", "<cat-toy>" * 9,
    "a <cat-toy>_1 star", "A  RED\tStar , ",
]  # fmt: skip


@pytest.fixture
def theirs(tmp_path: Path) -> Any:
    """A pipeline with a textual inversion of three vectors and one of one, saved and loaded again."""
    import diffusers
    import torch

    from tests.tiny import save

    pipeline = save("sd1", tmp_path)
    pipeline.load_textual_inversion({"<cat-toy>": torch.randn(3, 16)}, token="<cat-toy>")
    pipeline.load_textual_inversion({"<one>": torch.randn(1, 16)}, token="<one>")
    pipeline.save_pretrained(tmp_path / "with")
    absent = {part: None for part, component in pipeline.components.items() if component is None}
    return diffusers.StableDiffusionPipeline.from_pretrained(tmp_path / "with", **absent)


def test_a_token_of_several_vectors_becomes_all_of_them(theirs: Any, tmp_path: Path) -> None:
    """In negative prompts, too, which take the same way."""
    tokenizer = theirs.tokenizer
    (path := tmp_path / "tokenizer.json").write_text(tokenizer.backend_tokenizer.to_str())
    spec = Tokenizer(
        input="input_ids", file=File.of(path), max_length=16, pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    bundle: Any = SimpleNamespace(
        manifest=SimpleNamespace(tokenizers=(spec,)), tokenizer=lambda spec: path.read_bytes()
    )
    ours, _ = PromptTokenizer(bundle)(PROMPTS)
    converted = [theirs.maybe_convert_prompt(prompt, tokenizer) for prompt in PROMPTS]
    assert converted[2] == "a <cat-toy> <cat-toy>_1 <cat-toy>_2 on the left"
    wanted = tokenizer(converted, padding="max_length", max_length=16, truncation=True, return_tensors="np").input_ids
    assert np.array_equal(ours["input_ids"], wanted)


@pytest.mark.slow
def test_images_with_a_token_of_several_vectors_equal_diffusers(
    theirs: Any, tmp_path: Path, rng: np.random.Generator
) -> None:
    import diffusers
    import torch

    from engines import load
    from engines.devices import parse_devices
    from engines.store import Bundle
    from export.bundle import export
    from export.spec import ExportSpec
    from runtime.pipeline import Pipeline

    spec = ExportSpec("with", tmp_path / "with", sides=(64, 64))
    export(spec, tmp_path / "build" / "with", spec.identity(), "fp32")
    bundle = Bundle.open(str(tmp_path / "build" / "with"))
    load.build_missing(bundle, parse_devices("cpu@1"))
    theirs.scheduler = diffusers.EulerDiscreteScheduler.from_config(theirs.scheduler.config)
    noise = rng.standard_normal((1, 4, 16, 16), np.float32)
    words = {"prompt": "a <cat-toy> on the left", "negative_prompt": "blue <cat-toy>"}
    options: dict[str, Any] = {**words, "num_inference_steps": 4, "guidance_scale": 5.0}
    options |= {"height": 64, "width": 64}
    wanted = theirs(latents=torch.from_numpy(noise.copy()), output_type="latent", **options).images.numpy()
    pipeline = Pipeline(bundle, "cpu@1")
    try:
        made = pipeline.generate(latents=noise, mode="sequential", scheduler="euler", **options).latents
    finally:
        pipeline.close()
    assert np.linalg.norm(made - wanted) <= 1e-3 * np.linalg.norm(wanted)
