"""`python -m export MODEL`: a diffusers model to a bundle of ONNX files with a manifest."""

from __future__ import annotations

import argparse
import errno
import json
import os
import re
import shutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from pydantic import ValidationError

from engines.devices import parse_devices, precision
from engines.errors import BundleError, EngineError, ExportError, ParameterError
from engines.manifest import Defaults, File, Manifest, Network, Sizes, Tokenizer, sha256_file, sha256_files
from engines.memory import require
from engines.store import BUILD, Bundle, bundle_name, locked, resuming
from export import UNUSED

if TYPE_CHECKING:
    from export.loading import Components, Source
    from export.networks import Exported

PACKAGES = ("torch", "diffusers", "transformers", "peft", "onnx", "onnxscript", "onnxruntime")
EMBEDDED = {"shapes": Path(__file__).parent / "shapes" / "model"}
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
FILES = (".json", ".safetensors", ".txt", ".model", ".bin")
BYTES = {"fp32": 4, "fp16": 2, "bf16": 2}


@dataclass(frozen=True)
class Asked:
    """What to export: a model's name and folder, LoRA files with their scales, and which sides images may have.

    `model` is what stands behind `make engines MODEL=`; without it, the folder does.
    """

    name: str
    folder: Path
    loras: tuple[tuple[Path, float], ...] = ()
    sides: tuple[int, int] | None = None
    allow_pickle: bool = False
    model: str | None = None

    @property
    def embedded(self) -> str | None:
        """The name of the embedded model that this is, with LoRA or without."""
        return next((name for name, folder in EMBEDDED.items() if folder == self.folder), None)

    @property
    def origin(self) -> str:
        """What to write behind `make engines MODEL=`, from anywhere, to get this."""
        words = [self.model or self.embedded or str(self.folder.absolute())]
        if self.loras:
            files = " ".join(f"{file.resolve()}:{scale:g}" for file, scale in self.loras)
            words.append(f'LORA="{files}"' if len(self.loras) > 1 else f"LORA={files}")
        if self.sides:
            words.append(f"SIZES={self.sides[0]}-{self.sides[1]}")
        return " ".join(words)

    def identity(self) -> str:
        """A hash over everything the export depends on: the model's files, our export code, the packages."""
        index, root = self.folder / "model_index.json", self.folder
        try:
            parts = set(json.loads(index.read_text()))
        except (ValueError, TypeError):
            parts = set()
        files = [index, *(path for part in sorted(parts - set(UNUSED)) for path in (root / part).rglob("*"))]
        own = Path(__file__).parent
        code = sha256_files(own, own.glob("*.py"))
        packages = " ".join(f"{name}={version(name)}" for name in PACKAGES)
        fused = "".join(f" +{sha256_file(file)}:{scale:g}" for file, scale in self.loras)
        sides = f" {self.sides[0]}-{self.sides[1]}" if self.sides else ""
        content = sha256_files(root, [path for path in files if path.is_file() and path.suffix in FILES])
        return f"{content} {code[:16]} {packages}{fused}{sides}"


def resolve(model: str, *, allow_pickle: bool = False) -> tuple[str, Path]:
    """What names a model from anywhere, and its diffusers folder: an embedded one, any folder, or one of the hub."""
    if model in EMBEDDED:
        return model, EMBEDDED[model]
    folder = Path(os.path.abspath(model))  # noqa: PTH100 - a link has a name of its own, which resolve() takes away
    if (folder / "model_index.json").is_file():
        if folder.name in EMBEDDED and folder != EMBEDDED[folder.name]:
            raise ExportError(f"{folder}: {folder.name} is the name of an embedded model: give the folder another one")
        return str(folder), folder
    if folder.is_dir():
        raise ExportError(f"{folder} is not a diffusers model: it has no model_index.json")
    if re.fullmatch(r"[\w.-]+/[\w.-]+", model) and not model.startswith("."):
        os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
        from export.loading import download

        return model, download(model, allow_pickle=allow_pickle)
    raise ExportError(
        f"unknown model {model!r}: use {', '.join(EMBEDDED)}, the folder of a diffusers model, or owner/name on the hub"
    )


