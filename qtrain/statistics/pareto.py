"""Cost against quality: what no other point beats, the area below it, and what one frontier gains over another."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from qtrain.errors import UsageError


def pareto_front(cost: Any, quality: Any, *, maximize: bool = True) -> np.ndarray:
    """Which points no other point dominates, the cheapest first.

    Point j dominates i when cost_j ≤ cost_i and quality_j ≥ quality_i (≤ with ``maximize=False``), one of them
    strictly. Equal points do not dominate each other: both are kept.

    Args:
      cost: [points]; less is better.
      quality: [points].
      maximize: whether more quality is better (accuracy), or less (a loss).

    Returns:
      int64 indices; points with a number that is not finite are never among them.

    >>> pareto_front(cost=[3, 1, 2, 2], quality=[0.9, 0.7, 0.8, 0.6])
    array([1, 2, 0])
    """
    costs, values = _points(cost, quality, maximize)
    if costs.ndim != 1:
        raise UsageError(f"cost: {costs.ndim} axes; the front is that of one list of points")
    finite = np.flatnonzero(np.isfinite(costs) & np.isfinite(values))
    order = finite[np.lexsort((-values[finite], costs[finite]))]
    front: list[int] = []
    for index in order:
        last = front[-1] if front else None
        equal = last is not None and (costs[last], values[last]) == (costs[index], values[index])
        if last is None or equal or values[index] > values[last]:
            front.append(int(index))
    return np.array(front, np.int64)


def best_within(cost: Any, quality: Any, budgets: Any, *, maximize: bool = True) -> np.ndarray:
    """The best quality among the points that cost no more than a budget, for each budget: the frontier as a function.

    Args:
      cost: [..., points]; leading axes are independent problems, such as draws of a bootstrap.
      quality: [..., points].
      budgets: [budgets].

    Returns:
      float64 [..., budgets]; NaN where no point costs so little.

    >>> best_within([1, 2, 3], [0.8, 0.7, 0.9], [0.5, 1, 2.5, 9]).tolist()
    [nan, 0.8, 0.8, 0.9]
    """
    costs, values = _points(cost, quality, maximize)
    order = np.argsort(costs, axis=-1, kind="stable")
    ordered = np.take_along_axis(costs, order, -1).reshape(-1, costs.shape[-1])
    best = np.maximum.accumulate(np.take_along_axis(values, order, -1), axis=-1).reshape(ordered.shape)
    asked = np.atleast_1d(np.asarray(budgets, float))
    padded = np.concatenate([np.full((len(best), 1), np.nan), best], axis=1)
    found = [row[np.searchsorted(c, asked, side="right")] for c, row in zip(ordered, padded, strict=True)]
    return np.stack(found).reshape(*costs.shape[:-1], len(asked)) * (1 if maximize else -1)


def hypervolume(
    cost: Any, quality: Any, reference: tuple[float, float], *, maximize: bool = True, log_cost: bool = False
) -> Any:
    """The area that the points dominate, up to a reference point.

    ::

        H = ∫ max(q(c) − q_ref, 0) dc  over c ≤ c_ref,   q(c) the best quality at a cost of at most c

    for ``maximize=False`` with q_ref − q(c). In two dimensions this is the S-metric of Zitzler and Thiele (1998).

    Args:
      cost: [..., points].
      quality: [..., points].
      reference: (c_ref, q_ref): a cost and a quality that are no better than those of the points that are to count.
      maximize: whether more quality is better.
      log_cost: integrate over log10 of the cost, so that the unit is quality × decades; costs are then above 0.

    Returns:
      a float, or float64 of the leading axes. Only comparable between groups with the same reference.

    Raises:
      UsageError: shapes that differ, no points, numbers that are not finite, a logarithm of what is not above 0.

    >>> hypervolume([1.0, 2.0], [0.5, 0.8], reference=(3.0, 0.0))
    1.3
    """
    costs, values = _points(cost, quality, maximize, log_cost)
    c_ref = float(_logarithm(np.asarray(reference[0], float))) if log_cost else float(reference[0])
    q_ref = float(reference[1]) * (1 if maximize else -1)
    return _plain(_area(costs, np.maximum(values - q_ref, 0.0), np.asarray(-np.inf), np.asarray(c_ref)))


class AreaBetween(NamedTuple):
    """What frontier A gains over frontier B on the costs that both cover.

    area: quality × cost (or × decades of cost); mean: area over the width of the range, in units of quality; low, high:
    the range, a cost. All NaN where the two share no cost.
    """

    area: Any
    mean: Any
    low: Any
    high: Any


def area_between(
    cost_a: Any,
    quality_a: Any,
    cost_b: Any,
    quality_b: Any,
    *,
    maximize: bool = True,
    log_cost: bool = False,
) -> AreaBetween:
    """The signed area between two frontiers, above zero where A is better.

    ::

        area = ∫ q_A(c) − q_B(c) dc  over [max(min c_A, min c_B), min(max c_A, max c_B)],   mean = area/width

    with q(c) the best quality at a cost of at most c (signs turned for ``maximize=False``). Nothing is interpolated:
    between two widths there may be nothing. The range is that of all points, not of the frontiers alone: a group
    that is tried at high costs and gains nothing there has been compared there. Where it is a single cost, `area` is 0
    and `mean` the difference at it.

    Args:
      cost_a, quality_a: [..., points of A].
      cost_b, quality_b: [..., points of B].
      maximize: whether more quality is better.
      log_cost: integrate over log10 of the cost.

    Raises:
      UsageError: as `hypervolume`.

    >>> area_between([1.0, 3.0], [0.6, 0.9], [1.0, 2.0, 3.0], [0.5, 0.6, 0.9])
    AreaBetween(area=0.1, mean=0.05, low=1.0, high=3.0)
    """
    a, b = (_points(*each, maximize, log_cost) for each in ((cost_a, quality_a), (cost_b, quality_b)))
    low = np.maximum(a[0].min(-1), b[0].min(-1))
    high = np.minimum(a[0].max(-1), b[0].max(-1))
    area = _area(*a, low, high) - _area(*b, low, high)
    at_one = _best(*a, low) - _best(*b, low)
    width = high - low
    with np.errstate(invalid="ignore", divide="ignore"):
        average = np.where(width > 0, area / width, at_one)
    apart = width < 0
    ends = (10.0**low, 10.0**high) if log_cost else (low, high)
    return AreaBetween(*(_plain(np.where(apart, np.nan, value)) for value in (area, average, *ends)))


def _points(cost: Any, quality: Any, maximize: bool, log_cost: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """Cost and quality as float64, more quality always better."""
    costs, values = np.asarray(cost, float), np.asarray(quality, float)
    if costs.shape != values.shape or not costs.ndim:
        raise UsageError(f"cost, quality: shapes {costs.shape} and {values.shape}; each point has one of both")
    if not costs.shape[-1]:
        raise UsageError("cost, quality: there are no points")
    return _logarithm(costs) if log_cost else costs, values if maximize else -values


def _logarithm(costs: np.ndarray) -> np.ndarray:
    if not np.all(costs > 0):
        raise UsageError("cost: some are not above 0, so that they have no logarithm; leave log_cost out")
    return np.log10(costs)


def _area(costs: np.ndarray, values: np.ndarray, low: np.ndarray, high: np.ndarray) -> np.ndarray:
    """∫ of the best value at a cost of at most c over [low, high]; what is cheaper than all points counts nothing."""
    if not (np.isfinite(costs).all() and np.isfinite(values).all()):
        raise UsageError("cost, quality: some are not finite; leave those points out and say so")
    order = np.argsort(costs, axis=-1, kind="stable")
    costs = np.take_along_axis(costs, order, -1)
    best = np.maximum.accumulate(np.take_along_axis(values, order, -1), axis=-1)
    low, high = low[..., None], high[..., None]
    ends = np.concatenate([costs[..., 1:], np.broadcast_to(high, (*costs.shape[:-1], 1))], axis=-1)
    widths = np.clip(ends, low, high) - np.clip(costs, low, high)
    return (np.maximum(widths, 0.0) * best).sum(-1)


def _best(costs: np.ndarray, values: np.ndarray, budget: np.ndarray) -> np.ndarray:
    return np.max(np.where(costs <= budget[..., None], values, -np.inf), axis=-1)


def _plain(value: np.ndarray) -> Any:
    """A float where there are no leading axes."""
    return float(value) if np.ndim(value) == 0 else value
