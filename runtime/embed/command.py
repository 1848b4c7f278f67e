"""`python -m runtime program MODEL --mode aggressive --out FILE`: writes a sampler as a file for `libdriffusion`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from engines.devices import parse_devices
from engines.errors import EngineError
from engines.store import BUILD, Bundle
from runtime.embed.program import program_of, write_program
from runtime.sampling.drafts import DRAFTS
from runtime.sampling.samplers import SAMPLERS
from runtime.sampling.schedulers import SCHEDULERS


def arguments() -> argparse.ArgumentParser:
    """The command line; options mean what they mean to `python -m runtime`."""
    parser = argparse.ArgumentParser(prog="python -m runtime program", description=(__doc__ or "").replace("`", ""))
    parser.add_argument("model", help="an exported model's name, or its bundle folder")
    parser.add_argument("--mode", required=True, help=", ".join(SAMPLERS))
    parser.add_argument("--steps", type=int, help="default: the model's own")
    parser.add_argument("--k", type=int, help="drafts per round; default: the number of lanes")
    parser.add_argument("--first-blocks", type=int, nargs="+", default=(), help="drafts in the first blocks, if not k")
    parser.add_argument("--drafts", default="auto", help=", ".join(("auto", *DRAFTS)))
    parser.add_argument("--scheduler", help=f"{', '.join(SCHEDULERS)}; default: the model's own")
    parser.add_argument("--eta", type=float, default=0.0, help="of ddim: 0 adds no noise, 1 is ddpm")
    parser.add_argument("--tolerance", type=float, default=0.0, help="refused unless it is 0")
    parser.add_argument("--blocks", type=int, help="of srds; default: near the root of the number of steps")
    parser.add_argument("--iterations", type=int, help="of srds, at most; default: until it is exact")
    parser.add_argument("--plain", action="store_false", dest="pipelined", help="srds without pipelining")
    parser.add_argument("--guidance", type=float, help="where a call names no scale; default: the model's own")
    parser.add_argument("--size", help="WIDTHxHEIGHT in pixels; default: the model's own")
    parser.add_argument("--clip-skip", type=int, default=0, help="layers of the text encoder to leave out at its end")
    parser.add_argument("--devices", default="auto", help="lanes where the player is told nothing: cpu, cpu*LANES")
    parser.add_argument("--build", type=Path, default=BUILD, help="folder of the bundles")
    parser.add_argument("--out", type=Path, required=True, help="the program file")
    return parser


def main(words: Sequence[str]) -> int:
    """Exit code 1 with one message on any error."""
    options = vars(arguments().parse_args(words))
    out, build, model, devices = (options.pop(name) for name in ("out", "build", "model", "devices"))
    try:
        lanes = parse_devices(devices)
        program = program_of(Bundle.open(model, build), lanes, **options)
        size = write_program(program, out)
    except (EngineError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)  # noqa: T201 - this is a command
        return 1
    rounds = sum(1 for one in program.operations if one.kind == 1)
    print(f"{out}: {size} bytes, {program.model.steps} steps in {rounds} rounds")  # noqa: T201
    return 0
