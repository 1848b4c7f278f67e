"""`Pipeline`: a prompt in, images out. The stages in order: text, start, denoising loop, VAE decoder."""

from __future__ import annotations

import inspect
import logging
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Concatenate, ParamSpec, TypeVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from engines.base import Array, Backend, Branch
from engines.devices import parse_devices, precision
from engines.errors import DeviceError, EngineError, NonFiniteError
from engines.load import check as check_lanes
from engines.load import load
from engines.store import BUILD, Bundle
from runtime.auto import Calibration, Choice, Setting, call_seconds, choose, played_seconds
from runtime.call import Arguments, Call, Callbacks, read_arguments
from runtime.conditioning import Conditioner, Conditioning, Texts
from runtime.initial_state import Start, initial_noise
from runtime.lanes import Lanes
from runtime.report import Report, quantiles
from runtime.sampling.drafts import resolve
from runtime.sampling.execute import denoise
from runtime.sampling.operations import STATE, Options
from runtime.sampling.samplers import check
from runtime.sampling.schedule import Schedule
from runtime.sampling.schedulers import make_schedule, substituted
from runtime.sampling.timeline import Timeline
from runtime.tokenizer import PromptTokenizer

log = logging.getLogger(__name__)

Made = TypeVar("Made")
P = ParamSpec("P")
NO_CALLBACKS = Callbacks()


@dataclass(frozen=True)
class Result:
    """The images of one call; `latents` is (images, channels, height, width) float32, as diffusers has them."""

    images: list[Image.Image]
    latents: Array
    report: Report


def _with_arguments(
    arguments: Callable[P, object],
) -> Callable[[Callable[..., Result]], Callable[Concatenate[Pipeline, P], Result]]:
    """Gives a method the keywords of a class, for type checkers, `help`, and completion in editors and notebooks."""

    def decorate(method: Callable[..., Result]) -> Callable[Concatenate[Pipeline, P], Result]:
        own, taken = inspect.signature(method), inspect.signature(arguments)
        parameters = [own.parameters["self"], *taken.parameters.values()]
        vars(method)["__signature__"] = own.replace(parameters=parameters)
        return method

    return decorate


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

    @_with_arguments(Arguments)
    def generate(self, *prompt: Any, **options: Any) -> Result:
        """Makes images. Arguments that diffusers also has mean what they mean there, and default to what they do in
        the model's own pipeline. `runtime.call` says what each of them is; `run` is the same for a `Call`.

        Latents come back as the model sees them, so that of the Euler schedulers those before the last step are
        diffusers' divided by √(1 + σ²).

        ParameterError for arguments that cannot be used, NonFiniteError when a model's output is not finite.
        """
        return self.run(*read_arguments(*prompt, **options))

    def run(self, call: Call, callbacks: Callbacks = NO_CALLBACKS) -> Result:
        """Makes the images of a call. ParameterError, NonFiniteError and DeviceError as `generate`."""
        manifest, asked = self.manifest, call.checked(self.manifest, len(self.devices), self._default_k)
        num_inference_steps, guidance_scale = asked.num_inference_steps, asked.guidance_scale
        mode, seed, lanes, num_images_per_prompt = asked.mode, asked.seed, asked.lanes, asked.num_images_per_prompt
        texts = Texts(
            asked.prompt, asked.negative_prompt, asked.prompt_embeds, asked.negative_prompt_embeds,
            asked.pooled_prompt_embeds, asked.negative_pooled_prompt_embeds, asked.clip_skip,
        )  # fmt: skip
        start = Start.of(manifest, asked.image, asked.strength)
        size = start.size(manifest, asked.width, asked.height)
        first = start.first_step(num_inference_steps)
        schedule = make_schedule(manifest, asked.scheduler, num_inference_steps, size, eta=asked.eta, first=first)
        # a second pass is what guidance means to a sampler: a model that is told the scale, or knows none, needs none
        passes = float(guidance_scale) if manifest.guidance == "classifier_free" else 1.0
        options = Options(
            asked.k, resolve(asked.drafts), asked.tolerance, asked.blocks, asked.pipelined, asked.iterations,
            tuple(asked.first_blocks),
        )  # fmt: skip
        choice: Choice | None = None
        warnings = [substitute] if (substitute := substituted(manifest, asked.scheduler)) else []
        if mode == "auto":
            setting = Setting(
                scheduler=schedule.name, eta=asked.eta, steps=num_inference_steps, guidance_scale=guidance_scale
            )
            known, count = Calibration.read(self.calibration_path), num_images_per_prompt * texts.count
            guided = manifest.guidance == "classifier_free"
            choice, said = choose(
                known, self.calibration_key, len(self.devices), schedule, setting, asked.tolerance, count, guided=guided
            )
            warnings += said
            mode, options = choice.candidate.mode, choice.candidate.options
        check(mode, schedule, options)
        started = time.perf_counter()
        images = texts.count * num_images_per_prompt

        def encode() -> tuple[Conditioning, Sequence[str], Array]:
            conditioning, cut = self._conditioner(texts, float(guidance_scale), size, num_images_per_prompt)
            noise = initial_noise(seed, images, self._latent_shape(size), asked.latents)
            return conditioning, cut, start.state(schedule, noise, seed, size, self._engines.runners.get("vae_encoder"))

        conditioning, cut, state = self._beside_lanes(encode, warnings)
        encoded = time.perf_counter()
        notify = self._notifier(callbacks, schedule)

        @cache
        def seconds(number: int) -> float:
            return played_seconds(mode, options, schedule, number, passes, self._call_seconds, images)

        again = False
        while True:
            try:
                with self.lanes.seat(seconds, callbacks.before_round, first=again, most=lanes) as seat:
                    seated = time.perf_counter()
                    self._here.seat, before = seat, seat.critical_path_seconds
                    recorded = Timeline(seat, lambda: seat.dealt) if asked.timeline else None
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

    def _notifier(self, callbacks: Callbacks, schedule: Schedule) -> Callable[[int], None]:
        def notify(finished: int) -> None:
            if callbacks.progress is not None:
                callbacks.progress(finished, schedule.steps)
            if callbacks.callback_on_step_end is None:
                return
            latents = self._here.seat.read(STATE)
            timestep = schedule.timesteps[finished - 1]
            callbacks.callback_on_step_end(self, finished - 1, timestep, {"latents": latents})

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
