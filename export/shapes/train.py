"""Trains `shapes` from nothing: `python -m export.shapes.train`.

Four stages: tokenizer, VAE, latents, then text encoder and UNet together. Each stage resumes from its last checkpoint,
so an interrupted run continues where it was. The result is a folder that `diffusers.StableDiffusionPipeline` loads.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from diffusers.training_utils import EMAModel, compute_snr
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from torch import Tensor
from tqdm import tqdm
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from export.shapes.card import write_card
from export.shapes.data import COLOURS, KINDS, PLACES, RADII, SIDE, Scene, draw, random_scene

MODEL_FOLDER = Path(__file__).parent / "model"
MAX_TOKENS = 32
CAPTION_DROPOUT = 0.1  # of the captions are empty, which is what guidance needs
LOOSE_CAPTIONS = 0.3  # of the captions leave something out
TWO_SHAPES = 0.4  # of the images
OFFSET_NOISE = 0.1  # keeps the model from reading the background out of the mean of the noise
SNR_GAMMA = 5.0  # min-SNR weighting: Hang et al., "Efficient Diffusion Training via Min-SNR Weighting", 2023
# Where a shape goes is decided at high noise, where ε hardly depends on it, and only if the place words can be told
# apart. On a plain ε loss colours and kinds were right after 2,000 steps and places still chance after 4,000; by then
# "left" and "right" had become the same to 1.6 %. So word embeddings start long, and in the first steps the text
# encoder learns slowly, half of the noise levels are high, and there the loss also looks at the layout of x̂_0. Places
# are right after 1,500 such steps; kinds never become so with them, which is why they end.
LAYOUT_STEPS = 2200
HIGH_NOISE = 0.65  # of the timesteps; half of the batch is drawn above it
LAYOUT_NOISE = 0.7  # of the timesteps; the layout counts above it
LAYOUT_WEIGHT = 4.0
WORD_LENGTH = 0.25  # standard deviation of fresh word embeddings; CLIP's is 0.02
TEXT_RATE = 0.1  # of the learning rate, while the layout is learned
SAVE_EVERY = 250


@dataclass(frozen=True)
class Recipe:
    """How long and how hard to train."""

    work: Path
    device: str
    vae_steps: int
    vae_batch: int
    images: int
    steps: int
    batch: int
    seed: int


# --- tokenizer ---------------------------------------------------------------------------------------------------


def build_tokenizer(recipe: Recipe) -> CLIPTokenizer:
    """A CLIP tokenizer whose byte-level BPE knows every caption word as one token and can spell any other."""
    words = " ".join((*RADII, *COLOURS, *KINDS, *PLACES, "a", "and", "on", "background", "centre")).split()
    bpe = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    bpe.normalizer = normalizers.Lowercase()
    bpe.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=2000, min_frequency=1, initial_alphabet=alphabet, end_of_word_suffix="</w>", show_progress=False
    )
    bpe.train_from_iterator([" ".join(words)] * 2, trainer)
    merges = _merges(bpe)
    symbols = [*alphabet, *(letter + "</w>" for letter in alphabet), *("".join(pair) for pair in merges)]
    vocab = {symbol: i for i, symbol in enumerate(dict.fromkeys(symbols))}
    for special in ("<|startoftext|>", "<|endoftext|>"):
        vocab[special] = len(vocab)
    tokenizer = CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=MAX_TOKENS)
    for word in words:
        if len(tokenizer(word).input_ids) != 3:
            raise RuntimeError(f"the tokenizer does not know {word!r} as one token: {tokenizer.tokenize(word)}")
    return tokenizer


def _merges(bpe: Tokenizer) -> list[tuple[str, str]]:
    return [(left, right) for left, right in json.loads(bpe.to_str())["model"]["merges"]]


# --- networks ----------------------------------------------------------------------------------------------------


def new_vae() -> AutoencoderKL:
    """64×64×3 → 16×16×4 and back; no attention, so that it costs little beside the UNet."""
    return AutoencoderKL(
        in_channels=3,
        out_channels=3,
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(24, 48, 64),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
        sample_size=SIDE,
        mid_block_add_attention=False,
    )


def new_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    """Three CLIP layers of width 128."""
    encoder = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=128,
            intermediate_size=512,
            projection_dim=128,
            num_hidden_layers=3,
            num_attention_heads=4,
            max_position_embeddings=MAX_TOKENS,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    torch.nn.init.normal_(encoder.get_input_embeddings().weight, std=WORD_LENGTH)
    return encoder


def new_unet() -> UNet2DConditionModel:
    """Three levels, cross-attention on the lower two; `attention_head_dim` is, as in SD 1.5, the number of heads."""
    return UNet2DConditionModel(
        sample_size=SIDE // 4,
        in_channels=4,
        out_channels=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        block_out_channels=(64, 96, 128),
        layers_per_block=1,
        norm_num_groups=16,
        cross_attention_dim=128,
        attention_head_dim=4,
    )


def new_scheduler() -> DDIMScheduler:
    """Stable Diffusion's own schedule."""
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        num_train_timesteps=1000,
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        timestep_spacing="leading",
        prediction_type="epsilon",
    )


