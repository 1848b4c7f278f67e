"""The model card of `shapes`, written beside its weights."""

from __future__ import annotations

from pathlib import Path


def write_card(
    folder: Path, vae_losses: list[float], losses: list[float], vae_batch: int, batch: int, pictures: int
) -> None:
    """placeholder"""
