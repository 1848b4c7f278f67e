"""`python -m bench.gpu.child`: one part in a process of its own, which only `supervise` starts."""

from __future__ import annotations

import ctypes
import faulthandler
import json
import math
import signal
import sys
import time
import traceback
from pathlib import Path
from typing import Any

from bench.gpu.parts import NotPossibleError, Part, Row, Settings

PR_SET_PDEATHSIG = 1


def run(part: Part, settings: Settings, folder: Path) -> Row:
    """Runs a part, writes every figure when it is found, and the result when the part ends."""
    figures = folder / f"{part.slug}.figures"
    status, reason, start = "passed", "", time.perf_counter()
    with figures.open("w", encoding="utf-8") as file:
        try:
            for row in map(finite, part.load()(settings)):
                file.write(json.dumps(row, allow_nan=False) + "\n")
                file.flush()
                print("  " + "  ".join(f"{key} {short(value)}" for key, value in row.items()), flush=True)  # noqa: T201
        except NotPossibleError as error:
            status, reason = "not possible here", str(error)
        except ModuleNotFoundError as error:
            status = "not possible here"
            reason = f"{error.name} is missing: install it, or use a bundle of `make gpu-bundle`"
        except Exception as error:  # noqa: BLE001 - whatever a part raises is its result
            place = traceback.extract_tb(error.__traceback__)[-1]
            where = f"{Path(place.filename).name}:{place.lineno}"
            status, reason = "failed", f"{type(error).__name__} at {where}: {error}"
            traceback.print_exc()
    seconds = round(time.perf_counter() - start, 1)
    return {"part": part.name, "status": status, "reason": reason, "seconds": seconds, "figures": read_figures(figures)}


def read_figures(path: Path) -> list[Row]:
    """What a part had found, also when it was killed in the middle of a line."""
    if not path.is_file():
        return []
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return rows


def finite(value: Any) -> Any:
    """NaN and infinity as words: a wrong number must not keep the others from being written."""
    if isinstance(value, dict):
        return {key: finite(one) for key, one in value.items()}
    if isinstance(value, list):
        return [finite(one) for one in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def short(value: Any) -> str:
    """A value for one line on the screen."""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def main() -> int:
    """Reads what to run from the command line, as JSON; the result goes into the folder by one rename."""
    faulthandler.enable()
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)  # whoever kills `supervise` means this process, too
    asked = json.loads(sys.argv[1])
    part, folder = Part(**asked["part"]), Path(asked["folder"])
    settings = Settings(tuple(asked["lanes"]), asked["rehearsal"], Path(asked["cache"]))
    row = run(part, settings, folder)
    partial = folder / f"{part.slug}.partial"
    partial.write_text(json.dumps(row, allow_nan=False), encoding="utf-8")
    partial.replace(folder / f"{part.slug}.ended")
    return 0


if __name__ == "__main__":
    sys.exit(main())