def parse_loras(words: Sequence[str]) -> tuple[tuple[Path, float], ...]:
    """FILE or FILE:SCALE each."""
    found = []
    for word in words:
        file, _, scale = word.rpartition(":") if re.search(r":[-+.\w]*$", word) else (word, "", "1")
        path = Path(file)
        try:
            number = float(scale)
        except ValueError:
            raise ParameterError("lora", f"{word}: the scale behind the colon must be a number, as in 0.8") from None
        if not -10 <= number <= 10:
            raise ParameterError("lora", f"{word}: the scale must be between -10 and 10")
        if not path.is_file():
            raise ParameterError("lora", f"there is no LoRA file {path}")
        if path.suffix != ".safetensors":
            raise ParameterError("lora", f"{path}: LoRA files must be safetensors")
        found.append((path, number))
    return tuple(found)


def lora_name(words: Sequence[str]) -> str:
    """What a bundle's name has behind the model's: `+style:0.8`; the Makefile makes the same of the same words."""
    return "".join(f"+{Path(word).name.replace('.safetensors', '')}" for word in words)


def parse_sides(text: str | None) -> tuple[int, int] | None:
    """SIDE or LEAST-MOST in pixels."""
    if not text:
        return None
    match = re.fullmatch(r"(\d{1,5})(?:-(\d{1,5}))?", text)
    if not match or int(match[1]) > int(match[2] or match[1]):
        raise ParameterError("sizes", f"sizes must be SIDE or LEAST-MOST in pixels, such as 512-1024, not {text!r}")
    return int(match[1]), int(match[2] or match[1])


def up_to_date(target: Path, source: str) -> bool:
    """Whether an intact export of exactly this source exists."""
    try:
        manifest = Manifest.read(target)
    except BundleError:
        return False
    return manifest.source == source and not Bundle(target, manifest).damaged_sources()


def check_name(target: Path, asked: Asked, precision: str) -> None:
    """ExportError where the name of one model in fp16 is that of another one."""
    try:
        there = Manifest.read(target)
    except BundleError:
        return
    if there.precision != precision:
        raise ExportError(f"{target} holds {there.model} in {there.precision}: give the folder another name")


def sizes(asked: Asked, source: Source, configs: Components) -> Sizes:
    """The sides that the family can do, within those that were asked for."""
    can = source.family.sides(configs)
    least, most = asked.sides or (can.least, can.most)
    if asked.sides:
        known = source.family.sides(configs, full=True)
        if least % can.multiple or most % can.multiple or most > known.most or least < known.least:
            raise ParameterError(
                "sizes",
                f"sizes: this model's sides are multiples of {can.multiple} from {known.least} to {known.most}, "
                f"not {least}-{most}",
            )
    side = min(max(can.default, least), most)
    return Sizes(width=side, height=side, least=least, most=most, multiple=can.multiple)


