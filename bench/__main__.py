"""`python -m bench run|quality|drafts|gpu|moves|report`."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from bench import gpu, moves, quality, report, run
from engines.errors import EngineError
from engines.store import BUILD
from runtime.report import result_file
from runtime.samplers import DRAFTS


def arguments() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    for name, text in (("run", run.__doc__), ("quality", quality.__doc__), ("drafts", quality.drafts.__doc__)):
        sub = commands.add_parser(name, help=(text or "").splitlines()[0])
        sub.add_argument("--model", default="shapes")
        sub.add_argument("--build", type=Path, default=BUILD, help="folder of the bundles")
        sub.add_argument("--devices", default="cpu*2")
        sub.add_argument("--json", type=Path, help="where the result file goes")
    sub = commands.choices["run"]
    sub.add_argument("--images", type=int, default=10)
    sub.add_argument("--warmup", type=int, default=2)
    sub.add_argument("--modes", nargs="+", default=["sequential", "conservative", "aggressive"])
    sub.add_argument("--k", type=int, help="default: the number of lanes")
    sub.add_argument("--steps", type=int, default=50)
    sub.add_argument("--guidance", type=float, default=4.0, dest="guidance_scale")
    sub = commands.choices["quality"]
    sub.add_argument("--full", action="store_true", help="100 captions, two shapes, and the other schedulers")
    sub.add_argument("--images", type=int, help="captions per row; default 24, or 100 with --full")
    sub.add_argument("--seed", type=int, default=0)
    sub.add_argument("--pictures", type=Path, help="PNG with the first pictures of some modes")
    sub.add_argument("--plot", type=Path, help="PNG with speed-up against distance")
    sub = commands.choices["drafts"]
    sub.add_argument("--images", type=int, default=16, help="captions per row")
    sub.add_argument("--seed", type=int, default=0, help="which captions: choose by some, report others")
    kinds = [name for name, kind in DRAFTS.items() if not kind.own_noise]
    sub.add_argument("--kinds", nargs="+", choices=kinds, default=kinds)
    sub = commands.add_parser("gpu", help=(gpu.__doc__ or "").splitlines()[0])
    sub.add_argument("--lanes", type=int, nargs="+", default=[1, 2, 4], help="numbers of lanes on the first GPU")
    sub.add_argument("--json", type=Path, help="where the result file goes")
    sub = commands.add_parser("moves", help=(moves.__doc__ or "").splitlines()[0])
    sub.add_argument("--call-seconds", type=float, default=0.01, help="of one model call")
    sub.add_argument("--json", type=Path, help="where the result file goes")
    commands.add_parser("report", help=(report.__doc__ or "").splitlines()[0])
    return parser


def measure(command: str, options: dict[str, Any]) -> list[dict[str, Any]]:
    """Runs a benchmark and prints its table."""
    if command == "run":
        rows = run.run(**options)
        print(run.table(rows))
    elif command == "gpu":
        rows = gpu.gpu(options["lanes"], lambda line: print(line, flush=True))
        print(gpu.table(rows))
    elif command == "moves":
        rows = moves.moves(**options)
        print(moves.table(rows))
    elif command == "drafts":
        rows = quality.drafts(**options)
        print(quality.table_of_drafts(rows))
    else:
        target, options["images"] = (
            options.pop("plot"),
            (100 if options["full"] else 24) if options["images"] is None else options["images"],
        )
        rows = quality.quality(**options)
        print(quality.table(rows))
        if target:
            quality.plot(rows, target)
    return rows


def main() -> int:
    """Exit code 1 with one message on any error."""
    options = vars(arguments().parse_args())
    command = options.pop("command")
    try:
        if command == "report":
            report.README.write_text(report.rebuilt(report.README.read_text()))
            return 0
        target = options.pop("json")
        rows = measure(command, options)
        if target:
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_text(json.dumps(result_file(rows), indent=1) + "\n")
        if any(row.get("status") == "failed" for row in rows):
            return 1
    except (EngineError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
