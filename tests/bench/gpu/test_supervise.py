"""No crash, hang, cut-off or kill of one part loses the result of another."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from bench.gpu.parts import DEVICE, Part, Settings
from bench.gpu.supervise import SCHEMA_VERSION, Supervisor
from tests import ROOT
from tests.libcuda.plugin import environment


def part(function: str, seconds: float = 20, name: str | None = None) -> Part:
    return Part(name or function.replace("_", " "), f"tests.bench.gpu.parts:{function}", seconds, "Does it?")


MACHINE = part("good", name="machine")


class Runs:
    """A folder of results, and what was shown."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.shown = folder, list[str]()

    def __call__(self, *parts: Part, **options: Any) -> dict[str, dict[str, Any]]:
        settings = Settings(cache=self.folder)
        rows = Supervisor(self.folder, settings, self.shown.append, **options).run([MACHINE, *parts])
        assert rows == json.loads((self.folder / "gpu.json").read_text())["rows"]
        return {row["part"]: row for row in rows}


@pytest.fixture
def runs(tmp_path: Path) -> Runs:
    return Runs(tmp_path)


def test_every_way_to_end(runs: Runs) -> None:
    names = ("crashes", "raises", "leaves", "crashes_at_its_end", "impossible", "missing", "good")
    rows = runs(*(part(name) for name in names), part("hangs", seconds=1.5))
    assert {name: (row["status"], row.get("ended")) for name, row in rows.items()} == {
        "machine": ("passed", "by itself"),
        "crashes": ("failed", "SIGSEGV"),
        "raises": ("failed", "by itself"),
        "leaves": ("failed", "exit code 3"),
        "crashes at its end": ("failed", "SIGSEGV"),
        "impossible": ("not possible here", "by itself"),
        "missing": ("not possible here", "by itself"),
        "good": ("passed", "by itself"),
        "hangs": ("failed", "time limit"),
    }
    assert rows["crashes"]["figures"] == [{"seen": 1}, {"seen": 2}], "figures of before a crash are lost"
    assert "string_at" in rows["crashes"]["log"], "the log does not say where it crashed"
    assert rows["raises"]["reason"] == "ValueError at parts.py:34: wrong by 3 times"
    assert rows["raises"]["figures"] == [{"seen": 1, "error": "nan", "rates": [1.0, "inf"]}]
    assert "the library says why" in rows["leaves"]["reason"]
    assert rows["crashes at its end"]["figures"] == [{"seen": 1}]
    assert "after its result" in rows["crashes at its end"]["reason"]
    assert rows["impossible"]["reason"] == "this machine has one GPU"
    assert "a_package_that_nobody_has is missing" in rows["missing"]["reason"]
    assert "hangs" in rows["hangs"]["log"], "the log does not say where it hung"
    assert "did not end within 2 s" in rows["hangs"]["reason"]
    assert rows["good"]["figures"][0]["process"] != rows["machine"]["figures"][0]["process"]
    assert "  seen 2" in runs.shown


def test_a_part_that_is_too_late_leaves_no_process_behind(runs: Runs) -> None:
    rows = runs(part("hangs_with_a_child", seconds=1))
    child = rows["hangs with a child"]["figures"][0]["child"]
    deadline = time.monotonic() + 5
    while Path(f"/proc/{child}/cmdline").exists() and Path(f"/proc/{child}/cmdline").read_bytes():
        assert time.monotonic() < deadline, "its child lives on"
        time.sleep(0.05)


def test_a_second_run_goes_on(runs: Runs) -> None:
    """What passed is kept, what failed runs again, and `again` runs everything."""
    parts = part("counted"), part("hangs_once", seconds=3)
    assert runs(*parts)["hangs once"]["status"] == "failed"
    rows = runs(*parts)
    assert rows["counted"]["figures"] == [{"runs": 1}]
    assert rows["hangs once"]["status"] == "passed"
    assert runs(*parts, again=True)["counted"]["figures"] == [{"runs": 2}]


def test_other_code_or_another_machine_keeps_nothing(runs: Runs, monkeypatch: pytest.MonkeyPatch) -> None:
    runs(part("counted"))
    monkeypatch.setattr("bench.gpu.supervise.source_hash", lambda: "changed")
    assert runs(part("counted"))["counted"]["figures"] == [{"runs": 2}]


def running(folder: Path) -> bool:
    """Whether a part of this folder runs anywhere."""
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            line = path.read_text()
        except OSError:
            continue
        if "bench.gpu.child" in line and str(folder) in line:
            return True
    return False