def export(asked: Asked, target: Path, identity: str, precision: str) -> None:
    """Exports every network and writes the bundle; the manifest is written last and the folder appears whole.

    Networks that an interrupted run has finished are not exported again.
    """
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # it talks about optional packages while it is imported

    from tqdm import tqdm

    from export.families import Sides
    from export.loading import Lora, configs, open_source
    from export.networks import vae_factor
    from export.to_onnx import STAGES, export_network, memory

    loras = [Lora(file, scale) for file, scale in asked.loras]
    source = open_source(asked.folder, loras, allow_pickle=asked.allow_pickle)
    known = configs(source)
    refused = source.family.refused(known)
    if refused:
        raise ExportError(f"{asked.folder} cannot be exported: {refused}")
    images = sizes(asked, source, known)
    sides = Sides(images.width, images.least, images.most, images.multiple)
    factor = vae_factor(known)
    with resuming(target, f"{identity} {precision}") as partial:
        for scratch in partial.glob("*/"):
            shutil.rmtree(scratch)  # what a killed run was comparing
        wanted = source.family.networks
        networks = {name: done for name in wanted if (done := finished(partial, name))}
        missing = [name for name in wanted if name not in networks]
        types = {name: precision_of(source, known, wanted[name][0], precision) for name in missing}

        def enough(name: str) -> None:
            size = sum(source.parameters(part) for part in source.loaded_with(wanted[name][0])) * BYTES[types[name]]
            needed = memory(name, size, types[name], sides, factor)
            require(needed, f"exporting {name} of {asked.name}", "export it on a larger machine and copy build/")

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
        manifest(asked, identity, precision, source, known, images, networks, partial).write(partial)


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
    asked: Asked, identity: str, precision: str, source: Source, known: Components, images: Sizes,
    networks: dict[str, Network], folder: Path,
) -> Manifest:  # fmt: skip
    """The manifest; writes the tokenizers, which it has the hashes of."""
    from export.networks import vae_factor

    family, scheduler = source.family, known.scheduler
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
            )
        )  # fmt: skip
    skips = [one for one in networks["text_encoder"].inputs if one.name == "clip_skip"]
    alphas = getattr(scheduler, "alphas_cumprod", None)
    return Manifest(
        schema_version=2,
        model=asked.name,
        family=source.family_name,
        origin=asked.origin,
        source=identity,
        versions={package: version(package) for package in PACKAGES},
        precision=cast(Any, precision),
        networks=networks,
        tokenizers=tuple(tokenizers),
        scheduler=dict(scheduler.config),
        alphas_cumprod=() if alphas is None else tuple(alphas.tolist()),
        latent_channels=known.vae.config.latent_channels,
        vae_scale_factor=vae_factor(known),
        sizes=images,
        guidance=family.guidance(known),
        zero_negative=bool(known.config.get("force_zeros_for_empty_prompt", False)),
        clip_skip=known.text_encoder.config.num_hidden_layers - 1 if skips else 0,
        patch=family.patch,
        even_sigmas=family.even_sigmas,
        strength_up=family.strength_up,
        defaults=Defaults(**{**family.defaults, **DEFAULTS.get(asked.embedded or "", {})}),  # type: ignore[arg-type]
        examples=EXAMPLES.get(asked.embedded or "", OTHER_EXAMPLES),
    )


def main() -> int:
    """The command line; exit code 1 with one message when the export cannot be made."""
    parser = argparse.ArgumentParser(prog="python -m export", description=__doc__)
    parser.add_argument("model", help="shapes, the folder of a diffusers model, or owner/name on the hub")
    parser.add_argument("--lora", nargs="+", default=(), metavar="FILE[:SCALE]", help="LoRA files to fuse, in order")
    parser.add_argument("--sizes", metavar="LEAST-MOST", help="sides of images in pixels; default: half to double")
    parser.add_argument("--build", type=Path, default=BUILD, help="folder of the bundles")
    parser.add_argument("--devices", default="auto", help="where it will run, which says in what type")
    parser.add_argument("--allow-pickle", action="store_true", help="read weights that may run code when they are read")
    options = parser.parse_args()
    try:
        wanted = precision(parse_devices(options.devices))
        loras, sides = parse_loras(options.lora), parse_sides(options.sizes)
        model, folder = resolve(options.model, allow_pickle=options.allow_pickle)
        name = Path(model).name + lora_name(options.lora)
        asked = Asked(name, folder, loras, sides, options.allow_pickle, model)
        target = options.build / bundle_name(name, wanted)
        with locked(target):
            check_name(target, asked, wanted)
            source = asked.identity()
            if up_to_date(target, source):
                print(f"{target.name}: the export in {target} is up to date")
                return 0
            export(asked, target, source, wanted)
        print(f"{target.name}: exported to {target}")
    except EngineError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except OSError as error:
        advice = "free some space and run it again" if error.errno == errno.ENOSPC else "nothing was changed"
        print(f"error: the export could not be written ({error}): {advice}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("stopped; the same command goes on with the networks that are missing", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
