"""`python -m engines list|build|verify|explain|gc`: compiled plans on this machine."""

from __future__ import annotations

import argparse
import shutil
import sys
from pathlib import Path

from tqdm import tqdm

from engines import choice
from engines.command import Parser, exit_code
from engines.devices import parse_devices, precision
from engines.errors import BundleError
from engines.load import build_missing, check, wanted
from engines.manifest import MANIFEST
from engines.runtimes import PRECISIONS, RUNTIMES
from engines.store import BUILD, Bundle, bundle_name, delete_leftovers, locked, plan_key


class Bars:
    """The phases of a TensorRT build as progress bars."""

    def __init__(self) -> None:
        self._bars: dict[str, tqdm] = {}

    def __enter__(self) -> Bars:
        return self

    def __exit__(self, *_: object) -> None:
        for bar in self._bars.values():
            bar.close()

    def __call__(self, phase: str, done: int, steps: int) -> None:
        """`done` of the steps of a phase."""
        bar = self._bars.get(phase) or self._bars.setdefault(phase, tqdm(total=steps, desc=phase, leave=False))
        bar.update(done - bar.n)
        if done >= steps:
            self._bars.pop(phase).close()


def bundles(options: argparse.Namespace) -> list[Bundle]:
    """The named bundle, or every bundle."""
    if options.model:
        found = [options.build / bundle_name(options.model, one) for one in PRECISIONS]
        return [Bundle.open(str(folder)) for folder in found if (folder / MANIFEST).is_file()] or [
            Bundle.open(options.model, options.build)
        ]
    return [Bundle.open(str(path.parent)) for path in sorted(options.build.glob(f"[!.]*/{MANIFEST}"))]


def list_(options: argparse.Namespace) -> int:
    """What is exported and compiled, and whether it fits this machine."""
    found = bundles(options)
    if not found:
        print(f"nothing is exported in {options.build} yet: start with `make engines`")
    for bundle in found:
        manifest = bundle.manifest
        print(f"{manifest.model}  {manifest.family}  {manifest.precision}  {manifest.sizes}")
        current = {plan_key(fields) for several in wanted(bundle).values() for fields in several}
        for key, plan in bundle.plans().items():
            fits = "fits this machine" if key in current else "for another machine, version or export"
            print(f"  {key}  {plan.network:<12}  {plan.bytes / 1e6:6.1f} MB  {plan.fields['runtime']}  {fits}")
    return 0


def build(options: argparse.Namespace) -> int:
    """Compiles what is missing or damaged."""
    lanes = parse_devices(options.devices)  # refuses unknown devices before any work
    check(lanes)
    bundle = Bundle.open(options.model, options.build, precision(lanes))
    damaged = bundle.damaged_sources()
    if damaged:
        raise BundleError(damaged[0])
    several = choice.runtimes(bundle) if options.devices == "auto" and lanes[0].device == "cpu" else ()
    for runtime in several or (lanes[0].runtime,):
        used = choice.on(runtime, lanes) if several else lanes
        with Bars() as bars:
            built = build_missing(bundle, used, bars)
        title = f" for {RUNTIMES[runtime].title}" if len(several) > 1 else ""
        for network, plan in built.items():
            state = f"compiled{title} in {plan.build_seconds:.1f} s" if plan else f"is up to date{title}"
            print(f"{bundle.manifest.model}: {network} {state}")
    if len(several) > 1:
        known = choice.Measured.read(bundle)
        if known is None or not known.of(bundle, lanes):
            known = choice.measure(bundle, lanes)
        print(f"{bundle.manifest.model}: auto runs on {RUNTIMES[known.fastest(bundle)].title} ({known})")
    return 0


def verify(options: argparse.Namespace) -> int:
    """Hashes every file of bundles and plans against its record."""
    problems = [problem for bundle in bundles(options) for problem in bundle.problems()]
    print("\n".join(problems) if problems else "every file is what its record says")
    return 1 if problems else 0


def explain(options: argparse.Namespace) -> int:
    """Per network, which plan is used here, or why none fits."""
    missing = 0
    for bundle in bundles(options):
        for network, several in wanted(bundle).items():
            name = f"{bundle.folder.name}/{network}"
            parity = bundle.manifest.networks[network].parity
            if not several:
                print(f"{name}: no GPU here that a plan could be for")
            for fields in several:
                reasons = bundle.explain(network, fields)
                missing += bool(reasons)
                print(f"{name}: {'; '.join(reasons) if reasons else 'uses plan ' + plan_key(fields)}")
                print(f"  ONNX Runtime against torch: {parity.relative_error:.1e} of the output's scale")
                plan = bundle.plans().get(plan_key(fields))
                if plan is not None and plan.parity is not None:
                    print(f"  this plan against ONNX Runtime: {plan.parity.relative_error:.1e} of the output's scale")
                for field, value in fields.items():
                    print(f"  {field:<13} {value}")
    return 1 if missing else 0


def gc(options: argparse.Namespace) -> int:
    """Deletes plans that fit nothing here, and leftovers of killed builds."""
    found = bundles(options)
    for bundle in found:
        with locked(bundle.folder):
            used = {plan_key(fields) for several in wanted(bundle).values() for fields in several}
            for path in bundle.garbage(used):
                shutil.rmtree(path)
                print(f"deleted {path}")
    for build in sorted({options.build, *(bundle.folder.parent for bundle in found)}):
        for path in delete_leftovers(build):
            print(f"deleted {path}")
    return 0


COMMANDS = {"list": list_, "build": build, "verify": verify, "explain": explain, "gc": gc}


def main() -> int:
    """The command line; exit code 1 with one message on any error."""
    parser = Parser(prog="python -m engines", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    for name, command in COMMANDS.items():
        sub = commands.add_parser(name, help=command.__doc__)
        sub.add_argument("model", nargs="?", default="shapes" if name == "build" else None, help="default: all")
        sub.add_argument("--build", type=Path, default=BUILD, help="folder of the bundles")
        if name == "build":
            sub.add_argument("--devices", default="auto", help="auto, cpu, cpu*LANES, cuda:0,cuda:1, cuda:0*LANES")
    options = parser.parse_args()
    stopped = "stopped; what was compiled stays, and the same command goes on"
    return exit_code(lambda: COMMANDS[options.command](options), stopped)


if __name__ == "__main__":
    sys.exit(main())
