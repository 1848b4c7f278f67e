"""`Pipeline`: a prompt in, images out. The stages of `run` in order: check, encode, denoise, decode, report."""

from __future__ import annotations

import asyncio
import inspect
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Concatenate, ParamSpec, TypeVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from engines.base import Array, Backend
from engines.cached import check_cache
from engines.choice import lanes_of
from engines.cuda.driver import LANE_TIMEOUT
from engines.devices import LaneSpec, parse_devices, precision
from engines.errors import NonFiniteError, ParameterError
from engines.load import check as check_lanes
from engines.store import BUILD, Bundle
from runtime.auto import (
    Calibration,
    Candidate,
    Choice,
    Setting,
    call_seconds,
    choose,
    rows_per_round,
    seconds_by_lanes,
)  # fmt: skip
from runtime.call import Arguments, Call, Callbacks, CheckedCall, read_arguments
from runtime.certificate import certificate, model_sha256
from runtime.conditioning import Conditioner, Conditioning
from runtime.initial_state import InitialState, initial_noise
from runtime.lane_policy import batch_sizes
from runtime.lanes import Lanes, Lease
from runtime.machine import Machine
from runtime.report import Report, quantiles
from runtime.sampling.drafts import resolve
from runtime.sampling.execute import Counts, denoise
from runtime.sampling.operations import STATE, Options
from runtime.sampling.samplers import check
from runtime.sampling.schedule import Schedule
from runtime.sampling.schedulers import make_schedule, substituted
from runtime.sampling.timeline import Timeline
from runtime.tokenizer import PromptTokenizer

P = ParamSpec("P")
Returned = TypeVar("Returned")
NO_CALLBACKS = Callbacks()


@dataclass(frozen=True)
class Result:
    """The images of one call; `latents` is (images, channels, height, width) float32, as diffusers has them."""

    images: list[Image.Image]
    latents: Array
    report: Report


@dataclass(frozen=True)
class Task:
    """A checked call and what follows from it for a model: sizes in (width, height), the schedule, the sampler.

    sampler_guidance: what guidance means to a sampler, a second pass; 1 where the model takes the scale as an input.
    choice: what mode auto chose. warnings: for the report; later stages add to it.
    """

    call: CheckedCall
    initial: InitialState
    size: tuple[int, int]
    schedule: Schedule
    mode: str
    options: Options
    sampler_guidance: float
    choice: Choice | None
    warnings: list[str]


@dataclass(frozen=True)
class Encoded:
    """What the denoising loop starts from: the state before its first step, and the conditioning of both branches."""

    state: Array
    conditioning: Conditioning


@dataclass(frozen=True)
class Denoised:
    """The finished latents and how they were made.

    began: when the lanes were there, by `time.perf_counter`. devices: the lanes that it had, by name.
    """

    latents: Array
    counts: Counts
    lease: Lease
    devices: tuple[str, ...]
    began: float
    critical_seconds: float | None
    timeline: Timeline | None


def _with_arguments(
    arguments: Callable[P, object],
) -> Callable[[Callable[..., Returned]], Callable[Concatenate[Pipeline, P], Returned]]:
    """Gives a method the keywords of a class, for type checkers, `help`, and completion in editors and notebooks."""

    def decorate(method: Callable[..., Returned]) -> Callable[Concatenate[Pipeline, P], Returned]:
        own, taken = inspect.signature(method), inspect.signature(arguments)
        parameters = [own.parameters["self"], *taken.parameters.values()]
        vars(method)["__signature__"] = own.replace(parameters=parameters)
        return method

    return decorate


