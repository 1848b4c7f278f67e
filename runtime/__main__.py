"""`python -m runtime "a large red star" --out image.png`: one prompt, one or more images."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
from PIL import Image
from tqdm import tqdm

from engines.errors import EngineError, ParameterError
from engines.store import BUILD
from runtime.pipeline import MODES, Pipeline
from runtime.provenance import result_file
from runtime.sampling.drafts import DRAFTS
from runtime.sampling.schedulers import SCHEDULERS


def arguments() -> argparse.ArgumentParser:
    """The command line; `Pipeline.generate` has the checks."""
    parser = argparse.ArgumentParser(prog="python -m runtime", description=__doc__)
    parser.add_argument("prompt")
    parser.add_argument("--model", default="shapes", help="an exported model's name, or its bundle folder")
    parser.add_argument("--devices", default="auto", help="auto, cpu, cpu*LANES, cuda:0,cuda:1, cuda:0*LANES")
    parser.add_argument("--mode", default="auto", help=", ".join(MODES))
    parser.add_argument("--k", type=int, help="drafts per round; default: the number of lanes")
    parser.add_argument("--first-blocks", type=int, nargs="+", default=(), help="drafts in the first blocks, if not k")
    parser.add_argument("--drafts", default="auto", help=", ".join(("auto", *DRAFTS)))
    parser.add_argument("--tolerance", type=float, default=0.0, help="of auto, adaptive and srds; 0 is exact")
    parser.add_argument("--blocks", type=int, help="of srds; default: near the root of the number of steps")
    parser.add_argument("--iterations", type=int, help="of srds, at most; default: until it is exact")
    parser.add_argument("--plain", action="store_false", dest="pipelined", help="srds without pipelining")
    parser.add_argument("--eta", type=float, default=0.0, help="of ddim: 0 adds no noise, 1 is ddpm")
    parser.add_argument("--steps", type=int, dest="num_inference_steps", help="default: the model's own")
    parser.add_argument("--guidance", type=float, dest="guidance_scale", help="default: the model's own")
    parser.add_argument("--negative-prompt")
    parser.add_argument("--clip-skip", type=int, help="layers of the text encoder to leave out at its end")
    parser.add_argument("--image", type=Path, help="an image to start from")
    parser.add_argument("--strength", type=float, help="of --image, 0 to 1: the share of the steps that is made")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--scheduler", help=f"{', '.join(SCHEDULERS)}; default: the model's own")
    parser.add_argument("--width", type=int)
    parser.add_argument("--height", type=int)
    parser.add_argument("--num-images-per-prompt", type=int, default=1)
    parser.add_argument("--lanes", type=int, help="how many of the lanes work, all by default; k stays the same")
    parser.add_argument("--latents", type=Path, help=".npy with the initial noise, unit variance")
    parser.add_argument("--save-latents", type=Path, help=".npy for the finished latents")
    parser.add_argument("--out", type=Path, default=Path("image.png"))
    parser.add_argument(
        "--report", type=Path, help="JSON with rounds, evaluations, seconds and the timeline of the lanes"
    )
    parser.add_argument("--build", type=Path, default=BUILD, help="folder of the bundles")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    return parser


def load_latents(path: Path | None) -> np.ndarray | None:
    """The array of an .npy file; ParameterError when it is none."""
    if path is None:
        return None
    try:
        with path.open("rb") as file:
            array = np.load(file, allow_pickle=False)
    except (OSError, ValueError, EOFError, BadZipFile) as error:
        raise ParameterError("latents", f"{path} cannot be read as an .npy array: {error}") from error
    if not isinstance(array, np.ndarray) or array.dtype.kind not in "fiu":
        raise ParameterError("latents", f"{path} cannot be used as latents: save one array of numbers with numpy.save")
    return array


def load_image(path: Path | None) -> Image.Image | None:
    """An image from a file; ParameterError when it is none."""
    if path is None:
        return None
    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except (OSError, ValueError) as error:
        raise ParameterError("image", f"{path} cannot be read as an image: {error}") from error


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
    quiet = options.pop("quiet")
    options["latents"] = load_latents(options["latents"])
    options["image"] = load_image(options["image"])
    pipeline = Pipeline.load(model, devices, build)
    total = options["num_inference_steps"] or pipeline.manifest.defaults.num_inference_steps
    with tqdm(total=total, unit="step", disable=quiet, mininterval=0.05, delay=0.1) as bar:

        def progress(finished: int, steps: int) -> None:
            bar.total = steps
            bar.update(finished - bar.n)

        result = pipeline.generate(**options, progress=progress, timeline=report is not None)
    pipeline.close()
    for path, image in zip(output_paths(out, len(result.images)), result.images, strict=True):
        image.save(path)
        print(path)
    if save_latents:
        np.save(save_latents, result.latents)
    if report:
        report.write_text(json.dumps(result_file([result.report.to_dict()]), indent=1) + "\n")
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
    options = vars(arguments().parse_args())
    try:
        run(options)
    except EngineError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except OSError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
