"""diffusers' own pipeline as a baseline, in a process of its own, where its threads and compiler disturb nothing.

Only the denoising loop is timed, from the first call of the denoiser to the latents.
"""

from __future__ import annotations

import multiprocessing
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from engines.base import Array

SCHEDULERS = {
    "ddim": "DDIMScheduler", "ddpm": "DDPMScheduler", "euler": "EulerDiscreteScheduler",
    "euler_a": "EulerAncestralDiscreteScheduler", "dpm++2m": "DPMSolverMultistepScheduler",
    "flow_euler": "FlowMatchEulerDiscreteScheduler", "lcm": "LCMScheduler",
}  # fmt: skip


class NotPossibleHereError(Exception):
    """This baseline cannot be measured on this machine; the message says why."""


@dataclass(frozen=True)
class Wanted:
    """What the process is to load, on which of torch's devices, and the LoRA files with their scales to fuse."""

    checkpoint: str
    compiled: bool = False
    device: str = "cpu"
    loras: tuple[tuple[str, float], ...] = ()


@dataclass(frozen=True)
class Setting:
    """How an image is drawn; `scheduler` is a name of this project."""

    scheduler: str
    steps: int
    guidance_scale: float


class TorchBaseline:
    """A running process. NotPossibleHereError where it fails, or where an answer takes more than `limit` seconds.

    With `compiled`, the first image of a batch size includes compilation.
    """

    def __init__(self, wanted: Wanted, limit: float) -> None:
        context = multiprocessing.get_context("spawn")
        self._ours, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, wanted), daemon=True)
        self._process.start()
        theirs.close()
        self._limit = limit
        self._broken: str | None = None
        try:
            self._answer(f"diffusers was not loaded within {limit:g} s")
        except NotPossibleHereError:
            self.close()
            raise

    def image(self, prompt: str, noise: Array, setting: Setting) -> tuple[float, Array]:
        """Seconds of the denoising loop, and the latents in the shape of the noise."""
        if self._broken is not None:
            raise NotPossibleHereError(self._broken)
        self._ours.send((prompt, noise, setting))
        seconds, latents = self._answer(f"an image was not ready within {self._limit:g} s")
        return seconds, latents

    def close(self) -> None:
        """Ends the process."""
        self._ours.close()  # it reads the end of its messages
        self._process.join(5)
        if self._process.is_alive():
            self._process.terminate()
            self._process.join()

    def _answer(self, late: str) -> Any:
        if not self._ours.poll(self._limit):
            self._broken = late
            self.close()  # a late answer belongs to no request
            raise NotPossibleHereError(late)
        try:
            good, answer = self._ours.recv()
        except EOFError:
            self._process.join()
            self._broken = f"the process died with code {self._process.exitcode}"
            raise NotPossibleHereError(self._broken) from None
        if not good:
            raise NotPossibleHereError(answer)
        return answer


def _serve(connection: Connection, wanted: Wanted) -> None:
    """The process: loads, then draws one image for every message."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    draw: Any = None
    while True:
        try:
            if draw is None:
                draw, answer = _load(wanted), None
            else:
                answer = draw(*connection.recv())
            connection.send((True, answer))
        except EOFError:
            return
        except Exception as error:  # noqa: BLE001 - whatever a library raises is the reason that the row will give
            connection.send((False, f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"))
            if draw is None:
                return


def _load(wanted: Wanted) -> Callable[[str, Array, Setting], tuple[float, Array]]:
    import diffusers
    import torch
    import transformers

    for library in (diffusers, transformers):
        library.utils.logging.disable_progress_bar()
        library.utils.logging.set_verbosity_error()
    kind = torch.float32 if wanted.device == "cpu" else torch.float16
    pipe = diffusers.DiffusionPipeline.from_pretrained(wanted.checkpoint, dtype=kind, local_files_only=True)
    for number, (file, scale) in enumerate(wanted.loras):
        pipe.load_lora_weights(Path(file).parent, weight_name=Path(file).name, adapter_name=f"lora{number}")
        pipe.fuse_lora(adapter_names=[f"lora{number}"], lora_scale=scale)
        pipe.unload_lora_weights()
    pipe.to(wanted.device)
    pipe.set_progress_bar_config(disable=True)
    denoiser = getattr(pipe, "unet", None) or pipe.transformer
    forward = torch.compile(denoiser.forward, dynamic=False) if wanted.compiled else denoiser.forward
    packed = hasattr(pipe, "_pack_latents")  # Flux's own call takes and returns tokens of two by two latents
    started: list[float] = []

    def now() -> float:
        if wanted.device != "cpu":
            torch.cuda.synchronize()
        return time.perf_counter()

    def timed(*arguments: Any, **named: Any) -> Any:
        if not started:
            started.append(now())
        return forward(*arguments, **named)

    denoiser.forward = timed

    def draw(prompt: str, noise: Array, setting: Setting) -> tuple[float, Array]:
        scheduler = getattr(diffusers, SCHEDULERS[setting.scheduler])
        if type(pipe.scheduler) is not scheduler:
            pipe.scheduler = scheduler.from_config(pipe.scheduler.config)
        started.clear()
        height, width = (side * pipe.vae_scale_factor for side in noise.shape[2:])
        given = torch.from_numpy(noise).to(wanted.device, kind)
        latents = pipe(
            prompt, num_inference_steps=setting.steps, guidance_scale=setting.guidance_scale, output_type="latent",
            height=height, width=width, latents=pipe._pack_latents(given, *given.shape) if packed else given,
        ).images  # fmt: skip
        seconds = now() - started[0]
        if packed:
            latents = pipe._unpack_latents(latents, height, width, pipe.vae_scale_factor)
        return seconds, latents.float().cpu().numpy()

    return draw
