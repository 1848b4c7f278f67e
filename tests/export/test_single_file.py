"""Checkpoints in one file, with the layout that Stable Diffusion was first published in."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from engines.errors import ExportError, ParameterError
from export.spec import ExportSpec, checkpoint_of, model_name, resolve

pytestmark = pytest.mark.filterwarnings("ignore")  # diffusers and transformers, about themselves
RESNET = {
    "norm1": "in_layers.0", "conv1": "in_layers.2", "time_emb_proj": "emb_layers.1", "norm2": "out_layers.0",
    "conv2": "out_layers.3", "conv_shortcut": "skip_connection",
}  # fmt: skip
# the tiny UNet's modules by their place in the original's lists: two levels, one layer each
UNET = {
    "time_embedding.linear_1": "time_embed.0", "time_embedding.linear_2": "time_embed.2", "conv_in": "input_blocks.0.0",
    "down_blocks.0.resnets.0": "input_blocks.1.0", "down_blocks.0.downsamplers.0.conv": "input_blocks.2.0.op",
    "down_blocks.1.resnets.0": "input_blocks.3.0", "down_blocks.1.attentions.0": "input_blocks.3.1",
    "mid_block.resnets.0": "middle_block.0", "mid_block.attentions.0": "middle_block.1",
    "mid_block.resnets.1": "middle_block.2", "up_blocks.0.resnets.0": "output_blocks.0.0",
    "up_blocks.0.attentions.0": "output_blocks.0.1", "up_blocks.0.resnets.1": "output_blocks.1.0",
    "up_blocks.0.attentions.1": "output_blocks.1.1", "up_blocks.0.upsamplers.0.conv": "output_blocks.1.2.conv",
    "up_blocks.1.resnets.0": "output_blocks.2.0", "up_blocks.1.resnets.1": "output_blocks.3.0",
    "conv_norm_out": "out.0", "conv_out": "out.2",
}  # fmt: skip
ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}


def unet_name(name: str) -> str:
    place = next(one for one in UNET if name.startswith(one + "."))
    rest = name.removeprefix(place)
    if ".resnets." in name:
        part, kind = rest[1:].rsplit(".", 1)
        rest = f".{RESNET[part]}.{kind}"
    return f"model.diffusion_model.{UNET[place]}{rest}"


def vae_name(name: str, levels: int = 3) -> str:
    import re

    for new, old in ATTENTION.items():
        name = name.replace(f"mid_block.attentions.0.{new}.", f"mid.attn_1.{old}.")
    name = re.sub(r"mid_block\.resnets\.(\d)", lambda found: f"mid.block_{int(found[1]) + 1}", name)
    name = name.replace("conv_norm_out", "norm_out").replace("conv_shortcut", "nin_shortcut")
    name = re.sub(r"down_blocks\.(\d)\.resnets", r"down.\1.block", name)
    name = re.sub(r"down_blocks\.(\d)\.downsamplers\.0", r"down.\1.downsample", name)
    name = re.sub(r"up_blocks\.(\d)\.resnets", lambda found: f"up.{levels - 1 - int(found[1])}.block", name)
    name = re.sub(r"up_blocks\.(\d)\.upsamplers\.0", lambda found: f"up.{levels - 1 - int(found[1])}.upsample", name)
    return f"first_stage_model.{name}"


def one_file(folder: Path, target: Path, change: Callable[[dict[str, Any]], object] = lambda tensors: None) -> Path:
    """A Stable Diffusion folder as one file with the original names."""
    from safetensors.torch import load_file, save_file

    tensors = {}
    for name, value in load_file(folder / "unet" / "diffusion_pytorch_model.safetensors").items():
        tensors[unet_name(name)] = value
    for name, value in load_file(folder / "vae" / "diffusion_pytorch_model.safetensors").items():
        square = "attentions" in name and value.ndim == 2
        tensors[vae_name(name)] = value[:, :, None, None].contiguous() if square else value
    for name, value in load_file(folder / "text_encoder" / "model.safetensors").items():
        tensors[f"cond_stage_model.transformer.text_model.{name.removeprefix('text_model.')}"] = value
    change(tensors)
    save_file(tensors, target, metadata={"format": "pt"})
    return target


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Stable Diffusion folder with its weights."""
    from tests.tiny import save

    root = tmp_path_factory.mktemp("folders")
    save("sd1", root)
    return root / "sd1"


@pytest.fixture
def config(folder: Path, tmp_path: Path) -> Path:
    """The same folder without weights."""
    return Path(shutil.copytree(folder, tmp_path / "config", ignore=shutil.ignore_patterns("*.safetensors")))


def weights(source: Any, part: str) -> dict[str, np.ndarray]:
    from export.loading import load

    module = getattr(load(source, [part], "fp32"), part)
    return {name: value.numpy() for name, value in module.state_dict().items()}


