"""Where the calls of a round run: one rule for every sampler and every machine."""

from __future__ import annotations

from collections.abc import Sequence

from engines.base import Branch, Call


def place(branches: Sequence[Branch], lanes: int) -> list[Call]:
    """Deals the guidance branches of a round evenly over the lanes, in order; each lane runs its share as one call.

    With enough lanes each branch has one of its own, a lone evaluation uses two lanes, and one lane gets one batch.
    """
    share, extra = divmod(len(branches), lanes)
    calls, start = [], 0
    for lane in range(lanes):
        end = start + share + (lane < extra)
        calls.append(branches[start:end])
        start = end
    return calls
