"""Plots of predictions and of their errors."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from bench.plots import colour, drawing
from bench.simulation.predict import AGGRESSIVE, CONSERVATIVE, DEVICES, LINKS, MODES
from bench.simulation.tables import named

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FLEET_COLOURS = ("sequential", "conservative", "aggressive", "srds")
DOLLARS = (0.5, 1, 2, 5, 10, 20)


@contextmanager
def figure(rows: Sequence[dict[str, Any]]) -> Iterator[Figure]:
    """Two plots of predictions: guidance split or not, and links."""
    predicted = [row for row in rows if row["kind"] == "prediction"]
    tables = [row["name"] for row in rows if row["kind"] == "table"]
    with drawing(10.5, 5.4, ncols=2) as (whole, (split, links)):
        _split_plot(split, predicted, tables[0])
        _link_plot(links, predicted, tables[1])
        yield whole


@contextmanager
def validation_figure(rows: Sequence[dict[str, Any]]) -> Iterator[Figure]:
    """Errors of the predicted seconds, with their intervals."""
    checked = [row for row in reversed(rows) if row["kind"] == "validation"]
    with drawing(10.5, 0.24 * len(checked) + 0.8) as (whole, axes):
        axes.axvline(0, color=colour("ink"), linewidth=0.8)
        for at, row in enumerate(checked):
            error = {key: 100 * value for key, value in row["error"].items()}
            spread = [[error["median"] - error["low"]], [error["high"] - error["median"]]]
            axes.errorbar(error["median"], at, xerr=spread, fmt="o", color=colour(row["mode"]), capsize=2)
        axes.set_yticks(range(len(checked)), map(named, checked), fontsize=8.5)
        axes.set_xlabel("error of the predicted seconds, %: median of images, and its 95 % interval")
        axes.grid(visible=False, axis="y")
        yield whole


def _line(
    predicted: Sequence[dict[str, Any]], **wanted: Any
) -> tuple[list[int], list[float]]:  # fmt: skip
    found = [row for row in predicted if all(row[key] == value for key, value in wanted.items())]
    return [row["devices"] for row in found], [row["speedup"] for row in found]


def _axes(axes: Any, title: str) -> None:
    axes.set(title=title, xlabel="devices for one image", ylabel="speed-up over one device")
    axes.set_xticks(DEVICES)
    axes.set_ylim(bottom=0)
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.14), ncols=2)


def _split_plot(axes: Any, predicted: Sequence[dict[str, Any]], name: str) -> None:
    for mode in MODES:
        for split in (False, True):
            x, y = _line(predicted, table=name, link="NVLink", mode=mode, guidance_split=split)
            if x and not (mode == "sequential" and not split):
                label = f"{mode}{', guidance split' if split else ''}"
                axes.plot(x, y, "-" if split else "--", color=colour(mode), label=label)
    _axes(axes, f"All modes over NVLink, {name}")


def _link_plot(axes: Any, predicted: Sequence[dict[str, Any]], name: str) -> None:
    for link, style in zip(LINKS, ("-", "--", ":"), strict=True):
        for mode in (CONSERVATIVE, AGGRESSIVE):
            x, y = _line(predicted, table=name, link=link.name, mode=mode, guidance_split=False)
            axes.plot(x, y, style, color=colour(mode), label=f"{mode}, {link.name}")
    _axes(axes, f"Links, {name}")


@contextmanager
def fleet_figure(rows: Sequence[dict[str, Any]]) -> Iterator[Figure]:
    """What a thousand images cost by the limit of the 99th percentile, a line per number of GPUs of a replica."""
    fleets = [row for row in rows if row["kind"] == "fleet" and row["policy"] == "elastic" and row["replicas"]]
    modes = list(dict.fromkeys(row["mode"] for row in fleets))
    (rate,) = {row["rate"] for row in fleets if row["limit"] != fleets[0]["limit"]}
    with drawing(10.5, 4.6, ncols=len(modes), sharey=True) as (whole, panels):
        for axes, mode in zip(panels, modes, strict=True):
            here = [row for row in fleets if (row["mode"], row["rate"], row["process"]) == (mode, rate, "poisson")]
            for gpus, kind in zip(sorted({row["gpus"] for row in here}), FLEET_COLOURS, strict=False):
                line = sorted((row["limit"], row["dollars_per_1000"]) for row in here if row["gpus"] == gpus)
                each = f"{gpus} GPU{'s' * (gpus > 1)} per replica"
                axes.plot(*zip(*line, strict=True), "o-", color=colour(kind), label=each)
            axes.set(title=f"{mode}, {rate:g} requests per second", xlabel="seconds that 99 % of requests keep to")
            axes.set_yscale("log")
            axes.set_yticks(DOLLARS, [f"${dollars:g}" for dollars in DOLLARS])
            axes.minorticks_off()
            axes.legend()
        panels[0].set_ylabel("dollars per 1,000 images")
        yield whole
