"""What a cluster serves: the models, what a replica of each owns, and how many there may be. No ray in here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from engines.devices import parse_devices
from engines.errors import EngineError, ParameterError
from engines.store import BUILD
from runtime.serve.access import Access
from runtime.serve.limits import Limits

SPARE_REQUESTS = 4  # beside images, so that metrics and health of a busy replica are answered


class Strict(BaseModel):
    """Unknown fields are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class ModelSettings(Strict):
    """A model and its replicas. `devices` are those of one replica, numbered within what Ray gives it.

    `replicas` is how many there are at least and at most. `seconds` is how many device-seconds of accepted work one
    lane should have before another replica is started; `up` and `down` are how long that must be so.
    """

    model: str = "shapes"
    devices: str = "cpu*2"
    scheduler: str | None = None
    replicas: tuple[int, int] = (1, 1)
    seconds: float = Field(default=2.0, gt=0)
    up: float = Field(default=5.0, ge=0)
    down: float = Field(default=60.0, ge=0)

    @model_validator(mode="after")
    def _usable(self) -> ModelSettings:
        least, most = self.replicas
        if not 1 <= least <= most:
            raise ValueError(f"replicas must be a range from 1 on, as 1-4, not {least}-{most}")
        if self.devices == "auto":
            raise ValueError("a replica owns named devices: write cpu*2 or cuda:0,cuda:1, not auto")
        return self

    @property
    def name(self) -> str:
        """What requests call it: the last part of a bundle's path."""
        return Path(self.model).name

    @property
    def lanes(self) -> int:
        """Of one replica."""
        return len(parse_devices(self.devices))

    @property
    def resources(self) -> dict[str, float]:
        """What one replica owns on one node, in Ray's terms: a GPU for each card, a core for each lane and thread."""
        lanes = parse_devices(self.devices)
        gpus = {lane.gpu for lane in lanes} - {None}
        if gpus and gpus != set(range(len(gpus))):
            raise ParameterError("devices", f"{self.devices}: Ray numbers the GPUs of a replica from cuda:0 on")
        if gpus:
            return {"CPU": 1.0, "GPU": float(len(gpus))}
        return {"CPU": float(sum(max(lane.threads, 1) for lane in lanes) if len(lanes) == 1 else len(lanes))}


class Settings(Strict):
    """An application. `store` is a shared folder of bundles that nodes copy theirs from; None: `build` has them.

    `keys`, `hosts` and `origins` are those of `runtime.serve.access.Access`; `revision` is any text whose change
    starts all replicas anew, for an upgrade of what is not in here. `ingresses` own the HTTP requests, at most one on
    a node; None: one on each.
    """

    models: tuple[ModelSettings, ...] = Field(default=(ModelSettings(),), min_length=1)
    build: Path = BUILD
    store: Path | None = None
    limits: dict[str, float] = {}
    keys: tuple[str, ...] = ()
    hosts: tuple[str, ...] = ()
    origins: tuple[str, ...] = ()
    addresses: bool = False
    revision: str = ""
    ingresses: int | None = Field(default=None, ge=1)

    @model_validator(mode="after")
    def _usable(self) -> Settings:
        names = [model.name for model in self.models]
        if len(set(names)) < len(names):
            raise ValueError(f"every model may be listed once, not {', '.join(names)}")
        known = {field.name for field in fields(Limits)}
        if unknown := self.limits.keys() - known:
            raise ValueError(f"there is no limit {min(unknown)!r}: use {', '.join(sorted(known))}")
        return self

    @property
    def served(self) -> Limits:
        """The limits of every replica, and of the ingress."""
        given = {name: type(getattr(Limits, name))(value) for name, value in self.limits.items()}
        return Limits(**given)

    @property
    def access(self) -> Access:
        """Who may ask."""
        return Access(self.keys, self.hosts, self.origins, self.addresses)


def read_settings(given: Mapping[str, Any]) -> Settings:
    """Settings of a config file; ParameterError names the first field that cannot be used."""
    try:
        return Settings.model_validate(dict(given))
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False)[0]
        name = ".".join(map(str, first["loc"])) or "the application"
        message = first["msg"].removeprefix("Value error, ")
        raise ParameterError(name, f"{name}: {message}") from None


def check_nodes(settings: Settings, nodes: Sequence[Mapping[str, float]]) -> None:
    """EngineError for a model whose replica fits on no node; `nodes` are what the nodes of a cluster have in all."""
    for model in settings.models:
        wanted = model.resources
        if not any(all(node.get(name, 0) >= amount for name, amount in wanted.items()) for node in nodes):
            asked = " and ".join(f"{amount:g} {name}" for name, amount in wanted.items())
            most = {name: max((node.get(name, 0) for node in nodes), default=0) for name in wanted}
            there = " and ".join(f"{amount:g} {name}" for name, amount in most.items())
            raise EngineError(
                f"a replica of {model.name} on {model.devices} needs {asked} on one node, and no node has that "
                f"(at most {there}): give it fewer devices, or add a node"
            )
