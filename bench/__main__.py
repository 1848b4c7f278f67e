"""`python -m bench run|quality|report`."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from bench import quality, report, run
from engines.errors import EngineError
from engines.store import BUILD
from runtime.report import result_file


def arguments() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    modes = {"run": run.__doc__, "quality": quality.__doc__}
    for name, text in modes.items():
        sub = commands.add_parser(name, help=(text or "").splitlines()[0])
        sub.add_argument("--model", default="shapes")
        sub.add_argument("--build", type=Path, default=BUILD, help="folder of the bundles")
        sub.add_argument("--devices", default="cpu*2")
        sub.add_argument("--modes", nargs="+", default=["sequential", "conservative", "aggressive"])
        sub.add_argument("--k", type=int, help="default: the number of lanes")
        sub.add_argument("--steps", type=int, default=50)
        sub.add_argument("--guidance", type=float, default=4.0, dest="guidance_scale")
        sub.add_argument("--json", type=Path, help="where the result file goes")
        sub.add_argument("--images", type=int, default=10 if name == "run" else 200)
    commands.choices["run"].add_argument("--warmup", type=int, default=2)
    commands.choices["quality"].add_argument("--shapes", type=int, nargs="+", default=[1], choices=(1, 2))
    commands.choices["quality"].add_argument("--seed", type=int, default=0)
    commands.choices["quality"].add_argument("--pictures", type=Path, help="PNG with the first pictures of every mode")
    commands.add_parser("report", help=(report.__doc__ or "").splitlines()[0])
    return parser


def main() -> int:
    """Exit code 1 with one message on any error."""
    options = vars(arguments().parse_args())
    command = options.pop("command")
    try:
        if command == "report":
            report.README.write_text(report.rebuilt(report.README.read_text()))
            return 0
        target = options.pop("json")
        if command == "run":
            rows = run.run(**options)
            print(run.table(rows))
        else:
            rows = quality.quality(**options)
            print(quality.table(rows))
        if target:
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_text(json.dumps(result_file(rows), indent=1) + "\n")
    except (EngineError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
