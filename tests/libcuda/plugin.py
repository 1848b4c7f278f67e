"""Tests marked `imaginary_gpus` run in a process of their own, one per file, whose NVIDIA driver is the imaginary one.

The driver must be in the library path before a process starts, and a process that has one has it for ever. So the
session hands each of these files to a child session and shows the reports that it sends.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

import pytest

from tests import ROOT

MARK, REPORTS = "imaginary_gpus", "IMAGINARY_GPUS_REPORTS"
INSIDE = "IMAGINARY_GPUS"
_children: dict[Path, _Child] = {}


def environment() -> dict[str, str]:
    """Of a process that has the imaginary driver."""
    from tests.libcuda.library import FOLDER, driver_folder

    path = os.pathsep.join(filter(None, (str(driver_folder()), os.environ.get("LD_LIBRARY_PATH"))))
    return os.environ | {"LD_LIBRARY_PATH": path, "XDG_CACHE_HOME": str(FOLDER), INSIDE: "1"}


class _Child:
    """The session that runs the tests of one file."""

    def __init__(self, items: list[pytest.Item]) -> None:
        self._reports: dict[str, list[dict[str, Any]]] = defaultdict(list)
        receiving, sending = os.pipe()
        with tempfile.NamedTemporaryFile("w", suffix=".txt", delete=False) as names:
            names.write("\n".join(item.nodeid for item in items))
        self._names, self._output = Path(names.name), tempfile.TemporaryFile("w+")  # noqa: SIM115
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:xdist", "-p", "no:cacheprovider", "-m", ""]
        self.process = subprocess.Popen(
            [*command, f"@{names.name}"], cwd=ROOT, env=environment() | {REPORTS: str(sending)}, pass_fds=(sending,),
            stdout=self._output, stderr=subprocess.STDOUT,
        )  # fmt: skip
        os.close(sending)
        self._lines: TextIO = os.fdopen(receiving)

    def reports(self, item: pytest.Item) -> list[Any]:
        """The reports of one test, when it has ended."""
        mine = self._reports[item.nodeid]
        while not any(report["when"] == "teardown" for report in mine):
            line = self._lines.readline()
            if not line:
                return [_ended(item, self.process.wait(), self._text())]
            report = json.loads(line)
            self._reports[report["nodeid"]].append(report)
        for report in mine:
            if isinstance(report["longrepr"], list):
                report["longrepr"] = tuple(report["longrepr"])  # of a skipped test, which JSON does not keep
        return [item.config.hook.pytest_report_from_serializable(config=item.config, data=data) for data in mine]

    def _text(self) -> str:
        self._output.seek(0)
        return self._output.read()[-20000:]

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        self._names.unlink(missing_ok=True)
        self._output.close()
        self._lines.close()


def _ended(item: pytest.Item, status: int, text: str) -> pytest.TestReport:
    reason = f"the process with the imaginary driver ended with status {status} before this test did\n{text}"
    return pytest.TestReport(item.nodeid, item.location, dict.fromkeys(item.keywords, 1), "failed", reason, "call")


def _wanted(item: pytest.Item) -> bool:
    return item.get_closest_marker(MARK) is not None and INSIDE not in os.environ


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Time is kept by the process that runs a test."""
    for item in filter(_wanted, items):
        item.add_marker(pytest.mark.timeout(0), append=False)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_protocol(item: pytest.Item, nextitem: pytest.Item | None) -> bool | None:
    """Shows the reports of the child session instead of running the test here."""
    if not _wanted(item):
        return None
    if item.path not in _children:
        close_children()
        _children[item.path] = _Child([one for one in item.session.items if one.path == item.path and _wanted(one)])
    item.ihook.pytest_runtest_logstart(nodeid=item.nodeid, location=item.location)
    for report in _children[item.path].reports(item):
        item.ihook.pytest_runtest_logreport(report=report)
    item.ihook.pytest_runtest_logfinish(nodeid=item.nodeid, location=item.location)
    # what the test before this one left open for it (its folder, its module) ends here: nothing was set up for it
    item.session._setupstate.teardown_exact(nextitem)
    return True


def close_children() -> None:
    """Ends the child sessions."""
    for path in list(_children):
        _children.pop(path).close()


def pytest_sessionfinish() -> None:
    """Leaves no process behind."""
    close_children()


@pytest.hookimpl(trylast=True)
def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """In the child session: sends a report."""
    if REPORTS in os.environ and _config is not None:
        data = _config.hook.pytest_report_to_serializable(config=_config, report=report)
        os.write(int(os.environ[REPORTS]), (json.dumps(data) + "\n").encode())


_config: pytest.Config | None = None


def pytest_configure(config: pytest.Config) -> None:
    """In the child session: the driver learns what the kernels are."""
    global _config
    _config = config
    if INSIDE in os.environ:
        from tests.libcuda.machine import know_kernels

        know_kernels()


@pytest.fixture(autouse=True)
def _rules_are_kept(request: pytest.FixtureRequest) -> Iterator[None]:
    """No test on imaginary GPUs ends with a broken rule that it did not look at."""
    yield
    if INSIDE in os.environ and request.node.get_closest_marker(MARK):
        from tests.libcuda.machine import latest

        if latest is not None:
            latest.check()
