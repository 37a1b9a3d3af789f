"""The width of each layer that a budget leaves: integer programs, one assignment or the whole front."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp

from qtrain.errors import UsageError
from qtrain.search.problem import Costs, Problem

_SPAN = 1e3
"""Range of a program's objective and of its budget: HiGHS's tolerances are 1e-6, which is then 1e-9 of it. On wider
ranges it takes programs for infeasible that are not."""


def solve(problem: Problem, unit: str, budget: float | str) -> np.ndarray:
    """argmin Σ_l Ω_l(b_l) subject to cost(b) ≤ budget: for each layer the index of its width, [layers].

    An integer program with a 0/1 variable for each layer and width, by HiGHS (`scipy.optimize.milp`) without a gap, on
    a scale that grows finer until the optimum is known to about 1e-7 of itself. The budget is kept exactly: costs are
    whole numbers, and are added up as such. Of two widths that are equally good for a layer the cheaper one is taken.

    Args:
      problem: the layers, their widths and costs.
      unit: a key of ``problem.costs``.
      budget: at most so much, in that unit; a number, or its decimal digits. More than the widest widths cost is no
        error: then nothing is binding.

    Raises:
      UsageError: an unknown unit, a budget that is no number, or one that no choice meets: the range is named.
    """
    costs = problem.unit(unit)
    bound = _whole(costs, unit, budget)
    if bound < _least(costs):
        raise infeasible(problem, unit, budget)
    return _optimum(problem.omega, costs.table, bound - costs.fixed)


def front(problem: Problem, unit: str, points: int = 0) -> list[np.ndarray]:
    """The efficient choices, the cheapest first: each has a smaller Σ Ω than every other that costs as much or less.

    Args:
      problem: the layers, their widths and costs.
      unit: of the cost that is traded for Ω.
      points: at most so many, at least 2: the solutions for as many budgets, evenly spaced from the cheapest choice to
        the one beyond which Ω does not fall. 0: all there are, each found just below the cost of the one before; their
        number may grow as the number of widths to the power of the number of layers.

    Raises:
      UsageError: an unknown unit, or a number of points below 2 that is not 0.
    """
    costs = problem.unit(unit)
    if points < 0 or points == 1:
        raise UsageError(f"front: {points} points; give at least 2, or 0 for all of them")
    lowest = _least(costs)
    best = _optimum(problem.omega, costs.table, int(costs.table.max(axis=1).sum()))
    found = [best]
    if points:
        highest = costs.total(best)
        budgets = sorted({lowest + (highest - lowest) * k // (points - 1) for k in range(points - 1)})
        found += [_optimum(problem.omega, costs.table, budget - costs.fixed) for budget in budgets]
    else:
        while costs.total(found[-1]) > lowest:
            found.append(_optimum(problem.omega, costs.table, costs.total(found[-1]) - costs.fixed - 1))
    return efficient(problem, costs, found)


def efficient(problem: Problem, costs: Costs, choices: list[np.ndarray]) -> list[np.ndarray]:
    """`choices` without those that another one equals or beats in both cost and Ω, the cheapest first."""
    ordered = sorted(choices, key=lambda choice: (costs.total(choice), problem.rise(choice)))
    kept: list[np.ndarray] = []
    for choice in ordered:
        if not kept or problem.rise(choice) < problem.rise(kept[-1]):
            kept.append(choice)
    return kept


def infeasible(problem: Problem, unit: str, budget: float | str) -> UsageError:
    """The error of a budget that no choice meets, with the range of those that some do."""
    costs = problem.unit(unit)
    low = _least(costs) / costs.divisor
    high = (costs.fixed + int(costs.table.max(axis=1).sum())) / costs.divisor
    widths = ", ".join(map(str, problem.widths))
    return UsageError(
        f"budget {unit}={budget}: cannot be met; with widths {widths} the model takes from {low:.10g} to {high:.10g} "
        f"{unit}; give at least {_rounded_up(low)}"
    )


def _rounded_up(value: float) -> str:
    """`value` with few digits, not below it."""
    if value == int(value):
        return str(int(value))
    digits = 10 ** max(0, 6 - len(str(int(value))))
    return f"{math.ceil(value * digits) / digits:.10g}"


def _whole(costs: Costs, unit: str, budget: float | str) -> int:
    """The budget in the whole numbers of `costs`, exactly: 2.7 bits of ten weights are 27."""
    try:
        exact = Fraction(str(budget))
    except (ValueError, ZeroDivisionError, OverflowError):
        exact = Fraction(0)
    if exact <= 0:
        raise UsageError(f"budget {unit}={budget}: give a number above 0, such as {unit}=3")
    return math.floor(exact * costs.divisor)


def _least(costs: Costs) -> int:
    return costs.fixed + int(costs.table.min(axis=1).sum())


def _optimum(omega: np.ndarray, table: np.ndarray, bound: int) -> np.ndarray:
    """The choice of least Σ Ω with Σ cost ≤ bound, which the cheapest one meets."""
    allowed = _worth_it(omega, table)
    excess = np.where(allowed, omega, np.inf)
    excess = excess - excess.min(axis=1, keepdims=True)  # what every choice has is no part of the choice
    rows = np.arange(len(omega))
    while True:
        finite = excess[allowed]
        top = float(finite.max(initial=0.0))
        if top == 0.0:
            return np.argmin(np.where(allowed, table, np.iinfo(np.int64).max), axis=1)
        choice = _program(excess / top * _SPAN, allowed, table, bound)
        reached = float(excess[rows, choice].sum())
        # A width whose own share exceeds what was reached is in no optimum: without those the scale is finer.
        closer = allowed & (excess <= reached)
        if reached == 0.0 or reached > 1e-2 * top or np.array_equal(closer, allowed):
            return choice
        allowed = closer


def _worth_it(omega: np.ndarray, table: np.ndarray) -> np.ndarray:
    """Which widths of each layer no other one equals or beats in both cost and Ω (of equal ones the first stays)."""
    keep = np.ones(omega.shape, bool)
    for index in range(omega.shape[1]):
        for other in range(omega.shape[1]):
            no_worse = (omega[:, other] <= omega[:, index]) & (table[:, other] <= table[:, index])
            equal = (omega[:, other] == omega[:, index]) & (table[:, other] == table[:, index])
            if other != index:
                keep[:, index] &= ~(no_worse & (~equal | (other < index)))
    return keep


def _program(objective: np.ndarray, allowed: np.ndarray, table: np.ndarray, bound: int) -> np.ndarray:
    cheapest = np.where(allowed, table, np.iinfo(np.int64).max).min(axis=1)
    slack = bound - int(cheapest.sum())
    above = table - cheapest[:, None]
    # What exceeds the slack by itself is out, which leaves a row whose numbers are of the size of its limit.
    layer, width = np.nonzero(allowed & (above <= slack))
    spent, gains = above[layer, width], objective[layer, width]
    # Sums of costs are multiples of their common divisor: a limit between two of them leaves no doubt which it admits.
    step = math.gcd(*map(int, spent)) or 1
    limit = (slack // step + 0.5) * step
    unit = limit / _SPAN
    one_each = (layer == np.arange(len(table))[:, None]).astype(float)
    constraints = [LinearConstraint(one_each, 1, 1), LinearConstraint(spent / unit, -np.inf, _SPAN)]
    while True:
        result = milp(
            gains,
            constraints=constraints,
            integrality=np.ones(len(layer)),
            bounds=Bounds(0, 1),
            options={"mip_rel_gap": 0.0, "presolve": False},
        )
        if result.x is None:
            raise RuntimeError(f"HiGHS found no solution where there is one: {result.message}")
        taken = np.round(result.x).astype(bool)
        if not np.array_equal(one_each @ taken, np.ones(len(table))):
            raise RuntimeError("HiGHS gave a layer no width, or two")
        if int(spent[taken].sum()) <= slack:
            choice = np.zeros(len(table), int)
            choice[layer[taken]] = width[taken]
            return choice
        # Within the budget to HiGHS's tolerance, and beyond it by the exact sum: every choice but this one.
        constraints.append(LinearConstraint(taken.astype(float), -np.inf, len(table) - 1))
