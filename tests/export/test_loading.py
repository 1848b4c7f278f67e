"""Folders, hub names and LoRA files as people have them: loaded by diffusers, or refused in one message."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from engines.errors import DeviceError, ExportError, ParameterError
from engines.manifest import MANIFEST, Manifest
from engines.store import Bundle
from export.__main__ import main
from export.bundle import check_name, export, finished
from export.spec import EMBEDDED, ExportSpec, parse_loras, parse_sides, resolve
from tests import ROOT

pytestmark = pytest.mark.filterwarnings("ignore")  # diffusers and transformers, about themselves


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of a family by name, made once; not to be changed."""
    from tests.tiny import save

    root = tmp_path_factory.mktemp("folders")

    def folder(name: str) -> Path:
        if not (root / name).is_dir():
            save(name, root)
        return root / name

    return folder


@pytest.fixture
def copied(tiny: Callable[[str], Path], tmp_path: Path) -> Path:
    """A Stable Diffusion folder that may be changed."""
    return Path(shutil.copytree(tiny("sd1"), tmp_path / "copied"))


def lora(folder: Path, target: Path, seed: int, *, text: bool = False) -> Path:
    """A LoRA of random weights for the attention of a folder's denoiser, saved by diffusers."""
    import diffusers
    import torch
    from peft import LoraConfig
    from peft.utils import get_peft_model_state_dict

    torch.manual_seed(seed)
    pipeline = diffusers.DiffusionPipeline.from_pretrained(folder)
    layers = {}
    for part in ("unet", "transformer", *(["text_encoder"] if text else [])):
        module = getattr(pipeline, part, None)
        if module is not None:
            targets = ["q_proj", "v_proj"] if part == "text_encoder" else ["to_q", "to_v"]
            module.add_adapter(LoraConfig(r=2, lora_alpha=2, target_modules=targets, init_lora_weights=False))
            layers[f"{part}_lora_layers"] = get_peft_model_state_dict(module)
    pipeline.save_lora_weights(target.parent, weight_name=target.name, **layers)
    return target


def weights(folder: Path, *loras: tuple[Path, float], part: str = "unet") -> dict[str, np.ndarray]:
    """A component's weights as they would be exported."""
    from export.loading import load, open_source
    from export.lora import Lora

    source = open_source(folder, [Lora(file, scale) for file, scale in loras])
    module = getattr(load(source, [part], "fp32"), part)
    return {name: value.numpy() for name, value in module.state_dict().items()}


def diffusers_with(folder: Path, *loras: tuple[Path, float]) -> Any:
    """The diffusers pipeline with the denoiser that would be exported."""
    import diffusers

    from export.loading import load, open_source
    from export.lora import Lora

    source = open_source(folder, [Lora(file, scale) for file, scale in loras])
    return diffusers.DiffusionPipeline.from_pretrained(folder, unet=load(source, ["unet"], "fp32").unet)


# --- LoRA ------------------------------------------------------------------------------------------------------------


def test_a_lora_is_added_to_the_weights_in_its_scale(tiny: Callable[[str], Path], tmp_path: Path) -> None:
    from safetensors.numpy import load_file

    folder, plain = tiny("sd1"), weights(tiny("sd1"))
    files = [lora(folder, tmp_path / f"{name}.safetensors", seed) for seed, name in enumerate(("one", "two"))]
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
    file = lora(folder, tmp_path / "text.safetensors", 3, text=True)
    before, after = weights(folder, part="text_encoder"), weights(folder, (file, 1.0), part="text_encoder")
    assert sum(not np.array_equal(before[name], after[name]) for name in before) == 6  # two of each of three layers


@pytest.mark.slow
def test_the_baseline_of_benchmarks_has_the_lora_too(
    tiny: Callable[[str], Path], tmp_path: Path, rng: np.random.Generator
) -> None:
    import torch

    from bench.torch_baseline import Setting, TorchBaseline, Wanted

    folder, noise = tiny("sd2"), rng.standard_normal((1, 4, 16, 16), np.float32)
    file = lora(folder, tmp_path / "a lora.safetensors", 0)
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
    file = lora(tiny(of), tmp_path / "other.safetensors", 0)
    with pytest.raises(ExportError, match=r"other\.safetensors does not fit .*, a StableDiffusion"):
        weights(tiny(folder), (file, 1.0), part="text_encoder")


