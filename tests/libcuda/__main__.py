"""The imaginary driver outside of pytest.

`python -m tests.libcuda -m MODULE ARGUMENT…` runs a module on imaginary GPUs, `--gpus N` of them. The driver keeps
no account of races then, and runs work only where somebody waits. Without a module this prints what gives a shell the
driver: `eval "$(python -m tests.libcuda)"`.
"""

from __future__ import annotations

import argparse
import os
import runpy
import sys

from tests.libcuda.plugin import INSIDE, environment


def run(module: str, arguments: list[str], gpus: int, computes: bool) -> None:
    """A module as the main program of a process that has the driver."""
    from tests.libcuda.machine import Machine, know_kernels

    know_kernels()
    machine = Machine(gpus, eager=0)
    machine.set("races", 0)
    machine.set("computes", computes)
    sys.argv = [module, *arguments]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


def main() -> None:
    """Starts itself again with the driver in the library path, which must be there before a process starts."""
    own, module = sys.argv[1:], []
    if "-m" in own:
        own, module = own[: own.index("-m")], own[own.index("-m") + 1 :]
    parser = argparse.ArgumentParser(prog="python -m tests.libcuda", description=__doc__)
    parser.add_argument("--gpus", type=int, default=8, help="how many GPUs the machine has")
    parser.add_argument("--idle", action="store_true", help="kernels, copies and models do nothing")
    options = parser.parse_args(own)
    if not module:
        for name, value in environment().items():
            if os.environ.get(name) != value:
                print(f"export {name}='{value}'")
    elif INSIDE in os.environ:
        run(module[0], module[1:], options.gpus, not options.idle)
    else:
        os.execve(sys.executable, [sys.executable, "-m", "tests.libcuda", *sys.argv[1:]], environment())


if __name__ == "__main__":
    main()
