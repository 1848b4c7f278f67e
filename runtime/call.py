"""`Call`: every argument of `Pipeline.generate`, each written once, with its type, range, default and help text.

An option is one field of `Call`. `OPTIONS` lists them by name, and everything that offers them to somebody is made of
it: the signature of `Pipeline.generate`, the command line (`add_options`), the fields of the HTTP API (`Option.http`
and `Option.http_range`) and the tables of the documentation (`markdown`). A new option is a new field here and the
code that reads it.

HTTP, the command line and benchmarks make a `Call` and give it to `Pipeline.run`. A `Call` checks itself when it is
made; `checked` adds what depends on the model.
"""
# ruff: noqa: RUF009 - `_option` makes fields of a dataclass, as `dataclasses.field` does

from __future__ import annotations

import argparse
import secrets
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import KW_ONLY, dataclass, field, fields
from difflib import get_close_matches
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

import numpy as np
from PIL import Image

from engines.base import Array
from engines.errors import ParameterError
from engines.manifest import Manifest
from runtime.option import Option
from runtime.sampling.drafts import DRAFTS
from runtime.sampling.samplers import SAMPLERS
from runtime.sampling.schedulers import SCHEDULERS

MODES = ("auto", *SAMPLERS)
MAX_SEED = 2**64 - 1
RANDOM_SEED = -1
CHOSEN_SEEDS = 2**32  # chosen ones are below: JavaScript's numbers, and the fields of other tools, hold them
# what is chosen where a call may be made again elsewhere, so that it gives the same image
CHOSEN_SEED: ContextVar[int | None] = ContextVar("chosen_seed", default=None)
StepCallback = Callable[[Any, int, float, dict[str, Any]], object]  # pipeline, step, timestep, {"latents": …}


def _option(default: Any, help: str, **more: Any) -> Any:
    """A field of `Call` with what `Option` says of it."""
    return field(default=default, metadata={"help": help, **more})


def _both(name: str) -> dict[str, str]:
    """The same name on the command line and over HTTP."""
    return {"flag": "--" + name.replace("_", "-"), "http": name}


