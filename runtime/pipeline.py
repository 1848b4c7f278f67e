"""`Pipeline`: a prompt in, images out. The stages in order: text, start, denoising loop, VAE decoder."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from engines.base import Array, Backend, Branch
from engines.devices import parse_devices, precision
from engines.errors import DeviceError, EngineError, NonFiniteError, ParameterError
from engines.load import check as check_lanes
from engines.load import load
from engines.store import BUILD, Bundle
from runtime.auto import Calibration, Choice, Setting, call_seconds, choose, played_seconds
from runtime.conditioning import Conditioner, Conditioning, Texts
from runtime.initial_state import Start, initial_noise
from runtime.lanes import Lanes
from runtime.report import Report, quantiles
from runtime.sampling.drafts import DRAFTS, resolve
from runtime.sampling.execute import denoise
from runtime.sampling.operations import STATE, Options
from runtime.sampling.samplers import SAMPLERS, check
from runtime.sampling.schedule import Schedule
from runtime.sampling.schedulers import make_schedule, substituted
from runtime.sampling.timeline import Timeline
from runtime.tokenizer import PromptTokenizer

log = logging.getLogger(__name__)

MODES = ("auto", *SAMPLERS)
MAX_SEED = 2**64 - 1
Made = TypeVar("Made")
StepCallback = Callable[["Pipeline", int, float, dict[str, Any]], object]


@dataclass(frozen=True)
class Result:
    """The images of one call; `latents` is (images, channels, height, width) float32, as diffusers has them."""

    images: list[Image.Image]
    latents: Array
    report: Report


class Pipeline:
    """A loaded model on a set of lanes. Safe to call from several threads, which share the lanes (`runtime.lanes`).

    A lane that stops working is left out from then on, and named in `lost`; its image is made again on the others.
    `revive` tries it again.
    """

    def __init__(self, bundle: Bundle, devices: str) -> None:
        self._wanted_devices = self.devices = parse_devices(devices)
        self.lost: tuple[str, ...] = ()
        self._bundle = bundle
        self.manifest = bundle.manifest
        self._tokenizer = PromptTokenizer(bundle)
        self._open()
        self.lanes = Lanes(len(self.devices), self._desk)
        self._default_k = len(self.devices)  # also when some are lost: an image depends on what was asked alone
        self._repairing = threading.Lock()
        self._round_inputs: tuple[Array, Conditioning] | None = None  # of the last image, for `probe`
        self._here = threading.local()

    @classmethod
    def load(cls, model: str, devices: str = "auto", build: Path = BUILD) -> Pipeline:
        """Loads an exported and compiled model by name or by bundle folder.

        BundleError when it is missing, altered or not compiled for this machine; DeviceError for unknown devices.
        """
        lanes = parse_devices(devices)
        check_lanes(lanes)
        return cls(Bundle.open(model, build, precision(lanes)), devices)

    def _open(self) -> None:
        """Loads the networks on the lanes that there are."""
        self._engines = load(self._bundle, self.devices)
        self._conditioner = Conditioner(self.manifest, self._tokenizer, self._engines.runners["text_encoder"])
        self._prober: Backend | None = None
        self._call_seconds = self._measured()

    @property
    def calibration_key(self) -> str:
        """The lanes, as measured call times are stored for them."""
        return ",".join(f"{lane}@{lane.threads}" for lane in self.devices)

    @property
    def backend(self) -> Backend:
        """The lanes, for benchmarks."""
        return self._engines.backend

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(channels, height, width) of the latent of an image of the default size."""
        return self._latent_shape((self.manifest.sizes.width, self.manifest.sizes.height))

    def _latent_shape(self, size: tuple[int, int]) -> tuple[int, int, int]:
        factor = self.manifest.vae_scale_factor
        return self.manifest.latent_channels, size[1] // factor, size[0] // factor

    @property
    def calibration_path(self) -> Path:
        """Where what mode `auto` knows is stored: beside the plan of the noise predictor that it was measured with."""
        return self._engines.plan_folder / "calibration.json"

    def setting(
        self, scheduler: str | None, num_inference_steps: int, guidance_scale: float, eta: float = 0.0
    ) -> Setting:
        """What drifts are measured for."""
        sizes = self.manifest.sizes
        name = make_schedule(self.manifest, scheduler, num_inference_steps, (sizes.width, sizes.height), eta=eta).name
        return Setting(scheduler=name, eta=eta, steps=num_inference_steps, guidance_scale=guidance_scale)

    def close(self) -> None:
        """Stops the lanes, after the images that are being made."""
        with self.lanes.alone(wait=True):
            self._engines.close()

    def generate(
        self,
        prompt: str | Sequence[str] | None = None,
        *,
        negative_prompt: str | None = None,
        mode: str = "auto",
        k: int | None = None,
        drafts: str = "auto",
        tolerance: float = 0.0,
        blocks: int | None = None,
        iterations: int | None = None,
        first_blocks: Sequence[int] = (),
        pipelined: bool = True,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        seed: int = 0,
        scheduler: str | None = None,
        eta: float = 0.0,
        width: int | None = None,
        height: int | None = None,
        num_images_per_prompt: int = 1,
        lanes: int | None = None,
        latents: Array | None = None,
        image: Image.Image | Sequence[Image.Image] | None = None,
        strength: float | None = None,
        prompt_embeds: Array | None = None,
        negative_prompt_embeds: Array | None = None,
        pooled_prompt_embeds: Array | None = None,
        negative_pooled_prompt_embeds: Array | None = None,
        clip_skip: int | None = None,
        callback_on_step_end: StepCallback | None = None,
        progress: Callable[[int, int], None] | None = None,
        timeline: bool = False,
        before_round: Callable[[], None] = lambda: None,
    ) -> Result:
        """Makes images. Arguments that diffusers also has mean what they mean there, and default to what they do in
        the model's own pipeline.

        mode: a key of `samplers.SAMPLERS`, or `auto`: the fastest of them whose measured drift is within `tolerance`.
        k, first_blocks, drafts, tolerance, blocks, iterations, pipelined: `samplers.Options`; k is by default the
        number of lanes that were loaded, however many of them are free.
        seed: 0 … 2⁶⁴−1; image i of a call draws its noise from (seed, i, step).
        width, height: `manifest.sizes` says which; with `image`, by default those of the image.
        lanes: how many of the lanes work on this call, all by default. It changes neither k nor what `auto` chooses, so
        that the image is the same to rounding.
        latents: initial noise of unit variance, (images, channels, height/f, width/f). prompt_embeds: (prompts, tokens,
        width), in place of `prompt`, with pooled_prompt_embeds where the model has them. Latents come back as the model
        sees them, so that of the Euler schedulers those before the last step are diffusers' divided by √(1 + σ²).
        image: starts from an image, or one per prompt, instead of from noise; the last `strength` of the steps are
        made, on the image with the noise that belongs there.
        callback_on_step_end(pipeline, step, timestep, {"latents": …}) is called whenever further steps are finished,
        after each block in the parallel modes; it may look, and raise to cancel, but not change the latents. `srds`
        shows its latest guess at the finished latents. With a tolerance, `adaptive` and `srds` make images one by one,
        so that none depends on its neighbours, and the steps begin anew with each.

        progress(finished, steps) is called at the same times with numbers of steps, costs nothing, and may raise to
        cancel; while it runs, `preview` shows the image so far. before_round() is called before every round and while
        the image waits for lanes, and may raise to cancel.

        timeline: whether the report says what each lane did when.

        ParameterError for arguments that cannot be used, NonFiniteError when a model's output is not finite.
        """
        _check_choice("mode", mode, MODES)
        _check_choice("drafts", drafts, ("auto", *DRAFTS))
        given = {
            "k": k,
            "blocks": blocks,
            "iterations": iterations,
            "first_blocks": first_blocks or None,
            "drafts": None if drafts == "auto" else drafts,
        }
        for name, value in given.items():
            if mode == "auto" and value is not None:
                raise ParameterError(name, f"mode auto chooses {name} itself: name a mode to set it")
        manifest = self.manifest
        defaults = manifest.defaults
        trained = int(manifest.scheduler.get("num_train_timesteps", 1000))
        num_inference_steps = defaults.num_inference_steps if num_inference_steps is None else num_inference_steps
        guidance_scale = defaults.guidance_scale if guidance_scale is None else guidance_scale
        _check_whole("num_inference_steps", num_inference_steps, 1, trained)
        _check_whole("num_images_per_prompt", num_images_per_prompt, 1, 64)
        seed = _check_whole("seed", seed, 0, MAX_SEED)
        k = self._default_k if k is None else _check_whole("k", k, 1, 1000)
        lanes = len(self.devices) if lanes is None else _check_whole("lanes", lanes, 1, len(self.devices))
        for name, number, low in (
            ("guidance_scale", guidance_scale, -np.inf), ("tolerance", tolerance, 0.0), ("eta", eta, 0.0),
        ):  # fmt: skip
            if (
                isinstance(number, bool)
                or not isinstance(number, int | float)
                or not np.isfinite(number)
                or number < low
            ):
                least = " of at least 0" if low == 0 else ""
                raise ParameterError(name, f"{name} must be a finite number{least}, not {number!r}")
        for name, count in (("blocks", blocks), ("iterations", iterations)):
            if count is not None:
                _check_whole(name, count, 1, num_inference_steps)
        texts = Texts(
            prompt, negative_prompt, prompt_embeds, negative_prompt_embeds, pooled_prompt_embeds,
            negative_pooled_prompt_embeds, clip_skip,
        )  # fmt: skip
        start = Start.of(manifest, image, strength)
        size = start.size(manifest, width, height)
        first = start.first_step(num_inference_steps)
        schedule = make_schedule(manifest, scheduler, num_inference_steps, size, eta=eta, first=first)
        # a second pass is what guidance means to a sampler: a model that is told the scale, or knows none, needs none
        passes = float(guidance_scale) if manifest.guidance == "classifier_free" else 1.0
        options = Options(k, resolve(drafts), float(tolerance), blocks, pipelined, iterations, tuple(first_blocks))
        choice: Choice | None = None
        warnings = [substitute] if (substitute := substituted(manifest, scheduler)) else []
        if mode == "auto":
            setting = Setting(
                scheduler=schedule.name, eta=eta, steps=num_inference_steps, guidance_scale=guidance_scale
            )
            known, count = Calibration.read(self.calibration_path), num_images_per_prompt * texts.count
            guided = manifest.guidance == "classifier_free"
            choice, said = choose(
                known, self.calibration_key, len(self.devices), schedule, setting, tolerance, count, guided=guided
            )
            warnings += said
            mode, options = choice.candidate.mode, choice.candidate.options
        check(mode, schedule, options)
        started = time.perf_counter()
        images = texts.count * num_images_per_prompt

        def encode() -> tuple[Conditioning, Sequence[str], Array]:
            conditioning, cut = self._conditioner(texts, float(guidance_scale), size, num_images_per_prompt)
            noise = initial_noise(seed, images, self._latent_shape(size), latents)
            return conditioning, cut, start.state(schedule, noise, seed, size, self._engines.runners.get("vae_encoder"))

        conditioning, cut, state = self._beside_lanes(encode, warnings)
        encoded = time.perf_counter()
        notify = self._notifier(callback_on_step_end, progress, schedule)

        @cache
        def seconds(number: int) -> float:
            return played_seconds(mode, options, schedule, number, passes, self._call_seconds, images)

        again = False
        while True:
            try:
                with self.lanes.seat(seconds, before_round, first=again, most=lanes) as seat:
                    seated = time.perf_counter()
                    self._here.seat, before = seat, seat.critical_path_seconds
                    recorded = Timeline(seat, lambda: seat.dealt) if timeline else None
                    finished, counts = denoise(
                        seat, state, conditioning, schedule, mode, options, passes, seed, notify, timeline=recorded
                    )
                    after = seat.critical_path_seconds
                break
            except DeviceError as error:
                again = True
                warnings.append(self._without_dead_lanes(error, seat, seat.generation))
        self._round_inputs = state[:1], [{name: value[:1] for name, value in branch.items()} for branch in conditioning]
        critical = None if before is None or after is None else after - before
        denoised = time.perf_counter()
        decoded = self._beside_lanes(lambda: self._decode(finished), warnings)
        ended = time.perf_counter()
        working = self.devices[:lanes]
        report = Report(
            model=self.manifest.model, mode=mode, scheduler=schedule.name, steps=schedule.steps, k=options.k,
            first_blocks=options.first_blocks,
            lanes=len(working), devices=",".join(map(str, working)), guidance_scale=float(guidance_scale),
            guidance_split=passes > 1 and len(working) > 1, drafts=options.drafts, seed=seed,
            images=len(decoded), width=size[0], height=size[1],
            rounds=counts.rounds, evaluations=counts.evaluations, calls=seat.calls,
            lanes_per_round=round(seat.lane_rounds / seat.rounds, 3),
            seconds={
                "text": encoded - started, "wait": seated - encoded, "denoise": denoised - seated,
                "decode": ended - denoised, "total": ended - started,
            },
            critical_seconds=critical,
            overhead_us_per_round=None if critical is None else (denoised - seated - critical) / counts.rounds * 1e6,
            accepted=quantiles(counts.accepted),
            staged=tuple(f"cuda:{of}→cuda:{to}" for of, to in seat.staged),
            auto=choice.model_dump(mode="json") if choice else None,
            timeline=tuple(recorded.spans) if recorded else None,
            warnings=(*warnings, *cut),
        )  # fmt: skip
        return Result(decoded, finished, report)

    def probe(self) -> bool:
        """One evaluation on every lane, to see whether they work; False, at once, while images are made on them.

        DeviceError or NonFiniteError of a lane that does not; a lane that stopped working is left out from then on.
        """
        if self._round_inputs is None:
            self.generate("", num_inference_steps=1)
        assert self._round_inputs is not None
        with self.lanes.alone(wait=False) as free:
            if not free:
                return False
            noise, conditioning = self._round_inputs
            generation, error = self.lanes.generation, None
            backend = self._prober = self._prober or self._engines.sibling(0)
            backend.bind(noise.shape, [1.0], conditioning)
            backend.write(STATE, noise)
            outputs = [f"output {lane}" for lane in range(backend.lanes)]
            try:
                calls = [(Branch(STATE, 0, output, len(conditioning) - 1),) for output in outputs]
                backend.predict(calls)
                self.lanes.count_round(backend, calls)
                if not all(np.isfinite(backend.read(output)).all() for output in outputs):
                    raise NonFiniteError("a lane answered with NaN or infinity")
                backend.settle()
            except DeviceError as caught:
                error = caught
        if error is not None:
            self._without_dead_lanes(error, backend, generation)
            raise error
        return True

    def revive(self) -> bool:
        """Opens the model again on the lost lanes, too, after the images that are being made; whether all lanes work.

        EngineError when not even those that worked can be opened.
        """
        with self._repairing, self.lanes.alone(wait=True):
            if not self.lost:
                return True
            left = self.devices
            self._engines.close()
            try:
                self.devices = self._wanted_devices
                self._open()
                self.lost = ()
            except EngineError as error:
                log.warning("%s did not come back: %s", ", ".join(self.lost), error)
                self.devices = left
                self._open()
            self.lanes.replace(len(self.devices), self._desk)
        try:
            self.probe()
        except EngineError as error:
            log.warning("lanes that came back do not work: %s", error)
        return not self.lost

    def _beside_lanes(self, run: Callable[[], Made], warnings: list[str]) -> Made:
        """Runs networks that belong to no lane; once more on what is left when their device has stopped working."""
        generation = self.lanes.generation
        try:
            with self.lanes.visit():
                return run()
        except DeviceError as error:
            warnings.append(self._without_dead_lanes(error, self._engines.backend, generation))
        with self.lanes.visit():
            return run()

    def _desk(self, desk: int) -> Backend:
        return self._engines.sibling(desk) if desk else self._engines.backend

    def _measured(self) -> Callable[[int], float]:
        """Seconds of a call by its number of branches; in proportion to them where nothing was measured."""
        known = Calibration.read(self.calibration_path).calls.get(self.calibration_key)
        return call_seconds(known or {1: 1.0})

    def _without_dead_lanes(self, error: DeviceError, used: Backend, generation: int) -> str:
        """Goes on with the lanes that still work and says so; raises the error when it was no lane, or the last one.

        Images that other threads are making on the others are waited for; those that fail, too, come here next.
        """
        with self._repairing:
            if generation != self.lanes.generation:
                return f"lanes stopped working ({error}): the image was made again on the others"
            dead = used.dead()
            left = tuple(lane for number, lane in enumerate(self.devices) if number not in dead)
            if not dead or not left:
                raise error
            names = [str(self.devices[number]) for number in dead]
            message = f"{', '.join(names)} stopped working ({error}): the image was made again on the other lanes"
            log.error("%s", message)
            with self.lanes.alone(wait=True):
                self._engines.close()
                self.devices, self.lost = left, (*self.lost, *names)
                self._open()
                self.lanes.replace(len(left), self._desk)
            return message

    def preview(self) -> list[Image.Image]:
        """The image so far, for `progress`: the noisy latents as the VAE decoder sees them."""
        return self._decode(self._here.seat.read(STATE))

    def _notifier(
        self, callback: StepCallback | None, progress: Callable[[int, int], None] | None, schedule: Schedule
    ) -> Callable[[int], None]:
        def notify(finished: int) -> None:
            if progress is not None:
                progress(finished, schedule.steps)
            if callback is None:
                return
            latents = self._here.seat.read(STATE)
            callback(self, finished - 1, schedule.timesteps[finished - 1], {"latents": latents})

        return notify

    def _decode(self, latents: Array) -> list[Image.Image]:
        if not np.isfinite(latents).all():
            raise NonFiniteError("the denoised latents hold NaN or infinity: no image can be made of them")
        pixels = self._engines.runners["vae_decoder"].run(latent_sample=latents)["sample"]
        if not np.isfinite(pixels).all():
            raise NonFiniteError("the VAE decoder gave NaN or infinity: no image can be made of it")
        return [Image.fromarray(image) for image in to_uint8(pixels)]


def to_uint8(pixels: Array) -> NDArray[np.uint8]:
    """(n, 3, h, w) in [−1, 1] to (n, h, w, 3) in 0 … 255, rounded as diffusers rounds."""
    scaled = (pixels / 2 + 0.5).clip(0, 1).transpose(0, 2, 3, 1)
    return (scaled * 255).round().astype(np.uint8)


def _check_choice(param: str, value: object, choices: Mapping[str, object] | Sequence[str]) -> None:
    if value not in choices:
        raise ParameterError(param, f"unknown {param} {value!r}: use one of {', '.join(choices)}")


def _check_whole(param: str, value: object, low: int, high: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or not low <= value <= high:
        raise ParameterError(param, f"{param} must be a whole number from {low} to {high}, not {value!r}")
    return int(value)
