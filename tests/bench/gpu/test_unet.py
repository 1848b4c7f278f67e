"""The project's own UNet is diffusers'."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import load_file

from bench.gpu.unet import SHAPES, STABLE_DIFFUSION_15, WEIGHTS, UNet, read_safetensors, shapes_unet


def test_outputs_are_those_of_diffusers(rng: np.random.Generator) -> None:
    theirs = UNet2DConditionModel.from_pretrained(SHAPES).eval()
    sample = torch.from_numpy(rng.standard_normal((3, 4, 12, 20), np.float32))
    timestep, words = torch.tensor([1.0, 500.0, 999.0]), torch.from_numpy(rng.standard_normal((3, 32, 128), np.float32))
    with torch.no_grad():
        ours, wanted = shapes_unet()(sample, timestep, words), theirs(sample, timestep, words).sample
    assert (ours - wanted).abs().max() <= 1e-5 * wanted.abs().max()


def test_weights_of_stable_diffusion_have_their_names() -> None:
    with torch.device("meta"):
        ours = UNet(STABLE_DIFFUSION_15)
        theirs = UNet2DConditionModel(sample_size=64, cross_attention_dim=768, attention_head_dim=8)
    shapes = [{name: weight.shape for name, weight in one.state_dict().items()} for one in (ours, theirs)]
    assert shapes[0] == shapes[1]


def test_weights_are_read_as_the_library_reads_them() -> None:
    ours, theirs = read_safetensors(SHAPES / WEIGHTS), load_file(SHAPES / WEIGHTS)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], weight.float()) for name, weight in theirs.items())


def test_a_file_that_is_cut_off(tmp_path: Path) -> None:
    content, path = (SHAPES / WEIGHTS).read_bytes(), tmp_path / WEIGHTS
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match=r"shape|buffer"):
        read_safetensors(path)
