"""The model card of `shapes`, written beside its weights: what it learned from, how long, and how well it converged."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

CARD = """---
license: apache-2.0
library_name: diffusers
pipeline_tag: text-to-image
---

# shapes

A small text-to-image latent diffusion model: 64×64 images of one or two filled shapes on a plain background. It
exists so that an inference engine has a real, trained model of Stable Diffusion's own form to run on any machine. It
loads with `diffusers.StableDiffusionPipeline.from_pretrained`.

| network | parameters |
|---|---|
{networks}

**Prompts** are of the form "a large red star at the left on blue background", or with two shapes "… and a small green
ring at the right on …". Size, colour, place and background may be left out.

- sizes: {sizes}; colours: {colours}
- shapes: {kinds}
- places: {places}

**Data.** {images:,} images that `export/shapes/data.py` draws, {two:.0%} of them with two shapes. One in twelve
combinations of colour, shape and place is held out: it occurs in no training image, alone or beside another shape.

**Training.** `python -m export.shapes.train`: the VAE {vae_steps:,} steps of {vae_batch} images (L1 + L2, faint KL),
then text encoder and UNet together {steps:,} steps of {batch} latents (ε loss, min-SNR weights, offset noise 0.1, 10 %
empty captions, exponential moving average), bfloat16 autocast. In the first {layout:,} steps high noise and the layout
of the predicted image count for more, which is the cliff in the UNet's curve: without them it does not learn places.
Last losses: VAE {vae_loss:.4f}, UNet {loss:.4f}.

![loss curves](loss.png)

**Quality** is measured, not looked at: `python -m bench quality` asks for held-out combinations and reads the images
back with an independent checker; the numbers are in `bench/results/quality.json`.

**Limits.** It knows the words above and nothing else, one image size, and one or two shapes. Two shapes are harder
for it than one. Its colours are the eight it was shown.
"""


def write_card(
    folder: Path,
    parameters: dict[str, int],
    vocabulary: dict[str, Sequence[str]],
    losses: dict[str, Sequence[float]],
    numbers: dict[str, float],
) -> None:
    """Writes README.md and loss.png into a pipeline folder."""
    networks = "\n".join(f"| {name} | {count / 1e6:.2f} million |" for name, count in parameters.items())
    words = {name: ", ".join(values) for name, values in vocabulary.items()}
    card = CARD.format(
        networks=networks,
        vae_loss=np.mean(losses["vae"][-100:]),
        loss=np.mean(losses["unet"][-100:]),
        vae_steps=len(losses["vae"]),
        steps=len(losses["unet"]),
        **words,
        **numbers,
    )
    (folder / "README.md").write_text(card)
    draw_losses(losses, folder / "loss.png")


def draw_losses(losses: dict[str, Sequence[float]], path: Path) -> None:
    """One panel per training: the loss of every step in grey, its running mean in colour, on a log scale."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.2), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, (name, values) in zip(figure.subplots(1, len(losses)), losses.items(), strict=True):
        window = max(1, min(100, len(values) // 10))
        smooth = np.convolve(values, np.ones(window) / window, "valid")
        axes.plot(values, color="0.8", linewidth=0.5)
        axes.plot(np.arange(len(smooth)) + window - 1, smooth, color="tab:blue")
        axes.set(yscale="log", title=name, xlabel="step", ylabel="loss")
    figure.savefig(path, dpi=110)