@dataclass(frozen=True, eq=False)
class Call:
    """What one image, or one call of several, is made from. ParameterError for values that no model could use."""

    prompt: str | Sequence[str] | None = _option(
        None, "what to make an image of; a list makes one or more of each", flag="prompt", http="prompt",
        absent="required, unless prompt_embeds are given",
    )  # fmt: skip
    _: KW_ONLY
    negative_prompt: str | None = _option(None, "what guidance leads away from", **_both("negative_prompt"))
    mode: str = _option(
        "auto", "the sampler; auto takes the fastest whose measured drift is within tolerance", choices=MODES,
        **_both("mode"),
    )  # fmt: skip
    k: int | None = _option(
        None, "drafts per round; adaptive and speculative count the state itself",
        absent="the number of lanes that were loaded", low=1, high=1000, **_both("k"),
        http_range=(1, 64),  # the drafts of a round are in memory at the same time
    )  # fmt: skip
    first_blocks: Sequence[int] = _option(
        (), "conservative and aggressive: drafts in each of the first blocks, where they differ from k", low=1,
        high=1000, flag="--first-blocks",
    )  # fmt: skip
    cache_interval: int = _option(
        1, "sequential, conservative and aggressive: evaluate the denoiser's deep part at one of so many steps and "
        "reuse its features at the others; 1 always", low=1, high=1000, **_both("cache_interval"), http_range=(1, 64),
    )  # fmt: skip
    drafts: str = _option("auto", "how drafts are guessed", choices=("auto", *DRAFTS), **_both("drafts"))
    tolerance: float | None = _option(
        None, "auto, adaptive and srds: largest relative error that is accepted; 0 is exact", low=0,
        absent="auto: no visible difference, measured in calibration; others: 0", **_both("tolerance"),
        http_range=(0, 100),
    )  # fmt: skip
    blocks: int | None = _option(
        None, "srds: number of blocks", absent="near the root of the number of steps", low=1, of_model=True,
        **_both("blocks"), http_range=(1, 64),
    )  # fmt: skip
    iterations: int | None = _option(
        None, "srds: most iterations", absent="until it is exact or within tolerance", low=1, of_model=True,
        **_both("iterations"), http_range=(1, 1000),
    )  # fmt: skip
    pipelined: bool = _option(True, "srds: start a block as soon as its left end is known", flag="--plain")
    num_inference_steps: int | None = _option(
        None, "steps of the scheduler", absent="the model's own", low=1, of_model=True, flag="--steps",
        http="num_inference_steps", http_range=(1, 1000),
    )  # fmt: skip
    guidance_scale: float | None = _option(
        None, "how strongly images follow the prompt; 1 is without guidance", absent="the model's own",
        flag="--guidance", http="guidance_scale", http_range=(0, 100),
    )  # fmt: skip
    scheduler: str | None = _option(
        None, "the rule of a step", absent="the model's own", choices=SCHEDULERS, of_model=True, **_both("scheduler")
    )
    eta: float = _option(0.0, "ddim: 0 adds no noise, 1 is ddpm", low=0, high=1, **_both("eta"))
    seed: int = _option(
        0,
        "starts the generator of all noise; image i draws from (seed, i, step); -1 chooses one and reports it",
        low=RANDOM_SEED,
        high=MAX_SEED,
        **_both("seed"),
    )
    width: int | None = _option(
        None, "pixels", absent="the model's own, or that of image", low=1, of_model=True, flag="--width", http="size"
    )
    height: int | None = _option(
        None, "pixels", absent="the model's own, or that of image", low=1, of_model=True, flag="--height", http="size"
    )
    num_images_per_prompt: int = _option(
        1, "images of each prompt", low=1, high=64, flag="--num-images-per-prompt", http="n"
    )
    image: Image.Image | Sequence[Image.Image] | None = _option(
        None, "an image to start from, or one per prompt; none starts from noise", **_both("image")
    )
    strength: float | None = _option(
        None, "with image: the share of the steps that is made", absent="the model's own", low=0, high=1, of_model=True,
        **_both("strength"),
    )  # fmt: skip
    latents: Array | None = _option(
        None, "initial noise of unit variance, (images, channels, height/f, width/f)", absent="drawn from seed",
        flag="--latents",
    )  # fmt: skip
    clip_skip: int | None = _option(
        None, "layers of the text encoder to leave out at its end", low=0, high=64, of_model=True, **_both("clip_skip")
    )
    prompt_embeds: Array | None = _option(None, "in place of prompt: (prompts, tokens, width)")
    negative_prompt_embeds: Array | None = _option(None, "in place of negative_prompt: one, or one per prompt")
    pooled_prompt_embeds: Array | None = _option(None, "(prompts, width), with prompt_embeds where the model has them")
    negative_pooled_prompt_embeds: Array | None = _option(None, "(prompts, width), with negative_prompt_embeds")
    lanes: int | None = _option(
        None, "most lanes that work on this call; k stays the same", absent="all", low=1, of_model=True,
        **_both("lanes"), http_range=(1, 64),
    )  # fmt: skip
    priority: int = _option(
        5, "who begins first, and whose rounds are played first, where calls wait for each other: 1 before 9", low=1,
        high=9, http="priority",
    )  # fmt: skip
    timeline: bool = _option(False, "whether the report says what each lane did when", http="timeline")

    def __post_init__(self) -> None:
        for option in OPTIONS.values():
            if not option.of_model:
                object.__setattr__(self, option.name, option.check(getattr(self, option.name)))
        if self.seed == RANDOM_SEED:
            chosen = CHOSEN_SEED.get()
            object.__setattr__(self, "seed", secrets.randbelow(CHOSEN_SEEDS) if chosen is None else chosen)
        if self.mode == "auto":
            for name in ("k", "blocks", "iterations", "first_blocks", "drafts", "cache_interval"):
                if getattr(self, name) != OPTIONS[name].default:
                    raise ParameterError(name, f"mode auto chooses {name} itself: name a mode to set it")

    def prompts(self) -> list[str]:
        """The prompts; none where there are embeddings in their place. ParameterError where there is neither."""
        if (self.prompt is None) == (self.prompt_embeds is None):
            raise ParameterError("prompt", "give either prompt or prompt_embeds")
        listed = self.prompt if isinstance(self.prompt, list | tuple) else [self.prompt]
        prompts = [one for one in listed if isinstance(one, str)]
        if self.prompt_embeds is None and (not prompts or len(prompts) < len(listed)):
            raise ParameterError("prompt", "prompt must be a string or a list of strings")
        return prompts

    @property
    def prompt_count(self) -> int:
        """How many prompts or embeddings there are."""
        if self.prompt_embeds is not None:
            return len(self.prompt_embeds)
        return 1 if isinstance(self.prompt, str) else len(self.prompt or ())

    @property
    def images(self) -> int:
        """How many images are made."""
        return self.prompt_count * self.num_images_per_prompt

    def checked(self, manifest: Manifest, lanes: int, k: int) -> CheckedCall:
        """The call for a model on so many lanes, its defaults filled in; `k` is that of modes that need one.

        ParameterError for what the model or the lanes cannot do. Sizes and images are checked by `initial_state`,
        embeddings by `conditioning`: they need more than one argument for it.
        """
        self.prompts()
        if self.negative_prompt is not None and not isinstance(self.negative_prompt, str):
            raise ParameterError("negative_prompt", "negative_prompt must be a string")
        if not manifest.negative_prompts and self.negative_prompt:
            raise ParameterError("negative_prompt", f"{manifest.model} makes no second pass that it could be used in")
        most = manifest.clip_skip
        if self.clip_skip is not None and (isinstance(self.clip_skip, bool) or self.clip_skip not in range(most + 1)):
            can = f"a whole number from 0 to {most}" if most else "left out: this model's text encoder cannot skip"
            raise ParameterError("clip_skip", f"clip_skip must be {can}, not {self.clip_skip!r}")
        trained = int(manifest.scheduler.get("num_train_timesteps", 1000))
        steps = manifest.defaults.num_inference_steps if self.num_inference_steps is None else self.num_inference_steps
        steps = OPTIONS["num_inference_steps"].check(steps, high=trained)
        values = {one.name: getattr(self, one.name) for one in fields(self)} | {
            "num_inference_steps": steps,
            "guidance_scale": manifest.defaults.guidance_scale if self.guidance_scale is None else self.guidance_scale,
            "k": k if self.k is None else self.k,
            "lanes": lanes if self.lanes is None else OPTIONS["lanes"].check(self.lanes, high=lanes),
            "blocks": OPTIONS["blocks"].check(self.blocks, high=steps),
            "iterations": OPTIONS["iterations"].check(self.iterations, high=steps),
        }
        return CheckedCall(**values)


