"""`python -m runtime "a large red star" --out image.png`: one prompt, one or more images."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from engines.command import Parser, exit_code
from engines.errors import ParameterError
from engines.files import written_whole
from engines.store import BUILD
from runtime.call import Call, Callbacks, add_options, flag_meant
from runtime.input_files import load_image, load_latents
from runtime.pipeline import Pipeline
from runtime.png_text import png_info
from runtime.provenance import engine_version, result_file


def arguments() -> argparse.ArgumentParser:
    """The command line; `Call` checks the values."""
    parser = Parser(prog="python -m runtime", description=__doc__, meant=flag_meant)
    add_options(parser)
    parser.add_argument("--version", action="version", version=f"driffusion-engine {engine_version()}")
    parser.add_argument("--model", default="shapes", help="an exported model's name, or its bundle folder")
    parser.add_argument("--devices", default="auto", help="auto, cpu, cpu*LANES, cuda:0,cuda:1, cuda:0*LANES")
    parser.add_argument("--save-latents", type=Path, help=".npy for the finished latents")
    parser.add_argument("--out", type=Path, default=Path("image.png"))
    parser.add_argument(
        "--report", type=Path, help="JSON with rounds, evaluations, seconds and the timeline of the lanes"
    )
    parser.add_argument("--build", type=Path, default=BUILD, help="folder of the bundles")
    parser.add_argument("--no-metadata", action="store_true", help="PNG files do not say how they were made")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    return parser


def output_paths(out: Path, count: int) -> list[Path]:
    """`image.png`, or `image-0.png`, `image-1.png`, … for several images."""
    return [out] if count == 1 else [out.with_stem(f"{out.stem}-{n}") for n in range(count)]


def run(options: dict[str, Any]) -> None:
    """Loads, generates, writes."""
    out, report, save_latents = options.pop("out"), options.pop("report"), options.pop("save_latents")
    for path in filter(None, (out, report, save_latents)):
        if not path.resolve().parent.is_dir():
            raise ParameterError("out", f"the folder of {path} does not exist: create it first")
    if out.suffix.lower() not in (".png", ".jpg", ".jpeg", ".webp"):
        raise ParameterError("out", f"{out}: the image's name must end in .png, .jpg or .webp")
    if save_latents and save_latents.suffix != ".npy":
        raise ParameterError("save_latents", f"{save_latents}: the name of the latents must end in .npy")
    model, devices, build = options.pop("model"), options.pop("devices"), options.pop("build")
    quiet, plain = options.pop("quiet"), options.pop("no_metadata") or out.suffix.lower() != ".png"
    latents, image = load_latents(options.pop("latents")), load_image(options.pop("image"))
    call = Call(**options, latents=latents, image=image, timeline=report is not None)
    pipeline = Pipeline.load(model, devices, build)
    with tqdm(unit="step", disable=quiet, mininterval=0.05, delay=0.1) as bar:

        def progress(finished: int, steps: int) -> None:
            bar.total = steps
            bar.update(finished - bar.n)

        result = pipeline.run(call, Callbacks(progress=progress))
    pipeline.close()
    for n, (path, image) in enumerate(zip(output_paths(out, len(result.images)), result.images, strict=True)):
        with written_whole(path) as partial:
            image.save(partial, pnginfo=None if plain else png_info(result.report, n))
        print(path)
    if save_latents:
        with written_whole(save_latents) as partial:
            np.save(partial, result.latents)
    if report:
        with written_whole(report) as partial:
            partial.write_text(json.dumps(result_file([result.report.to_dict()]), indent=1) + "\n")
    done = result.report
    print(
        f"{done.mode}, k={done.k}: {done.steps} steps in {done.rounds} rounds on {done.lanes} lanes, "
        f"{done.seconds['denoise']:.2f} s denoising, {done.seconds['total']:.2f} s in all"
    )


def main() -> int:
    """Exit code 1 with one message on any error."""
    if sys.argv[1:2] == ["program"]:
        from runtime.embed.command import main as write_program

        return write_program(sys.argv[2:])
    if sys.argv[1:2] == ["verify"]:
        from runtime.verify import main as verify

        return verify(sys.argv[2:])
    options = vars(arguments().parse_args())
    return exit_code(lambda: run(options))


if __name__ == "__main__":
    sys.exit(main())