def test_the_identity_depends_on_what_is_fused_how_and_in_which_order(
    tiny: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = tiny("sd1")
    files = [lora(folder, tmp_path / f"{name}.safetensors", seed) for seed, name in enumerate(("one", "two"))]
    same = Path(shutil.copy(files[0], tmp_path / "renamed.safetensors"))
    one, two = ((file, 1.0) for file in files)
    several = [(), (one,), (two,), (one, two), (two, one), ((files[0], 0.5),)]
    found = [ExportSpec("x", folder, loras).identity() for loras in several]
    assert len(set(found)) == len(several)
    assert ExportSpec("x", folder, ((same, 1.0),)).identity() == found[1], "the content counts, not the name"


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("missing.safetensors", "there is no LoRA file missing.safetensors"),
        ("file.safetensors:much", "the scale behind the colon must be a number"),
        ("file.safetensors:11", "between -10 and 10"),
        ("file.bin", "must be safetensors"),
    ],
)
def test_lora_words_that_cannot_be(word: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("file.safetensors", "file.bin"):
        (tmp_path / name).touch()
    with pytest.raises(ParameterError, match=message):
        parse_loras([word])


def test_lora_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.safetensors").touch()
    assert parse_loras(["a.safetensors", "a.safetensors:0.8", "a.safetensors:-1e-1"]) == tuple(
        (Path("a.safetensors"), scale) for scale in (1.0, 0.8, -0.1)
    )


def test_make_and_the_export_give_a_bundle_the_same_name(checkout: Path) -> None:
    words = ["MODEL=some/folder/sd15/", "LORA=a/one.safetensors:0.8 two.safetensors", "SIZES=512-1024"]
    run = ["make", "--dry-run", "--always-make", "engines", "DEVICES=cpu", *words]
    printed = subprocess.run(run, cwd=checkout, capture_output=True, text=True, check=True).stdout
    assert 'engines build "sd15+one:0.8+two"' in printed
    assert "--lora a/one.safetensors:0.8 two.safetensors --sizes 512-1024" in printed
    from export.spec import lora_name

    assert lora_name(["a/one.safetensors:0.8", "two.safetensors"]) == "+one:0.8+two"


# --- folders ----------------------------------------------------------------------------------------------------------


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
    with pytest.raises(ExportError, match="denoiser cannot be exported by torch"):
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


# --- sizes, memory, interruption --------------------------------------------------------------------------------------


def test_sizes() -> None:
    assert parse_sides(None) is None and parse_sides("512") == (512, 512) and parse_sides("256-768") == (256, 768)
    for text in ("512x512", "768-256", "big", "-5"):
        with pytest.raises(ParameterError, match="SIDE or LEAST-MOST"):
            parse_sides(text)


def test_sizes_that_a_model_cannot_do(copied: Path, tmp_path: Path) -> None:
    asked = ExportSpec("copied", copied, sides=(30, 64))
    with pytest.raises(ParameterError, match="multiples of 8 from 8 to 1024, not 30-64"):
        export(asked, tmp_path / "build" / "copied", asked.identity(), "fp32")


def test_too_little_memory_is_said_before_the_work(
    copied: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the first networks could be exported."""
    from export import to_onnx

    real = to_onnx.memory
    monkeypatch.setattr(to_onnx, "memory", lambda name, *rest: 10**15 if name == "denoiser" else real(name, *rest))
    monkeypatch.setattr(to_onnx, "export_network", lambda *_: pytest.fail("it began"))
    asked = ExportSpec("copied", copied)
    with pytest.raises(DeviceError, match=r"exporting denoiser of copied needs about 1000000\.0 GB of memory"):
        export(asked, tmp_path / "build" / "copied", asked.identity(), "fp32")
    assert not list((tmp_path / "build").glob(".partial*"))


def test_memory_grows_with_weights_and_with_pixels() -> None:
    from export.families import Sides
    from export.to_onnx import BATCHES, FEW, compared, memory

    small, large = Sides(512, 256, 1024, 64), Sides(1024, 512, 2048, 64)
    xl = memory("denoiser", 5_140_000_000, "fp16", large, 8)
    assert 13e9 < xl < 20e9, "measured: bench/results/export.json"
    assert xl > memory("denoiser", 1_720_000_000, "fp16", small, 8) > 6.5e9
    assert memory("vae_decoder", 10**8, "fp32", large, 8) > memory("vae_decoder", 10**8, "fp32", small, 8) + 3e9
    assert compared("denoiser", 10**8, large) == BATCHES and compared("vae_decoder", 10**8, large) == FEW


@pytest.mark.parametrize("failure", [KeyboardInterrupt(), DeviceError("memory ended")])
def test_an_interrupted_export_goes_on(
    failure: BaseException, copied: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    from export import to_onnx

    made: list[str] = []
    real = to_onnx.export_network

    def interrupted(name: str, *rest: Any) -> Any:
        if len(made) == 1 and name == "denoiser":
            (rest[1] / "what a kill leaves").mkdir()
            raise failure
        made.append(name)
        return real(name, *rest)

    monkeypatch.setattr(to_onnx, "export_network", interrupted)
    from export.families import STABLE_DIFFUSION
    from export.to_onnx import STAGES

    networks = {name: STABLE_DIFFUSION.networks[name] for name in ("text_encoder", "denoiser", "vae_decoder")}
    monkeypatch.setattr("export.loading.Source.family", property(lambda self: family(networks)))
    asked, target = ExportSpec("copied", copied), tmp_path / "build" / "copied"
    with pytest.raises(type(failure)):
        export(asked, target, asked.identity(), "fp32")
    (kept,) = (tmp_path / "build").glob(".partial-*")
    assert finished(kept, "text_encoder") and not finished(kept, "denoiser") and not target.exists()
    made.append("interrupted once")
    export(asked, target, asked.identity(), "fp32")
    assert made == ["text_encoder", "interrupted once", "denoiser", "vae_decoder"], (
        "only what was missing is exported again"
    )
    assert (target / MANIFEST).is_file() and not list((tmp_path / "build").glob(".partial-*"))
    assert not Bundle.open(str(target)).damaged_sources()
    assert not list(target.glob("*.done")) and not list(target.glob("*/"))
    shown = capsys.readouterr().err
    for network in ("text_encoder", "denoiser"):
        assert all(f"{network} {stage}" in shown for stage in STAGES)
    assert "12/12" in shown


def identity_model(path: Path) -> Path:
    """An ONNX file that gives what it is given."""
    import onnx
    from onnx import helper

    value = [helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, ["batch"]) for name in ("x", "y")]
    graph = helper.make_graph([helper.make_node("Identity", ["x"], ["y"])], "identity", value[:1], value[1:])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), path)
    return path


@pytest.mark.parametrize(
    ("given", "expected", "message"),
    [
        ([1.0, -4.0], [1.0, -4.5], "net: ONNX Runtime differs from torch by 0.5 in y, whose scale is 4.5; allowed is"),
        ([1.0, np.nan], [1.0, 2.0], "net: ONNX Runtime differs from torch by inf in y"),
        ([1.0, 2.0], [1.0, np.nan], "net: ONNX Runtime differs from torch by inf in y"),
        ([1.0, np.inf], [1.0, np.inf], "net: ONNX Runtime differs from torch by inf in y"),
        ([1.0, 2.0], [1.0], "net: ONNX Runtime"),
    ],
)
def test_an_export_that_differs_from_torch_is_refused(
    given: list[float], expected: list[float], message: str, tmp_path: Path
) -> None:
    from export.to_onnx import measure_parity

    pairs = tmp_path / "pairs.npz"
    np.savez(pairs, **{"in/0/x": np.float32(given), "out/0/y": np.float32(expected)})  # type: ignore[arg-type]
    with pytest.raises(ExportError, match=re.escape(message)):
        measure_parity("net", identity_model(tmp_path / "net.onnx"), pairs, 0.1, (1,))


def test_an_export_that_equals_torch_says_by_how_much(tmp_path: Path) -> None:
    from export.to_onnx import measure_parity

    pairs = tmp_path / "pairs.npz"
    np.savez(pairs, **{"in/0/x": np.float32([1, -4]), "out/0/y": np.float32([1, -4.25])})  # type: ignore[arg-type]
    found = measure_parity("net", identity_model(tmp_path / "net.onnx"), pairs, 0.1, (1,))
    assert found.relative_error == pytest.approx(0.25 / 4.25) and found.max_abs_error == 0.25


def test_a_comparison_that_the_system_kills_is_the_machines_fault(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from export import to_onnx

    monkeypatch.setattr(to_onnx, "sys", SimpleNamespace(executable=str(killed := tmp_path / "python")))
    killed.write_text("#!/bin/sh\nkill -9 $$\n")
    killed.chmod(0o755)
    with pytest.raises(DeviceError, match=r"net: ONNX Runtime was ended by signal 9 .* goes on from here"):
        to_onnx.measure_parity("net", tmp_path / "net.onnx", tmp_path / "pairs.npz", 0.1, (1,))


def family(networks: dict[str, Any]) -> Any:
    from dataclasses import replace

    from export.families import STABLE_DIFFUSION

    return replace(STABLE_DIFFUSION, networks=networks)


# --- the hub ----------------------------------------------------------------------------------------------------------


def test_a_name_that_the_hub_cannot_give(tmp_path: Path, checkout: Path) -> None:
    run = [sys.executable, "-m", "export", "nobody/nothing", "--build", str(tmp_path)]
    environment = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "hub"), "PATH": "/usr/bin:/bin"}
    done = subprocess.run(run, cwd=checkout, env=environment, capture_output=True, text=True, check=False)
    last = done.stderr.strip().splitlines()[-1]
    assert done.returncode == 1 and last.startswith("error: nobody/nothing is no folder, and the hub cannot give it")
    assert "HF_HUB_OFFLINE is set" in last and "give the path of a folder" in last


def test_a_model_in_the_hubs_cache_is_found_without_network(
    tiny: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cached = tmp_path / "hub" / "models--someone--sd1"
    shutil.copytree(tiny("sd1"), cached / "snapshots" / ("0" * 40))
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text("0" * 40)
    script = "import sys; from export.spec import resolve; print(*resolve(sys.argv[1]))"
    environment = {"HF_HUB_OFFLINE": "1", "HF_HUB_CACHE": str(tmp_path / "hub"), "PATH": "/usr/bin:/bin"}
    run = [sys.executable, "-c", script, "someone/sd1"]
    done = subprocess.run(run, cwd=ROOT, env=environment, capture_output=True, text=True)
    model, folder = done.stdout.strip().split(" ", 1)
    assert model == "someone/sd1" and Path(folder).resolve() == (cached / "snapshots" / ("0" * 40)).resolve()


def test_an_existing_folder_is_never_looked_up(tiny: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("socket.socket.connect", lambda *_: pytest.fail("the network was used"))
    monkeypatch.chdir(tiny("sd1").parent.parent)
    model, folder = resolve(str(tiny("sd1").relative_to(tiny("sd1").parent.parent)))
    assert model == str(tiny("sd1")) and folder.is_dir()


# --- names ------------------------------------------------------------------------------------------------------------


def test_what_makes_a_bundle_again(tiny: Callable[[str], Path], tmp_path: Path) -> None:
    folder, file = tiny("sd1"), lora(tiny("sd1"), tmp_path / "one.safetensors", 0)
    assert ExportSpec("shapes", EMBEDDED["shapes"]).origin == "shapes"
    assert ExportSpec("sd1", folder, sides=(64, 128)).origin == f"{folder} SIZES=64-128"
    assert ExportSpec("sd1", folder, ((file, 0.5),)).origin == f"{folder} LORA={file}:0.5"
    cached = tmp_path / "hub" / "snapshots" / "0123"
    assert ExportSpec("sd1", cached, model="someone/sd1").origin == "someone/sd1", "not where the hub's cache has it"


def test_a_link_has_a_name_of_its_own(tiny: Callable[[str], Path], tmp_path: Path, checkout: Path) -> None:
    link = tmp_path / "mine"
    link.symlink_to(tiny("sd1"))
    assert resolve(str(link)) == (str(link), link)
    for model, name in ((link, "mine"), (".", checkout.name)):
        run = ["make", "--dry-run", "--always-make", "engines", "DEVICES=cpu", f"MODEL={model}"]
        printed = subprocess.run(run, cwd=checkout, capture_output=True, text=True, check=True).stdout
        assert f'engines build "{name}"' in printed


def test_no_model_takes_the_place_of_another(copied: Path, tmp_path: Path) -> None:
    taken = Path(shutil.copytree(copied, tmp_path / "shapes"))
    with pytest.raises(ExportError, match="shapes is the name of an embedded model"):
        resolve(str(taken))
    target = tmp_path / "build" / "x-fp16"
    target.mkdir(parents=True)
    there = Bundle.open("shapes").manifest.model_copy(update={"model": "x", "precision": "fp16"})
    there.write(target)
    check_name(target, ExportSpec("x", copied), "fp16")
    check_name(tmp_path / "build" / "other", ExportSpec("other", copied), "fp32")
    with pytest.raises(ExportError, match="holds x in fp16: give the folder another name"):
        check_name(target, ExportSpec("x-fp16", copied), "fp32")


@pytest.mark.slow
def test_a_lora_is_in_its_own_bundle_alone(copied: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from export.families import STABLE_DIFFUSION

    networks = {name: STABLE_DIFFUSION.networks[name] for name in ("text_encoder", "denoiser", "vae_decoder")}
    monkeypatch.setattr("export.loading.Source.family", property(lambda self: family(networks)))
    file = lora(copied, tmp_path / "one.safetensors", 0)
    files: dict[str, dict[str, bytes]] = {}
    for run, words in {"before": [], "fused": ["--lora", f"{file}:0.8"], "after": []}.items():
        command = ["export", str(copied), *words, "--devices", "cpu", "--build", str(tmp_path / run)]
        monkeypatch.setattr("sys.argv", command)
        assert main() == 0
        (bundle,) = (tmp_path / run).glob("[!.]*")
        assert bundle.name == ("copied+one:0.8" if words else "copied")
        files[run] = {path.name: path.read_bytes() for path in bundle.iterdir() if path.suffix == ".onnx"}
    assert files["before"] == files["after"], "byte for byte"
    changed = {name for name, content in files["fused"].items() if content != files["before"][name]}
    assert changed == {"denoiser.onnx"} and len(files["after"]) == 3
    manifest = Manifest.read(tmp_path / "fused" / "copied+one:0.8")
    assert manifest.origin == f"{copied} LORA={file}:0.8"
