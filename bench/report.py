"""`python -m bench report`: one page of all result files, and the README's tables.

`bench/results/*.json` become `report.md`, its images, and `report.html`, which has everything inside and follows the
reader's light or dark. A block of the README that begins with `<!-- bench:NAME -->` and ends with `<!-- /bench -->`
holds the table of `bench/results/NAME.json`.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench import drafts, export, gpu, kernel, quality, run, scenario, serve, simulate
from bench.plots import colour, drawing, png, style_sheet, svg
from bench.statistics import interval

if TYPE_CHECKING:
    from matplotlib.figure import Figure

RESULTS = Path(__file__).parent / "results"
README = Path(__file__).parent.parent / "README.md"
LONG = 20  # rows
_BLOCK = re.compile(r"<!-- bench:([a-z0-9-]+) -->\n.*?<!-- /bench -->", re.DOTALL)
TABLES: dict[str, Callable[[Sequence[dict[str, Any]]], str]] = {
    "run": run.table, "simulate": simulate.table, "scenario": scenario.table, "quality": quality.table,
    "drafts": drafts.table, "kernel": kernel.table, "serve": serve.table, "export": export.table,
}  # fmt: skip
BENCH, FULL = "make bench", "make bench-full"
MADE_BY = {
    "run": BENCH, "simulate": BENCH, "scenario": BENCH, "kernel": BENCH, "serve": BENCH, "quality": FULL,
    "drafts": FULL, "export": "python -m bench export", "gpu": "make gpu-check",
}  # fmt: skip


def arguments(parser: argparse.ArgumentParser) -> None:
    """The command line."""
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the result files, and of the page")
    parser.add_argument("--readme", type=Path, default=README, help="whose tables are made again")


def measure(results: Path, readme: Path) -> list[dict[str, Any]]:
    """Writes the page and the README; nothing is measured."""
    page = Page.read(results)
    page.write()
    readme.write_text(rebuilt(readme.read_text(), results))
    return [{"written": str(path)} for path in (results / "report.md", results / "report.html", readme)]


def table(rows: Sequence[dict[str, Any]]) -> str:
    """What was written."""
    return "\n".join(f"written: {row['written']}" for row in rows)


# --- the README ------------------------------------------------------------------------------------------------------


def load(name: str, results: Path = RESULTS) -> dict[str, Any]:
    """A committed result file."""
    result: dict[str, Any] = json.loads((results / f"{name}.json").read_text())
    return result


def hardware(result: dict[str, Any]) -> str:
    """Where it was measured."""
    host = result["host"]
    return f"{host['processor']}, {host['cores']} cores" + "".join(f", {card}" for card in host.get("gpus", []))


def machine(result: dict[str, Any]) -> str:
    """Where and with what it was measured."""
    return f"{hardware(result)}, ONNX Runtime {result['versions'].get('onnxruntime', 'not there')}"


def source(name: str, result: dict[str, Any]) -> str:
    """The line beneath a table."""
    return f"`bench/results/{name}.json`, made by `{made_by(name)}`: {machine(result)}"


def made_by(name: str) -> str:
    """The command that makes a file; those of several GPUs begin alike."""
    return MADE_BY.get(name, MADE_BY["gpu"])


def block(name: str, results: Path = RESULTS) -> str:
    """The table of a result file, and where it was measured; empty where nothing was measured yet."""
    if not (results / f"{name}.json").is_file():
        return f"<!-- bench:{name} -->\n<!-- /bench -->"
    result = load(name, results)
    return f"<!-- bench:{name} -->\n{TABLES[name](result['rows'])}\n\n{source(name, result)}\n<!-- /bench -->"


def rebuilt(text: str, results: Path = RESULTS) -> str:
    """A README with every table made again from its file."""
    return _BLOCK.sub(lambda match: block(match[1], results), text)


# --- the page --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Plot:
    """An image of the page: its file's name, what it shows, and who draws it."""

    name: str
    caption: str
    draw: Callable[[], AbstractContextManager[Figure]]


Part = str | Plot


