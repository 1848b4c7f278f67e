"""The page of all results, `report.md` and `report.html`: everything in it comes from result files."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from html import unescape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench import gpu
from bench.page import figures, words
from bench.page.tables import BENCH, FULL, MADE_BY, TABLES, hardware, load, made_by, source
from bench.plots import png, style_sheet, svg
from bench.simulation import figures as plots
from bench.simulation import tables as predicted
from bench.statistics import interval

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FRAME = Path(__file__).parent / "frame.html"
_HEAD = re.compile(r"^(##+) (.+)$", re.MULTILINE)
# result files that have a heading, a paragraph and a table
_SECTIONS = {
    "drafts": ("Kinds of drafts", words.DRAFTS),
    "speculative": ("Exact sampling by speculation", words.SPECULATIVE),
    "robustness": ("What auto promises, on other images", words.ROBUSTNESS),
    "cache": ("Drafts, reused features, and both", words.CACHE),
    "scenario": ("MLPerf-style scenarios (unofficial)", words.SCENARIO),
    "serve": ("The server under load", words.SERVE),
    "loadtest": ("What a cluster adds to a server", words.LOADTEST),
    "kserve": ("What a protocol adds to a call", words.KSERVE),
    "calls": ("One model call by runtime and precision", words.CALLS),
    "kernel": ("The fused kernel beside separate operations", words.KERNEL),
    "export": ("Full-size models", words.EXPORT),
    "embed": ("The C library beside Python", words.EMBED),
    "host": ("Host time of a round on GPUs", words.HOST),
}

LONG = 20  # rows


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
                tables = re.sub(r"<table>.*?</table>", _folded, render(part), flags=re.DOTALL)
                body.append(re.sub(r"<(h[23])>(.*?)</h", _named, tables))
                continue
            with part.draw() as figure:
                body.append(f"<figure>{svg(figure)}<figcaption>{part.caption}</figcaption></figure>")
        return FRAME.read_text().replace("/* colours */", style_sheet()).replace("<!-- body -->", "\n".join(body))

    def parts(self) -> Iterator[Part]:
        """The page from top to bottom: figures, one plot and the table of contents first."""
        yield words.INTRODUCTION
        yield self._summary()
        if rows := self.rows("run"):
            caption = "Denoising time of one image in seconds: median, with p20 to p80."
            yield Plot("run", caption, lambda: figures.bars(rows))
        sections = [words.TERMS, *self._sections()]
        heads = [head for part in sections if isinstance(part, str) for head in _HEAD.findall(part)]
        yield "\n".join(f"{'  ' * (len(level) - 2)}- [{title}](#{anchor(title)})" for level, title in heads)
        yield from sections

    def _sections(self) -> Iterator[Part]:
        if rows := self.rows("run"):
            yield f"## The latency of one image\n\n{words.RUN}\n\n{self._table('run')}"
            yield "### Where the time of a round goes\n\n" + words.ROUND
            yield Plot("rounds", "Overhead per round beside the model calls, in µs.",
                       lambda: figures.overheads(rows))  # fmt: skip
        yield from self._predicted()
        if fleets := self.rows("cluster"):
            yield "## More machines\n\n" + words.FLEET
            yield Plot("cluster", "Dollars per thousand images by the limit of the 99th percentile.",
                       lambda: plots.fleet_figure(fleets))  # fmt: skip
            yield self._table("cluster")
        if judged := self.rows("quality"):
            yield "## Image quality\n\n" + words.QUALITY
            yield Plot("quality", "Distance to the sequential image and correct captions, against speed-up.",
                       lambda: figures.qualities(judged))  # fmt: skip
            yield self._table("quality")
        for name, (title, text) in _SECTIONS.items():
            if name in self.files:
                yield f"## {title}\n\n{text}"
                yield self._table(name)
        yield from self._gpus()
        yield words.AGAIN.format(commands=commands()) + "\n\n" + self._machines()

    def _predicted(self) -> Iterator[Part]:
        simulated = self.rows("simulate")
        if not simulated:
            return
        beneath = source("simulate", self.files["simulate"])
        yield f"## More devices\n\n{words.DEVICES}\n\n{predicted.assumptions(simulated)}"
        caption = "Predicted speed-ups: guidance together or split, and over slower links."
        yield Plot("simulate", caption, lambda: plots.figure(simulated))
        yield f"{predicted.prediction_table(simulated)}\n\n{beneath}"
        if checked := predicted.validation_table(simulated):
            yield "### Predicted against measured\n\n" + words.VALIDATION
            caption = "Error of the predicted time on the lanes of this machine."
            yield Plot("validation", caption, lambda: plots.validation_figure(simulated))
            yield f"{checked}\n\n{beneath}"
        yield "### The paper's speed-ups against round counts\n\n" + words.PAPER
        caption = "Speed-up against the number of devices: theory, the prediction, the paper, and here."
        yield Plot("speedup", caption, lambda: figures.speedups(simulated, self.rows("run")))
        yield f"{predicted.paper_table(simulated)}\n\n{beneath}"

    def _table(self, name: str) -> str:
        return f"{TABLES[name](self.rows(name))}\n\n{source(name, self.files[name])}"

    def _machines(self) -> str:
        packages = list(dict.fromkeys(package for file in self.files.values() for package in file["versions"]))
        lines = [f"| file | made by | machine | {' | '.join(packages)} |", "|---" * (3 + len(packages)) + "|"]
        for name, file in self.files.items():
            versions = (file["versions"].get(package, "") for package in packages)
            lines.append(f"| `{name}.json` | `{made_by(name)}` | {hardware(file)} | {' | '.join(versions)} |")
        return "\n".join(lines)

    def _summary(self) -> str:
        """The figures of each file that matter most."""
        said = [*self._fastest(), *predicted.in_short(self.rows("simulate")), *self._fewest_rounds()]
        return "\n".join(["## Summary", "", *(f"- {words}" for words in said)])

    def _fastest(self) -> Iterator[str]:
        rows = [row for row in self.rows("run") if "speedups" in row]
        for cell in dict.fromkeys((row["scheduler"], row["steps"], row["guidance_scale"]) for row in rows):
            here = [r for r in rows if (r["scheduler"], r["steps"], r["guidance_scale"]) == cell]
            ours = [row for row in here if row["baseline"] is None]
            if not ours:
                continue
            best = min(ours, key=lambda row: float(row["seconds"]["p50"]))
            guided = f"with guidance {cell[2]:g}" if cell[2] > 1 else "without guidance"
            against = [f"{interval(ratio)}× as fast as {name}" for name, ratio in best["speedups"].items() if ratio]
            played = f" ({best['mode']}, k = {best['k']})" if best["asked_mode"] == "auto" else ""
            yield (
                f"{cell[0]}, {cell[1]} steps, {guided}: the fastest is **{best['name']}**{played}, "
                f"{best['seconds']['p50']:.3f} s (median of {best['images']} images, drift "
                f"{best['drift']['median']:.1e}): {', '.join(against)}."
            )

    def _fewest_rounds(self) -> Iterator[str]:
        judged = [row for row in self.rows("quality") if "caption_accuracy" in row]
        if not judged:
            return
        reference = judged[0]
        alike = [r for r in judged if all(r[key] == reference[key] for key in ("scheduler", "images", "shapes"))]
        right = [r for r in alike if r["caption_accuracy"] >= reference["caption_accuracy"]]
        same = [r for r in right if r["mode"] != "sequential"]
        if same:
            best = min(same, key=lambda row: float(row["rounds"]))
            yield (
                f"Caption accuracy stays that of sequential ({100 * reference['caption_accuracy']:.0f} % of "
                f"{reference['images']}) down to {best['rounds']:g} rounds instead of {reference['rounds']:g} "
                f"({best['name']})."
            )

    def _gpus(self) -> Iterator[Part]:
        files = {name: file for name, file in self.files.items() if name.startswith("gpu")}
        if not files:
            yield f"## GPUs\n\n{words.NO_GPU}"
            return
        yield "## GPUs"
        for name, file in files.items():
            yield f"```\n{gpu.table(file['rows'])}\n```\n\n{source(name, file)}"


def commands() -> str:
    """What makes the result files, with the files that each makes."""

    def made(command: str) -> str:
        return ", ".join(name for name, maker in MADE_BY.items() if maker == command)

    return f"""make bench        # {made(BENCH)}: under 15 minutes on two cores
make bench-full   # {made(FULL)} as well, which takes much longer
make gpu-check    # gpu, on any NVIDIA machine
.venv/bin/{MADE_BY["export"]} --json bench/results/export.json   # 60 GB of disk, 24 GB of memory
.venv/bin/python -m bench report   # this page, and the tables of the READMEs"""


def anchor(title: str) -> str:
    """The name that GitHub gives to a heading, and the page as well."""
    return re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-")


def _named(heading: re.Match[str]) -> str:
    """An HTML heading that the table of contents can link to."""
    return f'<{heading[1]} id="{anchor(unescape(heading[2]))}">{heading[2]}</h'


def _ours(path: Path) -> bool:
    """Whether it is a result of this suite, not of another tool."""
    return {"rows", "commit", "host"} <= set(json.loads(path.read_text()))


def _folded(table: re.Match[str]) -> str:
    """A table of a page: as wide as it must be, with long cells in lines, and closed where there are many rows."""
    wrapped = re.sub(r"<td>(?=[^<]{60})", '<td class="long">', table[0])
    wide, rows = f'<div class="wide">{wrapped}</div>', table[0].count("<tr>") - 1
    return wide if rows <= LONG else f"<details><summary>All {rows} rows</summary>{wide}</details>"
