"""The constant of the fraction law from sweeps over when quantization is switched on."""

from __future__ import annotations

import dataclasses
import math
from collections import defaultdict
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import numpy as np

from qtrain.planner.constants import Constant, constant
from qtrain.planner.fraction import tokens_per_parameter_byte
from qtrain.planner.runs import FLOAT_BITS, Row
from qtrain.statistics import draw_means, percentiles

HUBER = 0.3
"""δ of the Huber loss of ``ln f`` residuals: a third off is an outlier."""
LEAST_SPREAD = 0.1
"""Of ``ln f`` of a cell's optimum: a sweep is no finer than its fractions."""
_RANGE = (0.05, 100.0)


@dataclasses.dataclass(frozen=True)
class Cell:
    """One size, length and width over its fractions.

    fractions, losses: of each fraction the mean loss. optimum: the fraction of least loss, between its neighbours by a
    parabola; low, high: its 95 % interval over seeds (NaN with one). edge: "" or which end of the sweep it lies at.
    law: what the fitted law says. used: whether the constant was fitted to it.
    """

    params: float
    tokens: float
    bits: int
    tokens_per_byte: float
    seeds: int
    fractions: tuple[float, ...]
    losses: tuple[float, ...]
    optimum: float
    low: float
    high: float
    edge: str
    law: float
    used: bool


@dataclasses.dataclass(frozen=True)
class FittedFraction:
    """``f* = exp(−a/ln S)``. constant: a. cells: what it was fitted to, and what it was not. runs: in those used."""

    constant: Constant
    cells: tuple[Cell, ...]
    runs: int


def fit_fraction(rows: Sequence[Row], *, draws: int, seed: int, notes: list[str]) -> FittedFraction | None:
    """Fit the a of ``f* = exp(−a/ln S)`` (Dremov et al. 2025) to measured optima, by least Huber loss of ln f.

    Of each size, length and width with runs at three fractions or more, the optimum is the vertex of the parabola
    through the best mean loss and its two neighbours. It weighs by the inverse of its spread over resampled seeds. An
    optimum at the lowest fraction of a sweep is a bound and not used, nor is one where S ≤ 1, outside the law.

    Args:
      rows: the runs, float ones too, which are left out.
      draws, seed: of the bootstrap, over seeds, and over sizes, lengths and widths where there are three or more: so
        few seeds are closer to each other than the law is to the optima.
      notes: what the runs cannot say is added here.

    Returns:
      None without a cell that can be used.
    """
    sweeps: dict[Any, dict[float, dict[Hashable, float]]] = defaultdict(lambda: defaultdict(dict))
    for row in rows:
        if row.bits < FLOAT_BITS:
            sweeps[row.params, row.tokens, row.bits][row.fraction][row.seed] = row.loss
    sweeps = {key: sweep for key, sweep in sorted(sweeps.items()) if len(sweep) >= 3}
    if not sweeps:
        notes.append(
            "no fraction law: no size, length and width has runs at three fractions of quantized training or more; add "
            "a sweep over schedule.start_percent"
        )
        return None
    measured = [_Sweep(key, sweep, draws, seed, notes) for key, sweep in sweeps.items()]
    used = [one for one in measured if one.usable(notes)]
    if not used:
        notes.append("no fraction law: no sweep has an optimum that can be used; see the notes before")
        return None
    ratios = np.array([one.ratio for one in used])
    weights = 1 / np.array([max(one.spread, LEAST_SPREAD) for one in used])
    value = _solve(ratios, np.array([one.optimum for one in used]), weights)
    generator = np.random.default_rng(seed)
    drawn = []
    for i in range(draws):
        cells = generator.integers(len(used), size=len(used)) if len(used) > 2 else np.arange(len(used))
        drawn.append(_solve(ratios[cells], np.array([used[j].drawn[i] for j in cells]), weights[cells]))
    if len({round(ratio, 6) for ratio in ratios}) < 2:
        notes.append(
            f"one S ({ratios[0]:.4g}) alone: the constant is that of its optimum, and nothing is said of how the "
            "fraction depends on S; add runs of other lengths, sizes or widths"
        )
    if all(one.seeds == 1 for one in used) and len(used) < 3:
        notes.append("one seed and fewer than three sweeps: the constant of the fraction law has no interval")
        found = Constant(value, math.nan, math.nan, False)
    else:
        found = constant(value, np.array(drawn), bounds=_RANGE)
    reported = tuple(one.cell(value, one in used) for one in measured)
    return FittedFraction(found, reported, sum(one.runs for one in used))


