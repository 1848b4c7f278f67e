"""Where exported models and compiled plans live: content-keyed, locked, and never half written.

    build/<model>/manifest.json, *.onnx, tokenizer.json      what `export` makes: a *bundle*
    build/<model>/plans/<key>/plan.json, <file>              what `engines build` makes of it for one kind of machine

A folder appears under its final name by one rename after everything in it was written.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from filelock import FileLock
from pydantic import BaseModel, ConfigDict, ValidationError

from engines.errors import BundleError, DeviceError
from engines.manifest import MANIFEST, File, Manifest, Parity, Tokenizer, check_file, read_checked

BUILD = Path(__file__).resolve().parent.parent / "build"
PLAN = "plan.json"
PARTIAL = ".partial-"


class Plan(BaseModel):
    """The sidecar of a compiled network: all that its key was made of, in clear, and the hashes of its files.

    `data` has weights that are too large for the file itself. `parity` is that of another runtime against ONNX Runtime.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    schema_version: Literal[2]
    network: str
    key: str
    fields: dict[str, str]
    file: File
    data: File | None = None
    build_seconds: float
    parity: Parity | None = None

    @property
    def files(self) -> tuple[File, ...]:
        """All of it."""
        return (self.file,) if self.data is None else (self.file, self.data)

    @property
    def bytes(self) -> int:
        """Of all files."""
        return sum(file.bytes for file in self.files)


def bundle_name(model: str, precision: str) -> str:
    """The folder of a model below `build`: one bundle per precision."""
    return model if precision == "fp32" else f"{model}-{precision}"


def plan_key(fields: Mapping[str, str]) -> str:
    """The key of a plan: a hash of everything that a plan depends on."""
    return hashlib.sha256(json.dumps(dict(sorted(fields.items()))).encode()).hexdigest()[:16]


@contextmanager
def replacing(folder: Path) -> Iterator[Path]:
    """A new folder to fill, which takes the place of `folder` when the block ends, and vanishes when it raises."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=PARTIAL, dir=folder.parent))
    try:
        yield partial
        partial.chmod(0o755)
        for path in partial.rglob("*"):
            if path.is_file():
                _flush(path)
        old = partial.with_name(f"{partial.name}-old")
        if folder.exists():
            os.replace(folder, old)
        try:
            os.replace(partial, folder)
        except BaseException:
            if old.exists():
                os.replace(old, folder)
            raise
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


@contextmanager
def resuming(folder: Path, key: str) -> Iterator[Path]:
    """As `replacing`, but what was finished stays for the same key when the process is interrupted or killed.

    It stays, too, when the machine is what fails, with a DeviceError.
    """
    kept = folder.parent / f"{PARTIAL}{folder.name}-{hashlib.sha256(key.encode()).hexdigest()[:16]}"
    kept.mkdir(parents=True, exist_ok=True)
    try:
        yield kept
        with replacing(folder) as partial:
            for path in kept.iterdir():
                os.replace(path, partial / path.name)
    except DeviceError:
        with suppress(OSError):
            kept.rmdir()  # if nothing is in it yet
        raise
    except Exception:
        shutil.rmtree(kept, ignore_errors=True)
        raise
    kept.rmdir()


def _flush(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """One process at a time may change `folder`; others wait."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.parent / f".{folder.name}.lock"):
        yield


def delete_leftovers(build: Path) -> list[Path]:
    """Deletes what killed exports and builds left in a folder of bundles, after running ones have ended."""
    found = list(build.glob(f"{PARTIAL}*"))
    with ExitStack() as locks:
        for lock in sorted(build.glob(".*.lock")):
            locks.enter_context(FileLock(lock))
        leftovers = [path for path in found if path.exists()]
        for path in leftovers:
            shutil.rmtree(path)
    return leftovers


