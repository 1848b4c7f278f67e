"""What may become part of a graph, asked of an imaginary driver that answers in every way."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from tests.bench.gpu.conftest import TimedCuda

Play = Callable[..., list[dict[str, Any]]]


def test_everything_can_be_captured(play: Play) -> None:
    rows = play("capture")
    assert len(rows) == 4 + 2 * 2
    assert {row["answer"] for row in rows} == {"yes"}
    assert [row["required"] for row in rows] == [True] * 4 + [False] * 4


def test_copies_between_devices_that_fail_are_an_answer(play: Play, cuda: TimedCuda) -> None:
    cuda.fault["peer refused"] = 1
    answers = {row["question"]: row["answer"] for row in play("capture")}
    assert answers["cuda:0 ↔ cuda:1 by cuMemcpyAsync without peer access"] == "no"
    assert answers["cuda:0 ↔ cuda:1 with peer access"] == "no"
    assert answers["a second stream by fork and join"] == "yes"


def test_copies_that_lie_fail(play: Play, cuda: TimedCuda) -> None:
    cuda.fault["peer zeros"] = 1
    with pytest.raises(AssertionError, match=r"wrong bytes and no error: cuda:0 ↔ cuda:1 by cuMemcpyAsync"):
        play("capture")


def test_a_wait_that_is_forgotten_fails(play: Play, cuda: TimedCuda) -> None:
    """Where a join is ignored the copy behind it may run first: in one of many launches it does."""
    cuda.ignored = lambda stream, event: stream.graph is None and event.captured is not None
    with pytest.raises(AssertionError):
        for _ in range(20):
            play("capture")
