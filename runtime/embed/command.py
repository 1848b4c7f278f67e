"""`python -m runtime program MODEL --mode aggressive --out FILE`: writes a sampler as a file for `libdriffusion`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from engines.command import Parser, exit_code
from engines.devices import parse_devices
from engines.errors import ParameterError
from engines.store import BUILD, Bundle
from runtime.call import Call, add_options, flag_meant
from runtime.embed.layout import PREDICT
from runtime.embed.program import program_of, write_program

FIXED = (
    "mode", "k", "first_blocks", "drafts", "tolerance", "blocks", "iterations", "pipelined", "num_inference_steps",
    "guidance_scale", "scheduler", "eta", "clip_skip",
)  # fmt: skip


def arguments() -> argparse.ArgumentParser:
    """The command line; `Call` checks the values."""
    parser = Parser(prog="python -m runtime program", description=(__doc__ or "").replace("`", ""), meant=flag_meant)
    parser.add_argument("model", help="an exported model's name, or its bundle folder")
    parser.add_argument("--out", type=Path, required=True, help="the program file")
    parser.add_argument("--size", help="WIDTHxHEIGHT in pixels; default: the model's own")
    parser.add_argument(
        "--devices", default="auto", help="lanes where the player is told nothing: cpu, cpu*LANES, cuda:0,cuda:1"
    )
    parser.add_argument("--build", type=Path, default=BUILD, help="folder of the bundles")
    add_options(parser, FIXED)
    return parser


def pixels(size: str | None) -> dict[str, int]:
    """Width and height of `--size`."""
    if size is None:
        return {}
    width, by, height = size.partition("x")
    if not (by and width.isdecimal() and height.isdecimal() and len(size) < 16):
        raise ParameterError("size", f"--size must be WIDTHxHEIGHT in pixels, as in 512x384, not {size!r}")
    return {"width": int(width), "height": int(height)}


def run(options: dict[str, Any]) -> None:
    """Writes the file and says what is in it."""
    out, size, model, devices, build = (options.pop(name) for name in ("out", "size", "model", "devices", "build"))
    if not out.resolve().parent.is_dir():
        raise ParameterError("out", f"the folder of {out} does not exist: create it first")
    call = Call("", **options | pixels(size))
    program = program_of(Bundle.open(model, build), parse_devices(devices), call)
    written = write_program(program, out)
    rounds = sum(1 for one in program.operations if one.kind == PREDICT)
    print(f"{out}: {written} bytes, {program.model.steps} steps in {rounds} rounds")  # noqa: T201 - a command


def main(words: Sequence[str]) -> int:
    """Exit code 1 with one message on any error."""
    options = vars(arguments().parse_args(words))
    return exit_code(lambda: run(options))
