"""`python -m bench export`: full-size models with random weights through the export: time, memory, parity, plans.

Architectures and sizes are those of the published checkpoints; diffusers makes and saves the folders. Every step runs
in a process of its own, as for a user; memory is that of the process and its children, without pages that the system
can read again from files. Takes about 60 GB of disk below `--folder`, and for SDXL most of 24 GB of memory.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from engines.errors import ExportError
from engines.store import Bundle, bundle_name

ROOT = Path(__file__).resolve().parent.parent
CAPABILITY = (8, 9)  # of the GPU that plans are built for, which need not be present


def arguments(parser: argparse.ArgumentParser) -> None:
    """The options."""
    parser.add_argument("--models", nargs="+", choices=tuple(MODELS), default=list(MODELS))
    parser.add_argument("--folder", type=Path, default=ROOT / "build" / "full", help="where models and bundles go")
    parser.add_argument("--keep", action="store_true", help="leave them there")


def measure(models: Sequence[str], folder: Path, keep: bool) -> list[dict[str, Any]]:
    """One row per network and precision."""
    rows: list[dict[str, Any]] = []
    for model in models:
        name, make, precisions = MODELS[model]
        source = folder / name
        if not (source / "model_index.json").is_file():
            subprocess.run([sys.executable, "-c", make, str(source)], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
        for precision in precisions:
            devices = "cpu" if precision == "fp32" else f"cuda:0@{precision}"
            bundles = folder / "bundles"
            shutil.rmtree(bundles, ignore_errors=True)  # networks exported by an interrupted run would not be measured
            networks = _exported(source, bundles, devices, bundle_name(name, precision))
            for network, row in networks.items():
                if precision == "fp16":
                    row |= _plan(bundles / bundle_name(name, precision), network)
                rows.append({"model": name, "network": network, "precision": precision, **row})
            if not keep:
                shutil.rmtree(bundles)
        if not keep:
            shutil.rmtree(source)
    return rows


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Markdown."""
    capabilities = ", ".join(dict.fromkeys(row["capability"] for row in rows if "capability" in row))
    planned = f"TensorRT-RTX plan for compute capability {capabilities}" if capabilities else "TensorRT-RTX plan"
    lines = [
        f"| model | network | type | ONNX | export and parity | peak memory | difference to torch | {planned} |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        plan = ""
        if "plan_seconds" in row:
            size, peak = row["plan_bytes"] / 1e9, row["plan_peak_bytes"] / 1e9
            plan = f"{row['plan_seconds']:.0f} s, {size:.2f} GB, peak {peak:.1f} GB"
        lines.append(
            f"| {row['model']} | {row['network']} | {row['precision']} | {row['bytes'] / 1e9:.2f} GB "
            f"| {row['seconds']:.0f} s | {row['peak_bytes'] / 1e9:.1f} GB | {row['relative_error']:.1e} "
            f"| {plan} |"
        )
    return "\n".join(lines)


def _exported(source: Path, bundles: Path, devices: str, name: str) -> dict[str, dict[str, Any]]:
    """Runs `python -m export`; seconds and peak memory per network."""
    command = [sys.executable, "-m", "export", str(source), "--build", str(bundles), "--devices", devices]
    networks: dict[str, dict[str, Any]] = {}
    state = {"since": time.perf_counter(), "peak": 0}

    def look(used: int) -> None:
        state["peak"] = max(state["peak"], used)
        for done in bundles.glob(".partial-*/*.done"):
            if done.stem not in networks:
                now = time.perf_counter()
                networks[done.stem] = {"seconds": round(now - state["since"], 1), "peak_bytes": state["peak"]}
                state.update(since=now, peak=0)

    _watched(command, look)
    manifest = Bundle.open(str(bundles / name)).manifest
    for network in manifest.networks:  # the last file may be renamed before it can be sampled
        row = {"seconds": round(time.perf_counter() - state["since"], 1), "peak_bytes": state["peak"]}
        networks.setdefault(network, row)
    for network, row in networks.items():
        spec = manifest.networks[network]
        row["bytes"] = sum(file.bytes for file in spec.files)
        row["relative_error"], row["bound"] = spec.parity.relative_error, spec.parity.bound
    return networks


BUILD = """
import sys
from engines.nvidia import Gpu
from engines.tensorrt import build
from engines.store import Bundle
bundle, network, major, minor, target = sys.argv[1:]
plan = build.build(Bundle.open(bundle), network, Gpu("named", (int(major), int(minor)), "none"))
open(target, "wb").write(plan)
"""


def _plan(bundle: Path, network: str) -> dict[str, Any]:
    """A TensorRT plan of a network, built for a named capability."""
    target = bundle / f"{network}.plan"
    peak = 0

    def look(used: int) -> None:
        nonlocal peak
        peak = max(peak, used)

    start = time.perf_counter()
    _watched([sys.executable, "-c", BUILD, str(bundle), network, *map(str, CAPABILITY), str(target)], look)
    size = target.stat().st_size
    target.unlink()
    return {
        "plan_seconds": round(time.perf_counter() - start, 1), "plan_bytes": size, "plan_peak_bytes": peak,
        "capability": ".".join(map(str, CAPABILITY)),
    }  # fmt: skip


def _watched(command: Sequence[str], look: Callable[[int], None]) -> None:
    """Runs a command and samples its memory, children included, ten times a second."""
    import psutil

    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL) as process:
        watched = psutil.Process(process.pid)
        while process.poll() is None:
            used = 0
            try:
                for one in (watched, *watched.children(recursive=True)):
                    used += (memory := one.memory_info()).rss - memory.shared
            except psutil.NoSuchProcess:
                continue
            look(used)
            time.sleep(0.1)
    if process.returncode:
        raise ExportError(f"{' '.join(command[:4])} … ended with {process.returncode}")


