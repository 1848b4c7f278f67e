"""`python -m bench gpu`: every part of the CUDA path tested and measured on this machine's GPUs, without network.

Each part runs in a process of its own with a time limit, and ends as passed, failed, or not possible here and why. Its
result is written when it ends; a second run goes on where the first was cut off. `make gpu-check` runs all of them.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from bench.gpu.parts import PARTS, Part, Row, Settings
from bench.gpu.supervise import ROOT, Supervisor
from engines.errors import ParameterError

FOLDER = ROOT / "build" / "gpu-check"


def arguments(parser: argparse.ArgumentParser) -> None:
    """The command line."""
    parser.add_argument("--lanes", type=int, nargs="+", default=[1, 2, 4], help="numbers of lanes on the first GPU")
    parser.add_argument("--only", nargs="+", metavar="PART", help=f"of: {', '.join(part.slug for part in PARTS)}")
    parser.add_argument("--folder", type=Path, default=FOLDER, help="where the result of each part goes when it ends")
    parser.add_argument("--within", type=float, metavar="SECONDS", help="begin no part after that; a later run goes on")
    parser.add_argument("--again", action="store_true", help="run parts that have a result already, too")
    parser.add_argument("--rehearsal", action="store_true", help="few sizes, steps and repeats, for imaginary GPUs")


def measure(
    lanes: Sequence[int], only: Sequence[str] | None = None, folder: Path = FOLDER, within: float | None = None,
    again: bool = False, rehearsal: bool = False, parts: Sequence[Part] = PARTS,
) -> list[Row]:  # fmt: skip
    """One row per part; lines are shown as they are found."""
    if min(lanes) < 1:
        raise ParameterError("lanes", "at least one lane is needed")
    unknown = sorted({*(only or ())} - {part.slug for part in parts})
    if unknown:
        raise ParameterError("only", f"there is no part {unknown[0]!r}: name {', '.join(part.slug for part in parts)}")
    chosen = [part for part in parts if only is None or part.slug in only or part is parts[0]]
    settings = Settings(tuple(lanes), rehearsal)
    supervisor = Supervisor(folder, settings, lambda line: print(line, flush=True), within, again)  # noqa: T201
    return supervisor.run(chosen)


def table(rows: Sequence[Row]) -> str:
    """One line per part."""
    lines = [f"{row['part']:<40} {row['status']}{': ' + row['reason'] if row['reason'] else ''}" for row in rows]
    return "\n".join(lines)
