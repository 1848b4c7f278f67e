"""A backend without models: it finds plan bugs in milliseconds and counts what a plan costs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from engines.base import Array, LaneCall, Measurements, Progress, Rows
from engines.devices import LaneSpec
from engines.manifest import Axes, Network, axes_of
from engines.store import Bundle, Plan


class Costs(Protocol):
    """What the virtual clock runs on: seconds that a machine would need."""

    def round(self, calls: Sequence[LaneCall]) -> float:
        """The calls of a round, with what starting them and moving their latents takes."""

    def combine(self, sources: int, targets: int) -> float:
        """One combination."""

    def distances(self, pairs: int) -> float:
        """Measuring and waiting for the answer."""


@dataclass(frozen=True)
class CallCosts:
    """Nothing but the longest call of every round; `seconds(branches)` is how long a call of so many takes."""

    seconds: Callable[[int], float] = lambda branches: 0.0

    def round(self, calls: Sequence[LaneCall]) -> float:
        """See Costs."""
        return max(self.seconds(len(call)) for call in calls if call)

    def combine(self, sources: int, targets: int) -> float:
        """See Costs."""
        return 0.0

    def distances(self, pairs: int) -> float:
        """See Costs."""
        return 0.0


class NullBackend:
    """Checks every slot access of a plan and counts; its clock, `seconds`, runs on costs instead of on hardware.

    Distances are zero, or what was once measured: `answers` gives them in the order in which they were asked for.
    Reading a slot that nobody wrote, or two branches of a round writing one slot, is an AssertionError: this engine
    makes the programs itself.
    """

    def __init__(self, lanes: int, costs: Costs | None = None, answers: Iterator[float] | None = None) -> None:
        self.lanes = lanes
        self._costs = costs or CallCosts()
        self._answers = answers
        self.bind((), (), ())

    def bind(
        self, shape: tuple[int, ...], timesteps: Sequence[float], conditioning: Sequence[Mapping[str, Array]]
    ) -> None:
        """Forgets all slots and counts."""
        self.shape = shape
        self.steps = len(timesteps)
        self.rounds = self.branches = self.calls = self.combines = 0
        self.sizes: Counter[int] = Counter()  # rounds by their number of branches
        self.seconds = 0.0
        self.written: set[str] = set()

    def write(self, slot: str, value: Array) -> None:
        """Marks a slot as written."""
        self.written.add(slot)

    def read(self, slot: str) -> Array:
        """Zeros, if the slot was written."""
        assert slot in self.written, f"slot {slot!r} is read but was never written"
        return np.zeros(self.shape, np.float32)

    def predict(self, calls: Sequence[LaneCall]) -> None:
        """One round."""
        assert len(calls) <= self.lanes, f"{len(calls)} calls for {self.lanes} lanes"
        branches = [branch for call in calls for branch in call]
        outputs = [branch.output for branch in branches]
        assert branches, "a round without a call"
        assert len(set(outputs)) == len(outputs), f"two branches of one round write the same slot: {outputs}"
        for branch in branches:
            assert branch.latent in self.written, f"slot {branch.latent!r} is read but was never written"
            assert branch.latent not in outputs, f"slot {branch.latent!r} is read and written in one round"
            assert 0 <= branch.step < self.steps, f"step {branch.step} of {self.steps}"
            assert not (branch.keep and branch.features), "features are either kept or taken"
            for slot, _ in branch.features:
                assert slot in self.written, f"slot {slot!r} is read but was never written"
        kept = [branch.keep for branch in branches if branch.keep]
        assert len(set(kept)) == len(kept), f"two branches of one round keep the same features: {kept}"
        assert not {slot for branch in branches for slot, _ in branch.features} & set(kept), "kept while they are read"
        self.written.update(outputs, kept)
        self.rounds += 1
        self.branches += len(branches)
        self.sizes[len(branches)] += 1
        self.calls += sum(1 for call in calls if call)
        self.seconds += self._costs.round(calls)

    def combine(self, sources: Sequence[str], rows: Rows, targets: Sequence[str]) -> None:
        """Checks shapes and slots."""
        assert len(rows) == len(targets) == len(set(targets)) > 0, "one row per distinct target"
        assert all(len(row) == len(sources) for row in rows), "one coefficient per source"
        assert len(set(sources)) == len(sources), f"a source is named twice: {sources}"
        for slot in sources:
            assert slot in self.written, f"slot {slot!r} is read but was never written"
        self.written.update(targets)
        self.combines += 1
        self.seconds += self._costs.combine(len(sources), len(targets))

    def distances(self, pairs: Sequence[tuple[str, str]]) -> list[float]:
        """Recorded answers or zeros, if the slots were written."""
        for pair in pairs:
            for slot in pair:
                self.read(slot)
        self.seconds += self._costs.distances(len(pairs))
        return [0.0 if self._answers is None else next(self._answers) for _ in pairs]

    def inner_products(self, products: Sequence[tuple[Sequence[str], Rows]]) -> list[float]:
        """Recorded answers or zeros, if the slots were written."""
        for sources, rows in products:
            assert len(rows) == 2 and all(len(row) == len(sources) for row in rows), "one coefficient per source"
            for slot in sources:
                assert slot in self.written, f"slot {slot!r} is read but was never written"
        self.seconds += self._costs.distances(len(products))
        return [0.0 if self._answers is None else next(self._answers) for _ in range(3 * len(products))]

    @property
    def measurements(self) -> Measurements:
        """Virtual seconds since the image began."""
        return Measurements(self._timed, self.seconds)

    def _timed(self, calls: Sequence[LaneCall]) -> float:
        before = self.seconds
        self.predict(calls)
        return self.seconds - before

    def settle(self) -> None:
        """Nothing runs."""

    @property
    def sharing(self) -> None:
        """See Backend.sharing."""

    def dead(self) -> list[int]:
        """None: nothing here can break."""
        return []

    def close(self) -> None:
        """Nothing to stop."""


class NullRunner:
    """A network that runs once per image and gives zeros."""

    def __init__(self, spec: Network, least: Axes) -> None:
        self._spec, self._least = spec, least

    def run(self, **inputs: np.ndarray) -> dict[str, Array]:
        """See load.Runner."""
        axes = {**self._least, **axes_of(self._spec.inputs, {name: value.shape for name, value in inputs.items()})}
        return {one.name: np.zeros(one.resolve(axes), np.float32) for one in self._spec.outputs}


class Engines:
    """A model of which nothing is computed: what is left of an image's time is the host's."""

    def __init__(self, bundle: Bundle, lanes: Sequence[LaneSpec], *, lane_timeout: float = 0.0) -> None:
        manifest = bundle.manifest
        least = manifest.latent_axes(manifest.sizes.width, manifest.sizes.height, 1)
        self.runners = {name: NullRunner(manifest.networks[name], least) for name in manifest.once}
        self._lanes, self.plan_folder = len(lanes), bundle.folder
        self.backend = NullBackend(self._lanes)

    def sibling(self, home: int) -> NullBackend:
        """See load.Engines."""
        return NullBackend(self._lanes)

    def close(self) -> None:
        """Nothing to stop."""


def trouble() -> str | None:
    """See load.RuntimeModule."""
    return None


def wanted(bundle: Bundle, runtime: str) -> dict[str, list[dict[str, str]]]:
    """See load.RuntimeModule: nothing is compiled."""
    return {}


def build_missing(
    bundle: Bundle, lanes: Sequence[LaneSpec], progress: Progress | None = None
) -> dict[str, Plan | None]:
    """See load.RuntimeModule."""
    return {}
