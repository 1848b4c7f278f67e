"""The runtime that computes nothing: whole requests at the price of the host's work alone."""

from __future__ import annotations

import numpy as np

from runtime.pipeline import Pipeline


def test_a_request_on_lanes_that_compute_nothing() -> None:
    pipeline = Pipeline.load("shapes", "null*3")
    result = pipeline.generate(
        "a large red star", mode="aggressive", k=3, num_inference_steps=7, num_images_per_prompt=2, width=48, height=32
    )
    pipeline.close()
    assert [image.size for image in result.images] == [(48, 32)] * 2
    assert not result.latents.any() and len(np.unique(np.asarray(result.images[0]))) == 1
    assert result.report.devices == "null/0,null/1,null/2" and result.report.rounds == 3
