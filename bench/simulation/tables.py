"""Predictions, the paper's points and the validation as Markdown."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

MEASURED = "measured here"  # where a table of costs comes from


def assumptions(rows: Sequence[dict[str, Any]]) -> str:
    """What predictions are made with, one line per model and device."""
    return "\n".join(
        f"- {row['name']}: {1e3 * row['evaluation']:.1f} ms an evaluation ({row['source']}), a branch of it "
        f"{100 * row['branch_share']:.0f} % of that{' (assumed)' if row['source'] != MEASURED else ''}."
        for row in rows
        if row["kind"] == "table"
    )


def validation_table(rows: Sequence[dict[str, Any]]) -> str:
    """Measured seconds beside what was predicted of them: median times the median of the ratios image by image."""
    checked = [row for row in rows if row["kind"] == "validation"]
    lines = ["| lanes | mode | guidance | rounds | images | measured | predicted | error (95 % interval) |",
             "|---|---|---|---|---|---|---|---|"]  # fmt: skip
    lines += [
        f"| {r['lanes']} | {r['mode']} | {r['guidance_scale']:g} | {r['rounds']:g} | {r['images']} "
        f"| {r['measured_seconds']:.3f} s | {r['measured_seconds'] * (1 + r['error']['median']):.3f} s "
        f"| {_percent(r['error'])} |"
        for r in checked
    ]
    return "\n".join(lines) if checked else ""


def paper_table(rows: Sequence[dict[str, Any]]) -> str:
    """The paper's speed-ups beside the predicted ones."""
    lines = ["| model | mode | devices | published | predicted | N/rounds | error |", "|---|---|---|---|---|---|---|"]
    lines += [
        f"| {r['model']} | {r['mode']} | {r['devices']} | {r['published_speedup']:.2f}× | {r['speedup']:.2f}× "
        f"| {r['speedup_in_rounds']:.2f}× | {100 * r['error']:+.1f} % |"
        for r in rows
        if r["kind"] == "paper"
    ]
    return "\n".join(lines)


def prediction_table(rows: Sequence[dict[str, Any]]) -> str:
    """Predicted speed-ups over NVLink on 2, 4, 8 and 16 devices."""
    several = [r for r in rows if r["kind"] == "prediction" and r["link"] == "NVLink" and r["devices"] in (2, 4, 8, 16)]
    counts = list(dict.fromkeys(r["devices"] for r in several))
    lines = [f"| model and device | guidance | mode | {' | '.join(f'{n} devices' for n in counts)} |",
             "|---" * (3 + len(counts)) + "|"]  # fmt: skip
    for key in dict.fromkeys((r["table"], r["guidance_split"], r["mode"]) for r in several):
        found = [r["speedup"] for r in several if (r["table"], r["guidance_split"], r["mode"]) == key]
        name, split, mode = key
        lines.append(
            f"| {name} | {'split' if split else 'together'} | {mode} | {' | '.join(f'{x:.2f}×' for x in found)} |"
        )
    return "\n".join(lines)


def in_short(rows: Sequence[dict[str, Any]]) -> list[str]:
    """How far predictions are off: what is typical, and the worst row."""
    said = []
    checked = [row for row in rows if row["kind"] == "validation"]
    if checked:
        worst = max(checked, key=lambda row: abs(row["error"]["median"]))
        reach = max(abs(row["error"][end]) for row in checked for end in ("low", "high"))
        usual = _typical([row["error"]["median"] for row in checked])
        said.append(
            f"The cost model's seconds are {usual} off the measured ones (median of {len(checked)} rows), at most "
            f"{100 * worst['error']['median']:+.1f} % ({named(worst)}); the rows' 95 % intervals, of "
            f"{worst['images']} images each, reach {100 * reach:.1f} %."
        )
    published = [row for row in rows if row["kind"] == "paper"]
    if published:
        worst = max(published, key=lambda row: abs(row["error"]))
        said.append(
            f"Round counts alone are {_typical([row['error'] for row in published])} off the paper's {len(published)} "
            f"published speed-ups (median), at most {100 * worst['error']:+.1f} % ({worst['model']}, {worst['mode']}, "
            f"{worst['devices']} devices)."
        )
    return said


def named(row: dict[str, Any]) -> str:
    """A row of the validation in words."""
    guided = "with guidance" if row["guidance_scale"] > 1 else "without guidance"
    return f"{row['mode']}, {guided}, {row['lanes']} lane{'s'[: row['lanes'] - 1]}"


def _typical(errors: Sequence[float]) -> str:
    return f"{100 * float(np.median(np.abs(errors))):.1f} %"


def _percent(error: dict[str, float]) -> str:
    median, low, high = (f"{100 * error[name]:+.1f}" for name in ("median", "low", "high"))
    return f"{median} % ({low} to {high} %)"
