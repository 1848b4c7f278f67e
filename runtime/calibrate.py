"""`python -m runtime.calibrate`: measures, once per model and machine, what mode `auto` chooses by."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from tqdm import tqdm

from engines.base import Array, Branch
from engines.command import Parser, exit_code
from engines.errors import ParameterError
from engines.store import BUILD, locked
from runtime.auto import EQUAL_PSNR, EXACT, FEWEST, Calibration, Candidate, Drift, candidates
from runtime.call import Call
from runtime.pipeline import Pipeline
from runtime.sampling.operations import STATE
from runtime.sampling.schedulers import make_schedule

BATCHES = (1, 2, 3, 4, 6, 8, 16)
REPEATS = 7


def measure_calls(pipeline: Pipeline, budget: float) -> dict[int, float]:
    """Median seconds of a call per batch size, with all lanes at work; larger batches only while the budget lasts."""
    pipeline.run(Call(pipeline.manifest.examples[0], num_inference_steps=1))  # binds an image
    backend, started = pipeline.backend, time.monotonic()

    def timed(batch: int) -> float:
        return backend.measurements.timed(
            [[Branch(STATE, 0, f"timed {lane}/{n}", 1) for n in range(batch)] for lane in range(backend.lanes)]
        )

    def left() -> float:
        return budget - (time.monotonic() - started)

    taken: dict[int, list[float]] = {}
    for batch in BATCHES:
        taken[batch] = [timed(batch)]
        if left() < 2 * taken[batch][0]:
            break  # larger ones are taken to cost in proportion
    for _ in range(REPEATS):
        for batch, seconds in taken.items():  # in turns: what else the machine does falls on all of them
            if left() > seconds[0]:
                seconds.append(timed(batch))
    return {batch: float(np.median(seconds[1:] or seconds)) for batch, seconds in taken.items()}


def drift_seconds(pipeline: Pipeline, calls: dict[int, float], steps: int, guidance_scale: float, images: int) -> float:
    """About how long measuring the drifts of all candidates takes: as many sequential evaluations and one more."""
    branches = 2 if guidance_scale > 1 and pipeline.manifest.guidance == "classifier_free" else 1
    per_branch = min(seconds / batch for batch, seconds in calls.items()) / pipeline.backend.lanes
    return (len(candidates()) + 1) * steps * branches * images * per_branch


def distances(
    pipeline: Pipeline, prompts: Sequence[str], steps: int, guidance_scale: float, scheduler: str | None,
    wanted: Sequence[Candidate], seed: int = 0,
) -> Iterator[tuple[Candidate, Array, Array]]:  # fmt: skip
    """How far each candidate's images are from those of `sequential`: relative L2 of the latents, and PSNR in dB."""
    images = len(prompts)

    def made(candidate: Candidate) -> tuple[Array, Array]:
        call = Call(
            list(prompts), num_inference_steps=steps, guidance_scale=guidance_scale, scheduler=scheduler, seed=seed,
            mode=candidate.mode, k=candidate.k, drafts=candidate.drafts,
        )  # fmt: skip
        result = pipeline.run(call)
        pixels = np.stack([np.asarray(image, np.float32) for image in result.images])
        return result.latents.reshape(images, -1), pixels.reshape(images, -1)

    reference, pixels = made(EXACT)
    for candidate in tqdm(wanted, desc=f"drift at {steps} steps", unit="candidate", mininterval=0.5):
        latents, other = made(candidate)
        apart = np.linalg.norm(latents - reference, axis=1) / np.linalg.norm(reference, axis=1)
        yield candidate, apart, psnr(other, pixels)


def calibration_prompts(pipeline: Pipeline, images: int) -> list[str]:
    """The model's examples, again and again."""
    examples = pipeline.manifest.examples or ("",)
    return [examples[n % len(examples)] for n in range(images)]


