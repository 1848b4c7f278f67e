"""What every backend is: lanes that predict, slots that hold latents, and one linear combination.

A *slot* is a named latent of shape (images, channels, height, width) in float32. An *evaluation* is one ε; with
guidance it has two *branches* (unconditional and conditional). A *call* is one batched run of the network on one lane.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float32]
Rows = Sequence[Sequence[float]] | Array
Progress = Callable[[str, int, int], None]  # of long work: phase, steps done, steps in all


class Branch(NamedTuple):
    """One guidance branch of one evaluation: which latent, at which step, under which conditioning, into which slot.

    With feature caching, either `keep` is where the deep part's features are kept, or `features` are kept ones with the
    weights of their sum, in place of the deep part.
    """

    latent: str
    step: int
    output: str
    conditioning: int
    keep: str = ""
    features: tuple[tuple[str, float], ...] = ()


LaneCall = Sequence[Branch]  # what one lane runs as one batch


class Entry(NamedTuple):
    """A branch as it goes into a call with branches of other images: one row of each array per image.

    `output` is written. `conditioning` is not changed while anybody holds it: a call knows it again by its identity.
    """

    sample: Array
    timestep: float
    conditioning: Mapping[str, Array]
    output: Array
    keep: Array | None = None  # as those of Branch
    features: tuple[tuple[Array, float], ...] = ()


Finished = Callable[[tuple[float, float], Exception | None], None]  # began and ended, by `time.perf_counter`


class Sharing(Protocol):
    """What a backend needs so that rounds of several images, each on a sibling, may share model calls."""

    @property
    def kind(self) -> Hashable:
        """Of the image that is bound: those of one kind have the same shapes of latents and model inputs."""

    def entries(self, branches: Sequence[Branch]) -> list[Entry]:
        """The branches of a round; valid until the round ends. DeviceError when the model is closed."""

    def start(self, lane: int, entries: Sequence[Entry], finished: Finished) -> None:
        """Runs entries of one kind as one call on an idle lane, which calls `finished` from its thread."""

    def note(self, calls: Sequence[LaneCall], spans: Mapping[int, tuple[float, float]]) -> None:
        """A round has ended: what ran on which lanes, and when each of them began and ended it."""


@dataclass
class Measurements:
    """What a backend measured of its own work.

    timed(calls): runs calls like `predict`, waits, and returns the seconds of the longest.
    critical_path_seconds: of the longest call of every round, added up; None where the host does not wait for rounds.
    spans: when each lane's last call began and ended, by `time.perf_counter`; None where the host does not wait.
    copied: copies between devices since the start: `peer`, and `staged` through host memory.
    staged: ordered pairs of devices whose direct copies failed their test, so that latents go through host memory.
    counts: what is kept for rounds that come again, by kind.
    stalled(): seconds since anything that was asked for began or ended, while something runs; any thread may ask.
    """

    timed: Callable[[Sequence[LaneCall]], float]
    critical_path_seconds: float | None = None
    spans: Sequence[tuple[float, float]] | None = None
    copied: Mapping[str, int] = field(default_factory=dict)
    staged: tuple[tuple[int, int], ...] = ()
    counts: Mapping[str, int] = field(default_factory=dict)
    stalled: Callable[[], float] = lambda: 0.0


class Backend(Protocol):
    """A machine that can play a sampler. Methods are called from one thread, in order."""

    @property
    def lanes(self) -> int:
        """How many calls can run at the same time."""

    def bind(
        self, shape: tuple[int, ...], timesteps: Sequence[float], conditioning: Sequence[Mapping[str, Array]]
    ) -> None:
        """Starts an image: forgets all slots and sets what does not change until the next one.

        `shape` is that of a slot. `timesteps[i]` goes in with step i. `conditioning[c]` holds the model inputs of
        branch c by name, each with one row per image.
        """

    def write(self, slot: str, value: Array) -> None:
        """Puts a latent into a slot."""

    def read(self, slot: str) -> Array:
        """A copy of a slot; waits for it."""

    def predict(self, calls: Sequence[LaneCall]) -> None:
        """Runs the calls at the same time, call n on lane n; an empty call leaves its lane idle."""

    def combine(self, sources: Sequence[str], rows: Rows, targets: Sequence[str]) -> None:
        """targets[m] = Σ_j rows[m][j] · sources[j], float32; targets may be among the sources."""

    def distances(self, pairs: Sequence[tuple[str, str]]) -> list[float]:
        """‖a − b‖ / ‖b‖ of pairs of slots in float32, summed in a fixed order; the host waits for it."""

    def inner_products(self, products: Sequence[tuple[Sequence[str], Rows]]) -> list[float]:
        """⟨a, b⟩, ‖a‖² and ‖b‖² for each of several pairs of combinations, one after the other; the host waits for it.

        A product is its sources and two rows of coefficients. Combinations and partial sums are float32, totals
        float64; the order of summation depends on the number of elements alone.
        """

    @property
    def measurements(self) -> Measurements:
        """What it measured of its own work, up to now."""

    def settle(self) -> None:
        """Waits until nothing runs any more of what was asked for: then another backend may use the lanes."""

    @property
    def sharing(self) -> Sharing | None:
        """How its rounds share calls with those of siblings; None where every call is of one image."""

    def dead(self) -> list[int]:
        """The lanes that stopped working; asked after a DeviceError."""

    def close(self) -> None:
        """Stops the lanes."""


def combine(inputs: Array, rows: Rows) -> Array:
    """The reference of the project's one kernel: (m, j) rows times (j, elements) inputs, in float32.

    Summed in the order of j for every element, so that a row gives the same bits whatever stands beside it; a matrix
    product would not, and would wake the BLAS library's threads in between the lanes' own.
    """
    result: Array = np.einsum("mj,je->me", np.asarray(rows, np.float32), inputs)
    return result
