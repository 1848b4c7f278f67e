"""`python -m bench COMMAND`: the source of every claim of speed, quality or cost.

Each command is a module of its name with `arguments(parser)`, `measure(**options) → rows` and `table(rows) → text`; its
docstring is its help.
"""

from __future__ import annotations

import argparse
import importlib
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

from engines.command import Parser, exit_code
from engines.files import written_whole
from runtime.provenance import result_file

COMMANDS = (
    "run",
    "scenario",
    "simulate",
    "cluster",
    "quality",
    "drafts",
    "speculative",
    "robustness",
    "cache",
    "calls",
    "kernel",
    "serve",
    "kserve",
    "loadtest",
    "embed",
    "export",
    "gpu",
    "host",
    "moves",
    "report",
)


def summary(module: ModuleType) -> str:
    """The first line of a command's docstring, without its name."""
    return (module.__doc__ or "").splitlines()[0].split(": ", 1)[-1].rstrip(".")


def arguments() -> argparse.ArgumentParser:
    """The command line."""
    description = "Measures speed, quality and cost. `COMMAND --help` has the options, bench/README.md the files."
    parser = Parser(prog="python -m bench", description=description)
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", title="commands")
    for name in COMMANDS:
        module = importlib.import_module(f"bench.{name}")
        text = (module.__doc__ or "").replace("`", "")
        sub = commands.add_parser(
            name, help=summary(module), description=text, formatter_class=argparse.RawDescriptionHelpFormatter
        )
        module.arguments(sub)
        if name != "report":
            sub.add_argument("--json", type=Path, help="where the result file goes")
    return parser


def dumped(result: dict[str, Any]) -> str:
    """A result file as JSON with a row per line, readable and easy to diff; ValueError for NaN and infinity."""
    frame = json.dumps(result | {"rows": []}, indent=1, allow_nan=False)
    rows = ",\n".join(json.dumps(row, allow_nan=False) for row in result["rows"])
    return frame.replace('"rows": []', f'"rows": [\n{rows}\n]') + "\n"


def main() -> int:
    """Exit code 1 with one message on any error, or when a row has status `failed`."""
    parser = arguments()
    options = vars(parser.parse_args())
    command = options.pop("command")
    if command is None:
        parser.print_help()
        return 0
    module = importlib.import_module(f"bench.{command}")
    target: Path | None = options.pop("json", None)

    def run() -> int:
        rows = module.measure(**options)
        print(module.table(rows))
        if target:
            target.parent.mkdir(parents=True, exist_ok=True)
            with written_whole(target) as partial:
                partial.write_text(dumped(result_file(rows)))
        return 1 if any(row.get("status") == "failed" for row in rows) else 0

    return exit_code(run)


if __name__ == "__main__":
    sys.exit(main())
