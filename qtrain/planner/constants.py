"""A fitted number with what the runs say of it."""

from __future__ import annotations

import dataclasses

import numpy as np

from qtrain.statistics import percentiles

LOOSE = 4.0
"""A constant whose interval spans more than this factor is one that the runs do not identify."""


@dataclasses.dataclass(frozen=True)
class Constant:
    """value: the estimate. low, high: its 95 % bootstrap interval. identified: whether the runs tell it."""

    value: float
    low: float
    high: float
    identified: bool


def constant(
    value: float, drawn: np.ndarray, *, fixed: bool = False, bounds: tuple[float, float] | None = None
) -> Constant:
    """A `Constant` from its draws; not identified where the interval spans a factor above `LOOSE`, or it meets a bound.

    Args:
      value: the estimate, above 0. drawn: its draws. fixed: 1 by definition. bounds: those of the optimisation.
    """
    if fixed:
        return Constant(value, value, value, True)
    low, high = percentiles(drawn)
    inside = bounds is None or (value > bounds[0] * 1.001 and value < bounds[1] * 0.999)
    identified = bool(inside and low > 0 and high < LOOSE * low)
    return Constant(float(value), float(low), float(high), identified)
