"""The plots of the page that show more than one command's rows, or need a whole file."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from bench.plots import colour, drawing

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def _cells(rows: Sequence[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    found: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        if "seconds" in row:
            guided = f"guidance {row['guidance_scale']:g}" if row["guidance_scale"] > 1 else "without guidance"
            found.setdefault(f"{row['scheduler']}, {row['steps']} steps, {guided}", []).append(row)
    return found


@contextmanager
def bars(rows: Sequence[dict[str, Any]]) -> Iterator[Figure]:
    """Latency of one image per row of run.json, a panel per scheduler, steps and guidance."""
    cells = _cells(rows)
    with drawing(10.5, 0.42 * max(map(len, cells.values())) + 1.2, ncols=len(cells), sharey=True, squeeze=False) as (
        figure,
        grid,
    ):
        for axes, (title, several) in zip(grid[0], cells.items(), strict=True):
            for at, row in enumerate(several):
                s, mode = row["seconds"], row["asked_mode"] if row["baseline"] is None else "other"
                spread = [[s["p50"] - s["p20"]], [s["p80"] - s["p50"]]]
                axes.barh(
                    at, s["p50"], xerr=spread, color=colour(str(mode)), height=0.7, alpha=0.9, ecolor=colour("ink")
                )
                axes.text(s["p80"] + 0.01 * axes.get_xlim()[1], at, f" {s['p50']:.2f}", va="center", fontsize=8.5)
            axes.set_yticks(range(len(several)), [row["name"] for row in several], fontsize=8.5)
            axes.set(title=title, xlabel="seconds")
            axes.grid(visible=False, axis="y")
            axes.margins(x=0.12)
        grid[0][0].invert_yaxis()
        yield figure


@contextmanager
def overheads(rows: Sequence[dict[str, Any]]) -> Iterator[Figure]:
    """What a round costs beside its model calls."""
    cells = {title: [r for r in several if r.get("us_per_round")] for title, several in _cells(rows).items()}
    names = {"combine": "combine", "copy": "copy", "wait": "wait", "python": "Python"}
    with drawing(10.5, 0.42 * max(map(len, cells.values())) + 1.5, ncols=len(cells), sharey=True, squeeze=False) as (
        figure,
        grid,
    ):
        for axes, (title, several) in zip(grid[0], cells.items(), strict=True):
            for at, row in enumerate(several):
                left = 0.0
                for part, label in names.items():
                    value = row["us_per_round"][part]
                    axes.barh(at, value, left=left, color=colour(part), height=0.7, label=label if not at else None)
                    left += value
                text = f" {left:.0f} µs beside {row['us_per_round']['model'] / 1e3:.1f} ms of calls"
                axes.text(left, at, text, va="center", fontsize=8)
            axes.set_yticks(range(len(several)), [row["name"] for row in several], fontsize=8.5)
            axes.set(title=title, xlabel="µs per round beside the model")
            axes.grid(visible=False, axis="y")
            axes.margins(x=0.75)
        grid[0][0].invert_yaxis()
        figure.legend(*grid[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=len(names))
        yield figure


@contextmanager
def speedups(simulated: Sequence[dict[str, Any]], measured: Sequence[dict[str, Any]]) -> Iterator[Figure]:
    """Speed-up against devices: closed form, prediction, the paper's points, and this machine's lanes."""
    with drawing(10.5, 4.4, ncols=2, sharey=True) as (figure, grid):
        for axes, mode in zip(grid, ("conservative", "aggressive"), strict=True):
            tables = [row["name"] for row in simulated if row["kind"] == "table"]
            line = [
                row for row in simulated
                if row["kind"] == "prediction" and row["mode"] == mode and not row["guidance_split"]
                and (row["table"], row["link"]) == (tables[0], "NVLink") and row["devices"] <= 8
            ]  # fmt: skip
            devices = [row["devices"] for row in line]
            law = [(n + 1) / 2 if mode == "conservative" else n for n in devices]
            axes.plot(devices, law, ":", color=colour("sequential"), linewidth=1.2, label="theory: N → ∞")
            broad = {"color": colour(mode), "linewidth": 4, "alpha": 0.4, "label": f"predicted, {tables[0]}"}
            axes.plot(devices, [row["speedup"] for row in line], **broad)
            theory = [row["steps"] / row["rounds"] for row in line]
            axes.plot(devices, theory, "--", color=colour("ink"), linewidth=1, label="theory: N / rounds, N = 50")
            paper = [row for row in simulated if row["kind"] == "paper" and row["mode"] == mode]
            for model, marker in zip(dict.fromkeys(row["model"] for row in paper), "osD^v", strict=False):
                points = [(row["devices"], row["published_speedup"]) for row in paper if row["model"] == model]
                axes.plot(*zip(*points, strict=True), marker, color=colour(mode), markerfacecolor="none",
                          markeredgewidth=1.3, label=f"paper, {model}")  # fmt: skip
            for row in measured:
                if row.get("asked_mode") == mode and row["guidance_scale"] <= 1 and row["baseline"] is None:
                    ratio = row["speedups"]["one lane"]
                    spread = [[ratio["median"] - ratio["low"]], [ratio["high"] - ratio["median"]]]
                    label = f"measured here, {row['lanes']} processor lanes"
                    look = {"fmt": "*", "markersize": 8, "capsize": 3, "color": colour("auto"), "label": label}
                    axes.errorbar(row["lanes"], ratio["median"], yerr=spread, **look)
            axes.set(title=mode, xlabel="devices for one image", xticks=devices, ylim=(0, 8.5), xlim=(0.7, 8.3))
            axes.legend()
        grid[0].set_ylabel("speed-up over one device")
        yield figure


@contextmanager
def qualities(rows: Sequence[dict[str, Any]]) -> Iterator[Figure]:
    """Drift and caption accuracy against N / rounds, one line per sampler and kind of drafts."""
    with drawing(10.5, 5.2, ncols=2) as (figure, (apart, right)):
        lines: dict[str, list[dict[str, Any]]] = {}
        for row in rows:
            if row.get("line") and row["drift"]["median"]:
                lines.setdefault(row["line"], []).append(row)
        for number, (name, several) in enumerate(lines.items()):
            several.sort(key=lambda row: float(row["speedup_in_rounds"]))
            style = {"linestyle": "--" if "paper" in name else "-", "marker": "osD^vPX*"[number % 8]}
            style |= {"color": colour(several[0]["mode"]), "label": name}
            x = [row["speedup_in_rounds"] for row in several]
            apart.plot(x, [row["drift"]["median"] for row in several], **style)
            if all("caption_accuracy" in row for row in several):
                right.plot(x, [100 * row["caption_accuracy"] for row in several], **style)
        speed = "N / rounds: the speed-up that the rounds allow"
        apart.set(yscale="log", xlabel=speed, ylabel="drift (median)", title="Distance to sequential: lower is closer")
        right.set(xlabel=speed, ylabel="captions right in every attribute, %", title="Right images")
        right.set_ylim(top=100)
        figure.legend(*apart.get_legend_handles_labels(), loc="outside lower center", ncols=4)
        yield figure