@dataclass(frozen=True, eq=False, kw_only=True)
class CheckedCall(Call):
    """A call that a model can play, without the defaults that a model has: see `Call.checked`."""

    num_inference_steps: int
    guidance_scale: float
    k: int
    lanes: int

    def __post_init__(self) -> None:
        """Checked already; mode auto has a k here, which it may use."""


@dataclass(frozen=True, kw_only=True)
class Callbacks:
    """What a caller hears of a call while it runs, and how it cancels it: each of them may raise.

    callback_on_step_end(pipeline, step, timestep, {"latents": …}) is called whenever further steps are finished, after
    each block in the parallel modes; it must not change the latents. `srds` shows its latest guess at the finished
    latents. With a tolerance, `adaptive` and `srds` make images one by one, and the steps begin anew with each.
    progress(finished, steps) is called at the same times and costs nothing; while it runs, `Pipeline.preview` shows the
    image so far. before_round() is called before every round, and again and again while the call waits for lanes.
    """

    callback_on_step_end: StepCallback | None = None
    progress: Callable[[int, int], None] | None = None
    before_round: Callable[[], None] = lambda: None


@dataclass(frozen=True, eq=False)
class Arguments(Callbacks, Call):
    """All keywords of `Pipeline.generate`: the fields of `Call`, then those of `Callbacks`."""


def read_arguments(*prompt: Any, **given: Any) -> tuple[Call, Callbacks]:
    """The call and the callbacks of keywords; ParameterError names an unknown one and the name that was meant."""
    known = [*OPTIONS, *CALLBACKS]
    for name in given:
        if name not in known:
            near = meant(name, known)
            hint = f"did you mean {near}?" if near else f"use {', '.join(known)}"
            raise ParameterError(name, f"generate has no argument {name}: {hint}")
    callbacks = {name: given.pop(name) for name in CALLBACKS if name in given}
    return Call(*prompt, **given), Callbacks(**callbacks)


# what other tools call these options
ALIASES = {
    "cfg": "guidance_scale", "cfg_scale": "guidance_scale", "guidance": "guidance_scale", "negative": "negative_prompt",
    "num_images": "num_images_per_prompt", "n_images": "num_images_per_prompt",
    "batch_size": "num_images_per_prompt", "n": "num_images_per_prompt",
    "n_iter": "num_images_per_prompt", "sampler": "scheduler", "sampler_name": "scheduler",
    "sample_method": "scheduler", "steps": "num_inference_steps", "num_steps": "num_inference_steps",
    "sample_steps": "num_inference_steps", "denoising_strength": "strength", "init_image": "image",
    "generator": "seed", "drafts_per_round": "k",
}  # fmt: skip


