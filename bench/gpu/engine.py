"""The engine on GPUs behind models that are nothing but copies: what is right and what is slow is then its own.

Every image is compared with the same image on the CPU backend.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from bench.gpu.parts import Row, Settings, open_driver
from engines.base import Array, Backend, LaneCall
from engines.cuda.backend import CudaBackend
from engines.cuda.driver import Driver
from engines.cuda.kernels import BYTES
from engines.cuda.memory import Tensor
from engines.cuda.rounds import Enqueue, Stateless
from engines.errors import ParameterError
from engines.host import FunctionLane, HostBackend
from runtime.sampling.execute import denoise
from runtime.sampling.operations import Options
from runtime.sampling.samplers import SAMPLERS, check
from runtime.sampling.schedule import Schedule

STABLE_DIFFUSION = {
    "_class_name": "DDIMScheduler", "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear",
    "clip_sample": False, "set_alpha_to_one": False, "steps_offset": 1, "num_train_timesteps": 1000,
}  # fmt: skip
GUIDANCE = 7.5
SCHEDULERS = ("ddim", "ddpm", "euler", "euler_a", "dpm++2m")
# how far rounding of stored latents may take an image of copies from the one in float32
BOUNDS = {"float32": 1e-4, "float16": 2e-2, "bfloat16": 1.5e-1}
FASTEST: tuple[tuple[str, Options], ...] = (
    ("sequential", Options(k=1)),
    ("conservative", Options(k=4, drafts="corrected")),
    ("aggressive", Options(k=4, drafts="corrected")),
    ("srds", Options(k=4, iterations=1)),
)


def schedule(steps: int, scheduler: str | None = None) -> Schedule:
    """Stable Diffusion's schedule under DDIM, or under another scheduler by name."""
    from runtime.sampling.schedulers import schedule_from_config

    alphas = np.cumprod(1 - np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2)
    return schedule_from_config(STABLE_DIFFUSION, alphas.tolist(), steps, scheduler=scheduler)


def samplers_to_check(plan: Schedule) -> Iterator[tuple[str, Options]]:
    """Every sampler that can play a schedule, with its ways to decide."""
    ways = {
        "sequential": [Options()],
        "srds": [Options(k=4, iterations=1), Options(k=4, tolerance=1e-2), Options(k=4)],
        "adaptive": [Options(k=4, tolerance=0.1)],
    }
    for mode in SAMPLERS:
        for options in ways.get(mode, [Options(k=4), Options(k=4, drafts="corrected")]):
            try:
                check(mode, plan, options)
            except ParameterError:
                continue
            yield mode, options


class CopyNetwork(Stateless):
    """Predicts its input: a model that costs one small copy.

    `routed` (float32 only) makes the first number of every prediction the timestep's, scaled, and the second that of
    its conditioning: then a number that took a wrong way changes the image.
    """

    capturable = True

    def __init__(self, driver: Driver, device: int, *, routed: bool = False) -> None:
        self.driver, self.device, self.routed = driver, device, routed

    def bind(self, inputs: Mapping[str, Tensor], output: Tensor, stream: Any) -> Enqueue:
        """See cuda.Network."""
        source, size = inputs["sample"].pointer, int(np.prod(output.shape)) * BYTES[output.dtype]
        copies = [(output.pointer, source, size)]
        if self.routed:
            words, row = inputs["encoder_hidden_states"], size // output.shape[0]
            stride = int(np.prod(words.shape[1:])) * BYTES[words.dtype]
            for n in range(output.shape[0]):
                copies.append((output.pointer + n * row, inputs["timestep"].pointer + 4 * n, 4))
                copies.append((output.pointer + n * row + 4, words.pointer + n * stride, 4))

        def enqueue() -> None:
            for target, origin, count in copies:
                self.driver("cuMemcpyDtoDAsync", target, origin, count, stream)

        return enqueue


def copied(sample: Array, timestep: Array, conditioning: Mapping[str, Array]) -> Array:
    """`CopyNetwork` on the CPU."""
    return sample


def routed(sample: Array, timestep: Array, conditioning: Mapping[str, Array]) -> Array:
    """The routed `CopyNetwork` on the CPU."""
    result = np.array(sample, np.float32)
    flat = result.reshape(len(sample), -1)
    flat[:, 0] = timestep
    flat[:, 1] = conditioning["encoder_hidden_states"].reshape(len(sample), -1)[:, 0]
    return result


@dataclass
class Image:
    """Latents, what they cost, and the rounds that made them."""

    latents: Array
    rounds: int
    seconds: float
    calls: list[Sequence[LaneCall]]


