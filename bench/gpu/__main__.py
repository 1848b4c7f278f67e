"""`python -m bench.gpu`: as `python -m bench gpu`, importing nothing else of the benchmarks, for bare machines."""

from __future__ import annotations

import argparse
import shutil
import sys
from pathlib import Path

import bench.gpu as command
from engines.errors import EngineError


def main() -> int:
    """Exit code 1 with one message on any error, and where a part failed."""
    description = (command.__doc__ or "").replace("`", "")
    parser = argparse.ArgumentParser(
        prog="python -m bench.gpu", description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    command.arguments(parser)
    parser.add_argument("--json", type=Path, help="where the file with all results goes")
    options = vars(parser.parse_args())
    target: Path | None = options.pop("json")
    try:
        rows = command.measure(**options)
        print(f"\n{command.table(rows)}")
        if target:
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(options["folder"] / "gpu.json", target)
    except (EngineError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted: run it again, and it goes on from here", file=sys.stderr)
        return 130
    return 1 if any(row["status"] == "failed" for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
