"""Bootstrap intervals over seeds."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from qtrain.errors import UsageError

DRAWS = 2000
METHODS = ("percentile", "basic", "bca")


class Interval(NamedTuple):
    """An estimate from `n` values and the ends of its interval; the ends are NaN where n is 1."""

    estimate: float
    low: float
    high: float
    n: int

    def __bool__(self) -> bool:
        """Whether there are ends."""
        return bool(np.isfinite(self.low) and np.isfinite(self.high))


def mean(values: np.ndarray) -> np.ndarray:
    """The mean over the last axis."""
    return values.mean(-1)


def bootstrap_interval(
    values: Any,
    statistic: Callable[[np.ndarray], np.ndarray] = mean,
    *,
    level: float = 0.95,
    draws: int = DRAWS,
    method: str = "percentile",
    seed: int = 0,
) -> Interval:
    """The bootstrap interval of a statistic of independent values, such as the results of seeds.

    With θ̂ = statistic(values) and θ* the statistic of n values drawn from them with replacement, `draws` times::

        percentile   [Q(α/2), Q(1 − α/2)],  Q the quantiles of θ*,  α = 1 − level
        basic        [2θ̂ − Q(1 − α/2), 2θ̂ − Q(α/2)]
        bca          [Q(β(z_{α/2})), Q(β(z_{1−α/2}))],  β(z) = Φ(z₀ + (z₀ + z)/(1 − a(z₀ + z)))
                     z₀ = Φ⁻¹(share of θ* below θ̂, ties half),  a = Σd³/(6(Σd²)^1.5),  d = θ̄₍·₎ − θ₍ᵢ₎ (jackknife)

    Few values make any such interval too narrow. Measured for the mean of normal values at level 0.95 (8000 trials), it
    covers the truth in 50 % of cases for n = 2, 75 % for 3, 79 % for 4, 84 % for 5, 90 % for 10 and 92 % for 20; BCa no
    more often (1500 trials). For what picks the largest of several means, such as a frontier, see `basic_ends`.

    Args:
      values: n finite numbers, in any iterable.
      statistic: from [..., n] to [...]; the mean unless given.
      level: of confidence, between 0 and 1.
      draws: resamples.
      method: "percentile", "basic" (reversed percentiles) or "bca" (bias-corrected and accelerated).
      seed: of the resampling, so that a report is the same twice.

    Returns:
      θ̂, the ends and n. For n = 1 there is no spread to draw from, and the ends are NaN.

    Raises:
      UsageError: no values, values that are not finite, another method, a level outside (0, 1), no draws.

    References:
      Efron and Tibshirani, An Introduction to the Bootstrap (1993), equations 13.5, 14.10, 14.14 and 14.15; Davison and
      Hinkley, Bootstrap Methods and their Application (1997), equation 2.10, for the basic interval.

    >>> bootstrap_interval([1.0, 2.0, 3.0, 4.0])
    Interval(estimate=2.5, low=1.5, high=3.5, n=4)
    """
    found = _checked(values)
    tails = _tails(level)
    if method not in METHODS:
        raise UsageError(f"method={method!r}: give one of {', '.join(METHODS)}")
    if draws < 1:
        raise UsageError(f"draws={draws}: give at least 1")
    n, estimate = len(found), float(statistic(found))
    if n == 1:
        return Interval(estimate, float("nan"), float("nan"), 1)
    drawn = statistic(found[np.random.default_rng(seed).integers(0, n, (draws, n))])
    if method == "bca":
        tails = _corrected(found, statistic, estimate, drawn, tails)
    low, high = np.percentile(drawn, tails)
    if method == "basic":
        low, high = 2 * estimate - high, 2 * estimate - low
    return Interval(estimate, float(low), float(high), n)


def draw_means(samples: Sequence[Mapping[Hashable, Any]], *, draws: int = DRAWS, seed: int = 0) -> np.ndarray:
    """Means of each sample over resampled seeds: what statistics of many points take their bootstrap from.

    Samples that have the same seeds are resampled together, one draw of seeds for all of them, because runs that share
    initialisation and order of the data are not independent of each other: what a seed does to all of them cancels from
    a difference. Others are resampled on their own.

    Args:
      samples: seed → value of each point, a number or several ([k], the same k everywhere).
      draws: resamples.
      seed: of the resampling.

    Returns:
      float64 [draws, points] or [draws, points, k].

    >>> draw_means([{0: 1.0, 1: 2.0}, {0: 11.0, 1: 12.0}], draws=3).tolist()
    [[1.5, 11.5], [1.5, 11.5], [2.0, 12.0]]
    """
    generator = np.random.default_rng(seed)
    drawn: dict[frozenset[Hashable], tuple[list[Hashable], np.ndarray]] = {}
    means = []
    for sample in samples:
        seeds = frozenset(sample)
        if seeds not in drawn:
            order, n = list(sample), len(sample)
            counts = generator.multinomial(n, np.full(n, 1 / n), size=draws) if n > 1 else np.ones((draws, n), int)
            drawn[seeds] = order, counts / n
        order, weights = drawn[seeds]
        means.append(weights @ np.array([sample[each] for each in order], float))
    return np.stack(means, axis=1)


def percentiles(drawn: np.ndarray, level: float = 0.95) -> tuple[Any, Any]:
    """The ends of the percentile interval of draws over the first axis; NaN where no draw is finite.

    >>> percentiles(np.arange(101.0), level=0.9)
    (5.0, 95.0)
    """
    values = np.asarray(drawn, float)
    with np.errstate(invalid="ignore"):
        low, high = np.percentile(values, _tails(level), axis=0)
    broken = ~np.isfinite(values).all(0)
    if broken.any():  # some draws have no value, such as two frontiers that share no cost
        low, high = (np.where(broken, np.nan, end) for end in (low, high))
    return (low, high) if np.ndim(low) else (float(low), float(high))


def basic_ends(estimate: Any, drawn: np.ndarray, level: float = 0.95) -> tuple[Any, Any]:
    """The ends of the basic bootstrap interval, 2θ̂ − Q(1 − α/2) and 2θ̂ − Q(α/2), Q over the first axis of `drawn`.

    For statistics that pick the best of several noisy means: frontiers, their hypervolumes, the area between two. Such
    a number is too high by what luck adds to the best, and resampled it is too high once more by about as much, so that
    percentiles may always miss the truth. Turned round, they take the luck back; θ̂ may then lie at the upper end.
    Measured at level 0.95 (300 trials, 16 to 70 points, a spread over seeds of 0.3 and 1 points of accuracy), the share
    of intervals that hold the truth, which is lower yet (0.5) for the best of 20 equal points:

    ========================  ===========  ===========  ===========
    .                         3 seeds      5 seeds      10 seeds
    ========================  ===========  ===========  ===========
    hypervolume, basic        0.81 – 0.87  0.81 – 0.88  0.88 – 0.93
    hypervolume, percentiles  0.00 – 0.51  0.00 – 0.74  0.01 – 0.88
    area, basic               0.72 – 0.76  0.82 – 0.88  0.88 – 0.91
    area, percentiles         0.41 – 0.77  0.45 – 0.87  0.58 – 0.93
    ========================  ===========  ===========  ===========

    >>> basic_ends(10.0, np.array([10.0, 11.0, 12.0]), level=0.5)
    (8.5, 9.5)
    """
    low, high = percentiles(drawn, level)
    return 2 * estimate - high, 2 * estimate - low


def _checked(values: Any) -> np.ndarray:
    found = np.array(list(values), float)
    if found.ndim != 1 or not found.size:
        raise UsageError(f"values: {found.shape} numbers; give a list of at least one")
    if not np.isfinite(found).all():
        raise UsageError("values: some are not finite; leave those runs out and say so")
    return found


def _tails(level: float) -> list[float]:
    if not 0 < level < 1:
        raise UsageError(f"level={level!r}: must be between 0 and 1, such as 0.95")
    tail = round(50 * (1 - level), 10)  # exactly 2.5, and not 2.5000000000000022
    return [tail, 100 - tail]


def _corrected(
    values: np.ndarray, statistic: Callable[[np.ndarray], np.ndarray], estimate: float, drawn: np.ndarray, tails: Any
) -> list[float]:
    """The percentiles that BCa takes instead."""
    from scipy.special import ndtr, ndtri  # a tenth of a second, which most reports need not spend

    below = (np.sum(drawn < estimate) + 0.5 * np.sum(drawn == estimate)) / len(drawn)
    if not 0 < below < 1:  # every draw on one side: there is no finite correction
        below = np.clip(below, 0.5 / len(drawn), 1 - 0.5 / len(drawn))
    bias = ndtri(below)
    left_out = np.array([statistic(np.delete(values, index)) for index in range(len(values))])
    d = left_out.mean() - left_out
    spread = np.sum(d**2)
    if spread == 0:
        return list(tails)
    acceleration = np.sum(d**3) / (6 * spread**1.5)
    z = bias + ndtri(np.array(tails) / 100)
    return list(100 * ndtr(bias + z / (1 - acceleration * z)))
