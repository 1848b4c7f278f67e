"""Folders, hub names and LoRA files as people have them: loaded by diffusers, or refused in one message."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from engines.errors import DeviceError, ExportError, ParameterError
from engines.manifest import MANIFEST
from engines.store import Bundle
from export.__main__ import Asked, export, finished, parse_loras, parse_sides, resolve

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
    from export.loading import Lora, load, open_source

    source = open_source(folder, [Lora(file, scale) for file, scale in loras])
    module = getattr(load(source, [part], "fp32"), part)
    return {name: value.numpy() for name, value in module.state_dict().items()}


def diffusers_with(folder: Path, *loras: tuple[Path, float]) -> Any:
    """The diffusers pipeline with the denoiser that would be exported."""
    import diffusers

    from export.loading import Lora, load, open_source

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
            _, latents = baseline.picture("a star", noise, Setting("ddim", 3, 4.0))
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
    found = [Asked("x", folder, loras).identity() for loras in several]
    assert len(set(found)) == len(several)
    assert Asked("x", folder, ((same, 1.0),)).identity() == found[1], "the content counts, not the name"


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
    from export.__main__ import lora_name

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
        asked = Asked("mixed", copied)
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
    assert load(source, ["vae"], "fp32").vae.config.latent_channels == 4


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
    }  # fmt: skip
    path.write_text(json.dumps(index))
    assert "it is a refiner" in refusal(folder)


# --- sizes, memory, interruption --------------------------------------------------------------------------------------


def test_sizes() -> None:
    assert parse_sides(None) is None and parse_sides("512") == (512, 512) and parse_sides("256-768") == (256, 768)
    for text in ("512x512", "768-256", "big", "-5"):
        with pytest.raises(ParameterError, match="SIDE or LEAST-MOST"):
            parse_sides(text)


def test_sizes_that_a_model_cannot_do(copied: Path, tmp_path: Path) -> None:
    asked = Asked("copied", copied, sides=(30, 64))
    with pytest.raises(ParameterError, match="multiples of 8 from 8 to 1024, not 30-64"):
        export(asked, tmp_path / "build" / "copied", asked.identity(), "fp32")


def test_too_little_memory_is_said_before_the_work(
    copied: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("export.__main__.MEMORY_ALWAYS", 10**15)
    asked = Asked("copied", copied)
    with pytest.raises(DeviceError, match=r"exporting text_encoder of copied needs about 1000000\.0 GB of memory"):
        export(asked, tmp_path / "build" / "copied", asked.identity(), "fp32")


def test_an_interrupted_export_goes_on(copied: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from export import to_onnx

    made: list[str] = []
    real = to_onnx.export_network

    def interrupted(name: str, *rest: Any) -> Any:
        if len(made) == 1 and name == "denoiser":
            raise KeyboardInterrupt
        made.append(name)
        return real(name, *rest)

    monkeypatch.setattr(to_onnx, "export_network", interrupted)
    from export.families import STABLE_DIFFUSION

    networks = {name: STABLE_DIFFUSION.networks[name] for name in ("text_encoder", "denoiser")}
    monkeypatch.setattr("export.loading.Source.family", property(lambda self: family(networks)))
    asked, target = Asked("copied", copied), tmp_path / "build" / "copied"
    with pytest.raises(KeyboardInterrupt):
        export(asked, target, asked.identity(), "fp32")
    (kept,) = (tmp_path / "build").glob(".partial-*")
    assert finished(kept, "text_encoder") and not finished(kept, "denoiser") and not target.exists()
    made.append("interrupted once")
    export(asked, target, asked.identity(), "fp32")
    assert made == ["text_encoder", "interrupted once", "denoiser"], "only what was missing is exported again"
    assert (target / MANIFEST).is_file() and not list((tmp_path / "build").glob(".partial-*"))
    assert not Bundle.open(str(target)).damaged_sources() and not list(target.glob("*.done"))


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
    script = "import sys; from export.__main__ import resolve; print(*resolve(sys.argv[1]))"
    environment = {"HF_HUB_OFFLINE": "1", "HF_HUB_CACHE": str(tmp_path / "hub"), "PATH": "/usr/bin:/bin"}
    run = [sys.executable, "-c", script, "someone/sd1"]
    done = subprocess.run(run, cwd=Path(__file__).parent.parent, env=environment, capture_output=True, text=True)
    name, folder = done.stdout.strip().split(" ", 1)
    assert name == "sd1" and Path(folder).resolve() == (cached / "snapshots" / ("0" * 40)).resolve()


def test_an_existing_folder_is_never_looked_up(tiny: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("socket.socket.connect", lambda *_: pytest.fail("the network was used"))
    monkeypatch.chdir(tiny("sd1").parent.parent)
    name, folder = resolve(str(tiny("sd1").relative_to(tiny("sd1").parent.parent)))
    assert name == "sd1" and folder.is_dir()
