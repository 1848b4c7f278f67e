"""The library, and programs for the embedded model."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from engines.devices import parse_devices
from engines.store import Bundle
from runtime.call import Call
from runtime.embed.program import program_of, write_program
from tests.runtime.embed.building import built
from tests.runtime.embed.library import Engine, Library

Write = Callable[..., Path]
Open = Callable[..., Engine]


@pytest.fixture(scope="session")
def library() -> Library:
    return Library(built())


@pytest.fixture
def write(shapes: Bundle, tmp_path: Path) -> Write:
    """Writes a program for the embedded model and two lanes."""

    def program(name: str = "test.program", **options: Any) -> Path:
        given: dict[str, Any] = {"mode": "aggressive", "k": 2, "num_inference_steps": 4} | options
        made = program_of(shapes, parse_devices("cpu*2"), Call("", **given))
        write_program(made, tmp_path / name)
        return tmp_path / name

    return program


@pytest.fixture
def open_engine(library: Library, shapes: Bundle, write: Write) -> Iterator[Open]:
    """Opens engines on programs, and closes them after the test."""
    opened: list[Engine] = []

    def engine(devices: str = "cpu*2", **options: Any) -> Engine:
        opened.append(library.open(shapes.folder, write(f"{len(opened)}.program", **options), devices))
        return opened[-1]

    yield engine
    for one in opened:
        one.close()
