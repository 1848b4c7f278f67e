"""The export itself: every network of a model to ONNX, and the manifest, into one folder that appears whole."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from pydantic import ValidationError

from engines.errors import BundleError, ExportError, ParameterError
from engines.manifest import Defaults, File, Manifest, Network, Sizes, Tokenizer
from engines.memory import require
from engines.store import Bundle, resuming
from export.shapes.data import WORDS
from export.spec import PACKAGES, ExportSpec

if TYPE_CHECKING:
    from export.loading import Components, Source
    from export.networks import Exported

DEFAULTS = {"shapes": {"guidance_scale": 4.0}}
EXAMPLES = {
    "shapes": (
        "a large red star at the left on blue background",
        "a small yellow ring in the center on black background",
        "a large green circle at the top right on white background",
        "a large white cross at the left and a small orange triangle at the right on purple background",
    )
}
OTHER_EXAMPLES = (
    "a lighthouse on a cliff at dawn, oil painting",
    "a bowl of ripe cherries on a wooden table, soft window light",
    "a red bicycle leaning on a blue wall",
    "snow on a mountain village at night, warm windows",
)
BYTES = {"fp32": 4, "fp16": 2, "bf16": 2}


def up_to_date(target: Path, source: str) -> bool:
    """Whether an intact export of exactly this source exists."""
    try:
        manifest = Manifest.read(target)
    except BundleError:
        return False
    return manifest.source == source and not Bundle(target, manifest).damaged_sources()


def check_name(target: Path, spec: ExportSpec, precision: str) -> None:
    """ExportError where the name of one model in fp16 is that of another one."""
    try:
        there = Manifest.read(target)
    except BundleError:
        return
    if there.precision != precision:
        raise ExportError(f"{target} holds {there.model} in {there.precision}: give the folder another name")


def sizes(spec: ExportSpec, source: Source, configs: Components) -> Sizes:
    """The sides that the family can do, within those that were asked for."""
    can = source.family.sides(configs)
    least, most = spec.sides or (can.least, can.most)
    if spec.sides:
        known = source.family.sides(configs, full=True)
        if least % can.multiple or most % can.multiple or most > known.most or least < known.least:
            raise ParameterError(
                "sizes",
                f"sizes: this model's sides are multiples of {can.multiple} from {known.least} to {known.most}, "
                f"not {least}-{most}",
            )
    side = min(max(can.default, least), most)
    return Sizes(width=side, height=side, least=least, most=most, multiple=can.multiple)


def export(spec: ExportSpec, target: Path, identity: str, precision: str) -> None:
    """Exports every network and writes the bundle; the manifest is written last and the folder appears whole.

    Networks that an interrupted run has finished are not exported again.
    """
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # it talks about optional packages while it is imported

    from tqdm import tqdm

    from export.checks import check
    from export.families import Sides
    from export.loading import configs, open_source
    from export.lora import Lora
    from export.to_onnx import STAGES, export_network, memory

    loras = [Lora(file, scale) for file, scale in spec.loras]
    source = open_source(spec.folder, loras, allow_pickle=spec.allow_pickle, checkpoint=spec.checkpoint)
    known = configs(source)
    images = sizes(spec, source, known)
    sides = Sides(images.width, images.least, images.most, images.multiple)
    check(source, known, sides)
    factor = source.family.latents(known).factor
    with resuming(target, f"{identity} {precision}") as partial:
        for scratch in partial.glob("*/"):
            shutil.rmtree(scratch)  # what a killed run was comparing
        wanted = networks_of(spec, source, known)
        networks = {name: done for name in wanted if (done := finished(partial, name))}
        missing = [name for name in wanted if name not in networks]
        types = {name: precision_of(source, known, wanted[name][0], precision) for name in missing}

        def enough(name: str) -> None:
            size = sum(source.parameters(part) for part in source.loaded_with(wanted[name][0])) * BYTES[types[name]]
            needed = memory(name, size, types[name], sides, factor)
            require(needed, f"exporting {name} of {spec.name}", "export it on a larger machine and copy build/")

        for name in missing:  # what cannot be finished does not begin
            enough(name)
        with tqdm(total=len(STAGES) * len(wanted), desc="export", unit="step") as bar:
            for name in missing:

                def stage(entered: str, name: str = name) -> None:
                    bar.set_description(f"{name} {entered}", refresh=False)
                    bar.update(len(STAGES) * len(networks) + STAGES.index(entered) - bar.n)
                    bar.refresh()

                enough(name)
                parts, make = wanted[name]
                exported = exporter(make, source, parts, types[name])
                networks[name] = export_network(name, exported, partial, sides, factor, stage)
                (partial / f"{name}.done").write_text(networks[name].model_dump_json())
            bar.set_description("export", refresh=False)
            bar.update(bar.total - bar.n)
        for name in wanted:
            (partial / f"{name}.done").unlink()
        networks = {name: networks[name] for name in wanted}
        manifest(spec, identity, precision, source, known, images, networks, partial).write(partial)


def networks_of(
    spec: ExportSpec, source: Source, configs: Components
) -> dict[str, tuple[tuple[str, ...], Callable[[Any], Exported]]]:
    """What to export, by name; ExportError where the denoiser cannot be cut as it should be."""
    family = source.family
    reason = family.uncacheable(configs) if spec.cache else None
    if reason:
        raise ExportError(f"{spec.name} cannot be exported for feature caching: {reason}; leave out --cache (CACHE=1)")
    return {**family.networks, **(family.cached if spec.cache else {})}


def precision_of(source: Source, known: Components, parts: Sequence[str], precision: str) -> str:
    """The type of one network: a VAE that overflows in fp16 is exported in float32, as diffusers runs it."""
    wide = source.family.wide_vae and "vae" in parts and known.vae.config.force_upcast
    return "fp32" if wide and precision == "fp16" else precision


def exporter(
    make: Callable[[Components], Exported], source: Source, parts: Sequence[str], precision: str
) -> Callable[[], Exported]:
    """What loads a network: nobody but who calls it holds its weights, which are to go before others come."""
    from export.loading import load

    return lambda: make(load(source, parts, precision))


def finished(partial: Path, network: str) -> Network | None:
    """A network that an earlier run has exported, if its files are still what they were."""
    try:
        done = Network.model_validate_json((partial / f"{network}.done").read_text())
    except (OSError, ValidationError):
        return None
    return done if all(File.of(partial / file.name) == file for file in done.files) else None


def manifest(
    spec: ExportSpec, identity: str, precision: str, source: Source, known: Components, images: Sizes,
    networks: dict[str, Network], folder: Path,
) -> Manifest:  # fmt: skip
    """The manifest; writes the tokenizers, which it has the hashes of."""
    from export.checks import alphas_of

    family, scheduler = source.family, known.scheduler
    latents = family.latents(known)
    tokenizers = []
    for text in family.texts:
        tokenizer = getattr(known, text.tokenizer, None)
        if tokenizer is None:
            continue
        path = folder / f"{text.tokenizer}.json"
        path.write_text(tokenizer.backend_tokenizer.to_str())
        tokenizers.append(
            Tokenizer(
                input=text.input, file=File.of(path), max_length=text.tokens(tokenizer),
                pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id,
                template=text.template(tokenizer) if text.template else None, pad_left=text.pad_left(tokenizer),
            )
        )  # fmt: skip
    skips = [one for one in networks["text_encoder"].inputs if one.name == "clip_skip"]
    return Manifest(
        schema_version=2,
        model=spec.name,
        family=source.family_name,
        origin=spec.origin,
        source=identity,
        versions={package: version(package) for package in PACKAGES},
        precision=cast(Any, precision),
        networks=networks,
        tokenizers=tuple(tokenizers),
        scheduler={**scheduler.config, **family.scheduler},
        alphas_cumprod=alphas_of(scheduler),
        latent_channels=latents.channels,
        vae_scale_factor=latents.factor,
        sizes=images,
        guidance=family.guidance(known),
        guidance_offset=family.guidance_offset,
        zero_negative=bool(known.config.get("force_zeros_for_empty_prompt", False)),
        clip_skip=known.text_encoder.config.num_hidden_layers - 1 if skips else 0,
        patch=family.patch,
        even_sigmas=family.even_sigmas,
        strength_up=family.strength_up,
        defaults=Defaults(**{**family.defaults, **DEFAULTS.get(spec.embedded or "", {})}),  # type: ignore[arg-type]
        examples=EXAMPLES.get(spec.embedded or "", OTHER_EXAMPLES),
        words=WORDS if spec.embedded == "shapes" else (),
    )
