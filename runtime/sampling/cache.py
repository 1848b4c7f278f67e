"""Feature caching: which evaluations compute the denoiser's deep part, and what the others take in its place.

DeepCache (Ma et al., CVPR 2024) evaluates the deep part at every n-th step and reuses its features in between. Here
they are carried on from the last two such steps along a line, as in TaylorSeer (Liu et al., ICCV 2025) of first order,
which costs nothing more; and the drafts of a round take those of evaluations before the round.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace
from itertools import count, islice

from runtime.sampling.operations import Predict


class Cache:
    """The features that are known while a sampler runs; with an interval of 1 it leaves operations as they are."""

    def __init__(self, interval: int) -> None:
        self._interval = interval
        self._known: list[tuple[int, str]] = []  # step and slot, newest first

    def predict(self, operation: Predict, anchor: int, deep: Collection[int] = ()) -> Predict:
        """A round of evaluations, those with a deep part at every interval from step `anchor` on and at steps `deep`.

        Also the first evaluation of an image has one.
        """
        if self._interval == 1:
            return operation
        steps = [one.step for one in operation.evaluations]
        whole = [n for n in steps if not self._known or n in deep or (n - anchor) % self._interval == 0]
        used = {slot for _, slot in self._known}
        free = islice((slot for n in count() if (slot := f"features {n}") not in used), len(whole))
        kept = dict(zip(whole, free, strict=True))
        made = tuple(
            replace(one, keep=kept[one.step]) if one.step in kept else replace(one, features=self._carried(one.step))
            for one in operation.evaluations
        )
        self._known = sorted([*kept.items(), *self._known], reverse=True)[:2]
        return Predict(made)

    def _carried(self, step: int) -> tuple[tuple[str, float], ...]:
        """Kept features with their weights in what stands for those of a step."""
        (here, slot), *before = self._known
        if not before or step == here:
            return ((slot, 1.0),)
        (earlier, other) = before[0]
        ahead = (step - here) / (here - earlier)
        return ((slot, 1 + ahead), (other, -ahead))