def test_every_component_has_the_weights_of_the_file(folder: Path, config: Path, tmp_path: Path) -> None:
    from export.loading import check_weights, open_source

    file = one_file(folder, tmp_path / "model.safetensors")
    single, whole = open_source(config, checkpoint=file), open_source(folder)
    check_weights(single)
    for part in ("unet", "vae", "text_encoder"):
        ours, theirs = weights(single, part), weights(whole, part)
        assert set(ours) == set(theirs) and all(np.array_equal(ours[name], theirs[name]) for name in ours), part
        assert single.parameters(part) == whole.parameters(part)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("model.diffusion_model.middle_block.0.in_layers.2.bias", "unet: 1 tensor"),
        ("first_stage_model.decoder.conv_in.bias", "vae: 1 tensor"),
        ("cond_stage_model.transformer.text_model.final_layer_norm.bias", "text_encoder: 1 tensor"),
    ],
)
def test_a_tensor_that_the_file_lacks(name: str, message: str, folder: Path, config: Path, tmp_path: Path) -> None:
    from export.loading import check_weights, open_source

    file = one_file(folder, tmp_path / "model.safetensors", lambda tensors: tensors.pop(name))
    with pytest.raises(ExportError) as caught:
        check_weights(open_source(config, checkpoint=file))
    assert str(caught.value).startswith(f"{file} cannot be loaded: {message}") and "\n" not in str(caught.value)


def test_more_layers_than_the_config_has(folder: Path, config: Path, tmp_path: Path) -> None:
    import torch

    from export.loading import check_weights, open_source

    extra = "model.diffusion_model.middle_block.1.proj_more.bias"
    file = one_file(folder, tmp_path / "more.safetensors", lambda tensors: tensors.update({extra: torch.zeros(3)}))
    with pytest.raises(ExportError, match=r"unet: 1 tensor is in more\.safetensors that config\.json has no"):
        check_weights(open_source(config, checkpoint=file))


def test_a_file_that_predicts_v(folder: Path, config: Path, tmp_path: Path) -> None:
    import torch

    from export.checks import check
    from export.families import Sides
    from export.loading import configs, open_source

    marks = {"v_pred": torch.zeros(0), "ztsnr": torch.zeros(0)}
    file = one_file(folder, tmp_path / "noob.safetensors", lambda tensors: tensors.update(marks))
    source = open_source(config, checkpoint=file)
    with pytest.raises(ExportError, match=r"says that it predicts v, .* says epsilon: write .* rescale_betas_zero_snr"):
        check(source, configs(source), Sides(64, 64, 64, 8))


def test_files_that_are_no_checkpoint(folder: Path, config: Path, tmp_path: Path) -> None:
    from export.loading import open_source

    weights_of_one = folder / "unet" / "diffusion_pytorch_model.safetensors"
    (tmp_path / "old.ckpt").write_bytes(b"\x80\x02")
    for file, message in (
        (weights_of_one, "holds no whole model"),
        (tmp_path / "old.ckpt", "is a pickle: convert it to safetensors, or insist with --allow-pickle"),
    ):
        with pytest.raises(ExportError, match=message):
            open_source(config, checkpoint=file)
    with pytest.raises(ExportError, match=r"old\.ckpt cannot be loaded"):
        from export.loading import check_weights

        check_weights(open_source(config, checkpoint=tmp_path / "old.ckpt", allow_pickle=True))


def test_names(folder: Path, tmp_path: Path) -> None:
    file = one_file(folder, tmp_path / "my model.safetensors")
    assert checkpoint_of(str(file)) == file and checkpoint_of(str(folder)) is None
    assert model_name(str(file)) == "my model" and model_name("a/b.ckpt") == "b" and model_name("some/sd15") == "sd15"
    assert resolve(str(file), config=folder) == (str(file), folder)
    with pytest.raises(ExportError, match="there is no checkpoint file"):
        resolve(str(tmp_path / "nothing.safetensors"))
    with pytest.raises(ParameterError, match="config belongs to a single file"):
        resolve(str(folder), config=folder)
    spec = ExportSpec("my model", folder, checkpoint=file)
    assert spec.origin == f"{file} CONFIG={folder}"
    assert spec.identity() != ExportSpec("my model", folder).identity()


def test_a_layout_whose_configuration_cannot_be_had(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from export import single_file

    def offline(*_: Any, **__: Any) -> None:
        raise OSError("no network")

    monkeypatch.setattr(single_file, "snapshot_download", offline)
    file = one_file(folder, tmp_path / "model.safetensors")
    with pytest.raises(ExportError, match=r"has the layout of stable-diffusion-v1-5/.*CONFIG=FOLDER \(--config"):
        resolve(str(file))
    monkeypatch.setattr(single_file, "snapshot_download", lambda name, **_: str(folder))
    assert resolve(str(file)) == (str(file), folder)


def test_the_refiner_as_one_file() -> None:
    from export.single_file import refuse_layout

    with pytest.raises(ExportError, match="is the SDXL refiner"):
        refuse_layout(Path("refiner.safetensors"), "xl_refiner")


def test_make_gives_a_file_the_name_that_the_export_does(checkout: Path) -> None:
    import subprocess

    run = ["make", "--dry-run", "--always-make", "engines", "DEVICES=cpu", "MODEL=a/x.safetensors", "CONFIG=some/sd15"]
    printed = subprocess.run(run, cwd=checkout, capture_output=True, text=True, check=True).stdout
    assert 'engines build "x"' in printed and '--config "some/sd15"' in printed