# --- images ----------------------------------------------------------------------------------------------------


def training_scene(rng: np.random.Generator) -> Scene:
    """A scene of one or two shapes, never a held-out one."""
    return random_scene(rng, 2 if rng.random() < TWO_SHAPES else 1)


def images(scenes: list[Scene], rng: np.random.Generator) -> Tensor:
    """Images as the VAE takes them: (n, 3, 64, 64) in [−1, 1]."""
    stack = np.stack([draw(scene, rng) for scene in scenes])
    return torch.from_numpy(stack).permute(0, 3, 1, 2).float() / 127.5 - 1


def training_caption(scene: Scene, rng: np.random.Generator) -> str:
    """The caption to learn with: usually full, sometimes loose, sometimes empty."""
    chance = rng.random()
    if chance < CAPTION_DROPOUT:
        return ""
    caption = scene.loose_caption(rng) if chance < CAPTION_DROPOUT + LOOSE_CAPTIONS else scene.caption()
    return caption.replace("center", "centre") if rng.random() < 0.1 else caption


# --- training ----------------------------------------------------------------------------------------------------


@contextmanager
def low_precision(device: str) -> Iterator[None]:
    """bfloat16 where it pays: twice the speed on CPUs with AVX-512 BF16 and on GPUs."""
    with torch.autocast(torch.device(device).type, torch.bfloat16):
        yield


def save(path: Path, state: dict[str, Any]) -> None:
    """Writes a checkpoint whole or not at all."""
    partial = path.with_suffix(".partial")
    torch.save(state, partial)
    os.replace(partial, path)


def learning_rate(step: int, steps: int, peak: float) -> float:
    """Warm-up over 100 steps, flat, then linear to zero over the last third."""
    return peak * min(1.0, (step + 1) / 100, (steps - step) / (steps / 3))


def run_steps(
    name: str,
    path: Path,
    steps: int,
    peak_lr: float,
    networks: dict[str, torch.nn.Module],
    step_loss: Callable[[int], Tensor],
    ema: EMAModel | None = None,
) -> list[float]:
    """The loop that both trainings share: AdamW, clipping, progress, checkpoints. Returns the loss of every step."""
    parameters = [p for network in networks.values() for p in network.parameters()]
    groups = [{"params": [*network.parameters()], "name": key} for key, network in networks.items()]
    optimizer = torch.optim.AdamW(groups, lr=peak_lr, betas=(0.9, 0.99), weight_decay=0.01)
    losses: list[float] = []
    if path.exists():
        state = torch.load(path, weights_only=True)
        for key, network in networks.items():
            network.load_state_dict(state[key])
        optimizer.load_state_dict(state["optimizer"])
        losses = state["losses"]
        if ema is not None:
            ema.load_state_dict(state["ema"])

    def checkpoint() -> None:
        state: dict[str, Any] = {key: network.state_dict() for key, network in networks.items()}
        state |= {"optimizer": optimizer.state_dict(), "losses": losses}
        if ema is not None:
            state["ema"] = ema.state_dict()
        save(path, state)

    bar = tqdm(range(len(losses), steps), initial=len(losses), total=steps, desc=name, unit="step", mininterval=2)
    for step in bar:
        for group in optimizer.param_groups:
            slow = group["name"] == "text_encoder" and step < LAYOUT_STEPS
            group["lr"] = (TEXT_RATE if slow else 1.0) * learning_rate(step, steps, peak_lr)
        loss = step_loss(step)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        if ema is not None:
            ema.step(parameters)
        losses.append(loss.item())
        if not np.isfinite(losses[-1]):
            raise FloatingPointError(f"{name}: the loss is {losses[-1]} at step {step}; delete {path} and train again")
        bar.set_postfix(loss=f"{np.mean(losses[-100:]):.4f}")
        if (step + 1) % SAVE_EVERY == 0 or step + 1 == steps:
            checkpoint()
    return losses


