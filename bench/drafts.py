"""`python -m bench drafts`: drift of each kind of drafts, compared with the paper's.

k = 2, 3, 4; 50 and 28 steps; guidance 4 and 7.5; `--seed` chooses the captions.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from bench.models import model_arguments
from bench.quality import Case, Gallery
from engines.errors import ParameterError
from runtime.sampling.drafts import DRAFTS


def arguments(parser: argparse.ArgumentParser) -> None:
    """The command line."""
    model_arguments(parser)
    parser.add_argument("--images", type=int, default=16, help="captions per row")
    parser.add_argument("--seed", type=int, default=0, help="which captions: choose by some, report others")
    kinds = [name for name, kind in DRAFTS.items() if not kind.own_noise]
    parser.add_argument("--kinds", nargs="+", choices=kinds, default=kinds)


def measure(
    model: str, build: Path, devices: str, images: int, seed: int, kinds: Sequence[str]
) -> list[dict[str, Any]]:  # fmt: skip
    """One row per cell and kind."""
    if images < 1:
        raise ParameterError("images", f"images must be at least 1, not {images}")
    gallery = Gallery(build, model, devices, seed)
    wanted = [
        Case(
            f"{mode}, k = {k}, {kind}", "", images, mode, {"k": k, "drafts": kind}, steps=steps,
            reference_steps=steps, guidance_scale=guidance,
        )
        for steps in (50, 28) for guidance in (4.0, 7.5) for mode in ("conservative", "aggressive")
        for k in (2, 3, 4) for kind in dict.fromkeys(("frozen", *kinds))
    ]  # fmt: skip
    try:
        return [gallery.row(case) for case in tqdm(wanted, desc="drafts", unit="row")]
    finally:
        gallery.close()


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Per kind of drafts, how many times closer to sequential than frozen ones it ends: median / 90th percentile."""
    kinds = list(dict.fromkeys(row["drafts"] for row in rows if row["drafts"] != "frozen"))
    cells = list(dict.fromkeys((r["steps"], r["guidance_scale"], r["mode"], r["k"]) for r in rows))
    by = {((r["steps"], r["guidance_scale"], r["mode"], r["k"]), r["drafts"]): r["drift"] for r in rows}
    heads = ["steps", "guidance", "mode", "k", "drift, frozen", *(f"{kind}: times closer" for kind in kinds)]
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for cell in cells:
        frozen = by[cell, "frozen"]
        ratios = [
            f"{frozen['median'] / by[cell, kind]['median']:.2f} / {frozen['p90'] / by[cell, kind]['p90']:.2f}"
            for kind in kinds
        ]
        steps, guidance, mode, k = cell
        lines.append(
            f"| {steps} | {guidance:g} | {mode} | {k} | {frozen['median']:.4f} ({frozen['p90']:.4f}) "
            f"| {' | '.join(ratios)} |"
        )
    return "\n".join(lines)