def measure_drifts(
    pipeline: Pipeline, steps: int, guidance_scale: float, scheduler: str | None, images: int,
    wanted: Sequence[Candidate],
) -> list[Drift]:  # fmt: skip
    """The drift of candidates from `sequential` over the model's example prompts."""
    prompts = calibration_prompts(pipeline, images)
    setting = pipeline.setting(scheduler, steps, guidance_scale)
    return [
        Drift.of(setting, *found) for found in distances(pipeline, prompts, steps, guidance_scale, scheduler, wanted)
    ]


def psnr(pixels: Array, references: Array) -> Array:
    """Peak signal-to-noise ratio in dB of each row, of pixels from 0 to 255; equal rows are `EQUAL_PSNR` apart."""
    error = np.square(pixels - references, dtype=np.float64).mean(axis=1)
    found: Array = np.minimum(EQUAL_PSNR, 10 * np.log10(255**2 / np.maximum(error, 1e-12)))
    return found


def calibrate(
    model: str, build: Path, devices: str, steps: Sequence[int], guidance_scale: float | None, scheduler: str | None,
    images: int, budget: float, *, again: bool,
) -> str:  # fmt: skip
    """Measures what is missing and stores it; returns what was done, in words."""
    if images < FEWEST:
        raise ParameterError("images", f"images must be at least {FEWEST}, not {images}")
    pipeline = Pipeline.load(model, devices, build)
    try:
        path = pipeline.calibration_path
        with locked(path.parent):
            before = known = Calibration() if again else Calibration.read(path)
            if pipeline.calibration_key not in known.calls:
                calls = {**known.calls, pipeline.calibration_key: measure_calls(pipeline, budget)}
                known = known.model_copy(update={"calls": calls})
                known.write(path)
            if not make_schedule(pipeline.manifest, scheduler, 1).draftable:
                return "nothing to choose from: its scheduler's steps are too long to be drafted"
            defaults = pipeline.manifest.defaults
            guidance_scale = defaults.guidance_scale if guidance_scale is None else guidance_scale
            for count in steps or (defaults.num_inference_steps,):
                there = {
                    drift.candidate for drift in known.for_setting(pipeline.setting(scheduler, count, guidance_scale))
                }
                missing = [candidate for candidate in candidates() if candidate not in there]
                needed = drift_seconds(pipeline, known.calls[pipeline.calibration_key], count, guidance_scale, images)
                if missing and needed > budget:
                    return (
                        f"not measured, as it would take about {needed / 60:.0f} minutes; mode auto plays sequential "
                        f"until `python -m runtime.calibrate {model} --devices {devices} --budget inf` has done it"
                    )
                if missing:
                    found = measure_drifts(pipeline, count, guidance_scale, scheduler, images, missing)
                    known = known.model_copy(update={"drifts": (*known.drifts, *found)})
                    known.write(path)
            return "calibrated" if known != before else "calibration is up to date"
    finally:
        pipeline.close()


def main() -> int:
    """Exit code 1 with one message on any error."""
    parser = Parser(prog="python -m runtime.calibrate", description=__doc__)
    parser.add_argument("model", nargs="?", default="shapes")
    parser.add_argument("--build", type=Path, default=BUILD, help="folder of the bundles")
    parser.add_argument("--devices", default="auto")
    parser.add_argument("--steps", type=int, nargs="+", default=(), help="one or more; auto knows these only")
    parser.add_argument("--guidance", type=float, dest="guidance_scale", help="default: the model's own")
    parser.add_argument("--budget", type=float, default=600, help="seconds; what would take longer is left out")
    parser.add_argument("--scheduler", help="default: the model's own")
    parser.add_argument("--images", type=int, default=16, help="how many the drift is measured over")
    parser.add_argument("--again", action="store_true", help="forget what was measured before")
    options = vars(parser.parse_args())
    return exit_code(
        lambda: print(f"{options['model']}: {calibrate(**options)}"),
        "stopped; the model works, but mode auto does not know what was not measured",
    )


if __name__ == "__main__":
    sys.exit(main())
