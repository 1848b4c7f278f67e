"""`python -m runtime.calibrate`: measures, once per model and machine, what mode `auto` chooses by."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from tqdm import tqdm

from engines.base import Array, Half
from engines.errors import EngineError, ParameterError
from engines.store import BUILD, locked
from runtime.auto import EXACT, Calibration, Candidate, Drift, candidates
from runtime.pipeline import Pipeline
from runtime.samplers import STATE

BATCHES = (1, 2, 3, 4, 6, 8, 16)
REPEATS = 7


def measure_calls(pipeline: Pipeline) -> dict[int, float]:
    """Median seconds of a call per batch size, with all lanes at work."""
    pipeline.generate(pipeline.manifest.examples[0], num_inference_steps=1)  # binds an image
    backend, found = pipeline.backend, {}
    for batch in BATCHES:
        calls = [[Half(STATE, 0, f"timed {lane}/{n}", 1) for n in range(batch)] for lane in range(backend.lanes)]
        found[batch] = float(np.median([backend.timed(calls) for _ in range(REPEATS)]))
    return found


def measure_drifts(
    pipeline: Pipeline, steps: int, guidance_scale: float, scheduler: str | None, pictures: int,
    wanted: Sequence[Candidate],
) -> list[Drift]:  # fmt: skip
    """The drift of candidates from `sequential` over the model's example prompts."""
    examples = pipeline.manifest.examples or ("",)
    prompts = [examples[n % len(examples)] for n in range(pictures)]

    def latents(candidate: Candidate) -> Array:
        result = pipeline.generate(
            prompts, num_inference_steps=steps, guidance_scale=guidance_scale, scheduler=scheduler,
            mode=candidate.mode, k=candidate.k, drafts=candidate.drafts,
        )  # fmt: skip
        return result.latents.reshape(pictures, -1)

    reference, found = latents(EXACT), []
    setting = pipeline.setting(scheduler, steps, guidance_scale)
    for candidate in tqdm(wanted, desc=f"drift at {steps} steps", unit="plan", mininterval=0.5):
        distances = np.linalg.norm(latents(candidate) - reference, axis=1) / np.linalg.norm(reference, axis=1)
        p90 = float(np.quantile(distances, 0.9))
        found.append(
            Drift(setting=setting, candidate=candidate, pictures=pictures, median=float(np.median(distances)), p90=p90)
        )
    return found


def calibrate(
    model: str, build: Path, devices: str, steps: Sequence[int], guidance_scale: float, scheduler: str | None,
    pictures: int, *, again: bool,
) -> bool:  # fmt: skip
    """Measures what is missing and stores it; returns whether anything was."""
    if pictures < 1:
        raise ParameterError("pictures", f"pictures must be at least 1, not {pictures}")
    pipeline = Pipeline.load(model, devices, build)
    try:
        path = pipeline.calibration_path
        with locked(path.parent):
            before = known = Calibration() if again else Calibration.read(path)
            if pipeline.calibration_key not in known.calls:
                calls = {**known.calls, pipeline.calibration_key: measure_calls(pipeline)}
                known = known.model_copy(update={"calls": calls})
                known.write(path)
            for count in steps:
                there = {
                    drift.candidate for drift in known.for_setting(pipeline.setting(scheduler, count, guidance_scale))
                }
                missing = [candidate for candidate in candidates() if candidate not in there]
                if missing:
                    found = measure_drifts(pipeline, count, guidance_scale, scheduler, pictures, missing)
                    known = known.model_copy(update={"drifts": (*known.drifts, *found)})
                    known.write(path)
            return known != before
    finally:
        pipeline.close()


def main() -> int:
    """Exit code 1 with one message on any error."""
    parser = argparse.ArgumentParser(prog="python -m runtime.calibrate", description=__doc__)
    parser.add_argument("model", nargs="?", default="shapes")
    parser.add_argument("--build", type=Path, default=BUILD, help="folder of the bundles")
    parser.add_argument("--devices", default="auto")
    parser.add_argument("--steps", type=int, nargs="+", default=[50], help="one or more; auto knows these only")
    parser.add_argument("--guidance", type=float, default=4.0, dest="guidance_scale")
    parser.add_argument("--scheduler", help="default: the model's own")
    parser.add_argument("--pictures", type=int, default=8)
    parser.add_argument("--again", action="store_true", help="forget what was measured before")
    options = vars(parser.parse_args())
    try:
        changed = calibrate(**options)
    except (EngineError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"{options['model']}: {'calibrated' if changed else 'calibration is up to date'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
