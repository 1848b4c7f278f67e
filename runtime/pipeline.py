"""`Pipeline`: a prompt in, pictures out. The stages in order: text, noise, denoising loop, VAE decoder."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from engines.base import Array, Backend
from engines.devices import parse_devices, precision
from engines.errors import DeviceError, NonFiniteError, ParameterError
from engines.load import check as check_lanes
from engines.load import load
from engines.store import BUILD, Bundle
from runtime.auto import Calibration, Choice, Setting, choose
from runtime.execute import Counts, denoise
from runtime.noise import gaussian
from runtime.prompt import PromptTokenizer
from runtime.report import Report, quantiles
from runtime.samplers import DRAFTS, SAMPLERS, STATE, Options, check, resolve
from runtime.schedule import Schedule
from runtime.schedulers import make_schedule

log = logging.getLogger(__name__)

MODES = ("auto", *SAMPLERS)
MAX_SEED = 2**64 - 1
StepCallback = Callable[["Pipeline", int, float, dict[str, Any]], object]


@dataclass(frozen=True)
class Result:
    """The pictures of one call; `latents` is (images, channels, height, width) float32, as diffusers returns them."""

    images: list[Image.Image]
    latents: Array
    report: Report


class Pipeline:
    """A loaded model on a set of lanes. Safe to call from several threads: images are made one after another.

    A lane that stops working is left out from then on, and named in `lost`; its picture is made again on the others.
    """

    def __init__(self, bundle: Bundle, devices: str) -> None:
        self.devices = parse_devices(devices)
        self.lost: tuple[str, ...] = ()
        self._bundle = bundle
        self.manifest = bundle.manifest
        self._tokenizer = PromptTokenizer(bundle)
        self._engines = load(bundle, self.devices)
        self._lock = threading.Lock()

    @classmethod
    def load(cls, model: str, devices: str = "auto", build: Path = BUILD) -> Pipeline:
        """Loads an exported and compiled model by name or by bundle folder.

        BundleError when it is missing, altered or not compiled for this machine; DeviceError for unknown devices.
        """
        lanes = parse_devices(devices)
        check_lanes(lanes)
        return cls(Bundle.open(model, build, precision(lanes)), devices)

    @property
    def device_names(self) -> str:
        """The lanes, as reports name them."""
        return ",".join(map(str, self.devices))

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
        """(channels, height, width) of one picture's latent."""
        factor = self.manifest.vae_scale_factor
        return self.manifest.latent_channels, self.manifest.height // factor, self.manifest.width // factor

    @property
    def calibration_path(self) -> Path:
        """Where what mode `auto` knows is stored: beside the plan of the noise predictor that it was measured with."""
        return self._engines.plan_folder / "calibration.json"

    def setting(
        self, scheduler: str | None, num_inference_steps: int, guidance_scale: float, eta: float = 0.0
    ) -> Setting:
        """What drifts are measured for."""
        name = make_schedule(self.manifest, scheduler, num_inference_steps, eta=eta).name
        return Setting(scheduler=name, eta=eta, steps=num_inference_steps, guidance_scale=guidance_scale)

    def close(self) -> None:
        """Stops the lanes, after the picture that is being made."""
        with self._lock:
            self._engines.close()

    def generate(
        self,
        prompt: str | Sequence[str] | None = None,
        *,
        negative_prompt: str = "",
        mode: str = "auto",
        k: int | None = None,
        drafts: str = "auto",
        tolerance: float = 0.0,
        blocks: int | None = None,
        iterations: int | None = None,
        first_blocks: Sequence[int] = (),
        pipelined: bool = True,
        num_inference_steps: int = 50,
        guidance_scale: float = 4.0,
        seed: int = 0,
        scheduler: str | None = None,
        eta: float = 0.0,
        width: int | None = None,
        height: int | None = None,
        num_images_per_prompt: int = 1,
        latents: Array | None = None,
        prompt_embeds: Array | None = None,
        negative_prompt_embeds: Array | None = None,
        callback_on_step_end: StepCallback | None = None,
        progress: Callable[[int], None] | None = None,
    ) -> Result:
        """Makes pictures. Arguments that diffusers also has mean what they mean there.

        mode: a key of `samplers.SAMPLERS`, or `auto`: the fastest of them whose measured drift is within `tolerance`.
        k, first_blocks, drafts, tolerance, blocks, iterations, pipelined: `samplers.Options`; k is by default the
        number of lanes.
        seed: 0 … 2⁶⁴−1; picture i of a call draws its noise from (seed, i, step).
        latents: initial noise of unit variance, (images, channels, height/f, width/f). prompt_embeds: (prompts, tokens,
        width), in place of `prompt`. Latents come back as the model sees them, so that of the Euler schedulers those
        before the last step are diffusers' divided by √(1 + σ²).
        callback_on_step_end(pipeline, step, timestep, {"latents": …}) is called whenever further steps are finished,
        after each block in the parallel modes; it may look, and raise to cancel, but not change the latents. `srds`
        shows its latest guess at the finished latents. With a tolerance, `adaptive` and `srds` make images one by one,
        so that none depends on its neighbours, and the steps begin anew with each.

        progress(steps) is called at the same times with the number of finished steps, costs nothing, and may raise to
        cancel; while it runs, `preview` shows the picture so far.

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
        trained = int(self.manifest.scheduler.get("num_train_timesteps", 1000))
        _check_whole("num_inference_steps", num_inference_steps, 1, trained)
        _check_whole("num_images_per_prompt", num_images_per_prompt, 1, 64)
        seed = _check_whole("seed", seed, 0, MAX_SEED)
        k = len(self.devices) if k is None else _check_whole("k", k, 1, 1000)
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
        self._check_size(width, height)
        schedule = make_schedule(self.manifest, scheduler, num_inference_steps, eta=eta)
        options = Options(k, resolve(drafts), float(tolerance), blocks, pipelined, iterations, tuple(first_blocks))
        choice: Choice | None = None
        warnings: list[str] = []
        if mode == "auto":
            setting = self.setting(scheduler, num_inference_steps, guidance_scale, eta)
            known, lanes = Calibration.read(self.calibration_path), len(self.devices)
            several = prompt if isinstance(prompt, list | tuple) else prompt_embeds
            count = num_images_per_prompt * (1 if several is None else len(several))
            choice, warnings = choose(known, self.calibration_key, lanes, schedule, setting, tolerance, count)
            mode, options = choice.candidate.mode, choice.candidate.options
        check(mode, schedule, options)
        with self._lock:
            started = time.perf_counter()
            conditioning, cut = self._encode(
                prompt, negative_prompt, prompt_embeds, negative_prompt_embeds, num_images_per_prompt
            )
            noise = self._initial_noise(len(conditioning[1]["encoder_hidden_states"]), seed, latents)
            encoded = time.perf_counter()
            notify = self._notifier(callback_on_step_end, progress, schedule)
            before = self.backend.critical

            def loop() -> tuple[Array, Counts]:
                return denoise(
                    self.backend, noise, conditioning, schedule, mode, options, float(guidance_scale), seed, notify
                )

            try:
                finished, counts = loop()
            except DeviceError as error:
                warnings = [*warnings, self._without_dead_lanes(error)]
                before, (finished, counts) = self.backend.critical, loop()
            after = self.backend.critical
            critical = None if before is None or after is None else after - before
            denoised = time.perf_counter()
            images = self._decode(finished)
            ended = time.perf_counter()
        report = Report(
            model=self.manifest.model, mode=mode, scheduler=schedule.name, steps=schedule.steps, k=options.k,
            first_blocks=options.first_blocks,
            lanes=len(self.devices), devices=self.device_names, guidance_scale=float(guidance_scale),
            guidance_split=guidance_scale > 1 and len(self.devices) > 1, drafts=options.drafts, seed=seed,
            images=len(images), rounds=counts.rounds, evaluations=counts.evaluations, calls=counts.calls,
            seconds={
                "text": encoded - started, "denoise": denoised - encoded, "decode": ended - denoised,
                "total": ended - started,
            },
            critical_seconds=critical,
            overhead_us_per_round=None if critical is None else (denoised - encoded - critical) / counts.rounds * 1e6,
            accepted=quantiles(counts.accepted),
            staged=tuple(f"cuda:{of}→cuda:{to}" for of, to in self.backend.staged),
            auto=choice.model_dump(mode="json") if choice else None,
            warnings=(*warnings, *cut),
        )  # fmt: skip
        return Result(images, finished, report)

    def _without_dead_lanes(self, error: DeviceError) -> str:
        """Goes on with the lanes that still work and says so; raises the error when it was no lane, or the last one."""
        dead = self.backend.dead()
        left = tuple(lane for number, lane in enumerate(self.devices) if number not in dead)
        if not dead or not left:
            raise error
        names = [str(self.devices[number]) for number in dead]
        message = f"{', '.join(names)} stopped working ({error}): the picture was made again on the other lanes"
        log.error("%s", message)
        self._engines.close()
        self._engines = load(self._bundle, left)
        self.devices, self.lost = left, (*self.lost, *names)
        return message

    def _check_size(self, width: int | None, height: int | None) -> None:
        for name, value, exported in (
            ("width", width, self.manifest.width),
            ("height", height, self.manifest.height),
        ):
            if value is None:
                continue
            if not isinstance(value, int) or value < 8 or value % 8:
                raise ParameterError(name, f"{name} must be a positive multiple of 8, not {value!r}")
            if value != exported:
                size = f"{self.manifest.width}x{self.manifest.height}"
                raise ParameterError(name, f"{name}={value} is not among the sizes of this engine: it makes {size}")

    def _encode(
        self,
        prompt: str | Sequence[str] | None,
        negative_prompt: str,
        prompt_embeds: Array | None,
        negative_prompt_embeds: Array | None,
        images_per_prompt: int,
    ) -> tuple[list[Mapping[str, Array]], list[str]]:
        """The conditioning of both guidance halves, each with one row per image."""
        if (prompt is None) == (prompt_embeds is None):
            raise ParameterError("prompt", "give either prompt or prompt_embeds")
        listed = prompt if isinstance(prompt, list | tuple) else [prompt]
        prompts = [p for p in listed if isinstance(p, str)]
        if prompt_embeds is None and (not prompts or len(prompts) < len(listed)):
            raise ParameterError("prompt", "prompt must be a string or a list of strings")
        if not isinstance(negative_prompt, str):
            raise ParameterError("negative_prompt", "negative_prompt must be a string")
        ids, warnings = self._tokenizer([negative_prompt, *prompts])
        encoded = self._engines.text_encoder.run(input_ids=ids)
        positive, negative = encoded[1:], encoded[:1]
        if prompt_embeds is not None:
            positive = self._check_embeds("prompt_embeds", prompt_embeds, encoded)
        if negative_prompt_embeds is not None:
            negative = self._check_embeds("negative_prompt_embeds", negative_prompt_embeds, encoded)
        positive = positive.repeat(images_per_prompt, 0)
        if len(negative) not in (1, len(positive) // images_per_prompt):
            raise ParameterError("negative_prompt_embeds", "give one negative embedding, or one per prompt")
        negative = np.broadcast_to(negative.repeat(len(positive) // len(negative), 0), positive.shape)
        return [{"encoder_hidden_states": negative}, {"encoder_hidden_states": positive}], warnings

    @staticmethod
    def _check_embeds(name: str, value: Array, like: Array) -> Array:
        array = np.asarray(value, np.float32)
        if array.ndim != 3 or array.shape[1:] != like.shape[1:] or not len(array):
            raise ParameterError(
                name, f"{name} must have shape (prompts, {like.shape[1]}, {like.shape[2]}), not {array.shape}"
            )
        if not np.isfinite(array).all():
            raise ParameterError(name, f"{name} holds NaN or infinity")
        return array

    def _initial_noise(self, images: int, seed: int, latents: Array | None) -> Array:
        shape = self.latent_shape
        if latents is None:
            return np.stack([gaussian(seed, image, 0, shape) for image in range(images)])
        array = np.asarray(latents, np.float32)
        if array.shape != (images, *shape):
            raise ParameterError("latents", f"latents must have shape {(images, *shape)}, not {array.shape}")
        if not np.isfinite(array).all():
            raise ParameterError("latents", "latents hold NaN or infinity")
        return array

    def preview(self) -> list[Image.Image]:
        """The picture so far, for `progress`: the noisy latents as the VAE decoder sees them."""
        return self._decode(self.backend.read(STATE))

    def _notifier(
        self, callback: StepCallback | None, progress: Callable[[int], None] | None, schedule: Schedule
    ) -> Callable[[int], None]:
        if callback is None:
            return progress or (lambda finished: None)

        def notify(finished: int) -> None:
            if progress is not None:
                progress(finished)
            latents = self.backend.read(STATE)
            callback(self, finished - 1, schedule.timesteps[finished - 1], {"latents": latents})

        return notify

    def _decode(self, latents: Array) -> list[Image.Image]:
        if not np.isfinite(latents).all():
            raise NonFiniteError("the denoised latents hold NaN or infinity: no picture can be made of them")
        scaled = latents / np.float32(self.manifest.vae_scaling_factor) + np.float32(self.manifest.vae_shift_factor)
        pixels = self._engines.vae_decoder.run(latent_sample=scaled)
        if not np.isfinite(pixels).all():
            raise NonFiniteError("the VAE decoder gave NaN or infinity: no picture can be made of it")
        return [Image.fromarray(picture) for picture in to_uint8(pixels)]


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