def vertex(fractions: np.ndarray, losses: np.ndarray) -> float:
    """The fraction of least loss: of the parabola through the least and its neighbours; at an end, that end.

    >>> fractions = np.array([0.0, 0.2, 0.6, 1.0])
    >>> vertex(fractions, (fractions - 0.3) ** 2)
    0.3
    """
    best = int(np.argmin(losses))
    if best in (0, len(losses) - 1):
        return float(fractions[best])
    (a, b, c), (x, y, z) = fractions[best - 1 : best + 2], losses[best - 1 : best + 2]
    left, right = (b - a) * (y - z), (b - c) * (y - x)
    if left == right:  # three equal losses
        return float(b)
    middle = b - 0.5 * ((b - a) * left - (b - c) * right) / (left - right)
    return round(float(np.clip(middle, a, c)), 12)


def _solve(ratios: np.ndarray, optima: np.ndarray, weights: np.ndarray) -> float:
    from scipy.optimize import minimize_scalar

    inverse, target = 1 / np.log(ratios), np.log(np.maximum(optima, 1e-6))

    def cost(a: float) -> float:
        error = np.abs(target + a * inverse)
        return float(np.sum(weights * np.where(error < HUBER, 0.5 * error**2, HUBER * (error - 0.5 * HUBER))))

    return float(minimize_scalar(cost, bounds=_RANGE, method="bounded").x)  # convex in a: one minimum


class _Sweep:
    """The fractions of one size, length and width."""

    def __init__(self, key: Any, sweep: dict[float, dict[Hashable, float]], draws: int, seed: int, notes: list[str]):
        self.params, self.tokens, self.bits = key
        self.ratio = tokens_per_parameter_byte(*key)
        order = sorted(sweep)
        self.fractions = np.array(order)
        self.losses = np.array([np.mean(list(sweep[fraction].values())) for fraction in order])
        self.seeds = min(len(sweep[fraction]) for fraction in order)
        self.runs = sum(len(sweep[fraction]) for fraction in order)
        self.optimum = vertex(self.fractions, self.losses)
        samples: list[Mapping[Hashable, Any]] = [dict(sweep[fraction].items()) for fraction in order]
        means = draw_means(samples, draws=draws, seed=seed)
        self.drawn = np.array([vertex(self.fractions, losses) for losses in means])
        self.spread = float(np.std(np.log(np.maximum(self.drawn, 1e-6)))) if self.seeds > 1 else 1.0
        best = int(np.argmin(self.losses))
        self.edge = {0: "lowest", len(order) - 1: "highest"}.get(best, "")

    def usable(self, notes: list[str]) -> bool:
        """Whether the law can be fitted to it; if not, a note says why."""
        where = f"{self.params:.4g} parameters, {self.tokens:.4g} tokens, {self.bits} bits"
        if self.ratio <= 1:
            notes.append(f"{where}: S = {self.ratio:.3g}, where the fraction law has no value: not used")
            return False
        if self.edge == "lowest":
            notes.append(f"{where}: the least loss is at the lowest fraction, {self.fractions[0]:.3g}: not used")
            return False
        return True

    def cell(self, value: float, used: bool) -> Cell:
        """For the report."""
        low, high = percentiles(self.drawn) if self.seeds > 1 else (math.nan, math.nan)
        law = math.exp(-value / math.log(self.ratio)) if self.ratio > 1 else math.nan
        return Cell(
            self.params,
            self.tokens,
            self.bits,
            self.ratio,
            self.seeds,
            tuple(self.fractions.tolist()),
            tuple(self.losses.tolist()),
            self.optimum,
            float(low),
            float(high),
            self.edge,
            law,
            used,
        )