@dataclass(frozen=True)
class Bundle:
    """An exported model on disk."""

    folder: Path
    manifest: Manifest

    @classmethod
    def open(cls, model: str, build: Path = BUILD, precision: str = "fp32") -> Bundle:
        """The bundle of a model's name below `build`, or of a path to a bundle; BundleError when there is none."""
        folder = Path(model) if Path(model, MANIFEST).is_file() else build / bundle_name(model, precision)
        if not (folder / MANIFEST).is_file():
            known = ", ".join(path.parent.name for path in sorted(build.glob(f"[!.]*/{MANIFEST}"))) or "none yet"
            raise BundleError(
                f"there is no exported model {model!r} (exported: {known}): make it with "
                f"`make engines MODEL={model}{_devices(precision)}`"
            )
        return cls(folder, Manifest.read(folder))

    @property
    def command(self) -> str:
        """The command that exports and compiles this model."""
        return f"`make engines MODEL={self.manifest.origin}{_devices(self.manifest.precision)}`"

    @property
    def repair(self) -> str:
        """The command that makes this bundle again."""
        return f"make it again with {self.command}"

    def onnx(self, network: str) -> Path:
        """The ONNX file of a network, checked against the manifest with what it refers to."""
        files = self.manifest.networks[network].files
        paths = [check_file(self.folder / file.name, file.sha256, self.repair) for file in files]
        return paths[0]

    def tokenizer(self, spec: Tokenizer) -> bytes:
        """A tokenizer's JSON, checked against the manifest."""
        return read_checked(self.folder / spec.file.name, spec.file.sha256, self.repair)

    def plans(self) -> dict[str, Plan]:
        """All plans of this bundle by key whose sidecars can be trusted; the others are rebuilt or left to `gc`."""
        found = {}
        for path in sorted((self.folder / "plans").glob(f"*/{PLAN}")):
            try:
                plan = Plan.model_validate_json(path.read_bytes())
            except ValidationError:
                continue
            if plan.key == plan_key(plan.fields) == path.parent.name:
                found[plan.key] = plan
        return found

    def plan_folder(self, key: str) -> Path:
        """Where the plan of a key lives."""
        return self.folder / "plans" / key

    def plan(self, network: str, fields: Mapping[str, str]) -> Plan:
        """The compiled network for these fields; BundleError names what differs and the repair."""
        plan = self.plans().get(plan_key(fields))
        if plan is None:
            reasons = "; ".join(self.explain(network, fields))
            raise BundleError(f"no compiled {network} for this machine ({reasons}): build it with {self.command}")
        return plan

    def plan_content(self, plan: Plan) -> bytes:
        """Its file, with all files checked against the sidecar; `data` lies beside it in the plan's folder."""
        folder, repair = self.plan_folder(plan.key), f"build it again with {self.command}"
        if plan.data is not None:
            check_file(folder / plan.data.name, plan.data.sha256, repair)
        return read_checked(folder / plan.file.name, plan.file.sha256, repair)

    def plan_file(self, plan: Plan) -> Path:
        """The path of its one file, checked against the sidecar, for a runtime that reads it itself."""
        repair = f"build it again with {self.command}"
        return check_file(self.plan_folder(plan.key) / plan.file.name, plan.file.sha256, repair)

    def explain(self, network: str, fields: Mapping[str, str]) -> list[str]:
        """Why no existing plan of a network fits, field by field against the nearest one; empty when one fits."""
        plans, folder = self.plans(), self.plan_folder(plan_key(fields))
        if folder.is_dir() and folder.name not in plans:
            return [f"{folder / PLAN} is missing or damaged"]
        candidates = [plan for plan in plans.values() if plan.network == network]
        if not candidates:
            return [f"no plan of {network} was ever built here"]
        differences = [_differences(plan.fields, fields) for plan in candidates]
        return min(differences, key=len)

    def add_plan(
        self, network: str, fields: Mapping[str, str], sources: Sequence[Path], seconds: float,
        parity: Parity | None = None,
    ) -> Plan:  # fmt: skip
        """Takes a compiled file into the store, and after it what it refers to."""
        key = plan_key(fields)
        with replacing(self.plan_folder(key)) as partial:
            files = [File.of(Path(shutil.move(source, partial / source.name))) for source in sources]
            plan = Plan(
                schema_version=2, network=network, key=key, fields=dict(fields), file=files[0],
                data=files[1] if len(files) > 1 else None, build_seconds=round(seconds, 3), parity=parity,
            )  # fmt: skip
            (partial / PLAN).write_text(json.dumps(plan.model_dump(mode="json"), indent=1) + "\n")
        return plan

    def has_intact_plan(self, fields: Mapping[str, str]) -> bool:
        """Whether a plan for these fields exists and its files are what its sidecar says."""
        plan = self.plans().get(plan_key(fields))
        return plan is not None and not _damaged(self._files_of(plan), "")

    def _files_of(self, plan: Plan) -> Iterator[tuple[Path, str]]:
        return ((self.plan_folder(plan.key) / file.name, file.sha256) for file in plan.files)

    def damaged_sources(self) -> list[str]:
        """One message per exported file that is not what the manifest says."""
        files = [file for network in self.manifest.networks.values() for file in network.files]
        files += [tokenizer.file for tokenizer in self.manifest.tokenizers]
        return _damaged(((self.folder / file.name, file.sha256) for file in files), self.repair)

    def problems(self) -> list[str]:
        """One message per file of the bundle or of its plans that is not what its record says."""
        plans, repair = self.plans(), f"build it again with {self.command}"
        folders = [path for path in sorted((self.folder / "plans").glob("[!.]*")) if path.name not in plans]
        sidecars = [f"{path / PLAN} is missing or damaged: {repair}" for path in folders]
        files = (file for plan in plans.values() for file in self._files_of(plan))
        return self.damaged_sources() + sidecars + _damaged(files, repair)

    def garbage(self, wanted: set[str]) -> list[Path]:
        """Plan folders with other keys than the wanted ones, and leftovers of killed builds of plans."""
        return [p for p in (self.folder / "plans").glob("*") if p.is_dir() and p.name not in wanted]


def _devices(precision: str) -> str:
    return {"fp32": "", "fp16": " DEVICES=cuda:0"}.get(precision, f" DEVICES=cuda:0@{precision}")


def _damaged(files: Iterable[tuple[Path, str]], repair: str) -> list[str]:
    found = []
    for path, sha256 in files:
        try:
            check_file(path, sha256, repair)
        except BundleError as error:
            found.append(str(error))
    return found


def _differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    names = sorted({*old, *new})
    return [
        f"{name}: built for {old.get(name)}, now {new.get(name)}" for name in names if old.get(name) != new.get(name)
    ]
