"""The imaginary driver against what cuda-python says of the real one."""

# covers: runtime/embed/src/driver_api.h, tests/libcuda/plugin.py
from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests import ROOT
from tests.libcuda.conftest import Cuda
from tests.libcuda.library import DRIVER_API
from tests.libcuda.machine import load
from tests.libcuda.plugin import INSIDE, REPORTS

pytestmark = pytest.mark.imaginary_gpus
HEADER = DRIVER_API.read_text()


def test_status_codes(cuda: Cuda) -> None:
    """Numbers and words are those of the bindings' own table and of the driver."""
    for name, number, text in re.findall(r"X\((CUDA_\w+), (\d+),\s*\"(.*?)\"\)", HEADER):
        status = cuda.api.CUresult(int(number))
        assert status.name == name
        assert cuda("cuGetErrorString", status) == text.encode()
        assert cuda("cuGetErrorName", status) == name.encode()


def test_functions_are_declared_as_in_cuda_python(cuda: Cuda) -> None:
    """Types of parameters, in their order, of every function."""
    declared = Path(cuda.api.__file__).with_name("cydriver.pxd").read_text()
    for name, symbol, parameters in re.findall(r"X\((cu\w+), (cu\w+),\s*\((.*?)\)\)", HEADER, re.DOTALL):
        found = re.search(rf"^cdef CUresult {name}\((.*?)\) except", declared, re.MULTILINE)
        assert found, name
        assert _types(parameters) == _types(found[1]), name
        assert symbol.startswith(name)


def _types(parameters: str) -> list[str]:
    """The types of a list of parameters, with enumerations as the integers that they are."""
    found = []
    for parameter in filter(None, (one.strip() for one in parameters.split(","))):
        kind = re.sub(r"\s*(\w+)$", "", parameter.replace("*", " * ")).replace("const ", "")
        stars, base = kind.count("*"), " ".join(kind.replace("*", " ").split())
        base = {"cuuint64_t": "unsigned long long"}.get(base, base)
        found.append(base + "*" * stars)
    return found


def test_names_that_are_not_there(cuda: Cuda) -> None:
    from cuda.bindings._internal.utils import FunctionNotFoundError

    with pytest.raises(FunctionNotFoundError, match="cuMemAllocManaged"):
        cuda.api.cuMemAllocManaged(8, 1)
    assert load().cuGetExportTable(bytes(8), bytes(16)) == 500


def test_cuda_core_works_on_it(cuda: Cuda) -> None:
    """The object-oriented half of cuda-python, whose code we did not write for it."""
    from cuda.core import Device

    device = Device(1)
    device.set_current()
    stream = device.create_stream()
    stream.sync()
    assert int(cuda("cuCtxGetDevice")) == 1
    stream.close()


# --- the process per file --------------------------------------------------------------------------------------------

BAD = """
import ctypes, os
import pytest
from tests.libcuda.conftest import Cuda
from tests.libcuda.machine import Machine

pytestmark = pytest.mark.imaginary_gpus

def test_good(): Machine(1)
def test_wrong(): assert Machine(1) is None
def test_a_broken_rule_that_nobody_looks_at():
    cuda = Cuda(Machine(1))
    assert cuda.status("cuMemFree", 4096) == "CUDA_ERROR_INVALID_VALUE"
@pytest.mark.skip(reason="not today")
def test_skipped(): pass
def test_skips(): pytest.skip("not here")
def test_ends_the_process(): ctypes.string_at(0)
def test_behind_it(): pass
"""


def test_reports_of_the_process_per_file(monkeypatch: pytest.MonkeyPatch) -> None:
    """What fails there fails here, a broken rule and the end of the process included."""
    for name in (INSIDE, REPORTS):
        monkeypatch.delenv(name, raising=False)
    path = ROOT / "tests" / "libcuda" / "test_written_by_a_test.py"
    path.write_text(BAD)
    try:
        command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-rA", str(path)]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    finally:
        path.unlink()
    ends = dict(reversed(one) for one in re.findall(r"^(PASSED|FAILED|ERROR) \S+::(\w+)", done.stdout, re.MULTILINE))
    assert ends == {
        "test_good": "PASSED", "test_wrong": "FAILED", "test_a_broken_rule_that_nobody_looks_at": "ERROR",
        "test_ends_the_process": "FAILED", "test_behind_it": "FAILED",
    }, done.stdout  # fmt: skip
    assert "nothing of this kind is allocated" in done.stdout
    assert "2 skipped" in done.stdout
    assert "ended with status -11" in done.stdout
