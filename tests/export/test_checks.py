"""What an export refuses before the first network: damaged weights, foreign components, schedulers, tokenizers."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from engines.errors import ExportError
from export.bundle import export
from export.spec import ExportSpec
from tests import ROOT

pytestmark = pytest.mark.filterwarnings("ignore")  # diffusers and transformers, about themselves
TEXT, UNET, VAE = (
    "text_encoder/model.safetensors",
    "unet/diffusion_pytorch_model.safetensors",
    "vae/diffusion_pytorch_model.safetensors",
)


@pytest.fixture
def refusal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """The one line that an export ends with, before it begins with a network."""
    from export import to_onnx

    def refused(folder: Path, **spec: Any) -> str:
        monkeypatch.setattr(to_onnx, "export_network", lambda *_: pytest.fail("it began"))
        asked = ExportSpec("x", folder, **spec)
        with pytest.raises(ExportError) as caught:
            export(asked, tmp_path / "build" / "x", asked.identity(), "fp32")
        assert "\n" not in str(caught.value) and not (tmp_path / "build" / "x").exists()
        return str(caught.value)

    return refused


def edit_weights(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def edit_json(path: Path, **fields: Any) -> None:
    """Sets fields; those that are None are taken out."""
    values = json.loads(path.read_text()) | fields
    path.write_text(json.dumps({name: value for name, value in values.items() if value is not None}))


# --- weights ----------------------------------------------------------------------------------------------------------


def test_layers_that_a_file_lacks(copied: Path, refusal: Callable[..., str]) -> None:
    def drop(tensors: dict[str, Any]) -> None:
        for name in [name for name in tensors if "layers.2." in name]:
            del tensors[name]

    edit_weights(copied / TEXT, drop)
    said = refusal(copied)
    assert "text_encoder: 16 tensors are missing in model.safetensors, first encoder.layers.2." in said


@pytest.mark.parametrize("file", [TEXT, UNET, VAE])
def test_one_tensor_that_a_file_lacks(file: str, copied: Path, refusal: Callable[..., str]) -> None:
    from safetensors.torch import load_file

    last = max(load_file(copied / file))
    edit_weights(copied / file, lambda tensors: tensors.pop(last))
    part, name = file.split("/")
    assert refusal(copied).endswith(f"{part}: 1 tensor is missing in {name}, first {last}")


@pytest.mark.parametrize("file", [TEXT, UNET, VAE])
def test_a_tensor_that_no_layer_takes(file: str, copied: Path, refusal: Callable[..., str]) -> None:
    import torch

    edit_weights(copied / file, lambda tensors: tensors.update({"another.weight": torch.zeros(3)}))
    assert "1 tensor is in" in (said := refusal(copied)) and said.endswith("no layer for, first another.weight")


@pytest.mark.parametrize("file", [TEXT, UNET, VAE])
def test_a_tensor_of_another_shape(file: str, copied: Path, refusal: Callable[..., str]) -> None:
    import torch

    changed: list[str] = []

    def widen(tensors: dict[str, Any]) -> None:
        changed.append(next(name for name, value in tensors.items() if value.ndim == 1))
        tensors[changed[0]] = torch.zeros(7)

    edit_weights(copied / file, widen)
    assert f"{changed[0]} is 7 in {file.split('/')[1]} and " in refusal(copied)


def test_layers_that_the_config_has_and_the_file_has_not(copied: Path, refusal: Callable[..., str]) -> None:
    edit_json(copied / "text_encoder" / "config.json", num_hidden_layers=4)
    assert "text_encoder: 16 tensors are missing in model.safetensors" in refusal(copied)
    edit_json(copied / "text_encoder" / "config.json", num_hidden_layers=2)
    assert "text_encoder: 16 tensors are in model.safetensors that config.json has no layer for" in refusal(copied)


def test_tied_weights_and_buffers_are_no_gaps(tiny: Callable[[str], Path], tmp_path: Path) -> None:
    """T5 embeds with the weights it is tied to; older CLIP files have the positions, which are a buffer."""
    import torch

    from export.loading import check_weights, open_source

    folder = Path(shutil.copytree(tiny("flux"), tmp_path / "flux"))
    edit_weights(folder / TEXT, lambda tensors: tensors.update({"embeddings.position_ids": torch.arange(16)[None]}))
    t5 = folder / "text_encoder_2" / "model.safetensors"
    edit_weights(t5, lambda tensors: tensors.update({"encoder.embed_tokens.weight": tensors["shared.weight"].clone()}))
    check_weights(open_source(folder))


EXPORT = """
import sys, json
from pathlib import Path
from export.bundle import export
from export.spec import ExportSpec
spec = ExportSpec("x", Path(sys.argv[1]), sides=(64, 64))
export(spec, Path(sys.argv[2]), spec.identity(), "fp32")
from engines.manifest import sha256_file
print(json.dumps({path.name: sha256_file(path) for path in Path(sys.argv[2]).glob("*.onnx")}))
"""


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_two_exports_in_two_processes_are_the_same_files(tiny: Callable[[str], Path], tmp_path: Path) -> None:
    digests = []
    for name in ("one", "two"):
        run = [sys.executable, "-W", "ignore", "-c", EXPORT, str(tiny("least")), str(tmp_path / name)]
        done = subprocess.run(run, cwd=ROOT, capture_output=True, text=True, check=True)
        digests.append(json.loads(done.stdout.strip().splitlines()[-1]))
    assert len(digests[0]) == 4 and digests[0] == digests[1]


def test_a_field_that_the_class_does_not_know(copied: Path, refusal: Callable[..., str]) -> None:
    """Diffusers warns and leaves it out, and the network is another one."""
    edit_json(copied / "unet" / "config.json", second_attention="wide")
    assert "unet/config.json: UNet2DConditionModel" in (said := refusal(copied))
    assert "knows no second_attention='wide'; where it may be ignored, take it out of the file" in said


# --- components that are not what the networks are made for -----------------------------------------------------------


def test_another_encoder(copied: Path, refusal: Callable[..., str]) -> None:
    edit_json(copied / "model_index.json", text_encoder=["transformers", "BertModel"])
    assert "text_encoder is a BertModel; of a StableDiffusionPipeline it can be CLIPTextModel or" in refusal(copied)


@pytest.mark.parametrize("part", ["unet", "text_encoder"])
def test_a_quantized_component(part: str, copied: Path, refusal: Callable[..., str]) -> None:
    quantized = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    edit_json(copied / part / "config.json", quantization_config=quantized)
    assert f"{part} is quantized (bitsandbytes), which ONNX cannot take over: export the checkpoint" in refusal(copied)


def test_a_tokenizer_without_a_length(copied: Path, refusal: Callable[..., str]) -> None:
    edit_json(copied / "tokenizer" / "tokenizer_config.json", model_max_length=None)
    assert "tokenizer/tokenizer_config.json has no model_max_length" in (said := refusal(copied))
    assert said.endswith("write it there, as 16")


def test_a_tokenizer_of_another_model(copied: Path, refusal: Callable[..., str]) -> None:
    edit_json(copied / "tokenizer" / "tokenizer_config.json", model_max_length=77)
    assert "tokenizer gives 77 tokens (model_max_length), and text_encoder has 16 positions" in refusal(copied)
    edit_json(copied / "tokenizer" / "tokenizer_config.json", model_max_length=16)
    edit_json(copied / "text_encoder" / "config.json", vocab_size=300)
    assert "tokenizer has ids up to 605, and text_encoder's vocab_size is 300" in refusal(copied)


def test_masks_of_padded_prompts(copied: Path, refusal: Callable[..., str]) -> None:
    edit_json(copied / "text_encoder" / "config.json", use_attention_mask=True)
    assert "text_encoder says use_attention_mask" in refusal(copied)


# --- schedulers -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"_class_name": "EDMDPMSolverMultistepScheduler", "sigma_min": 0.002, "sigma_max": 80, "sigma_data": 0.5},
            "EDMDPMSolverMultistepScheduler cannot be drafted: EDM preconditioning",
        ),
        ({"_class_name": "SCMScheduler"}, "SCMScheduler cannot be drafted: TrigFlow"),
        ({"_class_name": "TCDScheduler"}, "TCDScheduler cannot be drafted: trajectory consistency"),
        ({"_class_name": "EulerDiscreteScheduler", "timestep_type": "continuous"}, "timestep_type='continuous'"),
        ({"_class_name": "DDIMScheduler", "clip_sample": True}, "clip_sample=True; ddim can do False"),
        ({"_class_name": "DPMSolverMultistepScheduler", "thresholding": True}, "thresholding=True"),
        ({"_class_name": "UniPCMultistepScheduler", "thresholding": True}, "thresholding=True"),
        (
            {"_class_name": "DDIMScheduler", "clip_sample": False, "rescale_betas_zero_snr": True},
            "rescale_betas_zero_snr with prediction_type='epsilon'",
        ),
    ],
)
def test_a_scheduler_that_the_runtime_would_refuse(
    fields: dict[str, Any], message: str, copied: Path, refusal: Callable[..., str]
) -> None:
    path = copied / "scheduler" / "scheduler_config.json"
    path.write_text(json.dumps({"num_train_timesteps": 1000} | fields))
    edit_json(copied / "model_index.json", scheduler=["diffusers", fields["_class_name"]])
    said = refusal(copied)
    assert said.startswith(f"{copied} cannot be exported: scheduler/scheduler_config.json: ") and message in said


@pytest.mark.parametrize(
    ("kind", "fields"),
    [
        ("UniPCMultistepScheduler", {"solver_type": "bh2"}),
        ("DEISMultistepScheduler", {"solver_type": "logrho", "algorithm_type": "deis"}),
        ("PNDMScheduler", {"skip_prk_steps": True, "set_alpha_to_one": False}),
        ("DDIMScheduler", {
            "clip_sample": False, "rescale_betas_zero_snr": True, "prediction_type": "v_prediction",
            "timestep_spacing": "trailing",
        }),
        ("DPMSolverMultistepScheduler", {"use_exponential_sigmas": True}),
        ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}),
        ("DPMSolverMultistepScheduler", {
            "use_flow_sigmas": True, "prediction_type": "flow_prediction", "flow_shift": 3.0,
        }),
    ],
)  # fmt: skip
def test_a_scheduler_that_can_be_played(kind: str, fields: dict[str, Any], copied: Path) -> None:
    """As diffusers saves it."""
    import diffusers

    from export.checks import check
    from export.families import Sides
    from export.loading import configs, open_source

    getattr(diffusers, kind)(**fields).save_pretrained(copied / "scheduler")
    edit_json(copied / "model_index.json", scheduler=["diffusers", kind])
    source = open_source(copied)
    check(source, configs(source), Sides(64, 64, 64, 8))


# --- adapters ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "format_"),
    [
        ("lora_unet_mid.hada_w1_a", "LoHa"),
        ("lora_unet_mid.lokr_w1", "LoKr"),
        ("diffusion_model.out.diff", "full differences"),
        ("lora_unet_mid.oft_blocks", "OFT"),
        ("emb_params", "a textual inversion"),
    ],
)
def test_an_adapter_that_is_no_lora(
    name: str, format_: str, copied: Path, tmp_path: Path, refusal: Callable[..., str]
) -> None:
    import torch
    from safetensors.torch import save_file

    save_file({name: torch.zeros(2, 2)}, file := tmp_path / "adapter.safetensors")
    said = refusal(copied, loras=((file, 1.0),))
    assert f"{file} is no LoRA alone: 1 of its 1 tensors are {format_} (first {name})" in said


def test_weights_of_something_else_as_a_lora(copied: Path, refusal: Callable[..., str]) -> None:
    assert "is no LoRA: none of its" in refusal(copied, loras=((copied / VAE, 1.0),))


# --- whatever a library raises ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("part", ["scheduler", "tokenizer", "unet", "vae", "text_encoder"])
@pytest.mark.parametrize("error", [AttributeError("'list' object has no attribute 'x'"), RecursionError("deep\nlines")])
def test_whatever_a_library_raises_is_one_line_with_the_component(
    part: str, error: Exception, copied: Path, refusal: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from export.loading import open_source

    def fails(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(open_source(copied).kind(part), "from_pretrained", fails)
    assert refusal(copied).startswith(f"{copied} cannot be loaded: {part}: ")


def test_debug_shows_where_an_error_comes_from(
    copied: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from export.__main__ import main

    (copied / "unet" / "config.json").write_text("{")
    for words, shown in (([], False), (["--debug"], True)):
        monkeypatch.setattr("sys.argv", ["export", str(copied), "--devices", "cpu", "--build", str(tmp_path), *words])
        assert main() == 1
        printed = capsys.readouterr().err
        assert ("Traceback" in printed) is shown
        assert printed.splitlines()[-1].startswith(f"error: {copied} cannot be loaded: unet/config.json: ")
