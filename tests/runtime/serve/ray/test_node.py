"""What a node does before a replica can load. Needs no ray."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from engines.errors import BundleError, EngineError
from engines.store import Bundle
from runtime.pipeline import Pipeline
from runtime.serve.ray.node import claim, prepare
from runtime.serve.ray.settings import read_settings


def test_a_node_copies_the_bundle_of_the_shared_store_once(shapes: Bundle, tmp_path: Path) -> None:
    store, build = tmp_path / "store", tmp_path / "node"
    shutil.copytree(shapes.folder, store / "shapes")
    settings = read_settings({"models": [{"devices": "cpu*2"}], "build": build, "store": store})
    prepare(settings.models[0], settings)
    shutil.rmtree(store)
    prepare(settings.models[0], settings)  # what the node has needs no store
    pipeline = Pipeline.load("shapes", "cpu*2", build)
    pipeline.close()


def test_a_model_that_no_node_and_no_store_has(tmp_path: Path) -> None:
    settings = read_settings({"models": [{"model": "nope"}], "build": tmp_path / "a", "store": tmp_path / "b"})
    with pytest.raises(BundleError, match="no exported model 'nope'"):
        prepare(settings.models[0], settings)
    assert not (tmp_path / "a" / "nope").exists()


def test_a_folder_that_is_not_named_after_its_model(shapes: Bundle, tmp_path: Path) -> None:
    (tmp_path / "forms").symlink_to(shapes.folder)
    settings = read_settings({"models": [{"model": "forms"}], "build": tmp_path})
    with pytest.raises(EngineError, match="forms holds the model 'shapes', not 'forms': name the folder after"):
        prepare(settings.models[0], settings)


def test_two_applications_on_one_store(tmp_path: Path) -> None:
    claim(tmp_path, "one", "cluster", lambda name: True)
    claim(tmp_path, "one", "cluster", lambda name: True)  # another replica
    with pytest.raises(EngineError, match=f"'one' of this cluster uses {tmp_path}.*'two' a folder of its own"):
        claim(tmp_path, "two", "cluster", lambda name: name == "one")
    claim(tmp_path, "two", "cluster", lambda name: False)  # the first one is gone
    claim(tmp_path, "three", "another cluster", lambda name: True)
