"""What makes two networks of a test session one export."""

# covers: tests/export/once.py

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import pytest

from tests.export.once import content
from tests.tiny import vae


def changed(name: str, value: Any) -> Any:
    module: Any = vae()
    setattr(module.decoder.mid_block, name, value)
    return module


def test_equal_networks_are_one_wherever_they_came_from() -> None:
    one, two = vae(), vae()
    one.register_to_config(_name_or_path="/here")
    two.register_to_config(_name_or_path="/there")
    assert content("decoder", one) == content("decoder", two)


@pytest.mark.parametrize(
    "other",
    [
        lambda: vae(scaling_factor=0.5),
        lambda: vae().half(),
        lambda: changed("drop", 3),
        lambda: changed("processor", partial(np.clip, a_min=0)),
        lambda: changed("processor", lambda value: value + 1),
    ],
    ids=["config", "type", "number", "partial", "function"],
)
def test_what_differs_anywhere_is_another_network(other: Any) -> None:
    assert content(vae()) != content(other())


def test_one_weight_or_one_constant_makes_another_network() -> None:
    module = vae()
    before = content(module)
    last = list(module.parameters())[-1]
    last.data[-1] += 1e-3
    assert content(module) != before
    assert content(lambda value: value + 1) != content(lambda value: value + 2)
