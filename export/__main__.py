"""`python -m export MODEL`: a diffusers model to a bundle of ONNX files with a manifest."""

from __future__ import annotations

import argparse
import errno
import os
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any, cast

from engines.devices import parse_devices, precision
from engines.errors import BundleError, EngineError, ExportError
from engines.manifest import Manifest, Tokenizer, sha256_file, sha256_files
from engines.store import BUILD, Bundle, bundle_name, locked, replacing

PACKAGES = ("torch", "diffusers", "transformers", "onnx", "onnxscript", "onnxruntime")
EMBEDDED = {"shapes": Path(__file__).parent / "shapes" / "model"}
EXAMPLES = {
    "shapes": (
        "a large red star at the left on blue background",
        "a small yellow ring in the center on black background",
        "a large green circle at the top right on white background",
        "a large white cross at the left and a small orange triangle at the right on purple background",
    )
}


def resolve(model: str) -> tuple[str, Path]:
    """The name and the diffusers folder of a model: an embedded one by name, or any folder."""
    if model in EMBEDDED:
        return model, EMBEDDED[model]
    folder = Path(model)
    if (folder / "model_index.json").is_file():
        return folder.resolve().name, folder
    if folder.is_dir():
        raise ExportError(f"{folder} is not a diffusers model: it has no model_index.json")
    raise ExportError(f"unknown model {model!r}: use {', '.join(EMBEDDED)}, or the folder of a diffusers model")


def source_identity(folder: Path) -> str:
    """A hash over everything the export depends on: the model's files, our export code, the packages."""
    files = [path for path in folder.rglob("*") if path.is_file() and path.suffix in (".json", ".safetensors", ".txt")]
    code = Path(__file__).parent
    own = sha256_files(code, [code / name for name in ("__main__.py", "models.py", "to_onnx.py")])
    packages = " ".join(f"{name}={version(name)}" for name in PACKAGES)
    return f"{sha256_files(folder, files)} {own[:16]} {packages}"


def up_to_date(target: Path, source: str) -> bool:
    """Whether an intact export of exactly this source exists."""
    try:
        manifest = Manifest.read(target)
    except BundleError:
        return False
    return manifest.source == source and not Bundle(target, manifest).damaged_sources()


def export(name: str, folder: Path, target: Path, source: str, precision: str) -> None:
    """Exports every network and writes the bundle; the manifest is written last and the folder appears whole."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # it talks about optional packages while it is imported

    from tqdm import tqdm

    from export.models import FAMILIES, load_pipeline
    from export.to_onnx import export_network

    pipeline = load_pipeline(folder, precision)
    family = type(pipeline).__name__
    with replacing(target) as partial:
        networks = {}
        for network, spec in (bar := tqdm(FAMILIES[family](pipeline).items(), desc="export", unit="network")):
            bar.set_postfix_str(network)
            networks[network] = export_network(network, spec, partial, precision)
        tokenizer = pipeline.tokenizer
        (partial / "tokenizer.json").write_text(tokenizer.backend_tokenizer.to_str())
        scheduler, vae = pipeline.scheduler, pipeline.vae.config
        size = pipeline.unet.config.sample_size * pipeline.vae_scale_factor
        Manifest(
            schema_version=1,
            model=name,
            family=family,
            origin=name if name in EMBEDDED else str(folder.resolve()),
            source=source,
            versions={package: version(package) for package in PACKAGES},
            precision=cast(Any, precision),
            networks=networks,
            tokenizer=Tokenizer(
                file="tokenizer.json",
                sha256=sha256_file(partial / "tokenizer.json"),
                max_length=tokenizer.model_max_length,
                pad_token_id=tokenizer.pad_token_id,
                eos_token_id=tokenizer.eos_token_id,
            ),
            scheduler=dict(scheduler.config),
            alphas_cumprod=tuple(scheduler.alphas_cumprod.tolist()),
            latent_channels=vae.latent_channels,
            vae_scale_factor=pipeline.vae_scale_factor,
            vae_scaling_factor=vae.scaling_factor,
            vae_shift_factor=getattr(vae, "shift_factor", None) or 0.0,
            width=size,
            height=size,
            examples=EXAMPLES.get(name, ()),
        ).write(partial)


def main() -> int:
    """The command line; exit code 1 with one message when the export cannot be made."""
    parser = argparse.ArgumentParser(prog="python -m export", description=__doc__)
    parser.add_argument("model", help="shapes, or the folder of a diffusers model")
    parser.add_argument("--build", type=Path, default=BUILD, help="folder of the bundles")
    parser.add_argument("--devices", default="auto", help="where it will run, which says in what type")
    options = parser.parse_args()
    try:
        wanted = precision(parse_devices(options.devices))
        name, folder = resolve(options.model)
        target = options.build / bundle_name(name, wanted)
        with locked(target):
            source = source_identity(folder)
            if up_to_date(target, source):
                print(f"{name}: the export in {target} is up to date")
                return 0
            export(name, folder, target, source, wanted)
        print(f"{name}: exported to {target}")
    except EngineError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except OSError as error:
        advice = "free some space and run it again" if error.errno == errno.ENOSPC else "nothing was changed"
        print(f"error: the export could not be written ({error}): {advice}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