def make_image(
    backend: Backend, shape: tuple[int, ...], words: Array, mode: str, options: Options, plan: Schedule, seed: int = 1
) -> Image:
    """One image; its seconds are from the first write to the last read. `words` has one row per branch of guidance."""
    noise = np.random.default_rng(seed).standard_normal(shape, np.float32) * np.float32(plan.init_noise_sigma)
    conditioning = [{"encoder_hidden_states": np.repeat(branch[None], shape[0], 0)} for branch in words]
    calls: list[Sequence[LaneCall]] = []
    predict = backend.predict

    def recording(asked: Sequence[LaneCall]) -> None:
        calls.append(asked)
        predict(asked)

    vars(backend)["predict"] = recording
    try:
        start = time.perf_counter()
        latents, counts = denoise(backend, noise, conditioning, plan, mode, options, GUIDANCE, 0, lambda step: None)
        seconds = time.perf_counter() - start
    finally:
        del vars(backend)["predict"]
    return Image(latents, counts.rounds, seconds, calls)


def distance(a: Array, b: Array) -> float:
    """Relative, in float64; infinite for what is not finite."""
    wide = a.astype(np.float64) - b
    return float(np.linalg.norm(wide) / np.linalg.norm(b.astype(np.float64))) if np.isfinite(a).all() else float("inf")


def wrong(found: Array, wanted: Array, bound: float) -> str | None:
    """Why an image is not the one it should be; the two numbers that `routed` sets are large and judged apart."""
    flat, goal = (one.reshape(len(one), -1) for one in (found, wanted))
    for name, part in (("timestep's", slice(0, 1)), ("conditioning's", slice(1, 2)), ("latents'", slice(2, None))):
        off = distance(flat[:, part], goal[:, part])
        if not off <= bound:
            return f"the {name} numbers are {off:.3g} away from the CPU backend's, and {bound:g} is allowed"
    return None


def samplers(settings: Settings) -> Iterator[Row]:
    """Every sampler under every scheduler, by graphs and by streams, on one GPU and on all, in every type."""
    driver = open_driver()
    shape = (2, 4, 9, 7)  # two images, and a size that no load of 16 bytes divides
    words = np.random.default_rng(3).standard_normal((2, 3, 1), np.float32)
    host = HostBackend([FunctionLane(routed)])
    plain = HostBackend([FunctionLane(copied)])
    places = [[0] * lanes for lanes in settings.lanes] + ([list(range(driver.count))] if driver.count > 1 else [])
    for scheduler in SCHEDULERS:
        plan = schedule(settings.steps, scheduler)
        for mode, options in samplers_to_check(plan):
            wanted = make_image(host, shape, words, mode, options, plan)
            row: Row = {
                "scheduler": scheduler, "mode": mode, "drafts": options.drafts, "tolerance": options.tolerance,
                "iterations": options.iterations, "rounds": wanted.rounds, "images": 0, "largest_distance": 0.0,
            }  # fmt: skip
            for places_of_lanes in places:
                for dtype, graphs in (("float32", True), ("float32", False), ("float16", True), ("bfloat16", True)):
                    alike = dtype == "float32"
                    networks = [CopyNetwork(driver, device, routed=alike) for device in places_of_lanes]
                    reference = wanted if alike else make_image(plain, shape, words, mode, options, plan)
                    backend = CudaBackend(driver, networks, dtype, settings.cache, graphs=graphs)
                    for _ in range(2):  # the second one replays graphs
                        found = make_image(backend, shape, words, mode, options, plan)
                        where = f"{mode} with {scheduler} on cuda:{places_of_lanes} in {dtype}, graphs {graphs}"
                        fault = wrong(found.latents, reference.latents, BOUNDS[dtype])
                        row["images"] += 1
                        if alike:
                            off = distance(found.latents, reference.latents)
                            row["largest_distance"] = max(row["largest_distance"], off)
                        assert not fault, f"{where}: {fault}"
                    backend.close()
            yield row
    host.close()
    plain.close()


def overhead(settings: Settings) -> Iterator[Row]:
    """Microseconds per round beside the model, by graphs and by streams, at the latents of SD 1.5 and SDXL."""
    driver, words, plan = open_driver(), np.zeros((2, 1, 1), np.float32), schedule(settings.steps)
    for side in (64, 128):
        shape = (1, 4, side, side)
        host = HostBackend([FunctionLane(copied)])
        wanted = {mode: make_image(host, shape, words, mode, options, plan).latents for mode, options in FASTEST}
        host.close()
        for count in settings.lanes:
            for graphs in (True, False):
                backend = CudaBackend(driver, [CopyNetwork(driver, 0) for _ in range(count)], "float32",
                                      settings.cache, graphs=graphs)  # fmt: skip
                for mode, options in FASTEST:
                    images = [
                        make_image(backend, shape, words, mode, options, plan) for _ in range(settings.repeats + 2)
                    ]
                    seconds, off = (
                        np.median([one.seconds for one in images[2:]]),
                        distance(images[-1].latents, wanted[mode]),
                    )
                    yield {
                        "latent": side, "lanes": count, "graphs": graphs, "mode": mode, "rounds": images[-1].rounds,
                        "us_per_round": float(seconds) / images[-1].rounds * 1e6, "distance_to_cpu": off,
                    }  # fmt: skip
                    assert off < BOUNDS["float32"], f"{mode} on {count} lanes is {off:.3g} away from the CPU backend"
                backend.close()
