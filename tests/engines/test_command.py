"""How commands end."""

from __future__ import annotations

import subprocess
import sys

import pytest

from engines.command import exit_code
from engines.errors import DeviceError, EngineError
from tests import ROOT


def raising(error: BaseException) -> None:
    raise error


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (DeviceError("no such device: use cpu"), 1, "error: no such device: use cpu\n"),
        (EngineError("a.png cannot be written"), 1, "error: a.png cannot be written\n"),
        (FileNotFoundError(2, "No such file", "x"), 1, "error: [Errno 2] No such file: 'x'\n"),
        (
            MemoryError(),
            1,
            "error: there is not enough memory: close other programs, use fewer lanes, or a smaller size\n",
        ),
        (
            ImportError("x.so: failed to map segment from shared object"),
            1,
            "error: there is not enough memory: close other programs, use fewer lanes, or a smaller size\n",
        ),
        (KeyboardInterrupt(), 130, "stopped\n"),
    ],
)
def test_one_line_and_a_code(error: BaseException, code: int, line: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_code(lambda: raising(error)) == code
    assert capsys.readouterr().err == line


def test_our_own_mistakes_keep_their_traceback() -> None:
    with pytest.raises(ZeroDivisionError):
        exit_code(lambda: raising(ZeroDivisionError()))
    with pytest.raises(ImportError):
        exit_code(lambda: raising(ImportError("no module")))


def test_codes_of_the_command_itself() -> None:
    assert exit_code(lambda: None) == 0
    assert exit_code(lambda: 3) == 3


def test_too_little_memory_is_one_line() -> None:
    """Latents of 1024 images of 64 channels do not fit; a limit as `ulimit -v` sets it."""
    code = (
        "import resource, sys; resource.setrlimit(resource.RLIMIT_AS, (2 << 30, 2 << 30))\n"
        "import numpy as np\n"
        "from engines.command import exit_code\n"
        "sys.exit(exit_code(lambda: np.ones(1 << 30, np.float64) and None))"
    )
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (
        run.returncode == 1
        and run.stderr.startswith("error: there is not enough memory")
        and "\n" not in run.stderr[:-1]
    )


@pytest.mark.parametrize("spare", [2, 8, 20, 40, 60])
def test_a_model_that_does_not_fit_is_one_line(spare: int) -> None:
    """So many MiB are left when it is loaded: reading it fails, or the runtime is not asked."""
    code = (
        "import resource, sys, numpy.random, onnxruntime, tokenizers\n"
        "from engines.command import exit_code\n"
        "from runtime.pipeline import Pipeline\n"
        "used = int(open('/proc/self/statm').read().split()[0]) * resource.getpagesize()\n"
        f"resource.setrlimit(resource.RLIMIT_AS, (used + ({spare} << 20),) * 2)\n"
        "sys.exit(exit_code(lambda: Pipeline.load('shapes', 'cpu*2') and None))"
    )
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 1, run.stderr
    assert run.stderr.splitlines()[-1].startswith("error: there is not enough memory")
    assert "Traceback" not in run.stderr


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["runtime", "a star", "--sed", "3"], "there is no option --sed: did you mean --seed?"),
        (
            ["runtime", "a star", "--num-inference-steps=3"],
            "there is no option --num-inference-steps: did you mean --steps?",
        ),
        (["runtime", "a star", "--cfg-scale", "3"], "there is no option --cfg-scale: did you mean --guidance?"),
        (["runtime", "a star", "--zzz"], "there is no option --zzz\n"),
        (["runtime", "a", "star"], "what is 'star'? write a prompt of several words in quotes"),
        (["runtime.serve", "--divices", "cpu"], "there is no option --divices: did you mean --devices?"),
        (["engines", "build", "--divice", "cpu"], "there is no option --divice: did you mean --devices?"),
        (["bench", "run", "--step", "3", "--imagse", "3"], "there is no option --imagse: did you mean --images?"),
        (["export", "shapes", "--sides", "64"], "there is no option --sides: did you mean --sizes?"),
    ],
)
def test_misspelt_options_get_a_suggestion(words: list[str], said: str) -> None:
    run = subprocess.run([sys.executable, "-m", *words], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 2 and said in run.stderr
