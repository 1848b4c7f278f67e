"""`python -m runtime verify REPORT`: makes an image again, sequentially, and says how far the reported one is from it.

The image is first made again as the report says. Where it was made on the same lanes it must come out the same to the
bit, which its hash shows. The floor is how far apart sequential images are that differ only in batching and lanes.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from engines.command import Parser, exit_code
from engines.errors import BundleError, ParameterError
from engines.files import written_whole
from engines.store import BUILD
from runtime.call import OPTIONS, Call
from runtime.certificate import IN_DISTRIBUTION, arguments, array_sha256, model_sha256
from runtime.distances import drift, psnr, ssim
from runtime.input_files import load_image, load_latents
from runtime.pipeline import Pipeline, Result

SAMPLER = (
    "mode",
    "k",
    "drafts",
    "tolerance",
    "blocks",
    "iterations",
    "pipelined",
    "first_blocks",
    "cache_interval",
    "lanes",
)


@dataclass(frozen=True)
class Apart:
    """How far images are from others of the same noise: the largest distance, the lowest PSNR and SSIM."""

    latents: float
    psnr: float
    ssim: float

    @classmethod
    def of(cls, made: Result, reference: Result) -> Apart:
        """Of the images of two calls, one by one."""
        pairs = list(zip(made.images, reference.images, strict=True))
        return cls(
            max(drift(a, b) for a, b in zip(made.latents, reference.latents, strict=True)),
            min(psnr([a], [b]) for a, b in pairs), min(ssim(a, b) for a, b in pairs),
        )  # fmt: skip

    def __str__(self) -> str:
        return f"latents {self.latents:.3g}, PSNR {self.psnr:.1f} dB, SSIM {self.ssim:.5f}"


@dataclass(frozen=True)
class Verified:
    """What was found: `same` says whether the image came out to the bit as it was reported."""

    sameness: str
    same: bool
    placement: tuple[str, str]
    apart: Apart
    floor: Apart

    def __str__(self) -> str:
        reported, here = self.placement
        again = "the same to the bit" if self.same else "not the same to the bit"
        where = "the same lanes" if reported == here else f"other lanes ({here}, not {reported})"
        lines = [f"made again on {where}: {again}", f"class of sameness: {self.sameness}"]
        lines += [
            f"from the sequential image: {self.apart}",
            f"floor, sequential with other lanes and batches: {self.floor}",
        ]
        if self.sameness == IN_DISTRIBUTION:
            lines.append("both are samples of one distribution: the distance says nothing of quality")
        return "\n".join(lines)


def read_report(path: Path) -> dict[str, Any]:
    """The report in a file of `--report`, or in an answer of the server; ParameterError when there is none."""
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ParameterError("report", f"{path} cannot be read as a report: {error}") from error
    rows = content.get("rows") if isinstance(content, dict) else None
    found = rows[0] if isinstance(rows, list) and len(rows) == 1 else content
    found = found.get("report", found) if isinstance(found, dict) else None
    known = isinstance(found, dict) and isinstance(found.get("certificate"), dict) and "model" in found
    if found is None or not known or {"arguments", "inputs", "model_sha256"} - set(found["certificate"]):
        raise ParameterError("report", f"{path} holds no report with a certificate: make one with --report")
    return dict(found)


def call_of(report: dict[str, Any], path: Path, given: dict[str, Any]) -> Call:
    """The reported call; `given` has what a report cannot hold. ParameterError when it is missing or another."""
    certificate = report["certificate"]
    unknown = set(certificate["arguments"]) - set(OPTIONS)
    if unknown:
        raise ParameterError("report", f"{path} is of another version: nothing here is called {min(unknown)}")
    for name, sha256 in certificate["inputs"].items():
        if name not in given:
            how = f"give it with {OPTIONS[name].flag}" if name in ("latents", "image") else "it cannot be verified here"
            raise ParameterError(name, f"{path} was made with {name}, of which it holds the hash alone: {how}")
        if arguments(Call("", **{name: given[name]}))[1][name] != sha256:
            raise ParameterError(name, f"these are not the {name} that {path} was made with")
    return Call(**certificate["arguments"], **{name: given[name] for name in certificate["inputs"]})


def verify(path: Path, devices: str, build: Path, **given: Any) -> Verified:
    """Makes the images of a report again, as it says and sequentially.

    BundleError when its model is not there or has changed since, ParameterError for a report that cannot be used.
    """
    report = read_report(path)
    call = call_of(report, path, {name: value for name, value in given.items() if value is not None})
    certificate, model = report["certificate"], str(report["model"])
    with Pipeline.load(model, devices, build) as pipeline:
        if model_sha256(pipeline.manifest) != certificate["model_sha256"]:
            raise BundleError(
                f"the model {model} has changed since {path} was made, so that nothing can be said of the image: "
                "export the model that made it again, or make the image anew"
            )
        again = replace(call, lanes=min(int(certificate.get("lanes", 1)), len(pipeline.devices)))
        made, sequential = pipeline.run(again), pipeline.run(_sequential(call))
        floor = _floor(pipeline, call, sequential)
        same = array_sha256(made.latents) == certificate["latents_sha256"]
        places = str(certificate["placement"]), pipeline.calibration_key
        return Verified(str(certificate["sameness"]), same, places, Apart.of(made, sequential), floor)


def _sequential(call: Call, **more: Any) -> Call:
    """The same images by the sequential sampler, on all lanes."""
    defaults = {name: OPTIONS[name].default for name in SAMPLER} | {"mode": "sequential"}
    return replace(call, **defaults | more)


def _floor(pipeline: Pipeline, call: Call, reference: Result) -> Apart:
    """The largest distance of sequential images among themselves: on one lane, and with one image more per call."""
    count = len(reference.images)
    more: dict[str, Any] = {"prompt": [*call.prompts(), call.prompts()[-1]]}
    added = call.num_images_per_prompt
    if call.latents is not None:
        more["latents"] = np.concatenate([call.latents, np.repeat(call.latents[-1:], added, 0)])
    if isinstance(call.image, list | tuple):
        more["image"] = [*call.image, call.image[-1]]
    found = [Apart.of(pipeline.run(_sequential(call, lanes=1)), reference)]
    batched = pipeline.run(_sequential(call, **more))
    found.append(Apart.of(replace(batched, images=batched.images[:count], latents=batched.latents[:count]), reference))
    return Apart(max(one.latents for one in found), min(one.psnr for one in found), min(one.ssim for one in found))


def command_line() -> argparse.ArgumentParser:
    """The command line."""
    parser = Parser(prog="python -m runtime verify", description=(__doc__ or "").replace("`", ""))
    parser.add_argument("report", type=Path, help="a file of --report, or an answer of the server")
    parser.add_argument("--devices", default="auto", help="auto, cpu, cpu*LANES, cuda:0,cuda:1, cuda:0*LANES")
    parser.add_argument("--build", type=Path, default=BUILD, help="folder of the bundles")
    parser.add_argument("--latents", type=Path, help="the .npy file that the image was made with")
    parser.add_argument("--image", type=Path, help="the image that it was started from")
    parser.add_argument("--json", type=Path, help="what was found, as JSON")
    return parser


def main(words: Sequence[str]) -> int:
    """Exit code 1 with one message on any error."""
    options = vars(command_line().parse_args(words))

    def run() -> None:
        found = verify(
            options["report"], options["devices"], options["build"], latents=load_latents(options["latents"]),
            image=load_image(options["image"]),
        )  # fmt: skip
        print(found)  # noqa: T201 - a command
        if options["json"]:
            with written_whole(options["json"]) as partial:
                partial.write_text(json.dumps(asdict(found), indent=1) + "\n")

    return exit_code(run)