@dataclass(frozen=True)
class Page:
    """All result files of a folder, by name."""

    folder: Path
    files: dict[str, dict[str, Any]]

    @classmethod
    def read(cls, folder: Path) -> Page:
        """Every JSON file there."""
        return cls(
            folder, {path.stem: load(path.stem, folder) for path in sorted(folder.glob("*.json")) if _ours(path)}
        )

    def rows(self, name: str) -> list[dict[str, Any]]:
        """The rows of a file; none where it is not there."""
        return list(self.files[name]["rows"]) if name in self.files else []

    def write(self) -> None:
        """The page in both forms, and the images of the first."""
        parts = list(self.parts())
        (self.folder / "report.md").write_text(self.markdown(parts))
        for part in parts:
            if isinstance(part, Plot):
                with part.draw() as figure:
                    png(figure, self.folder / f"{part.name}.png")
        (self.folder / "report.html").write_text(self.html(parts))

    def markdown(self, parts: Sequence[Part] | None = None) -> str:
        """With images as files beside it."""
        listed = list(self.parts()) if parts is None else parts
        texts = [part if isinstance(part, str) else f"![{part.caption}]({part.name}.png)" for part in listed]
        return "\n\n".join(texts) + "\n"

    def html(self, parts: Sequence[Part]) -> str:
        """With everything inside."""
        from markdown_it import MarkdownIt

        render = MarkdownIt("commonmark", {"html": False}).enable("table").render
        body = []
        for part in parts:
            if isinstance(part, str):
                body.append(re.sub(r"<table>.*?</table>", _folded, render(part), flags=re.DOTALL))
                continue
            with part.draw() as figure:
                body.append(f"<figure>{svg(figure)}<figcaption>{part.caption}</figcaption></figure>")
        return _HTML.replace("/* colours */", style_sheet()).replace("<!-- body -->", "\n".join(body))

    def parts(self) -> Iterator[Part]:
        """The page from top to bottom."""
        yield _INTRODUCTION
        yield self._short()
        if rows := self.rows("run"):
            yield "## One image, as fast as this machine can\n\n" + _RUN
            yield Plot("run", "Seconds of the denoising loop of one image: median, and from p20 to p80.",
                       lambda: _bars(rows))  # fmt: skip
            yield self._table("run")
            yield "### Where the time of a round goes\n\n" + _ROUND
            yield Plot("rounds", "Microseconds per round beside the model's own calls, and those in milliseconds.",
                       lambda: _overheads(rows))  # fmt: skip
        yield from self._predicted()
        if judged := self.rows("quality"):
            yield "## What it costs in quality\n\n" + _QUALITY
            yield Plot("quality", "Distance to the sequential image, and captions that are right, against speed-up.",
                       lambda: _qualities(judged))  # fmt: skip
            yield self._table("quality")
        for name, title, text in (
            ("drafts", "Kinds of drafts", _DRAFTS), ("scenario", "Requests in the manner of MLPerf", _SCENARIO),
            ("serve", "The server under load", _SERVE), ("kernel", "One sum instead of many", _KERNEL),
            ("export", "Full-size models", _EXPORT),
        ):  # fmt: skip
            if name in self.files:
                yield f"## {title}\n\n{text}"
                yield self._table(name)
        yield from self._gpus()
        yield _AGAIN + "\n\n" + self._machines()

    def _predicted(self) -> Iterator[Part]:
        simulated = self.rows("simulate")
        if not simulated:
            return
        beneath = source("simulate", self.files["simulate"])
        yield f"## More devices\n\n{_DEVICES}\n\n{simulate.assumptions(simulated)}"
        caption = "Predictions for other machines: with guidance together or split, and over slower links."
        yield Plot("simulate", caption, lambda: simulate.figure(simulated))
        yield f"{simulate.prediction_table(simulated)}\n\n{beneath}"
        if checked := simulate.validation_table(simulated):
            yield "### The prediction beside measurement\n\n" + _VALIDATION
            caption = "Errors of the predicted seconds on the lanes of this machine."
            yield Plot("validation", caption, lambda: simulate.validation_figure(simulated))
            yield f"{checked}\n\n{beneath}"
        yield "### The paper's speed-ups beside round counts\n\n" + _PAPER
        caption = "Speed-up against the number of devices: theory, the prediction, the paper, and here."
        yield Plot("speedup", caption, lambda: _speedups(simulated, self.rows("run")))
        yield f"{simulate.paper_table(simulated)}\n\n{beneath}"

    def _table(self, name: str) -> str:
        return f"{TABLES[name](self.rows(name))}\n\n{source(name, self.files[name])}"

    def _machines(self) -> str:
        packages = list(dict.fromkeys(package for file in self.files.values() for package in file["versions"]))
        lines = [f"| file | made by | machine | {' | '.join(packages)} |", "|---" * (3 + len(packages)) + "|"]
        for name, file in self.files.items():
            versions = (file["versions"].get(package, "") for package in packages)
            lines.append(f"| `{name}.json` | `{made_by(name)}` | {hardware(file)} | {' | '.join(versions)} |")
        return "\n".join(lines)

    def _short(self) -> str:
        """The numbers that a hurried reader wants, each from its file."""
        lines = ["## In short", ""]
        rows = [row for row in self.rows("run") if "speedups" in row]
        for cell in dict.fromkeys((row["scheduler"], row["steps"], row["guidance_scale"]) for row in rows):
            here = [r for r in rows if (r["scheduler"], r["steps"], r["guidance_scale"]) == cell]
            ours = [row for row in here if row["baseline"] is None]
            if not ours:
                continue
            best = min(ours, key=lambda row: float(row["seconds"]["p50"]))
            guided = f"with guidance {cell[2]:g}" if cell[2] > 1 else "without guidance"
            against = [
                f"{interval(ratio)} times as fast as {name}" for name, ratio in best["speedups"].items() if ratio
            ]
            played = f" ({best['mode']}, k = {best['k']})" if best["asked_mode"] == "auto" else ""
            lines.append(
                f"- {cell[0]}, {cell[1]} steps, {guided}: fastest is **{best['name']}**{played}, "
                f"{best['seconds']['p50']:.3f} s, median of {best['images']} images with a drift of "
                f"{best['drift']['median']:.1e}: {', '.join(against)}."
            )
        lines += [f"- {words}" for words in simulate.in_short(self.rows("simulate"))]
        judged = [row for row in self.rows("quality") if "caption_accuracy" in row]
        if judged:
            reference = judged[0]
            alike = [r for r in judged if all(r[key] == reference[key] for key in ("scheduler", "images", "shapes"))]
            right = [r for r in alike if r["caption_accuracy"] >= reference["caption_accuracy"]]
            same = [r for r in right if r["mode"] != "sequential"]
            if same:
                best = min(same, key=lambda row: float(row["rounds"]))
                lines.append(
                    f"- As many captions right as sequential ({100 * reference['caption_accuracy']:.0f} % of "
                    f"{reference['images']}): down to {best['rounds']:g} rounds instead of {reference['rounds']:g} "
                    f"({best['name']})."
                )
        return "\n".join(lines)

    def _gpus(self) -> Iterator[Part]:
        files = {name: file for name, file in self.files.items() if name.startswith("gpu")}
        if not files:
            yield "## GPUs\n\nNo GPU run has been committed yet: `make gpu-check` makes one on any NVIDIA machine."
            return
        yield "## GPUs"
        for name, file in files.items():
            yield f"```\n{gpu.table(file['rows'])}\n```\n\n{source(name, file)}"


