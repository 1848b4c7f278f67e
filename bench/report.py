"""`python -m bench report`: one page of all result files, and the tables of the READMEs.

`bench/results/*.json` become `report.md` with its images, and `report.html`, a single file that follows the reader's
light or dark theme. Blocks of READMEs that begin with `<!-- bench:NAME -->` are made again (bench/page/tables.py).
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.page.document import Page
from bench.page.tables import RESULTS, readmes, rebuilt


def arguments(parser: argparse.ArgumentParser) -> None:
    """The command line."""
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the result files, and of the page")
    parser.add_argument("--readme", type=Path, nargs="+", help="whose tables are made again; default: every README")


def measure(results: Path, readme: Sequence[Path] | None) -> list[dict[str, Any]]:
    """Writes the page and the READMEs; nothing is measured."""
    page = Page.read(results)
    page.write()
    written = [results / "report.md", results / "report.html"]
    for path in readmes() if readme is None else readme:
        before = path.read_text()
        after = rebuilt(before, results)
        if after != before or readme is not None:
            path.write_text(after)
            written.append(path)
    return [{"written": str(path)} for path in written]


def table(rows: Sequence[dict[str, Any]]) -> str:
    """What was written."""
    return "\n".join(f"written: {row['written']}" for row in rows)
