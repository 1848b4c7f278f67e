"""What a request costs before it is made, for the number of replicas that the accepted ones want."""

from __future__ import annotations

from runtime.auto import Calibration, call_seconds, seconds_by_lanes
from runtime.call import Call
from runtime.pipeline import Pipeline


def device_seconds(pipeline: Pipeline, call: Call) -> float | None:
    """What the model calls of a request take on one device, by measured times; None where nothing was measured.

    The steps, the rounds of its mode, its guidance and its images count. Larger images take longer in proportion to
    their pixels, which is a guess. Errors as of `Pipeline.check`.
    """
    measured = Calibration.read(pipeline.calibration_path).calls.get(pipeline.calibration_key)
    if measured is None:
        return None
    task, sizes = pipeline.check(call), pipeline.manifest.sizes
    seconds = seconds_by_lanes(
        task.mode, task.options, task.schedule, task.sampler_guidance, 1, call_seconds(measured), task.call.images
    )
    return seconds[0] * (task.size[0] * task.size[1]) / (sizes.width * sizes.height)