def _ours(path: Path) -> bool:
    """Whether it is a result of this suite, not of another tool."""
    return {"rows", "commit", "host"} <= set(json.loads(path.read_text()))


def _folded(table: re.Match[str]) -> str:
    """A table of a page: as wide as it must be, with long cells in lines, and closed where there are many rows."""
    wrapped = re.sub(r"<td>(?=[^<]{60})", '<td class="long">', table[0])
    wide, rows = f'<div class="wide">{wrapped}</div>', table[0].count("<tr>") - 1
    return wide if rows <= LONG else f"<details><summary>All {rows} rows</summary>{wide}</details>"


# --- plots -----------------------------------------------------------------------------------------------------------


def _cells(rows: Sequence[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    found: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        if "seconds" in row:
            guided = f"guidance {row['guidance_scale']:g}" if row["guidance_scale"] > 1 else "without guidance"
            found.setdefault(f"{row['scheduler']}, {row['steps']} steps, {guided}", []).append(row)
    return found


@contextmanager
def _bars(rows: Sequence[dict[str, Any]]) -> Iterator[Figure]:
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
def _overheads(rows: Sequence[dict[str, Any]]) -> Iterator[Figure]:
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
def _speedups(simulated: Sequence[dict[str, Any]], measured: Sequence[dict[str, Any]]) -> Iterator[Figure]:
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
def _qualities(rows: Sequence[dict[str, Any]]) -> Iterator[Figure]:
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


def _made(command: str) -> str:
    return ", ".join(name for name, made in MADE_BY.items() if made == command)


# --- words -----------------------------------------------------------------------------------------------------------

_INTRODUCTION = """# What the engine does, measured

A diffusion model makes an image in N steps, one after another: usually a second device does not make one image any
faster. This engine guesses the states of the next few steps, asks the model about all of them at once, on several
devices, and refines them with the scheduler's own steps. The modes differ in what they guess, and in what they accept:

- `sequential`: no guesses, step after step; what all others are compared with.
- `conservative`, `aggressive`: the two modes of the paper, DRiffusion. The first asks anew between two blocks of
  guesses, 2⌈N/(k+1)⌉ rounds or one fewer; the second goes on from its guesses, 1 + ⌈(N−1)/k⌉ rounds.
- `srds`: Parareal over blocks of steps, until the image changes by less than a tolerance.
- `adaptive`: accepts only drafts that are within a tolerance of the refined state.
- `auto`: the fastest of them whose drift, measured once on this model, is within a tolerance.

The words of this page:

- A *lane* is what runs the model: a GPU, or here a processor core with a session of its own.
- A *draft* is a guessed state; k is the number of drafts per round, by default the number of lanes.
- A *round* is one set of model calls that run at the same time. Sequential takes N rounds: N / rounds is the speed-up
  that an algorithm allows where a call takes as long on every lane at once as on one alone.
- *Guidance* is classifier-free guidance: two branches per step, with the prompt and without. They are asked *together*,
  as one call, or *split* over two lanes, which changes nothing in the image.
- The alternatives: *one lane* is one ONNX Runtime session with one thread; *one session* a single session with all
  cores, which is what one would use otherwise; *diffusers* is its own pipeline in PyTorch, eager or *compiled*.
- *Drift* is the distance of the finished latents to the sequential ones of the same noise, relative to their size;
  0 is the same image.
- p20, p50 … are percentiles. A range in brackets behind a ratio is its 95 % bootstrap interval.

`shapes`, the model of most tables, is this project's own: small enough for processor cores, it draws 64×64 images of
one or two coloured shapes, so that a program can check whether an image shows what its caption says."""

_RUN = """All rows of a table are interleaved image by image and start from the same noise. The columns with × say
how many times as fast as an alternative a row is. *Of N/rounds* is the speed-up over one lane as a share of what the
algorithm allows; splitting guidance can take it above 1. *Of the floor* is the time of the same model calls alone, on
the same lanes with a barrier after each round, divided by the engine's time: 1 is an engine that costs nothing. With
so few images p99 is nearly the slowest of them."""

_ROUND = """The image with the median time, split so that the parts add up to all of it; the numbers are in the
tables above. *Model calls* is the longest call of every round. *Combine* is the sums over latents; *copy* brings
latents to where calls and sums read them; *wait* is what starting lanes and waiting for the last one takes beyond its
call; *Python* is the rest: the plan, binding calls, counting. *Device-seconds* are lanes times seconds: a faster
image on more devices still costs more of them."""

_DEVICES = """Machines with more devices are predicted: the real plan of every mode, played on a virtual clock. It
takes the seconds of an evaluation, which is both branches of guidance, from elsewhere; latency and bandwidth of links
are typical of their kind. The table is over NVLink."""

_VALIDATION = """On the lanes that are here the prediction can be held against measurement: the cost of calls, sums and
starts is measured before and after every pass of images, and each image is predicted from the costs around it.
*Error* is the median of predicted / measured − 1 image by image, *measured* the median seconds, and *predicted*
what the error makes of them. On one lane k is 2."""

_PAPER = """Here the prediction knows the paper's sequential seconds and nothing else, and they cancel out of a
speed-up. Beside calls of 50 ms and more, sums, starts and copies vanish, so that the prediction is N/rounds in every
row: this comparison tests that the engine's round counts are those of the paper, not the cost model. What the paper
lost beyond its rounds is its error. Five points are above what their round counts allow, SD 3's by 5 and 7 %: their
baselines were rounded, or timed otherwise."""

_QUALITY = """The captions are of combinations that never occurred in training. An independent checker reads the
image back: right means every attribute is. The distance is the drift; 99 dB and an SSIM of 1 are equal images. *As
in the paper* freezes the noise prediction for a block; *corrected* hands over mostly the predicted image, at the
same price; *fresh noise* draws other noise for drafts than for the steps, as the paper's listing for stochastic
schedulers does. Fewer sequential steps are what one would do otherwise. The second row is the floor: the same images
with another batch size and lane count. Rows that begin with a scheduler are compared with its own sequential images,
of fewer captions. `ddpm` and `euler_a` are one sampler in two notations: at this model's whole timesteps their
coefficients are equal, and so are their rows."""

_DRAFTS = """How far the modes end from sequential with each kind of drafts: the drift with the paper's `frozen` ones,
median and 90th percentile in brackets, and how many times closer another kind ends, median / 90th percentile. `frozen`
keeps the last noise prediction for a whole block and uses what the model says of a draft as it is. `corrected`, which
the engine takes if not told otherwise, hands over mostly the image that the model predicted at a draft, not the
noise, at the same price. The captions are others than those it was chosen by."""

_SCENARIO = """Requests for images from fixed latents: one after another (*SingleStream*), arriving at random
(*Server*), or all at once (*Offline*). **Unofficial**: not made by LoadGen, not verified by MLCommons, and with far
fewer requests than its rules ask for. *Valid* is whether a run this short would count otherwise; quality is held
against sequential images of the same latents."""

_SERVE = """Clients over HTTP ask for the next image when they have the last one. *Elastic* gives an idle server's
only image all lanes, and several waiting images fewer each; beside it, all lanes for every image and one lane
for each. The three take turns within one server. *× the better* is elastic's throughput, median and
95th percentile of latency, each divided by that of the better of the two others."""

_EXPORT = """Architectures of published checkpoints with random weights, since weights could not be downloaded: each
network is exported to ONNX by itself and compared with torch, which is part of every export. *Difference to torch* is
the largest one over the largest value, at the smallest sizes of the exported range, which take the least time.
TensorRT-RTX plans are built for a GPU that need not be there; none has run."""

_KERNEL = """Guidance, k scheduler steps and k drafts are one linear combination, made in one pass over the latents.
Beside it, the same as so many separate operations, for latents of four sizes, and a plain copy of as many bytes. On
processor cores this is the NumPy sum that lanes there use, on one thread; its cost grows with inputs times outputs, so
that for large latents and many drafts separate operations are cheaper there."""

_AGAIN = f"""## Do it again

```
make bench        # {_made(BENCH)}: under 15 minutes on two cores
make bench-full   # {_made(FULL)}, too, which takes much longer
make gpu-check    # gpu, on any NVIDIA machine
.venv/bin/{MADE_BY["export"]} --json bench/results/export.json   # 60 GB of disk, 24 GB of memory
.venv/bin/python -m bench report   # this page, and the README's tables
```

Each makes the files that are named beside it here, and leaves the others as they were. `python -m bench` lists the
commands; `bench/README.md` says what is in each file, which also names the commit that was measured."""

_HTML = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>What the engine does, measured</title>
<style>
/* colours */
:root { --paper: #ffffff; --soft: #f4f5f8; }
@media (prefers-color-scheme: dark) { :root { --paper: #14171c; --soft: #1d2229; } }
body { margin: 0 auto; padding: 2rem 1.25rem 4rem; max-width: 68rem; background: var(--paper); color: var(--ink);
  font: 16px/1.6 system-ui, sans-serif; }
p, li { max-width: 46rem; }
h1 { font-size: 1.9rem; line-height: 1.2; }
h2 { margin-top: 3rem; padding-top: 1rem; border-top: 1px solid var(--faint); }
h3 { margin-top: 2rem; }
code, pre { font: .88em ui-monospace, monospace; background: var(--soft); border-radius: 4px; padding: .1em .3em; }
pre { padding: .8rem 1rem; overflow-x: auto; }
pre code { padding: 0; background: none; }
summary { cursor: pointer; margin: 1rem 0; opacity: .75; }
.wide { overflow-x: auto; margin: 1rem 0; }
table { border-collapse: collapse; font-size: .82rem; line-height: 1.35; font-variant-numeric: tabular-nums; }
th, td { padding: .35rem .7rem; text-align: left; border-bottom: 1px solid var(--faint); vertical-align: top; }
th { font-weight: 600; border-bottom: 2px solid var(--faint); }
th:first-child, td:first-child { min-width: 8rem; }
td:not(:first-child) { white-space: nowrap; }
td.long:not(:first-child) { white-space: normal; min-width: 16rem; }
.wide table:has(th:nth-child(8)) td:first-child { min-width: 13.5rem; }
tbody tr:hover { background: var(--soft); }
figure { margin: 1.5rem 0; overflow-x: auto; }
figure svg { width: 100%; min-width: 42rem; height: auto; font-family: system-ui, sans-serif; }
figcaption { font-size: .88rem; opacity: .75; }
</style>
</head>
<body>
<!-- body -->
</body>
</html>
"""
