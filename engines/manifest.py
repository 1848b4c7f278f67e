"""The manifest of an exported model: everything the runtime knows about it, and nothing that it must import.

`build/<model>/manifest.json` is written by `export` and read by `engines` and `runtime`. Unknown fields are refused,
so that a manifest of another version never half works.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from engines.errors import BundleError, ExportError

MANIFEST = "manifest.json"
DENOISER = "denoiser"  # the network that lanes run
DEEP, SHALLOW = "denoiser_deep", "denoiser_shallow"  # it in two parts, for feature caching, where lanes can run these


class _Strict(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())


Axes = Mapping[str, int]


class TensorSpec(_Strict):
    """One input or output. An axis is a number, a name, or a multiple of a name such as `8*height`.

    Names are `batch`, and the `height` and `width` of the latents.
    """

    name: str
    dtype: str
    shape: tuple[int | str, ...]

    def resolve(self, axes: Axes) -> tuple[int, ...]:
        """The shape in numbers."""
        return tuple(axis if isinstance(axis, int) else _times(axis) * axes[_name(axis)] for axis in self.shape)


def axes_of(inputs: Iterable[TensorSpec], shapes: Mapping[str, tuple[int, ...]]) -> Axes:
    """The numbers behind the names, from the shapes of a network's inputs."""
    return {
        _name(axis): size // _times(axis)
        for one in inputs
        for axis, size in zip(one.shape, shapes[one.name], strict=True)
        if isinstance(axis, str)
    }


def _times(axis: str) -> int:
    return int(axis.rpartition("*")[0] or 1)


def _name(axis: str) -> str:
    return axis.rpartition("*")[2]


class File(_Strict):
    """A file of a bundle or a plan, by its name in the folder."""

    name: str
    sha256: str
    bytes: int

    @classmethod
    def of(cls, path: Path) -> File:
        """What a file is now."""
        return cls(name=path.name, sha256=sha256_file(path), bytes=path.stat().st_size)


class Parity(_Strict):
    """ONNX Runtime against torch on fresh random inputs, over all outputs and several batches and sizes.

    `relative_error` is the largest error of an output over the largest value of that output, `max_abs_error` the
    largest error of any.
    """

    relative_error: float
    max_abs_error: float
    bound: float
    batches: tuple[int, ...]


class Network(_Strict):
    """One ONNX file, with its weights beside it where they are too large for one, and what goes in and out of it."""

    file: File
    data: File | None = None
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    parity: Parity

    @property
    def files(self) -> tuple[File, ...]:
        """All of it."""
        return (self.file,) if self.data is None else (self.file, self.data)

    @property
    def sha256(self) -> str:
        """Identifies the network with its weights."""
        return " ".join(file.sha256 for file in self.files)


class Tokenizer(_Strict):
    """A `tokenizers` JSON file, the text encoder's input it is for, and how prompts become fixed-length ids.

    template: what stands before and after a prompt, special tokens included; such a text is cut without an end token.
    pad_left: padding comes first.
    """

    input: str
    file: File
    max_length: int
    pad_token_id: int
    eos_token_id: int
    template: tuple[str, str] | None = None
    pad_left: bool = False


class Sizes(_Strict):
    """The images that the networks take, in pixels: sides from `least` to `most`, multiples of `multiple`."""

    width: int
    height: int
    least: int
    most: int
    multiple: int

    def __str__(self) -> str:
        if self.least == self.most:
            return f"{self.least} pixels"
        return f"{self.least} to {self.most} pixels in steps of {self.multiple}"

    def allows(self, side: int) -> bool:
        """Whether an image may have such a side."""
        return self.least <= side <= self.most and side % self.multiple == 0


class Defaults(_Strict):
    """What the model's own pipeline uses where nothing is said."""

    num_inference_steps: int
    guidance_scale: float
    strength: float


