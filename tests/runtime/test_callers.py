"""A pipeline inside other programs: event loops, threads, interrupts, and arrays of other libraries."""

# covers: runtime/pipeline.py, runtime/option.py

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest

from engines.errors import ParameterError
from engines.store import Bundle
from runtime import Pipeline, Result
from runtime.call import Call
from tests.runtime.test_pipeline import PROMPT, assert_near, draw, same


def test_calls_beside_an_event_loop(pipeline: Pipeline) -> None:
    async def several() -> list[Result]:
        return list(
            await asyncio.gather(*(pipeline.agenerate(PROMPT, num_inference_steps=6, seed=n) for n in range(3)))
        )

    for seed, result in enumerate(asyncio.run(several())):
        assert_near(result.latents, draw(pipeline, seed=seed).latents, 1e-4)


def test_a_cancelled_task_ends_its_call_and_frees_the_lanes(pipeline: Pipeline) -> None:
    rounds: list[int] = []

    def progress(finished: int, steps: int) -> None:
        rounds.append(finished)

    async def cancelled() -> None:
        call = pipeline.agenerate(PROMPT, num_inference_steps=500, mode="sequential", progress=progress)
        task = asyncio.ensure_future(call)
        while not rounds:
            await asyncio.sleep(0.01)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(cancelled())  # its end waits for the thread, which is in its last round
    assert len(rounds) < 400 and len(draw(pipeline).images) == 1


def test_an_interrupted_call_leaves_the_pipeline_usable(pipeline: Pipeline) -> None:
    expected = draw(pipeline, seed=9)

    def interrupt(*now: int) -> None:
        if now[0] == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        draw(pipeline, progress=interrupt)
    assert same(draw(pipeline, seed=9), expected)


def test_arrays_of_other_libraries(pipeline: Pipeline, rng: np.random.Generator) -> None:
    """Through DLPack, without a copy, and back again."""
    import torch

    noise = rng.standard_normal((1, 4, 16, 16), np.float32)
    theirs = torch.from_numpy(noise.copy()).requires_grad_()
    call = Call(PROMPT, latents=theirs)  # type: ignore[arg-type]
    assert call.latents is not None and call.latents.__array_interface__["data"][0] == theirs.data_ptr()
    result = draw(pipeline, latents=theirs)
    assert same(result, draw(pipeline, latents=noise))
    back: Any = torch.utils.dlpack.from_dlpack(result.latents)
    assert back.data_ptr() == result.latents.__array_interface__["data"][0]
    for wrong in (theirs.to(torch.bfloat16), torch.empty(1, 4, 16, 16, device="meta"), "noise", [["a"]], object()):
        with pytest.raises(ParameterError, match="latents") as error:
            draw(pipeline, latents=wrong)
        assert error.value.param == "latents"


def test_two_pipelines_in_one_process(pipeline: Pipeline, shapes: Bundle) -> None:
    with Pipeline(shapes, "cpu*2") as other, ThreadPoolExecutor(2) as pool:
        for seed in range(3):
            a, b = pool.map(lambda one, seed=seed: draw(one, seed=seed), (pipeline, other))
            assert same(a, b)
