"""The published algorithms, line by line: what the runtime's samplers are compared against.

Source: "DRiffusion: Draft-and-Refine Process Parallelizes Diffusion Models with Ease", CVPR 2026. Conservative is
Algorithm 2 of the supplement; aggressive is Algorithm 1, reconstructed from the paper's prose and its latency law;
`skip` is the supplement's equation 14 with sigma = 0. DDIM is Song et al., "Denoising Diffusion Implicit Models".

Plain float64 NumPy, no cleverness, and nothing imported from the code under test. Three liberties against the print:
- Steps count upwards, i = 0 ... N, with x_0 the noise and x_N the result; the paper counts t = T ... 0.
- A block is cut to k' = min(k, N - 1 - i) drafts, so that N may be any number.
- Algorithm 2 keeps its first draft as x_{i+1}; here x_{i+1} is stepped like all the others. Without noise and with
  "leading" timesteps the two are the same expression.
"""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import chain, repeat

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]
Model = Callable[[Array, int], Array]
"""`model(x, t) -> eps`: the predicted noise after guidance, in the shape of x."""


@dataclass(frozen=True)
class Schedule:
    """N steps, three arrays of shape [N]: step i calls the model at timestep i and moves x from source i to target i.

    An abar is the cumulative product of alphas: the paper's alpha_t (with a bar in DDPM's notation).
    """

    timesteps: npt.NDArray[np.int64]
    abar_source: Array
    abar_target: Array


def stable_diffusion_alphas_cumprod() -> Array:
    """Stable Diffusion's abar, shape [1000]: beta is linear in its square root ("scaled_linear"), 0.00085 to 0.012."""
    beta = np.linspace(np.sqrt(0.00085), np.sqrt(0.012), 1000, dtype=np.float64) ** 2
    return np.cumprod(1 - beta, dtype=np.float64)


def ddim_schedule(
    alphas_cumprod: Array,
    num_inference_steps: int,
    num_train_timesteps: int = 1000,
    steps_offset: int = 1,
    final_alpha_cumprod: float | None = None,
) -> Schedule:
    """DDIM's steps as diffusers takes them with "leading" spacing.

    A step goes from t to t - T // N. A target below 0 is `final_alpha_cumprod`: by default `alphas_cumprod[0]`, which
    is diffusers' `set_alpha_to_one=False`; pass 1.0 for `set_alpha_to_one=True`.
    """
    N, T = num_inference_steps, num_train_timesteps
    assert 1 <= N <= T, f"{N} inference steps out of {T} training timesteps"
    if final_alpha_cumprod is None:
        final_alpha_cumprod = float(alphas_cumprod[0])

    timesteps, abar_source, abar_target = [], [], []
    for i in range(N):
        t = (N - 1 - i) * (T // N) + steps_offset
        t_target = t - T // N
        timesteps.append(t)
        abar_source.append(alphas_cumprod[t])
        abar_target.append(alphas_cumprod[t_target] if t_target >= 0 else final_alpha_cumprod)
    return Schedule(np.array(timesteps, np.int64), np.array(abar_source), np.array(abar_target))


def skip(x: Array, eps: Array, abar_source: float, abar_target: float) -> Array:
    """Equation 14 with sigma = 0: predict the clean image from x and eps, then noise it again to `abar_target`."""
    predicted_x0 = (x - np.sqrt(1 - abar_source) * eps) / np.sqrt(abar_source)
    x_target: Array = np.sqrt(abar_target) * predicted_x0 + np.sqrt(1 - abar_target) * eps
    return x_target


def step(x: Array, eps: Array, schedule: Schedule, i: int) -> Array:
    """The sampler's own step i -> i + 1."""
    return skip(x, eps, schedule.abar_source[i], schedule.abar_target[i])


def draft(x: Array, eps: Array, schedule: Schedule, i: int, j: int) -> Array:
    """The skip i -> j for i < j < N: from the noise level at which step i reads its x to that at which step j does."""
    return skip(x, eps, schedule.abar_source[i], schedule.abar_source[j])


def sequential(model: Model, x: Array, schedule: Schedule) -> tuple[Array, int]:
    """DDIM, one evaluation after another. Returns x_N and the rounds, here N."""
    rounds = 0
    for i, t in enumerate(schedule.timesteps):
        eps = model(x, int(t))
        rounds += 1
        x = step(x, eps, schedule, i)
    return x, rounds


def conservative(model: Model, x: Array, schedule: Schedule, k: int, first: tuple[int, ...] = ()) -> tuple[Array, int]:
    """Algorithm 2: one lone evaluation, then k concurrent ones at its drafts. Returns x_N and the rounds.

    A round is a group of model calls that need nothing from one another.
    """
    assert k >= 1
    sizes = chain(first, repeat(k))
    t = [int(timestep) for timestep in schedule.timesteps]
    N = len(t)
    x_at, eps_at = {0: x}, {}
    rounds = 0

    i = 0
    while i < N:
        eps_at[i] = model(x_at[i], t[i])
        rounds += 1
        k_cut = min(next(sizes), N - 1 - i)
        for j in range(1, k_cut + 1):  # concurrently
            x_draft = draft(x_at[i], eps_at[i], schedule, i, i + j)
            eps_at[i + j] = model(x_draft, t[i + j])
        rounds += 1 if k_cut > 0 else 0
        x_at[i + 1] = step(x_at[i], eps_at[i], schedule, i)
        for j in range(1, k_cut + 1):
            x_at[i + j + 1] = step(x_at[i + j], eps_at[i + j], schedule, i + j)
        i += k_cut + 1
    return x_at[N], rounds


def aggressive(model: Model, x: Array, schedule: Schedule, k: int, first: tuple[int, ...] = ()) -> tuple[Array, int]:
    """Algorithm 1: a block's last draft-made eps also serves as the next block's first. Returns x_N and the rounds."""
    assert k >= 1
    sizes = chain(first, repeat(k))
    t = [int(timestep) for timestep in schedule.timesteps]
    N = len(t)
    x_at, eps_at = {0: x}, {}
    rounds = 0

    i = 0
    eps_at[0] = model(x_at[0], t[0])
    rounds += 1
    while i < N:
        k_cut = min(next(sizes), N - 1 - i)
        for j in range(1, k_cut + 1):  # concurrently
            x_draft = draft(x_at[i], eps_at[i], schedule, i, i + j)
            eps_at[i + j] = model(x_draft, t[i + j])
        rounds += 1 if k_cut > 0 else 0
        for j in range(k_cut):
            x_at[i + j + 1] = step(x_at[i + j], eps_at[i + j], schedule, i + j)
        if i + k_cut == N - 1:
            x_at[N] = step(x_at[N - 1], eps_at[N - 1], schedule, N - 1)
            break
        i += k_cut
    return x_at[N], rounds


def rounds_conservative(N: int, k: int) -> int:
    """2 * ceil(N / (k + 1)), less one when the last block is a lone step; k >= 1."""
    return 2 * -(-N // (k + 1)) - (1 if N % (k + 1) == 1 else 0)


def rounds_aggressive(N: int, k: int) -> int:
    """1 + ceil((N - 1) / k); k >= 1."""
    return 1 + -(-(N - 1) // k)