class Manifest(_Strict):
    """An exported model. `origin` is what `make engines MODEL=` made it of; `source` identifies its content.

    networks: `text_encoder`, `denoiser`, `vae_decoder` and, where images can be started from, `vae_encoder`; for
    feature caching `denoiser_deep`, which makes `features`, and `denoiser_shallow`, which predicts with them. The text
    encoder's outputs are inputs of the denoiser, by name; the others of its inputs are `sample`, `timestep` and, where
    it takes them, `time_ids` (height, width, crop, crop, height, width) and `guidance`, the scale.
    alphas_cumprod: the training schedule's ᾱ per timestep; empty for flow matching.
    guidance: `classifier_free` combines two evaluations; `in_graph` is given the conditioning of both branches (the
    negative one under names with `negative_`) and the scale, and combines them itself, where that is not linear;
    `embedded` is told the scale; `none` knows none.
    guidance_offset: what is added to the scale before two evaluations are combined.
    zero_negative: no negative prompt means zeros, not the embedding of no words.
    clip_skip: the largest that the text encoder can do.
    patch: latents per side of a token, for schedules that depend on the number of tokens.
    even_sigmas: noise levels are spaced evenly from 1 to 1/N before they are shifted.
    strength_up: the number of steps that a strength stands for is rounded up.
    """

    schema_version: Literal[2]
    model: str
    family: str
    origin: str
    source: str
    versions: dict[str, str]
    precision: Literal["fp32", "fp16", "bf16"]
    networks: dict[str, Network]
    tokenizers: tuple[Tokenizer, ...]
    scheduler: dict[str, Any]
    alphas_cumprod: tuple[float, ...]
    latent_channels: int
    vae_scale_factor: int
    sizes: Sizes
    guidance: Literal["classifier_free", "in_graph", "embedded", "none"]
    guidance_offset: float = 0.0
    zero_negative: bool
    clip_skip: int
    patch: int | None
    even_sigmas: bool
    strength_up: bool
    defaults: Defaults
    examples: tuple[str, ...]
    words: tuple[str, ...] = ()

    @property
    def negative_prompts(self) -> bool:
        """Whether there is a second branch that leads away from a text."""
        return self.guidance in ("classifier_free", "in_graph")

    @property
    def usual(self) -> tuple[str, ...]:
        """The networks that every runtime has."""
        return tuple(name for name in self.networks if name not in (DEEP, SHALLOW))

    @property
    def once(self) -> tuple[str, ...]:
        """The networks that run once per image; the others belong to lanes."""
        return tuple(name for name in self.usual if name != DENOISER)

    @property
    def caches(self) -> bool:
        """Whether the denoiser is there in two parts, too."""
        return SHALLOW in self.networks

    @property
    def conditioning(self) -> tuple[str, ...]:
        """What the text encoder makes for the denoiser."""
        return tuple(output.name for output in self.networks["text_encoder"].outputs)

    def latent_axes(self, width: int, height: int, batch: int) -> Axes:
        """The names of axes for images of some size in pixels."""
        factor = self.vae_scale_factor
        return {"batch": batch, "height": height // factor, "width": width // factor}

    @property
    def image_to_image(self) -> bool:
        """Whether an image can be started from."""
        return "vae_encoder" in self.networks

    def write(self, folder: Path) -> None:
        """Writes `manifest.json`; the last file of an export, so that a folder with one is complete.

        ExportError where its parts contradict each other, as they may after a change to a part.
        """
        found = contradictions(self)
        if found:
            raise ExportError(f"{self.model}: its manifest contradicts itself: {'; '.join(found)}")
        (folder / MANIFEST).write_text(json.dumps(self.model_dump(mode="json"), indent=1) + "\n")

    @classmethod
    def read(cls, folder: Path) -> Manifest:
        """Reads and checks the manifest of a bundle; BundleError when there is none or it is not understood."""
        path = folder / MANIFEST
        repair = f"make it again with `make engines MODEL={folder.name}`"
        if not path.is_file():
            raise BundleError(f"there is no exported model in {folder}: {repair}")
        try:
            manifest = cls.model_validate_json(path.read_bytes())
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(map(str, first["loc"])) or "the file"
            raise BundleError(f"{path} cannot be read ({where}: {first['msg']}): {repair}") from error
        found = contradictions(manifest)
        if found:
            raise BundleError(f"{path} contradicts itself ({'; '.join(found)}): {repair}")
        return manifest


def contradictions(manifest: Manifest) -> list[str]:
    """What does not fit together in a manifest, in words; nothing for a sound one.

    Every input of a network is given by somebody, everything that is made is taken, and shapes agree where networks
    meet: a name that is no input would otherwise be left out without a word. Absent networks are not asked for.
    """
    return [
        f"{subject}: {says}"
        for subject, says in (
            *_interfaces(manifest), *_guidance(manifest), *_shapes(manifest), *_tokens(manifest), *_numbers(manifest),
        )
    ]  # fmt: skip


_Found = Iterator[tuple[str, str]]
_TOLD = ("sample", "timestep", "time_ids", "guidance")  # the denoiser's inputs that are no text
NEGATIVE = "negative_"  # before the names of the other branch's texts, where a denoiser combines both itself


def _inputs(manifest: Manifest, network: str) -> tuple[str, ...]:
    return tuple(one.name for one in manifest.networks[network].inputs) if network in manifest.networks else ()


def _outputs(manifest: Manifest) -> dict[str, tuple[int | str, ...]]:
    """What the text encoder makes for the denoiser, with its shapes; of both branches where it is given both."""
    encoder = manifest.networks.get("text_encoder")
    found = {one.name: one.shape for one in encoder.outputs} if encoder else {}
    both = manifest.guidance == "in_graph"
    return found | ({f"{NEGATIVE}{name}": shape for name, shape in found.items()} if both else {})


def _interfaces(manifest: Manifest) -> _Found:
    """Names: each network's inputs and outputs are those that the runtime gives and takes."""
    networks = manifest.networks
    known = {
        "text_encoder": ({one.input for one in manifest.tokenizers}, {"clip_skip"}),
        DENOISER: ({"sample", "timestep", *_outputs(manifest)}, set(_TOLD)),
        DEEP: ({"sample", "timestep", *_outputs(manifest)}, set(_TOLD)),
        SHALLOW: ({"sample", "timestep", "features", *_outputs(manifest)}, set(_TOLD)),
        "vae_decoder": ({"latent_sample"}, set[str]()),
        "vae_encoder": ({"image"}, {"noise"}),
    }
    if (DEEP in networks) != (SHALLOW in networks):
        yield DENOISER, f"only one of the parts {DEEP} and {SHALLOW} is there"
    for name, network in networks.items():
        if name not in known:
            yield name, f"no network of a bundle; those are {', '.join(known)}"
            continue
        inputs = [one.name for one in network.inputs]
        needed, optional = known[name]
        if len(set(inputs)) < len(inputs):
            yield name, f"two inputs of one name among {', '.join(inputs)}"
        for missing in sorted(needed - set(inputs)):
            yield name, f"no input {missing}, which it is given"
        for extra in sorted(set(inputs) - needed - optional):
            yield name, f"an input {extra}, which nobody gives"


def _guidance(manifest: Manifest) -> _Found:
    told = "guidance" in _inputs(manifest, DENOISER)
    if DENOISER in manifest.networks and told != (manifest.guidance in ("embedded", "in_graph")):
        yield "guidance", f"{manifest.guidance}, and the denoiser has {'an' if told else 'no'} input guidance"
    skips = "clip_skip" in _inputs(manifest, "text_encoder")
    if manifest.clip_skip < 0 or (manifest.clip_skip and not skips):
        yield "clip_skip", f"{manifest.clip_skip}, and the text encoder has no input for it"


def _shapes(manifest: Manifest) -> _Found:
    """Axes: latents, pixels and embeddings have the same shape on both sides."""
    networks, factor = manifest.networks, manifest.vae_scale_factor
    latents = ("batch", manifest.latent_channels, "height", "width")
    pixels = ("batch", 3, f"{factor}*height", f"{factor}*width")
    wanted = {
        (DENOISER, "sample"): latents, (DENOISER, "timestep"): ("batch",), ("vae_decoder", "latent_sample"): latents,
        ("vae_decoder", "sample"): pixels, ("vae_encoder", "image"): pixels, ("vae_encoder", "noise"): latents,
        ("vae_encoder", "latent_sample"): latents, (DENOISER, "guidance"): ("batch",),
        (DENOISER, "time_ids"): ("batch", 6), ("text_encoder", "clip_skip"): ("batch",),
    }  # fmt: skip
    wanted |= {(DENOISER, name): shape for name, shape in _outputs(manifest).items()}
    wanted |= {("text_encoder", one.input): ("batch", one.max_length) for one in manifest.tokenizers}
    for name in {DENOISER, SHALLOW} & set(networks):
        if [one.shape for one in networks[name].outputs] != [latents]:
            yield name, f"its output must be one of shape {latents}"
    if manifest.caches and DEEP in networks:
        taken = [one.shape for one in networks[SHALLOW].inputs if one.name == "features"]
        if taken != [one.shape for one in networks[DEEP].outputs]:
            yield SHALLOW, f"it takes features of other shapes than {DEEP} makes"
    for name, network in networks.items():
        for one in (*network.inputs, *network.outputs):
            shape = wanted.get((name, one.name), one.shape)
            if one.shape != shape:
                yield name, f"{one.name} has the shape {one.shape}, not {shape}"


def _tokens(manifest: Manifest) -> _Found:
    for one in manifest.tokenizers:
        if not 1 <= one.max_length <= 10_000 or min(one.pad_token_id, one.eos_token_id) < 0:
            yield one.input, f"{one.max_length} tokens, padded with {one.pad_token_id}, ended with {one.eos_token_id}"


def _numbers(manifest: Manifest) -> _Found:
    sizes, alphas = manifest.sizes, manifest.alphas_cumprod
    sides = (sizes.least, sizes.width, sizes.height, sizes.most)
    if sizes.multiple < 1 or sizes.multiple % manifest.vae_scale_factor or any(one % sizes.multiple for one in sides):
        yield (
            "sizes",
            f"{sides} are not all multiples of {sizes.multiple}, or that is none of {manifest.vae_scale_factor}",
        )
    elif not 0 < sizes.least <= min(sides) <= max(sides) <= sizes.most:
        yield "sizes", f"{sizes.width}×{sizes.height} is not between {sizes.least} and {sizes.most}"
    if alphas and len(alphas) != manifest.scheduler.get("num_train_timesteps", len(alphas)):
        yield "alphas_cumprod", f"{len(alphas)} numbers for {manifest.scheduler['num_train_timesteps']} timesteps"
    if any(not 0 <= one <= 1 for one in alphas) or any(a < b for a, b in itertools.pairwise(alphas)):
        yield "alphas_cumprod", "not falling from 1 to 0"
    for name, network in manifest.networks.items():
        if not 0 <= network.parity.relative_error <= network.parity.bound:
            yield name, f"differs from torch by {network.parity.relative_error}, more than {network.parity.bound}"


def sha256_file(path: Path) -> str:
    """The sha256 of a file's content, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256_files(root: Path, paths: Iterable[Path]) -> str:
    """One sha256 over the names and contents of several files, in sorted order."""
    lines = sorted(f"{path.relative_to(root).as_posix()} {sha256_file(path)}" for path in paths)
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def check_file(path: Path, sha256: str, repair: str) -> Path:
    """The path of a file whose hash is known; BundleError when it is missing or not the same."""
    found = sha256_file(path) if path.is_file() else None
    return _checked(path, found, sha256, repair)


def read_checked(path: Path, sha256: str, repair: str) -> bytes:
    """As `check_file`, but the content, read once: what is deserialized is what was checked."""
    content = path.read_bytes() if path.is_file() else b""
    _checked(path, hashlib.sha256(content).hexdigest() if path.is_file() else None, sha256, repair)
    return content


def _checked(path: Path, found: str | None, sha256: str, repair: str) -> Path:
    if found is None:
        raise BundleError(f"{path} is missing: {repair}")
    if found != sha256:
        size = path.stat().st_size
        raise BundleError(f"{path} was altered or truncated ({size} bytes, sha256 differs): {repair}")
    return path
