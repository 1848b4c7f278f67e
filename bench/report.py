"""`python -m bench report`: rebuilds the README's tables from the committed result files.

A block of the README that begins with `<!-- bench:NAME -->` and ends with `<!-- /bench -->` holds the table of
`bench/results/NAME.json`.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from bench import quality, run

RESULTS = Path(__file__).parent / "results"
README = Path(__file__).parent.parent / "README.md"
_BLOCK = re.compile(r"<!-- bench:([a-z0-9-]+) -->\n.*?<!-- /bench -->", re.DOTALL)


def load(name: str) -> dict[str, Any]:
    """A committed result file."""
    result: dict[str, Any] = json.loads((RESULTS / f"{name}.json").read_text())
    return result


def block(name: str) -> str:
    """The table of a result file, and where it was measured."""
    result = load(name)
    rows = result["rows"]
    tables = {"quality": quality.table, "drafts": quality.table_of_drafts, "run": run.table}
    table = tables[name](rows)
    host, versions = result["host"], result["versions"]
    machine = f"{host['processor']}, {host['cores']} cores, ONNX Runtime {versions['onnxruntime']}"
    source = f"`bench/results/{name}.json`: {machine}, commit {result['commit']}"
    return f"<!-- bench:{name} -->\n{table}\n\n{source}\n<!-- /bench -->"


def rebuilt(text: str) -> str:
    """A README with every table made again from its file."""
    return _BLOCK.sub(lambda match: block(match[1]), text)
