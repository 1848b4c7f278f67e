"""Statistics of repeated measurements: quantiles, and ratios with their uncertainty."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

PERCENTILES = (20, 50, 80, 90, 99)
DRAWS = 2000


def quantile(values: Sequence[float], q: float) -> float | None:
    """A quantile, six digits; None without values."""
    return float(f"{np.quantile(values, q):.6g}") if len(values) else None


def median(values: Sequence[float]) -> float | None:
    """The median, six digits; None without values."""
    return quantile(values, 0.5)


def percentiles(seconds: Sequence[float]) -> dict[str, float]:
    """p20, p50, p80, p90 and p99; with few values the last two are nearly the largest."""
    return {f"p{q}": round(float(np.percentile(seconds, q)), 5) for q in PERCENTILES}


def middle(values: Sequence[float]) -> int:
    """The index of a value in the middle: what belongs to one measurement adds up, medians of parts do not."""
    return int(np.argsort(values, kind="stable")[(len(values) - 1) // 2])


def bootstrap(values: Sequence[float], *, draws: int = DRAWS) -> dict[str, float]:
    """The median with the 95 % percentile interval of the medians of bootstrap samples."""
    picked = np.random.default_rng(0).choice(np.asarray(values, np.float64), (draws, len(values)))
    low, high = np.quantile(np.median(picked, axis=1), (0.025, 0.975))
    return {"median": _four(np.median(values)), "low": _four(low), "high": _four(high)}


def mean(values: Sequence[float], *, draws: int = DRAWS) -> dict[str, float]:
    """The mean with the 95 % percentile interval of the means of bootstrap samples."""
    picked = np.random.default_rng(0).choice(np.asarray(values, np.float64), (draws, len(values)))
    low, high = np.quantile(picked.mean(axis=1), (0.025, 0.975))
    return {"mean": _four(float(np.mean(values))), "low": _four(low), "high": _four(high)}


def ratio(above: Sequence[float], below: Sequence[float]) -> dict[str, float]:
    """Median of the ratios of what was measured side by side, with its interval."""
    return bootstrap(np.divide(above, below).tolist())


def of_medians(above: Sequence[float], below: Sequence[float], *, draws: int = DRAWS) -> dict[str, float]:
    """Ratio of two medians that were not measured in pairs, with its interval: both are drawn anew."""
    rng = np.random.default_rng(0)
    tops, bottoms = (np.median(rng.choice(values, (draws, len(values))), axis=1) for values in (above, below))
    low, high = np.quantile(tops / bottoms, (0.025, 0.975))
    return {"median": _four(np.median(above) / np.median(below)), "low": _four(low), "high": _four(high)}


def scaled(value: dict[str, float], factor: float) -> dict[str, float]:
    """A ratio and its interval times a positive number that is known exactly."""
    return {name: _four(number * factor) for name, number in value.items()}


def interval(value: dict[str, float] | None, digits: int = 2) -> str:
    """A ratio with its interval, as tables print it; nothing where it was not measured."""
    if value is None:
        return ""
    return f"{value['median']:.{digits}f} ({value['low']:.{digits}f}–{value['high']:.{digits}f})"


def _four(value: float) -> float:
    return round(float(value), 4)
