"""Manifests: what contradicts itself is neither written nor read."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from engines.errors import BundleError, ExportError
from engines.manifest import MANIFEST, Manifest, contradictions
from engines.store import Bundle

Change = Callable[[dict[str, Any]], object]


def test_a_sound_manifest_is_written_and_read(shapes: Bundle, tmp_path: Path) -> None:
    assert contradictions(shapes.manifest) == []
    shapes.manifest.write(tmp_path)
    assert Manifest.read(tmp_path) == shapes.manifest


def tensor(values: dict[str, Any], network: str, name: str) -> dict[str, Any]:
    several = values["networks"][network]["inputs"] + values["networks"][network]["outputs"]
    found: dict[str, Any] = next(one for one in several if one["name"] == name)
    return found


CHANGES: list[tuple[str, Change, str]] = [
    (
        "guidance that no input takes", lambda values: values.update(guidance="embedded"),
        "guidance: embedded, and the denoiser has no input guidance",
    ),
    (
        "an input that nobody gives", lambda values: tensor(values, "denoiser", "timestep").update(name="t"),
        "denoiser: an input t, which nobody gives",
    ),
    (
        "an embedding that nobody takes",
        lambda values: tensor(values, "text_encoder", "encoder_hidden_states").update(name="states"),
        "denoiser: no input states, which it is given",
    ),
    (
        "a tokenizer for no input", lambda values: values["tokenizers"][0].update(input="input_ids_2"),
        "text_encoder: no input input_ids_2",
    ),
    (
        "a tokenizer of another length", lambda values: values["tokenizers"][0].update(max_length=77),
        "input_ids has the shape",
    ),
    ("other latents", lambda values: values.update(latent_channels=16), "sample has the shape"),
    ("a VAE of another factor", lambda values: values.update(vae_scale_factor=8), "vae_decoder: sample has the shape"),
    ("half an ᾱ table", lambda values: values.update(alphas_cumprod=values["alphas_cumprod"][:500]), "500 numbers for"),
    (
        "a rising ᾱ table", lambda values: values.update(alphas_cumprod=values["alphas_cumprod"][::-1]),
        "alphas_cumprod: not falling",
    ),
    ("a size outside its bounds", lambda values: values["sizes"].update(width=16), "sizes: 16×"),
    ("a size between the steps", lambda values: values["sizes"].update(most=129), "are not all multiples of"),
    (
        "networks that differ from torch",
        lambda values: values["networks"]["denoiser"]["parity"].update(relative_error=0.5),
        "denoiser: differs from torch by 0.5",
    ),
    ("clip_skip without an input", lambda values: values.update(clip_skip=2), "clip_skip: 2, and the text encoder"),
]  # fmt: skip


@pytest.mark.parametrize(("change", "message"), [case[1:] for case in CHANGES], ids=[case[0] for case in CHANGES])
def test_what_contradicts_itself_is_neither_written_nor_read(
    change: Change, message: str, shapes: Bundle, tmp_path: Path
) -> None:
    values = shapes.manifest.model_dump(mode="json")
    if "clip_skip" in message:
        inputs = values["networks"]["text_encoder"]["inputs"]
        values["networks"]["text_encoder"]["inputs"] = [one for one in inputs if one["name"] != "clip_skip"]
    change(values)
    (tmp_path / MANIFEST).write_text(json.dumps(values))
    with pytest.raises(BundleError) as read:
        Manifest.read(tmp_path)
    with pytest.raises(ExportError) as written:
        Manifest.model_validate(values).write(tmp_path)
    assert message in str(read.value) and message in str(written.value)