SD15 = """
import sys, torch, diffusers, transformers
torch.manual_seed(0)
tokenizer = transformers.CLIPTokenizer.from_pretrained("export/shapes/model/tokenizer", model_max_length=77)
text = transformers.CLIPTextModel(transformers.CLIPTextConfig(
    hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12, vocab_size=49408,
    max_position_embeddings=77, eos_token_id=605, bos_token_id=604, pad_token_id=605)).half()
unet = diffusers.UNet2DConditionModel(sample_size=64, cross_attention_dim=768, attention_head_dim=8).half()
vae = diffusers.AutoencoderKL(
    block_out_channels=(128, 256, 512, 512), down_block_types=("DownEncoderBlock2D",) * 4,
    up_block_types=("UpDecoderBlock2D",) * 4, layers_per_block=2, latent_channels=4, sample_size=512).half()
scheduler = diffusers.PNDMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear",
    skip_prk_steps=True, set_alpha_to_one=False, steps_offset=1)
diffusers.StableDiffusionPipeline(vae=vae, text_encoder=text, tokenizer=tokenizer, unet=unet, scheduler=scheduler,
    safety_checker=None, feature_extractor=None, requires_safety_checker=False).save_pretrained(sys.argv[1])
"""
SDXL = """
import sys, torch, diffusers, transformers
torch.manual_seed(0)
torch.set_default_dtype(torch.float16)
tokenizer = transformers.CLIPTokenizer.from_pretrained("export/shapes/model/tokenizer", model_max_length=77)
def text(width, layers, kind, **more):
    return kind(transformers.CLIPTextConfig(hidden_size=width, intermediate_size=4 * width, num_hidden_layers=layers,
        num_attention_heads=width // 64, vocab_size=49408, max_position_embeddings=77, eos_token_id=605,
        bos_token_id=604, pad_token_id=605, projection_dim=width, **more)).half()
unet = diffusers.UNet2DConditionModel(
    sample_size=128, block_out_channels=(320, 640, 1280), layers_per_block=2, cross_attention_dim=2048,
    down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"), attention_head_dim=(5, 10, 20),
    transformer_layers_per_block=(1, 2, 10), use_linear_projection=True, addition_embed_type="text_time",
    addition_time_embed_dim=256, projection_class_embeddings_input_dim=2816).half()
vae = diffusers.AutoencoderKL(
    block_out_channels=(128, 256, 512, 512), down_block_types=("DownEncoderBlock2D",) * 4, force_upcast=True,
    up_block_types=("UpDecoderBlock2D",) * 4, layers_per_block=2, latent_channels=4, sample_size=1024).half()
scheduler = diffusers.EulerDiscreteScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear",
    timestep_spacing="leading", steps_offset=1)
diffusers.StableDiffusionXLPipeline(vae=vae, text_encoder=text(768, 12, transformers.CLIPTextModel),
    text_encoder_2=text(1280, 32, transformers.CLIPTextModelWithProjection, hidden_act="gelu"), tokenizer=tokenizer,
    tokenizer_2=tokenizer, unet=unet, scheduler=scheduler, add_watermarker=False).save_pretrained(sys.argv[1])
"""
MODELS: dict[str, tuple[str, str, tuple[str, ...]]] = {
    "sd15": ("sd15-random", SD15, ("fp16",)),
    "sdxl": ("sdxl-random", SDXL, ("fp16",)),
}
