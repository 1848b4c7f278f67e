"""Folders as people have them: loaded by diffusers, or refused in one message."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from engines.errors import ExportError
from export.bundle import export
from export.spec import ExportSpec
from tests.tiny import weights

pytestmark = pytest.mark.filterwarnings("ignore")  # diffusers and transformers, about themselves


def refusal(folder: Path, **options: Any) -> str:
    from export.loading import configs, open_source

    with pytest.raises(ExportError) as caught:
        source = open_source(folder, **options)
        raise ExportError(source.family.refused(configs(source)))
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_folder_without_a_component(copied: Path) -> None:
    shutil.rmtree(copied / "vae")
    assert "vae missing; a StableDiffusionPipeline has it" in refusal(copied)


def test_a_component_of_another_model(copied: Path, tiny: Callable[[str], Path], tmp_path: Path) -> None:
    shutil.rmtree(copied / "unet")
    shutil.copytree(tiny("sdxl") / "unet", copied / "unet")
    with pytest.raises(ExportError, match=r"addition_embed_type is .text_time."):
        asked = ExportSpec("mixed", copied)
        export(asked, tmp_path / "build" / "mixed", asked.identity(), "fp32")
    assert not (tmp_path / "build" / "mixed").exists() and not list((tmp_path / "build").glob(".partial*"))


def test_weights_that_are_no_safetensors_need_a_flag(copied: Path) -> None:
    import torch
    from safetensors.torch import load_file

    path = copied / "vae" / "diffusion_pytorch_model.safetensors"
    torch.save(load_file(path), path.with_suffix(".bin"))
    path.unlink()
    assert "no safetensors file in vae" in refusal(copied) and "--allow-pickle" in refusal(copied)
    from export.loading import load, open_source

    source = open_source(copied, allow_pickle=True)
    loaded = load(source, ["vae", "unet"], "fp32")  # the other one is safetensors alone
    assert loaded.vae.config.latent_channels == 4 and loaded.unet.config.in_channels == 4


def test_no_code_of_a_folder_is_run(copied: Path, tmp_path: Path) -> None:
    trap = f"open({str(tmp_path / 'ran')!r}, 'w')\n"
    for place in (copied / "unet" / "custom.py", copied / "custom.py", copied / "pipeline.py"):
        place.write_text(trap)
    path = copied / "model_index.json"
    index = json.loads(path.read_text())
    path.write_text(json.dumps(index | {"unet": ["custom", "UNet"]}))
    assert "custom.UNet is no class of diffusers or transformers, and no other code is run" in refusal(copied)
    path.write_text(json.dumps(index | {"_class_name": ["pipeline", "Own"]}))
    assert "holds a ['pipeline', 'Own']; this version exports" in refusal(copied)
    assert not (tmp_path / "ran").exists()


def test_weights_of_a_variant_are_found(copied: Path) -> None:
    for path in copied.rglob("*.safetensors"):
        path.rename(path.with_suffix(".fp16.safetensors"))
    assert weights(copied)


def test_a_tokenizer_of_a_vocabulary_and_merges(copied: Path) -> None:
    """As older folders have it."""
    from export.loading import configs, open_source

    before = configs(open_source(copied)).tokenizer.backend_tokenizer
    folder = copied / "tokenizer"
    model = json.loads((folder / "tokenizer.json").read_text())["model"]
    (folder / "tokenizer.json").unlink()
    (folder / "vocab.json").write_text(json.dumps(model["vocab"]))
    merges = [" ".join(pair) if isinstance(pair, list) else pair for pair in model["merges"]]
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges))
    after = configs(open_source(copied)).tokenizer.backend_tokenizer
    text = "a large red star at the left"
    assert after.encode(text).ids == before.encode(text).ids


UNET = (
    "act_fn attention_head_dim block_out_channels center_input_sample cross_attention_dim down_block_types "
    "downsample_padding flip_sin_to_cos freq_shift in_channels layers_per_block mid_block_scale_factor norm_eps "
    "norm_num_groups out_channels sample_size up_block_types"
)
VAE = (
    "act_fn block_out_channels down_block_types in_channels latent_channels layers_per_block norm_num_groups "
    "out_channels sample_size up_block_types"
)
ATTENTION = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}


def as_first_published(folder: Path) -> None:
    """Makes of a folder what diffusers 0.6 and transformers 4.22 saved: fewer keys, other names, a safety checker."""
    from safetensors.torch import load_file, save_file

    for part, keys in (("unet", UNET), ("vae", VAE)):
        path = folder / part / "config.json"
        config = json.loads(path.read_text())
        kept = {key: config[key] for key in ("_class_name", *keys.split())}
        path.write_text(json.dumps(kept | {"_diffusers_version": "0.6.0"}))
    path = folder / "vae" / "diffusion_pytorch_model.safetensors"
    renamed = {}
    for name, value in load_file(path).items():
        for new, old in ATTENTION.items():
            name = name.replace(f"attentions.0.{new}.", f"attentions.0.{old}.")
        renamed[name] = value
    save_file(renamed, path)
    path = folder / "text_encoder" / "model.safetensors"
    prefixed = {f"text_model.{name}": value for name, value in load_file(path).items()}
    positions = torch_arange(len(prefixed["text_model.embeddings.position_embedding.weight"]))
    save_file(prefixed | {"text_model.embeddings.position_ids": positions}, path)
    path = folder / "model_index.json"
    index = {name: value for name, value in json.loads(path.read_text()).items() if name in PARTS}
    checker = {"safety_checker": ["stable_diffusion", "StableDiffusionSafetyChecker"]}
    extractor = {"feature_extractor": ["transformers", "CLIPFeatureExtractor"]}
    path.write_text(json.dumps(index | checker | extractor | {"_diffusers_version": "0.6.0"}))


PARTS = ("_class_name", "scheduler", "text_encoder", "tokenizer", "unet", "vae")


def torch_arange(count: int) -> Any:
    import torch

    return torch.arange(count)[None]


def test_a_folder_as_it_was_first_published(tiny: Callable[[str], Path], copied: Path) -> None:
    from export.loading import configs, open_source

    as_first_published(copied)
    old, new = open_source(copied), open_source(tiny("sd1"))
    family, known = old.family, configs(old)
    assert family.refused(known) is None and family.guidance(known) == "classifier_free"
    assert family.sides(known) == family.sides(configs(new))
    for part in ("unet", "vae", "text_encoder"):
        before, after = weights(tiny("sd1"), part=part), weights(copied, part=part)
        assert set(before) == set(after) and all(np.array_equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        ("unet/config.json", {"in_channels": 9}, "takes 9 channels, not the 4 of the latents: inpainting"),
        ("unet/config.json", {"class_embed_type": "timestep"}, "wants more than a text"),
    ],
)
def test_a_member_of_the_family_that_cannot_be_exported(
    file: str, change: dict[str, Any], message: str, copied: Path
) -> None:
    path = copied / file
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    assert message in refusal(copied)


def test_a_refiner_is_refused(tiny: Callable[[str], Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny("sdxl"), tmp_path / "refiner"))
    path = folder / "model_index.json"
    index = json.loads(path.read_text()) | {
        "_class_name": "StableDiffusionXLImg2ImgPipeline", "requires_aesthetics_score": True,
        "text_encoder": [None, None], "tokenizer": [None, None],
    }  # fmt: skip
    path.write_text(json.dumps(index))
    assert "is the SDXL refiner" in refusal(folder)
