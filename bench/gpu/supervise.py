"""Runs parts one after another, each in a process of its own, so that no crash, hang or cut-off loses another's result.

In the folder, per part: `NAME.json` is its result, written when it ends; `NAME.running` stands while it runs, and stays
when the machine is taken away; `NAME.log` is what it printed. `gpu.json` has all results, renewed after each part.
A second run keeps what passed or was not possible with the same code on the same machine, begins with the parts that
never ran, and repeats those that were cut off or failed after them.
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from bench.gpu.child import read_figures
from bench.gpu.parts import DEVICE, MACHINE, Part, Row, Settings

ROOT = Path(__file__).resolve().parents[2]
SOURCES = ("bench/gpu", "bench/torch_lane.py", "engines", "runtime", "kernels")
NOTE_SECONDS, END_SECONDS = 3.0, 10.0  # for the stacks of a part that is too late; for a killed process to go
LOG_TAIL = 1500
SCHEMA_VERSION = 2  # of runtime.provenance, whose imports a bare machine may lack
NO_FRAME: Row = {"commit": None, "host": {"processor": "", "cores": 0, "system": "", "gpus": []}, "versions": {}}


@dataclass
class Supervisor:
    """`show` gets every line. `within` limits all of it: parts that would begin later are not run."""

    folder: Path
    settings: Settings
    show: Callable[[str], None]
    within: float | None = None
    again: bool = False

    def run(self, parts: Sequence[Part]) -> list[Row]:
        """The rows of all parts in their order."""
        self.folder.mkdir(parents=True, exist_ok=True)
        start = time.monotonic()
        machine = [part for part in parts if part.name == MACHINE]
        for part in machine:  # always: what it finds says whether older results are of this machine
            self._store(part, self._run(part, part.seconds), "")
        key = self._key(machine)
        kept, waiting = self._sorted([part for part in parts if part.name != MACHINE], key)
        for part in kept:
            self.show(f"{part.name}: {self._result(part)['status']}, kept from an earlier run")
        skipped: dict[str, str] = {}
        for part in waiting:
            left = None if self.within is None else self.within - (time.monotonic() - start)
            reason = self._not_now(left, [*parts])
            if reason:
                skipped[part.name] = reason
                continue
            self._store(part, self._run(part, part.seconds if left is None else min(part.seconds, left)), key)
            self.merge(parts, key)
        return self.merge(parts, key, skipped)

    def merge(self, parts: Sequence[Part], key: str, skipped: dict[str, str] | None = None) -> list[Row]:
        """Writes `gpu.json` from the results of all parts, with what was cut off or never begun."""
        rows = [self._row(part, key, (skipped or {}).get(part.name)) for part in parts]
        frame = next((figure for row in rows for figure in row["figures"] if "commit" in figure), NO_FRAME)
        result = {"schema_version": SCHEMA_VERSION, **frame, "rows": rows}
        lines = ",\n".join(json.dumps(row, allow_nan=False) for row in rows)
        head = json.dumps(result | {"rows": []}, indent=1, allow_nan=False)
        _write(self.folder / "gpu.json", head.replace('"rows": []', f'"rows": [\n{lines}\n]') + "\n")
        return rows

    def _not_now(self, left: float | None, parts: Sequence[Part]) -> str | None:
        """Why the next part is not begun, or None."""
        if left is not None and left < 1:
            return "the time of --within was up: run it again, and what has no result yet comes first"
        device = next((part for part in parts if part.name == DEVICE), None)
        result = {} if device is None else self._result(device)
        if device is not None and (result.get("status"), result.get("ended")) == ("failed", "time limit"):
            return f"the part {DEVICE} hung, and so would this: look at {device.slug}.log"
        return None

    def _sorted(self, parts: Sequence[Part], key: str) -> tuple[list[Part], list[Part]]:
        """Parts whose results are kept, and those to run: first those that never ran."""
        kept, new, cut_off, failed = [], [], [], []
        for part in parts:
            result = {} if self.again else self._result(part)
            same = result.get("key") == key
            if same and result["status"] in ("passed", "not possible here"):
                kept.append(part)
            elif same:
                failed.append(part)
            elif not self.again and self._path(part, "running").is_file():
                cut_off.append(part)
            else:
                new.append(part)
        return kept, [*new, *cut_off, *failed]

    def _run(self, part: Part, seconds: float) -> Row:
        """One part, to its end or to its limit."""
        for suffix in ("ended", "figures", "partial"):
            self._path(part, suffix).unlink(missing_ok=True)
        running, log = self._path(part, "running"), self._path(part, "log")
        running.touch()
        self.show(f"{part.name}: {part.question}")
        asked = {
            "part": asdict(part), "folder": str(self.folder.resolve()), "lanes": self.settings.lanes,
            "rehearsal": self.settings.rehearsal, "cache": str(self.settings.cache.resolve()),
        }  # fmt: skip
        command = [sys.executable, "-m", "bench.gpu.child", json.dumps(asked)]
        start = time.monotonic()
        with log.open("wb") as output:
            process = subprocess.Popen(command, cwd=ROOT, stdout=output, stderr=subprocess.STDOUT,
                                       stdin=subprocess.DEVNULL, start_new_session=True)  # fmt: skip
        try:
            code = self._watch(process, log, start + seconds)
        except BaseException:  # Ctrl-C: the part must not go on behind our back; `running` says that it was cut off
            _end(process)
            raise
        row = self._ended(part, code, seconds, round(time.monotonic() - start, 1))
        running.unlink()
        text = f" ({row['reason']})" if row["reason"] else ""
        self.show(f"{part.name}: {row['status']}{text}, {row['seconds']:g} s")
        return row

    def _watch(self, process: subprocess.Popen[bytes], log: Path, end: float) -> int | None:
        """Shows the figures while they come; the exit code, or None when the limit was reached."""
        with log.open("rb") as lines:
            partial = b""
            while True:
                code = process.poll()
                *whole, partial = (partial + lines.read()).split(b"\n")
                for line in whole:
                    if line.startswith(b"  "):
                        self.show(line.decode(errors="replace"))
                if code is not None:
                    return code
                if time.monotonic() > end:
                    _end(process)
                    return None
                time.sleep(0.05)

    def _ended(self, part: Part, code: int | None, limit: float, seconds: float) -> Row:
        """The row of a part that ended, or was ended."""
        path = self._path(part, "ended")
        row: Row = {"part": part.name, "status": "failed", "reason": "", "seconds": seconds}
        row["figures"] = read_figures(self._path(part, "figures"))
        if path.is_file():
            row = json.loads(path.read_text(encoding="utf-8"))
        if code == 0 and path.is_file():
            return row | {"ended": "by itself"}
        log = self._path(part, "log").read_text(encoding="utf-8", errors="replace").strip()
        row |= {"status": "failed", "log": log[-LOG_TAIL:]}
        after = " after its result" if path.is_file() else ""
        if code is None:
            cut = limit < part.seconds  # by --within, which says nothing about the part
            why = f"--within ended it after {limit:.0f} s: run it again" if cut else f"did not end within {limit:.0f} s"
            row |= {"status": "not run"} if cut else {}
            return row | {"ended": "time limit", "reason": why if cut else f"{why}{after}: killed"}
        if code < 0:
            name = signal.Signals(-code).name
            return row | {"ended": name, "reason": f"the process died of {name}{after}: see {part.slug}.log"}
        last = log.rsplit("\n", 1)[-1]
        return row | {"ended": f"exit code {code}", "reason": f"the process ended with code {code}{after}: {last}"}

    def _store(self, part: Part, row: Row, key: str) -> None:
        _write(self._path(part, "json"), json.dumps(row | {"key": key}, allow_nan=False) + "\n")

    def _row(self, part: Part, key: str, skipped: str | None) -> Row:
        """The result of a part without what only a second run needs."""
        result = self._result(part)
        if part.name == MACHINE or result.get("key") == key:
            return {name: value for name, value in result.items() if name != "key"}
        reason, status = skipped or "not begun yet", "not run"
        if self._path(part, "running").is_file():
            status, reason = "failed", "it was cut off before it ended: run it again"
        figures = read_figures(self._path(part, "figures")) if status == "failed" else []
        return {"part": part.name, "status": status, "reason": reason, "seconds": 0, "figures": figures}

    def _result(self, part: Part) -> Row:
        """The stored result; empty where there is none that can be read."""
        try:
            found = json.loads(self._path(part, "json").read_text(encoding="utf-8"))
        except (OSError, json.JSONDecodeError):
            return {}
        return found if isinstance(found, dict) else {}

    def _key(self, machine: Sequence[Part]) -> str:
        """What a result depends on: the code, the packages, the GPUs and their driver, and how much was asked for."""
        figures = [figure for part in machine for figure in self._result(part).get("figures", [])]
        keys = ("package", "version", "gpu", "name", "uuid", "driver", "python")
        facts = [[figure.get(key) for key in keys] for figure in figures]
        asked = [list(self.settings.lanes), self.settings.rehearsal]
        return hashlib.sha256(json.dumps([facts, asked, source_hash()]).encode()).hexdigest()[:16]

    def _path(self, part: Part, suffix: str) -> Path:
        return self.folder / f"{part.slug}.{suffix}"


def source_hash() -> str:
    """Identifies the code that is checked."""
    digest = hashlib.sha256()
    for name in SOURCES:
        path = ROOT / name
        files = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.suffix in (".py", ".cu"))
        for file in files:
            digest.update(file.relative_to(ROOT).as_posix().encode() + b"\0" + file.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


def _end(process: subprocess.Popen[bytes]) -> None:
    """Ends a process with all its children: first so that it writes where it is, then so that it must.

    A process that waits inside the driver cannot be killed before that answers; it is left behind.
    """
    with suppress(ProcessLookupError):
        os.kill(process.pid, signal.SIGABRT)  # faulthandler writes the stack of every thread
    with suppress(subprocess.TimeoutExpired):
        process.wait(NOTE_SECONDS)
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    with suppress(subprocess.TimeoutExpired):
        process.wait(END_SECONDS)


def _write(path: Path, text: str) -> None:
    partial = path.with_name(f"{path.name}.new")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)
