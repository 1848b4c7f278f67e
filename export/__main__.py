"""`python -m export MODEL`: a diffusers model to a bundle of ONNX files with a manifest."""

from __future__ import annotations

import errno
import sys
import traceback
from pathlib import Path

from engines.command import MEMORY, Parser
from engines.devices import parse_devices, precision
from engines.errors import EngineError
from engines.store import BUILD, bundle_name, locked
from export.bundle import check_name, export, up_to_date
from export.spec import (
    EMBEDDED,
    ExportSpec,
    cache_name,
    checkpoint_of,
    lora_name,
    model_name,
    parse_loras,
    parse_sides,
    resolve,
)


def main() -> int:
    """The command line; exit code 1 with one message when the export cannot be made."""
    parser = Parser(prog="python -m export", description=__doc__)
    parser.add_argument("model", help="shapes, a diffusers folder, a checkpoint file, or owner/name on the hub")
    parser.add_argument("--config", type=Path, metavar="FOLDER", help="a diffusers folder with the configs of a file")
    parser.add_argument("--lora", nargs="+", default=(), metavar="FILE[:SCALE]", help="LoRA files to fuse, in order")
    parser.add_argument("--sizes", metavar="LEAST-MOST", help="sides of images in pixels; default: half to double")
    parser.add_argument("--cache", action="store_true", help="with the parts of a UNet that cache_interval needs")
    parser.add_argument("--build", type=Path, default=BUILD, help="folder of the bundles")
    parser.add_argument("--devices", default="auto", help="where it will run, which says in what type")
    parser.add_argument("--allow-pickle", action="store_true", help="read weights that may run code when they are read")
    parser.add_argument("--debug", action="store_true", help="show where an error comes from")
    options = parser.parse_args()
    try:
        wanted = precision(parse_devices(options.devices))
        loras, sides = parse_loras(options.lora), parse_sides(options.sizes)
        model, folder = resolve(options.model, allow_pickle=options.allow_pickle, config=options.config)
        name = model_name(model) + lora_name(options.lora) + cache_name(options.cache)
        checkpoint = None if model in EMBEDDED else checkpoint_of(model)
        spec = ExportSpec(name, folder, loras, sides, options.allow_pickle, model, checkpoint, options.cache)
        target = options.build / bundle_name(name, wanted)
        with locked(target):
            check_name(target, spec, wanted)
            source = spec.identity()
            if up_to_date(target, source):
                print(f"{target.name}: the export in {target} is up to date")
                return 0
            export(spec, target, source, wanted)
        print(f"{target.name}: exported to {target}")
    except EngineError as error:
        if options.debug:
            traceback.print_exc()
        print(f"error: {error}", file=sys.stderr)
        return 1
    except OSError as error:
        advice = "free some space and run it again" if error.errno == errno.ENOSPC else "nothing was changed"
        print(f"error: the export could not be written ({error}): {advice}", file=sys.stderr)
        return 1
    except MemoryError:
        print(f"error: {MEMORY}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("stopped; the same command goes on with the networks that are missing", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
