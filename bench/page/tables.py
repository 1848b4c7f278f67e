"""Result files as tables: who makes each file, how its rows read, and the blocks of READMEs that hold them.

Blocks of READMEs are made again by `python -m bench report`: one from `<!-- bench:NAME -->` to `<!-- /bench -->` holds
the table of a result file or one of `SUMMARIES`, one from `<!-- options:NAME -->` to `<!-- /options -->` a table of
`bench/page/options.py`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from bench import (
    cache,
    calls,
    cluster,
    drafts,
    embed,
    export,
    host,
    kernel,
    kserve,
    loadtest,
    quality,
    robustness,
    run,
    scenario,
    serve,
    simulate,
    speculative,
)
from bench.page import options, words
from bench.statistics import interval
from engines.errors import ParameterError

ROOT = Path(__file__).parent.parent.parent
RESULTS = ROOT / "bench" / "results"
_BLOCK = re.compile(r"<!-- (bench|options):([a-z0-9-]+) -->\n.*?<!-- /\1 -->", re.DOTALL)
Rows = Sequence[dict[str, Any]]
TABLES: dict[str, Callable[[Rows], str]] = {
    "run": run.table, "simulate": simulate.table, "scenario": scenario.table, "quality": quality.table,
    "drafts": drafts.table, "kernel": kernel.table, "serve": serve.table, "export": export.table,
    "embed": embed.table, "host": host.table, "kserve": kserve.table, "openvino": run.table,
    "speculative": speculative.table, "robustness": robustness.table,
    "cache": cache.table,
    "calls": calls.table,
    "cluster": cluster.table, "loadtest": loadtest.table,
}  # fmt: skip
BENCH, FULL, GPU = "make bench", "make bench-full", "make gpu-check"
MADE_BY = {
    "run": BENCH, "simulate": BENCH, "scenario": BENCH, "kernel": BENCH, "serve": BENCH, "quality": FULL,
    "drafts": FULL, "export": "python -m bench export", "gpu": GPU,
    "embed": "python -m bench embed", "host": "python -m tests.libcuda --idle -m bench host",
    "speculative": "python -m bench speculative", "robustness": "python -m bench robustness",
    "kserve": "python -m bench kserve", "cache": "python -m bench cache", "cluster": "python -m bench cluster",
    "calls": "python -m bench calls",
    "loadtest": "python -m bench loadtest CLUSTER --against SERVER",
    "openvino": "python -m bench run --devices 'cpu*2' 'cpu*2@openvino' 'cpu*2@openvino+bf16'",
}  # fmt: skip


def readmes(root: Path = ROOT) -> list[Path]:
    """Every README of the tree, but for those of models: its own, one level below, and those of protocols."""
    below = ("*/README.md", "[!.]*/[!.]*/README.md", "runtime/serve/*/README.md")
    return [root / "README.md", *(path for pattern in below for path in sorted(root.glob(pattern)))]


def load(name: str, results: Path = RESULTS) -> dict[str, Any]:
    """A committed result file."""
    result: dict[str, Any] = json.loads((results / f"{name}.json").read_text())
    return result


def hardware(result: dict[str, Any]) -> str:
    """Processor, cores and GPUs."""
    host = result["host"]
    return f"{host['processor']}, {host['cores']} cores" + "".join(f", {card}" for card in host.get("gpus", []))


def source(name: str, result: dict[str, Any]) -> str:
    """The line beneath a table."""
    runtime = result["versions"].get("onnxruntime")
    machine = hardware(result) + (f", ONNX Runtime {runtime}" if runtime else "")
    return f"`bench/results/{name}.json`, made by `{made_by(name)}`: {machine}"


def made_by(name: str) -> str:
    """The command that makes a file; those of several GPUs begin alike."""
    return MADE_BY.get(name, GPU)


def block(name: str, results: Path = RESULTS) -> str:
    """The block of a README; empty where nothing was measured yet. ParameterError for an unknown name."""
    if name in SUMMARIES:
        text = SUMMARIES[name](results)
    elif name not in TABLES:
        raise ParameterError("bench", f"no table is called {name}; there are {', '.join([*TABLES, *SUMMARIES])}")
    elif (results / f"{name}.json").is_file():
        result = load(name, results)
        text = f"{TABLES[name](result['rows'])}\n\n{source(name, result)}"
    else:
        text = ""
    return f"<!-- bench:{name} -->\n{text}\n<!-- /bench -->" if text else f"<!-- bench:{name} -->\n<!-- /bench -->"


def rebuilt(text: str, results: Path = RESULTS) -> str:
    """A README with every block made again from its files, or from the code's options."""
    return _BLOCK.sub(lambda match: block(match[2], results) if match[1] == "bench" else options.block(match[2]), text)


# --- summaries -------------------------------------------------------------------------------------------------------

# rows of run.json in the README's first table: how they are named there, and what selects them
_SHORT: tuple[tuple[str, dict[str, Any]], ...] = (
    ("diffusers, `torch.compile`", {"baseline": "diffusers compiled"}),
    ("one ONNX Runtime session, all cores", {"baseline": "one session"}),
    ("`sequential`, {lanes} lanes", {"asked_mode": "sequential", "baseline": None}),
    ("`aggressive`, {lanes} lanes, k = {k}", {"asked_mode": "aggressive"}),
    ("`auto`, {lanes} lanes: `{mode}`, k = {k}", {"asked_mode": "auto"}),
)


def speed_summary(results: Path) -> str:
    """Five rows of the first cell of run.json; nothing without the file."""
    if not (results / "run.json").is_file():
        return ""
    result = load("run", results)
    rows, keys = result["rows"], ("model", "scheduler", "steps", "guidance_scale")
    cell = [row for row in rows if all(row[key] == rows[0][key] for key in keys)]
    heads = ["", "rounds", "seconds per image", "× diffusers compiled", "× one session", "drift"]
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for name, wanted in _SHORT:
        for row in cell:
            if "seconds" in row and all(row[key] == value for key, value in wanted.items()):
                against = [interval(row["speedups"].get(key)) for key in ("diffusers compiled", "one session")]
                cells = [name.format(**row), str(row.get("rounds", "")), f"{row['seconds']['p50']:.3f}", *against]
                drift = row["drift"]["median"]
                lines.append(f"| {' | '.join([*cells, f'{drift:.1e}' if drift else '0'])} |")
    return "\n".join(lines)


def gpu_summary(results: Path) -> str:
    """What has run on which GPU: one line per committed GPU file."""
    files = sorted(results.glob("gpu*.json"))
    if not files:
        return words.NO_GPU
    lines = ["| GPU | commit | parts passed | failed | not possible or not run | file |", "|---|---|---|---|---|---|"]
    for path in files:
        result = load(path.stem, results)
        counts = [sum(row["status"] == status for row in result["rows"]) for status in ("passed", "failed")]
        rest = len(result["rows"]) - sum(counts)
        gpus = ", ".join(result["host"]["gpus"])
        lines.append(f"| {gpus} | {result['commit']} | {counts[0]} | {counts[1]} | {rest} | `{path.name}` |")
    return "\n".join(lines)


SUMMARIES: dict[str, Callable[[Path], str]] = {"summary": speed_summary, "gpus": gpu_summary}
