"""What may become part of a graph, asked of an imaginary driver that answers in every way."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from tests.libcuda.machine import Machine

pytestmark = pytest.mark.imaginary_gpus
Play = Callable[..., list[dict[str, Any]]]


# the driver is asked for it on purpose: on a GPU it may answer either way
ASKED = [
    f"{name}: the stream's device copies memory of another device, without peer access"
    for name in ("cuMemcpyAsync", "cuMemcpyPeerAsync")
]


def test_everything_can_be_captured(play: Play, machine: Machine) -> None:
    rows = play("capture")
    assert len(rows) == 4 + 2 * 2
    answers = {row["question"]: row["answer"] for row in rows if "cuMemcpyPeerAsync" not in row["question"]}
    assert answers.pop("cuda:0 ↔ cuda:1 by cuMemcpyAsync without peer access") == "no"
    assert {*answers.values()} == {"yes"}
    assert [row["required"] for row in rows] == [True] * 4 + [False] * 4
    assert machine.forgive() == ASKED


def test_without_peer_access_copies_between_devices_are_no_answer(play: Play, machine: Machine) -> None:
    machine.set("peers", 0)
    answers = {row["question"]: row["answer"] for row in play("capture")}
    assert answers["cuda:0 ↔ cuda:1 with peer access"] == "no"
    assert answers["a second stream by fork and join"] == "yes"
    assert machine.forgive() == ASKED


def test_copies_that_lie_fail(play: Play, machine: Machine) -> None:
    machine.set("peer_zeros", 1)
    with pytest.raises(AssertionError, match=r"wrong bytes and no error: cuda:0 ↔ cuda:1 by cuMemcpyAsync"):
        play("capture")
    assert machine.forgive() == ASKED


def test_a_copy_that_does_nothing_fails(play: Play, machine: Machine) -> None:
    machine.skip("cuMemcpyAsync")
    with pytest.raises(AssertionError, match="wrong bytes and no error: cuMemcpyAsync on one device"):
        play("capture")
    machine.forgive()


def test_what_cannot_be_captured_is_said(play: Play, machine: Machine) -> None:
    machine.fail("cuGraphInstantiate", 1, 900)
    with pytest.raises(AssertionError, match="rounds cannot be graphs here: cuMemcpyAsync on one device"):
        play("capture")
    machine.forgive()
