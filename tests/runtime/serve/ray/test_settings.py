"""What an application is told, and what it says of what cannot be. Needs no ray."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import pytest
import yaml

from engines.errors import EngineError, ParameterError
from runtime.serve.limits import Limits
from runtime.serve.ray.settings import check_nodes, read_settings


@pytest.mark.parametrize(
    ("devices", "owned"),
    [
        ("cpu*2", {"CPU": 2}),
        ("cuda:0,cuda:1", {"CPU": 1, "GPU": 2}),
        ("cuda:0*3", {"CPU": 1, "GPU": 1}),
    ],
)
def test_a_replica_owns_what_its_lanes_need(devices: str, owned: dict[str, float]) -> None:
    (model,) = read_settings({"models": [{"devices": devices}]}).models
    assert model.resources == owned


def test_what_is_said_is_what_is_served() -> None:
    given = {"models": [{"model": "/m/one", "replicas": [1, 3]}], "limits": {"queue": 4, "seconds": 9}, "keys": ["k"]}
    settings = read_settings(given)
    assert settings.served == Limits(queue=4, seconds=9.0)
    assert settings.access.keys == ("k",)
    assert [model.name for model in settings.models] == ["one"]


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"modles": []}, "modles: Extra inputs"),
        ({"models": []}, "models: "),
        ({"models": [{"replicas": [3, 1]}]}, "range from 1 on"),
        ({"models": [{"replicas": [0, 1]}]}, "range from 1 on"),
        ({"models": [{"devices": "auto"}]}, "write cpu*2 or cuda:0,cuda:1, not auto"),
        ({"models": [{"model": "a/x"}, {"model": "b/x"}]}, "listed once, not x, x"),
        ({"limits": {"qeue": 1}}, "no limit 'qeue'"),
        ({"ingresses": 0}, "ingresses: "),
    ],
)
def test_settings_that_cannot_be(given: dict[str, Any], words: str) -> None:
    with pytest.raises(ParameterError, match=r"\w") as caught:
        read_settings(given)
    assert words in str(caught.value)


def test_cards_are_counted_from_zero() -> None:
    with pytest.raises(ParameterError, match="from cuda:0 on"):
        _ = read_settings({"models": [{"devices": "cuda:1"}]}).models[0].resources


def test_a_replica_must_fit_on_one_node() -> None:
    settings = read_settings({"models": [{"devices": "cuda:0,cuda:1"}]})
    check_nodes(settings, [{"CPU": 8}, {"CPU": 4, "GPU": 2}])
    with pytest.raises(EngineError, match=r"needs 1 CPU and 2 GPU on one node.*at most 8 CPU and 1 GPU"):
        check_nodes(settings, [{"CPU": 8}, {"CPU": 4, "GPU": 1}])


def test_the_config_to_start_from(checkout: Path) -> None:
    config = yaml.safe_load((checkout / "runtime/serve/ray/serve.yaml").read_text())
    (application,) = config["applications"]
    module, name = application["import_path"].split(":")
    assert callable(getattr(importlib.import_module(module), name))
    settings = read_settings(application["args"])
    assert settings.models[0].replicas == (1, 4)
    assert settings.access.has_host("images.example.com")