def meant(name: str, known: Collection[str], *, http: bool = False) -> str | None:
    """The known name that was probably meant by an unknown one: its name in other tools, or the nearest spelling.

    `http`: known names are those of the HTTP API.
    """
    plain = name.lower().strip("-").replace("-", "_")

    def resolved(candidate: str) -> str | None:
        own = ALIASES.get(candidate, candidate)
        found = OPTIONS[own].http if http and own in OPTIONS else own
        return found if found in known else None

    near = get_close_matches(plain, [*known, *ALIASES], 1, cutoff=0.75)
    return resolved(plain) or (resolved(near[0]) if near else None)


def flag_meant(flag: str) -> str | None:
    """The command line's flag that was probably meant by an unknown one, as `meant` has it."""
    name = meant(flag, list(OPTIONS))
    return OPTIONS[name].flag if name else None


def add_options(
    parser: argparse.ArgumentParser, names: Iterable[str] | None = None, defaults: Mapping[str, Any] | None = None
) -> None:
    """Adds the flags of options to a command line, of all that have one or of those named.

    Parsed values come under the options' names and go into `Call` as they are, except that `image` and `latents` are
    paths to read. `defaults` replaces those of options. Values are checked by `Call`, not by the parser, so that every
    caller reads the same message.
    """
    for option in [OPTIONS[name] for name in names] if names is not None else OPTIONS.values():
        if option.flag is None:
            continue
        default = (defaults or {}).get(option.name, option.default)
        text = option.help if not option.choices else f"{option.help}: {', '.join(option.choices)}"
        said = option.default_text if default == option.default else default
        text = f"{text}; default: {said}".replace("%", "%%")
        if option.kind is bool:
            action = "store_false" if option.default else "store_true"
            parser.add_argument(option.flag, action=action, dest=option.name, help=f"not {option.name} ({option.help})")
        elif not option.flag.startswith("-"):
            parser.add_argument(option.flag, help=option.help)
        else:
            kind = option.kind if option.kind in (int, float, str) else Path
            count = "+" if option.several and option.kind is int else None
            parser.add_argument(
                option.flag, type=kind, dest=option.name, default=default, help=text, metavar=_metavar(option),
                nargs=count,
            )  # fmt: skip


def markdown(names: Iterable[str] | None = None, *, http: bool = False) -> str:
    """A table of options for the documentation: those named, else all; with `http` those of the HTTP API, as there."""
    lines = ["| option | values | default | meaning |", "|---|---|---|---|"]
    chosen = [OPTIONS[name] for name in names] if names is not None else list(OPTIONS.values())
    done = set()
    for option in chosen:
        name = option.http if http else option.name
        if name is None or name in done:
            continue
        done.add(name)
        if name == "size":
            lines.append("| `size` | `WIDTHxHEIGHT` | `auto`: the model's own, or that of `image` | pixels |")
            continue
        default = option.default_text if option.default is None or option.default == () else f"`{option.default_text}`"
        lines.append(f"| `{name}` | {_values(option, http=http)} | {default} | {option.help} |")
    return "\n".join(lines)


def _metavar(option: Option) -> str:
    return "N" if option.kind in (int, float) else "FILE" if option.kind in (np.ndarray, Image.Image) else "NAME"


def _values(option: Option, *, http: bool) -> str:
    """What an option may be, in words."""
    if option.choices:
        return ", ".join(f"`{choice}`" for choice in option.choices)
    low, high = option.low, option.high
    if http and option.http_range != (None, None):
        low, high = option.http_range
    kind = {str: "text", int: "whole number", float: "number", bool: "`true` or `false`" if http else "bool",
            Image.Image: "image", np.ndarray: "array"}[option.kind]  # fmt: skip
    if option.kind in (int, float):
        top = "2⁶⁴ − 1" if high == MAX_SEED else high
        kind += f", {low} to {top}" if high is not None else f", at least {low}" if low is not None else ""
    return f"{kind}, or several" if option.several and not http else kind


def _options() -> dict[str, Option]:
    """`OPTIONS`, from the fields of `Call`: the type of a value is the first one of the annotation."""
    hints, found = get_type_hints(Call), {}
    for one in fields(Call):
        kinds = [kind for kind in get_args(hints[one.name]) or (hints[one.name],) if kind is not type(None)]
        several = hints[one.name] == Sequence[int] or any(get_origin(kind) is Sequence for kind in kinds)
        kind = get_origin(kinds[0]) or kinds[0]
        default_range = {"http_range": (one.metadata.get("low"), one.metadata.get("high"))}
        found[one.name] = Option(one.name, kind, several, one.default, **{**default_range, **one.metadata})
    return found


OPTIONS: Mapping[str, Option] = _options()
CALLBACKS = tuple(one.name for one in fields(Callbacks))
