"""What a node needs before a replica can load: the bundle, its compiled engines, and a store of its own."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path

from engines.devices import parse_devices, precision
from engines.errors import EngineError
from engines.load import build_missing, check
from engines.store import Bundle, bundle_name, locked, replacing
from runtime.serve.ray.settings import ModelSettings, Settings

log = logging.getLogger("runtime.serve")
OWNER = ".application.json"


def prepare(model: ModelSettings, settings: Settings) -> None:
    """Copies the bundle from the shared store where this node lacks it, and compiles what is missing for its devices.

    Several replicas of a node wait for the first. BundleError where neither this node nor the store has the model,
    EngineError where its folder has another name than the model in it.
    """
    lanes = parse_devices(model.devices)
    check(lanes)
    kind = precision(lanes)
    folder = settings.build / bundle_name(model.name, kind)
    if settings.store is not None:
        with locked(folder):
            if not folder.exists():
                source = Bundle.open(model.model, settings.store, kind).folder
                with replacing(folder) as partial:
                    shutil.copytree(source, partial, dirs_exist_ok=True)
                log.info("copied %s from %s", model.name, source)
    bundle = Bundle.open(model.model, settings.build, kind)
    if bundle.manifest.model != model.name:  # the ingress chooses by the one, and the replica answers by the other
        raise EngineError(
            f"{bundle.folder} holds the model {bundle.manifest.model!r}, not {model.name!r}: name the folder after its "
            "model"
        )
    built = build_missing(bundle, lanes)
    for network, plan in built.items():
        if plan is not None:
            log.info("%s: %s compiled in %.1f s", model.name, network, plan.build_seconds)


def claim(build: Path, application: str, cluster: str, alive: Callable[[str], bool]) -> None:
    """Writes down that an application of a cluster uses a store; EngineError where another one that is alive does.

    Two would replace each other's compiled engines, and share devices that neither knows of.
    """
    build.mkdir(parents=True, exist_ok=True)
    path = build / OWNER
    with locked(path):
        known = json.loads(path.read_text()) if path.exists() else None
        if known and known["cluster"] == cluster and known["application"] != application:
            other = known["application"]
            if alive(other):
                raise EngineError(
                    f"the application {other!r} of this cluster uses {build}: add the model to its config, or give "
                    f"{application!r} a folder of its own with build"
                )
        path.write_text(json.dumps({"application": application, "cluster": cluster}))