def train_vae(recipe: Recipe) -> tuple[AutoencoderKL, list[float]]:
    """L1 + L2 reconstruction with a faint KL pull; the scaling factor that gives latents unit variance is set after."""
    vae = new_vae().to(recipe.device)

    def step_loss(step: int) -> Tensor:
        rng = np.random.default_rng((recipe.seed, 1, step))
        target = images([training_scene(rng) for _ in range(recipe.vae_batch)], rng).to(recipe.device)
        with low_precision(recipe.device):
            latent = vae.encode(target).latent_dist
            output = vae.decode(latent.sample()).sample.float()
        kl = latent.kl().float().mean() / (4 * (SIDE // 4) ** 2)
        loss: Tensor = F.l1_loss(output, target) + F.mse_loss(output, target) + 1e-4 * kl
        return loss

    losses = run_steps("vae", recipe.work / "vae.pt", recipe.vae_steps, 2e-3, {"vae": vae}, step_loss)
    return vae.eval(), losses


@torch.no_grad()
def encode_images(recipe: Recipe, vae: AutoencoderKL) -> tuple[Tensor, list[Scene]]:
    """The latents of the training images, scaled to unit variance, and their scenes."""
    rng = np.random.default_rng((recipe.seed, 2))
    scenes = [training_scene(rng) for _ in range(recipe.images)]
    path = recipe.work / "latents.pt"
    if not path.exists():
        parts = []
        for start in tqdm(range(0, len(scenes), 128), desc="latents", unit="batch", mininterval=2):
            target = images(scenes[start : start + 128], np.random.default_rng((recipe.seed, 3, start)))
            with low_precision(recipe.device):
                parts.append(vae.encode(target.to(recipe.device)).latent_dist.mode().float())
        latents = torch.cat(parts)
        save(path, {"latents": latents.half(), "scale": float(1 / latents.std())})
    state = torch.load(path, weights_only=True)
    if len(state["latents"]) != recipe.images:
        raise SystemExit(f"{path} holds {len(state['latents'])} images, not {recipe.images}: delete it")
    vae.register_to_config(scaling_factor=state["scale"])
    return state["latents"].float() * state["scale"], scenes


def draw_timesteps(batch: int, count: int, layout: bool, generator: torch.Generator) -> Tensor:
    """One timestep from each of `batch` equal strata, less noisy than independent draws; for layouts half are high."""
    strata = (torch.arange(batch) + torch.rand(batch, generator=generator)) / batch
    if layout:
        strata = torch.where(strata < 0.5, 2 * strata, HIGH_NOISE + (1 - HIGH_NOISE) * (2 * strata - 1))
    return (strata * count).long()


def noise_loss(difference: Tensor, snr: Tensor) -> Tensor:
    """The min-SNR-weighted loss of ε predictions, (batch, channels, height, width), that are off by `difference`."""
    weight = torch.clamp(snr, max=SNR_GAMMA) / snr
    return torch.mean(weight * difference.square().mean((1, 2, 3)))


def layout_loss(difference: Tensor, snr: Tensor, high: Tensor) -> Tensor:
    """What is added while the layout is learned: more weight the higher the noise.

    Where `high` holds, the error of x̂_0, which is that of ε over √SNR, also counts by its means over 4×4 cells: where
    something is, not how its edges run.
    """
    cells = F.avg_pool2d(difference * snr.rsqrt().view(-1, 1, 1, 1), 4).square().mean((1, 2, 3))
    return torch.mean(snr.rsqrt() * difference.square().mean((1, 2, 3)) + LAYOUT_WEIGHT * high * cells)


def train_unet(
    recipe: Recipe, tokenizer: CLIPTokenizer, latents: Tensor, scenes: list[Scene]
) -> tuple[UNet2DConditionModel, CLIPTextModel, list[float]]:
    """Text encoder and UNet together on min-SNR-weighted ε loss; returns their exponential moving average."""
    unet, text_encoder = new_unet().to(recipe.device), new_text_encoder(tokenizer).to(recipe.device)
    unet.set_attn_processor(AttnProcessor())  # on CPU the fused attention's bfloat16 backward is the slower one
    networks: dict[str, torch.nn.Module] = {"unet": unet, "text_encoder": text_encoder}
    parameters = [*unet.parameters(), *text_encoder.parameters()]
    ema = EMAModel(parameters, decay=0.999, use_ema_warmup=True, power=0.75)
    scheduler = new_scheduler()
    snr = compute_snr(scheduler, torch.arange(scheduler.config["num_train_timesteps"]))

    def step_loss(step: int) -> Tensor:
        rng = np.random.default_rng((recipe.seed, 4, step))
        generator = torch.Generator().manual_seed(int(rng.integers(2**62)))
        rows = rng.choice(len(scenes), size=recipe.batch)
        clean = latents[rows]
        captions = [training_caption(scenes[row], rng) for row in rows]
        tokens = tokenizer(captions, padding="max_length", max_length=MAX_TOKENS, truncation=True, return_tensors="pt")
        noise = torch.randn(clean.shape, generator=generator)
        noise = noise + OFFSET_NOISE * torch.randn((*clean.shape[:2], 1, 1), generator=generator)
        timesteps = draw_timesteps(recipe.batch, len(snr), step < LAYOUT_STEPS, generator)
        noisy = scheduler.add_noise(clean, noise, timesteps)
        to = recipe.device
        with low_precision(to):
            words = text_encoder(tokens.input_ids.to(to)).last_hidden_state
            output = unet(noisy.to(to), timesteps.to(to), words).sample.float()
        difference, ratio = output - noise.to(to), snr[timesteps].to(to)
        loss = noise_loss(difference, ratio)
        if step < LAYOUT_STEPS:
            loss = loss + layout_loss(difference, ratio, (timesteps >= LAYOUT_NOISE * len(snr)).to(to))
        return loss

    losses = run_steps("unet", recipe.work / "unet.pt", recipe.steps, 8e-4, networks, step_loss, ema)
    ema.copy_to(parameters)
    return unet.eval(), text_encoder.eval(), losses


def assemble(recipe: Recipe, folder: Path) -> None:
    """Trains what is not trained yet and writes the pipeline folder, fp16 safetensors, and the model card."""
    tokenizer = build_tokenizer(recipe)
    vae, vae_losses = train_vae(recipe)
    latents, scenes = encode_images(recipe, vae)
    unet, text_encoder, losses = train_unet(recipe, tokenizer, latents, scenes)
    pipeline = StableDiffusionPipeline(
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=new_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.to("cpu", torch.float16).save_pretrained(folder, safe_serialization=True)
    # transformers loads a network in the type its config names, diffusers in float32: let both be float32
    config = folder / "text_encoder" / "config.json"
    config.write_text(config.read_text().replace('"dtype": "float16"', '"dtype": "float32"'))
    networks = {"text_encoder": text_encoder, "unet": unet, "vae": vae}
    write_card(
        folder,
        {name: sum(p.numel() for p in network.parameters()) for name, network in networks.items()},
        {"sizes": tuple(RADII), "colours": tuple(COLOURS), "kinds": KINDS, "places": tuple(PLACES)},
        {"vae": vae_losses, "unet": losses},
        {
            "images": recipe.images, "two": TWO_SHAPES, "vae_batch": recipe.vae_batch, "batch": recipe.batch,
            "layout": LAYOUT_STEPS,
        },
    )  # fmt: skip


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m export.shapes.train", description=__doc__)
    parser.add_argument("--out", type=Path, default=MODEL_FOLDER, help="folder of the trained pipeline")
    parser.add_argument("--work", type=Path, default=Path("build/shapes-training"), help="folder of the checkpoints")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--vae-steps", type=int, default=1500)
    parser.add_argument("--vae-batch", type=int, default=32)
    parser.add_argument("--images", type=int, default=32768, help="training images, drawn and encoded once")
    parser.add_argument("--steps", type=int, default=6500, help="steps of the UNet")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--seed", type=int, default=0)
    options = vars(parser.parse_args())
    folder = options.pop("out")
    recipe = Recipe(**options)
    recipe.work.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(recipe.seed)
    assemble(recipe, folder)


if __name__ == "__main__":
    main()