def test_a_cut_off_loses_nothing(runs: Runs) -> None:
    """The supervisor is killed while a part hangs; what ended is there, and a second run begins with what never ran."""
    code = f"""if True:
        import sys
        from pathlib import Path
        from bench.gpu.parts import Settings
        from bench.gpu.supervise import Supervisor
        from tests.bench.gpu.test_supervise import MACHINE, part
        folder = Path({str(runs.folder)!r})
        parts = [MACHINE, part("good"), part("hangs_once"), part("counted")]
        Supervisor(folder, Settings(cache=folder), print).run(parts)"""
    process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.DEVNULL)
    while not (runs.folder / "hung").exists():
        assert process.poll() is None
        time.sleep(0.05)
    process.kill()
    process.wait()
    deadline = time.monotonic() + 5
    while running(runs.folder):
        assert time.monotonic() < deadline, "a part outlived its supervisor"
        time.sleep(0.05)
    rows = {row["part"]: row for row in json.loads((runs.folder / "gpu.json").read_text())["rows"]}
    assert (rows["good"]["status"], rows["counted"]["status"]) == ("passed", "not run")
    again = runs(part("good"), part("hangs_once"), part("counted"), within=100)
    order = [line.split(":")[0] for line in runs.shown if line.endswith("Does it?")]
    assert order == ["machine", "counted", "hangs once"]
    assert {row["status"] for row in again.values()} == {"passed"}


def test_what_was_cut_off_is_said(runs: Runs) -> None:
    row = runs(part("good"))["good"]
    assert row["status"] == "passed"
    (runs.folder / "good.json").unlink()
    (runs.folder / "good.running").touch()
    supervisor = Supervisor(runs.folder, Settings(cache=runs.folder), runs.shown.append)
    (cut,) = supervisor.merge([part("good")], "key")
    assert (cut["status"], cut["reason"]) == ("failed", "it was cut off before it ended: run it again")
    assert cut["figures"] == row["figures"], "what it had found is lost"


def test_when_the_time_is_up_nothing_more_begins(runs: Runs) -> None:
    start = time.monotonic()
    rows = runs(part("hangs"), part("good"), within=3)
    assert time.monotonic() - start < 15
    assert (rows["hangs"]["status"], rows["hangs"]["ended"]) == ("not run", "time limit"), "a cut-off is no failure"
    assert re.fullmatch(r"--within ended it after [0-3] s: run it again", rows["hangs"]["reason"])
    assert rows["good"]["status"] == "not run"
    assert "--within" in rows["good"]["reason"]


def test_where_the_driver_hangs_the_rest_is_not_tried(runs: Runs) -> None:
    rows = runs(part("hangs", seconds=1, name=DEVICE), part("good"))
    assert rows["good"]["status"] == "not run"
    assert "the part device hung" in rows["good"]["reason"]


def test_ctrl_c_ends_the_part(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "bench.gpu", "--folder", str(tmp_path), "--only", "device"]
    for _ in range(5):  # where the part ended before the signal came, once more
        with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            process.stdout.readline()
            process.send_signal(signal.SIGINT)
            process.communicate(timeout=20)
        if process.returncode:
            break
    assert process.returncode == 130
    assert list(tmp_path.glob("*.running")), "nothing says that it was cut off"


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_parts_on_an_imaginary_driver_in_processes_of_their_own(tmp_path: Path) -> None:
    """The real bindings and real processes: only the driver is not NVIDIA's."""
    code = f"""if True:
        from dataclasses import replace
        from pathlib import Path
        import bench.gpu
        from bench.gpu.parts import PARTS
        parts = [replace(p, target="tests.bench.gpu.imaginary:" + p.slug.replace("-", "_")) for p in PARTS]
        chosen = ["device", "capture", "kernel-correctness", "peer-copies", "copies", "engine-overhead"]
        bench.gpu.measure([1, 2], chosen, Path({str(tmp_path)!r}), rehearsal=True, parts=parts)"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / "gpu.json").read_text())["rows"]
    assert [(row["part"], row["status"], row["reason"]) for row in rows] == [
        (name, "passed", "")
        for name in (
            "machine", "device", "capture", "kernel correctness", "peer copies", "engine overhead", "copies",
        )
    ]  # fmt: skip
    assert rows[1]["figures"][1]["name"].startswith("Imaginary")


def test_its_frame_is_that_of_every_result_file() -> None:
    from runtime import provenance

    assert SCHEMA_VERSION == provenance.SCHEMA_VERSION
