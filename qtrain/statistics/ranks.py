"""Whether two orders agree."""

from __future__ import annotations

from typing import Any

import numpy as np

from qtrain.errors import UsageError
from qtrain.statistics.intervals import DRAWS, Interval, percentiles

_FEWEST = 6


def rank_correlation(x: Any, y: Any, *, level: float = 0.95, draws: int = DRAWS, seed: int = 0) -> Interval:
    """Spearman's ρ: Pearson's correlation of the ranks, ties at their average rank; with a bootstrap interval.

    The interval is the percentile bootstrap over pairs; draws in which x or y is all ties have no ρ and are left out.
    Measured on pairs of normal values (true ρ of 0 to 0.9) at level 0.95 it covers the truth in 86 to 98 % of cases for
    6 pairs, 94 to 99 % for 10 and 95 to 97 % for 20. Pairs in perfect order are so in every draw, which says nothing of
    how sure that is: there is no interval then.

    Args:
      x, y: [n] finite numbers.
      level: of confidence.
      draws: resamples.
      seed: of the resampling.

    Returns:
      ρ, the ends and n. ρ is NaN where x or y is all ties; the ends are NaN for fewer than 6 pairs and where
      |ρ| is 1.

    Raises:
      UsageError: lengths that differ, no pairs, numbers that are not finite.

    >>> rank_correlation([1, 2, 3, 4, 5], [1, 4, 9, 16, 20]).estimate
    1.0
    """
    pair = np.asarray(x, float), np.asarray(y, float)
    if pair[0].shape != pair[1].shape or pair[0].ndim != 1 or not pair[0].size:
        raise UsageError(f"x, y: shapes {pair[0].shape} and {pair[1].shape}; give two lists of the same length")
    if not (np.isfinite(pair[0]).all() and np.isfinite(pair[1]).all()):
        raise UsageError("x, y: some numbers are not finite; leave those pairs out and say so")
    n = len(pair[0])
    estimate = float(_correlation(*pair))
    if n < _FEWEST or np.isnan(estimate) or abs(estimate) == 1:
        return Interval(estimate, float("nan"), float("nan"), n)
    index = np.random.default_rng(seed).integers(0, n, (draws, n))
    drawn = _correlation(pair[0][index], pair[1][index])
    low, high = percentiles(drawn[np.isfinite(drawn)], level)
    return Interval(estimate, low, high, n)


def _correlation(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    a, b = _centred_ranks(x), _centred_ranks(y)
    scale = np.sqrt((a * a).sum(-1) * (b * b).sum(-1))
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.clip((a * b).sum(-1) / scale, -1.0, 1.0)


def _centred_ranks(values: np.ndarray) -> np.ndarray:
    """Average ranks over the last axis, from 0, less their mean. scipy has this; importing it takes a second."""
    order = np.argsort(values, axis=-1, kind="stable")
    ordered = np.take_along_axis(values, order, -1)
    place = np.broadcast_to(np.arange(values.shape[-1]), values.shape)
    new = np.ones(values.shape, bool)  # where a run of ties begins
    new[..., 1:] = ordered[..., 1:] != ordered[..., :-1]
    first = np.maximum.accumulate(np.where(new, place, 0), axis=-1)
    ends = np.roll(new, -1, axis=-1)  # the last place always ends a run, as the first begins one
    last = np.flip(np.minimum.accumulate(np.flip(np.where(ends, place, values.shape[-1]), -1), axis=-1), -1)
    ranks = np.empty(values.shape)
    np.put_along_axis(ranks, order, (first + last) / 2, axis=-1)
    return ranks - (values.shape[-1] - 1) / 2