class Pipeline:
    """A loaded model. Safe to call from several threads, which share the lanes of its `machine`."""

    def __init__(self, bundle: Bundle, devices: str, lane_timeout: float = LANE_TIMEOUT) -> None:
        lanes = lanes_of(devices, bundle)
        self.manifest = bundle.manifest
        self.machine = Machine(bundle, lanes, lane_timeout)
        self._tokenizer = PromptTokenizer(bundle)
        self._default_k = len(lanes)  # also when some are lost: an image depends on what was asked alone
        self._measured: tuple[str, Callable[[int], float]] | None = None
        self._here = threading.local()
        self._model_sha256 = model_sha256(bundle.manifest)

    @classmethod
    def load(
        cls, model: str, devices: str = "auto", build: Path | str = BUILD, lane_timeout: float = LANE_TIMEOUT
    ) -> Pipeline:
        """Loads an exported and compiled model by name or by bundle folder.

        A lane of a GPU that makes no progress for `lane_timeout` seconds is lost.

        BundleError when it is missing, altered or not compiled for this machine; DeviceError for unknown devices.
        """
        lanes = parse_devices(devices)
        check_lanes(lanes)
        return cls(Bundle.open(model, Path(build), precision(lanes)), devices, lane_timeout)

    def __repr__(self) -> str:
        state = "closed" if self.machine.closed else f"on {', '.join(map(str, self.devices))}"
        return f"<Pipeline {self.manifest.model} ({self.manifest.family}) {state}>"

    def __enter__(self) -> Pipeline:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    # --- the machine, for those who have a pipeline ---------------------------------------------------------------

    @property
    def devices(self) -> tuple[LaneSpec, ...]:
        """The lanes that there are."""
        return self.machine.devices

    @property
    def lost(self) -> tuple[str, ...]:
        """Lanes that stopped working."""
        return self.machine.lost

    @property
    def lanes(self) -> Lanes:
        """Who has which lanes."""
        return self.machine.lanes

    @property
    def backend(self) -> Backend:
        """The lanes, for benchmarks."""
        return self.machine.engines.backend

    def probe(self) -> bool:
        """See Machine.probe."""
        return self.machine.probe()

    def revive(self) -> bool:
        """See Machine.revive."""
        return self.machine.revive()

    def close(self) -> None:
        """Stops the lanes, after the images that are being made, and frees their memory. A second time does nothing."""
        self.machine.close()

    # --- what mode auto knows -------------------------------------------------------------------------------------

    @property
    def calibration_key(self) -> str:
        """The lanes, as measured call times are stored for them."""
        return ",".join(f"{lane}@{lane.threads}" for lane in self.devices)

    @property
    def calibration_path(self) -> Path:
        """Where what mode `auto` knows is stored: beside the plan of the noise predictor that it was measured with."""
        return self.machine.plan_folder / "calibration.json"

    def setting(
        self, scheduler: str | None, num_inference_steps: int, guidance_scale: float, eta: float = 0.0
    ) -> Setting:
        """What drifts are measured for."""
        sizes = self.manifest.sizes
        name = make_schedule(self.manifest, scheduler, num_inference_steps, (sizes.width, sizes.height), eta=eta).name
        scale = guidance_scale + self.manifest.guidance_offset
        return Setting(scheduler=name, eta=eta, steps=num_inference_steps, guidance_scale=scale)

    @property
    def _call_seconds(self) -> Callable[[int], float]:
        """Seconds of a call by its number of branches; in proportion to them where nothing was measured."""
        key = self.calibration_key
        if self._measured is None or self._measured[0] != key:
            known = Calibration.read(self.calibration_path).calls.get(key)
            self._measured = key, call_seconds(known or {1: 1.0})
        return self._measured[1]

    # --- images ---------------------------------------------------------------------------------------------------

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(channels, height, width) of the latent of an image of the default size."""
        return self._latent_shape((self.manifest.sizes.width, self.manifest.sizes.height))

    def _latent_shape(self, size: tuple[int, int]) -> tuple[int, int, int]:
        factor = self.manifest.vae_scale_factor
        return self.manifest.latent_channels, size[1] // factor, size[0] // factor

    @_with_arguments(Arguments)
    def generate(self, *prompt: Any, **options: Any) -> Result:
        """Makes images. Arguments that diffusers also has mean what they mean there, and default to what they do in
        the model's own pipeline. `runtime.call` says what each of them is; `run` is the same for a `Call`.

        Latents come back as the model sees them, so that of the Euler schedulers those before the last step are
        diffusers' divided by √(1 + σ²).

        ParameterError for arguments that cannot be used, NonFiniteError when a model's output is not finite.
        """
        return self.run(*read_arguments(*prompt, **options))

    @_with_arguments(Arguments)
    async def agenerate(self, *prompt: Any, **options: Any) -> Result:
        """`generate` beside an event loop. Cancelling the task cancels the call before its next round."""
        call, callbacks = read_arguments(*prompt, **options)
        left = threading.Event()

        def before_round() -> None:
            if left.is_set():
                raise asyncio.CancelledError
            callbacks.before_round()

        try:
            return await asyncio.to_thread(self.run, call, replace(callbacks, before_round=before_round))
        except asyncio.CancelledError:
            left.set()
            raise

    def run(self, call: Call, callbacks: Callbacks = NO_CALLBACKS) -> Result:
        """Makes the images of a call: check, encode, denoise, decode, report. Errors as of `generate`."""
        task = self.check(call)
        started = time.perf_counter()
        encoded = self._encode(task)
        ready = time.perf_counter()
        denoised = self._denoise(task, encoded, callbacks)
        finished = time.perf_counter()
        images = self.machine.beside_lanes(lambda: self._decode(denoised.latents), task.warnings)
        ended = time.perf_counter()
        seconds = {
            "text": ready - started, "wait": denoised.began - ready, "denoise": finished - denoised.began,
            "decode": ended - finished, "total": ended - started,
        }  # fmt: skip
        return Result(images, denoised.latents, self._report(task, denoised, seconds))

    def program(self, path: Path | str, **options: Any) -> None:
        """Writes a sampler as a file that `libdriffusion` plays without Python (`runtime/embed/README.md`).

        Options are those of `generate` that shape a sampler; prompt, seed and the like are parameters of each call.
        ParameterError for what cannot be played, such as a sampler that decides by what it measures.
        """
        call, callbacks = read_arguments("", **options)
        if callbacks != NO_CALLBACKS:
            raise ParameterError("progress", "callbacks belong to a call, no program holds them: leave them out")
        from runtime.embed.program import program_of, write_program  # late: servers start sooner without

        write_program(program_of(self.machine.bundle, self.devices, call), Path(path))

    def check(self, call: Call) -> Task:
        """What a call means for this model; ParameterError names the first argument that it cannot use."""
        manifest, checked = self.manifest, call.checked(self.manifest, len(self.devices), self._default_k)
        initial = InitialState.of(manifest, checked.image, checked.strength)
        size = initial.size(manifest, checked.width, checked.height)
        steps = checked.num_inference_steps
        first = initial.first_step(steps)
        schedule = make_schedule(manifest, checked.scheduler, steps, size, eta=checked.eta, first=first)
        guided = manifest.guidance == "classifier_free"
        mode, choice, options = checked.mode, None, Options(
            checked.k, resolve(checked.drafts), checked.tolerance or 0.0, checked.blocks, checked.pipelined,
            checked.iterations, tuple(checked.first_blocks), checked.cache_interval,
        )  # fmt: skip
        warnings = [substitute] if (substitute := substituted(manifest, checked.scheduler)) else []
        if mode == "auto":
            scale = checked.guidance_scale + manifest.guidance_offset
            setting = Setting(scheduler=schedule.name, eta=checked.eta, steps=steps, guidance_scale=scale)
            choice, notes = choose(
                Calibration.read(self.calibration_path), self.calibration_key, len(self.devices), schedule, setting,
                checked.tolerance, checked.images, guided=guided,
            )  # fmt: skip
            warnings += notes
            mode, options = choice.candidate.mode, choice.candidate.options
        check(mode, schedule, options)
        check_cache(options.cache_interval, manifest, self.devices[0].runtime)
        sampler_guidance = checked.guidance_scale + manifest.guidance_offset if guided else 1.0
        return Task(checked, initial, size, schedule, mode, options, sampler_guidance, choice, warnings)

    def _encode(self, task: Task) -> Encoded:
        """Texts to conditioning; noise, or an image with noise, to the state before the first step."""
        call = task.call

        def run() -> tuple[Encoded, list[str]]:
            runners = self.machine.runners
            conditioner = Conditioner(self.manifest, self._tokenizer, runners["text_encoder"])
            conditioning, cut = conditioner(call, task.size)
            noise = initial_noise(call.seed, call.images, self._latent_shape(task.size), call.latents)
            state = task.initial.draw(task.schedule, noise, call.seed, task.size, runners.get("vae_encoder"))
            return Encoded(state, conditioning), cut

        encoded, cut = self.machine.beside_lanes(run, task.warnings)
        task.warnings.extend(cut)
        return encoded

    def _denoise(self, task: Task, encoded: Encoded, callbacks: Callbacks) -> Denoised:
        """The denoising loop, on lanes that other calls may want, too."""
        notify = self._notifier(callbacks, task.schedule)

        seconds = seconds_by_lanes(
            task.mode, task.options, task.schedule, task.sampler_guidance, task.call.lanes, self._call_seconds,
            task.call.images,
        )  # fmt: skip

        def on_lanes(lease: Lease) -> Denoised:
            began, self._here.backend, backend = time.perf_counter(), lease.backend, lease.backend
            before = backend.measurements.critical_path_seconds
            timeline = Timeline(backend) if task.call.timeline else None
            latents, counts = denoise(
                backend, encoded.state, encoded.conditioning, task.schedule, task.mode, task.options,
                task.sampler_guidance, task.call.seed, notify, play=lease.play, timeline=timeline,
            )  # fmt: skip
            after = backend.measurements.critical_path_seconds
            critical = None if before is None or after is None else after - before
            devices = tuple(str(self.devices[lane]) for lane in sorted(lease.used))
            return Denoised(latents, counts, lease, devices, began, critical, timeline)

        rows = rows_per_round(task.mode, task.options, task.schedule, task.sampler_guidance, task.call.images)
        return self.machine.on_lanes(
            on_lanes, seconds, callbacks.before_round, task.call.lanes, task.warnings, rows,
            batch_sizes(self._call_seconds), task.call.priority,
        )  # fmt: skip

    def _notifier(self, callbacks: Callbacks, schedule: Schedule) -> Callable[[int], None]:
        def notify(finished: int) -> None:
            if callbacks.progress is not None:
                callbacks.progress(finished, schedule.steps)
            if callbacks.callback_on_step_end is None:
                return
            latents = self._here.backend.read(STATE)
            timestep = schedule.timesteps[finished - 1]
            callbacks.callback_on_step_end(self, finished - 1, timestep, {"latents": latents})

        return notify

    def preview(self) -> list[Image.Image]:
        """The image so far, for `progress`: the noisy latents as the VAE decoder sees them."""
        return self._decode(self._here.backend.read(STATE))

    def _decode(self, latents: Array) -> list[Image.Image]:
        """Latents to images by the VAE decoder."""
        if not np.isfinite(latents).all():
            raise NonFiniteError("the denoised latents hold NaN or infinity: no image can be made of them")
        pixels = self.machine.runners["vae_decoder"].run(latent_sample=latents)["sample"]
        if not np.isfinite(pixels).all():
            raise NonFiniteError("the VAE decoder gave NaN or infinity: no image can be made of it")
        return [Image.fromarray(image) for image in to_uint8(pixels)]

    def _report(self, task: Task, denoised: Denoised, seconds: dict[str, float]) -> Report:
        """What the stages did, in the caller's terms."""
        call, counts, lease, critical = task.call, denoised.counts, denoised.lease, denoised.critical_seconds
        beside = None if critical is None else (seconds["denoise"] - critical) / counts.rounds * 1e6
        return Report(
            model=self.manifest.model, mode=task.mode, scheduler=task.schedule.name, steps=task.schedule.steps,
            k=task.options.k, first_blocks=task.options.first_blocks, cache_interval=task.options.cache_interval,
            drafts=task.options.drafts, seed=call.seed,
            lanes=len(denoised.devices), devices=",".join(denoised.devices), guidance_scale=call.guidance_scale,
            guidance_split=len(denoised.devices) > 1 and task.sampler_guidance > 1,
            images=call.images, width=task.size[0], height=task.size[1],
            rounds=counts.rounds, evaluations=counts.evaluations, calls=counts.calls,
            lanes_per_round=round(lease.lane_rounds / lease.rounds, 3),
            shared_rounds=lease.player.shared_rounds if lease.player else 0, seconds=seconds, critical_seconds=critical,
            overhead_us_per_round=beside, accepted=_accepted(task.mode, counts),
            staged=tuple(f"cuda:{of}→cuda:{to}" for of, to in lease.backend.measurements.staged),
            auto=task.choice.model_dump(mode="json") if task.choice else None,
            timeline=tuple(denoised.timeline.spans) if denoised.timeline else None, warnings=tuple(task.warnings),
            certificate=certificate(
                call, self._model_sha256, self.manifest.precision, self.machine.plan_folder.name, self.calibration_key,
                task.mode, task.options, len(denoised.devices), denoised.latents, self._known_drift(task, counts),
                task.size,
            ),
        )  # fmt: skip

    def _known_drift(self, task: Task, counts: Counts) -> dict[str, float] | None:
        """What is known of the distance from the sequential image: by calibration, or of this image's own drafts."""
        if task.choice:
            return {"drift_bound": task.choice.drift_bound, "psnr_bound": task.choice.psnr_bound}
        if task.mode in ("conservative", "aggressive"):
            setting = Setting(scheduler=task.schedule.name, eta=task.call.eta, steps=task.call.num_inference_steps,
                              guidance_scale=task.call.guidance_scale)  # fmt: skip
            played = Candidate(mode=task.mode, k=task.options.k, drafts=task.options.drafts)
            for one in Calibration.read(self.calibration_path).for_setting(setting):
                if one.candidate == played and not task.options.first_blocks and task.options.cache_interval == 1:
                    found = {"drift_median": one.median, "drift_bound": one.bound, "psnr_bound": one.psnr_bound}
                    return {"calibration_images": one.images} | found
        if not counts.accepted or task.mode == "speculative":
            return None
        accepted = quantiles(counts.accepted) or {}
        return {"tolerance": task.options.tolerance} | {f"accepted_{name}": value for name, value in accepted.items()}


def _accepted(mode: str, counts: Counts) -> dict[str, float] | None:
    """Quantiles of what was measured of accepted drafts; of a sampler that keeps drafts by chance, how many, too."""
    found = quantiles(counts.accepted)
    if mode != "speculative":
        return found
    return {"drafts": counts.evaluations - counts.rounds, "kept": len(counts.accepted)} | (found or {})


def to_uint8(pixels: Array) -> NDArray[np.uint8]:
    """(n, 3, h, w) in [−1, 1] to (n, h, w, 3) in 0 … 255, rounded as diffusers rounds."""
    scaled = (pixels / 2 + 0.5).clip(0, 1).transpose(0, 2, 3, 1)
    return (scaled * 255).round().astype(np.uint8)
