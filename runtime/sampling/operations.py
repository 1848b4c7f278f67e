"""What samplers are made of: operations on named slots, and the options that a user has. No arrays, no devices.

A sampler is a generator of operations; the answers to `Distance`, `InnerProducts` and `Uniforms` are sent back into
it. The initial noise is in slot `STATE` when it starts and the finished latent when it ends; slot `fresh(i)` holds the
noise that a stochastic step i adds. What it returns are the distances of the drafts that it accepted by measurement.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass

from runtime.sampling.schedule import Linear

STATE = "x"


@dataclass(frozen=True)
class Evaluation:
    """One evaluation: the model's output for the latent in a slot at a step, written to another slot.

    With feature caching, either `keep` is where the deep part's features are kept, or `features` are kept ones with the
    weights of their sum, in place of the deep part. Slots of features hold no latents, and nothing else reads them.
    """

    latent: str
    step: int
    output: str
    keep: str = ""
    features: tuple[tuple[str, float], ...] = ()


@dataclass(frozen=True)
class Predict:
    """A round: evaluations that run at the same time."""

    evaluations: tuple[Evaluation, ...]


@dataclass(frozen=True)
class Combine:
    """targets[m] = Σ_j rows[m][j] · sources[j]. `finished` steps are done after it, with their state in STATE.

    While `srds` runs, STATE is its latest guess at the finished latent, of which `finished` steps are exact.
    """

    sources: tuple[str, ...]
    rows: tuple[tuple[float, ...], ...]
    targets: tuple[str, ...]
    finished: int


@dataclass(frozen=True)
class Distance:
    """Asks for ‖a − b‖ / ‖b‖ of pairs of slots; the host waits for it."""

    pairs: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Product:
    """Two linear combinations of the same sources, a and b."""

    sources: tuple[str, ...]
    a: tuple[float, ...]
    b: tuple[float, ...]


@dataclass(frozen=True)
class InnerProducts:
    """Asks for ⟨a, b⟩, ‖a‖² and ‖b‖² of each product, one after the other; the host waits for it."""

    products: tuple[Product, ...]


@dataclass(frozen=True)
class Uniforms:
    """Asks for the uniform numbers in [0, 1) that belong to steps, the same ones whenever they are asked for."""

    steps: tuple[int, ...]


Operation = Predict | Combine | Distance | InnerProducts | Uniforms
Operations = Generator[Operation, Sequence[float], tuple[float, ...]]


@dataclass(frozen=True)
class Options:
    """What a user can choose beside the sampler; every sampler reads its own.

    k: drafts per round; `adaptive` and `speculative` count the state itself. drafts: a key of `DRAFTS`.
    tolerance: largest relative change that `adaptive` accepts in a draft, or that `srds` stops at; 0 is exact.
    blocks: B of `srds`, ⌈√N⌉ or fewer by default. pipelined: whether `srds` starts a block as soon as its left end is
    known. iterations: where `srds` stops in any case. first_blocks: drafts in each of the first blocks of
    `conservative` and `aggressive`, where they shall differ from k. cache_interval: the denoiser's deep part is
    evaluated at one of so many steps.
    """

    k: int = 1
    drafts: str = "frozen"
    tolerance: float = 0.0
    blocks: int | None = None
    pipelined: bool = True
    iterations: int | None = None
    first_blocks: tuple[int, ...] = ()
    cache_interval: int = 1

    def ahead(self, block: int) -> int:
        """Drafts in a block, unless the steps end before."""
        return self.first_blocks[block] if block < len(self.first_blocks) else self.k


def fresh(step: int) -> str:
    """The slot of the noise that a step adds, drawn before the image starts."""
    return f"fresh {step}"


def own_noise_slot(step: int) -> str:
    """The slot of a draft's own noise."""
    return f"own {step}"


def combination(expressions: Mapping[str, Linear], finished: int) -> Combine:
    """One operation that writes each expression into its slot."""
    sources = tuple(dict.fromkeys(slot for expression in expressions.values() for slot in expression))
    rows = tuple(tuple(e.get(slot, 0.0) for slot in sources) for e in expressions.values())
    return Combine(sources, rows, tuple(expressions), finished)


def inner_products(pairs: Sequence[tuple[Linear, Linear]]) -> InnerProducts:
    """One operation for pairs of expressions."""
    products = []
    for a, b in pairs:
        sources = tuple(dict.fromkeys((*a, *b)))
        rows = (tuple(one.get(slot, 0.0) for slot in sources) for one in (a, b))
        products.append(Product(sources, *rows))
    return InnerProducts(tuple(products))
