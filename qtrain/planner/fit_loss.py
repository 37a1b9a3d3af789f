"""A loss law of one's own runs (the form of Hoffmann et al. 2022 and Panferov et al. 2025)."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import numpy as np

from qtrain.planner.constants import Constant, constant
from qtrain.planner.runs import FLOAT_BITS, Row

HUBER = 1e-3
"""δ of the Huber loss of log-loss residuals, as Hoffmann et al. 2022 (arXiv 2203.15556) have it."""
EXPONENTS = (0.01, 3.0)
WORTH = (1e-4, 4.0)
_STARTS = (0.1, 0.35, 0.8)
_FLOORS = (0.3, 0.9)
_PROMISING = 3


@dataclasses.dataclass(frozen=True)
class Residual:
    """Runs of one size, length and width: how many, their mean loss, the law's, and its error as a share of it."""

    params: float
    tokens: float
    bits: int
    n: int
    loss: float
    predicted: float
    error: float


@dataclasses.dataclass(frozen=True)
class FittedLoss:
    """``L = A/(N·eff_b)^α + B/D^β + E``.

    constants: A, alpha, B, beta, E; without B and beta where all runs have one length, whose term E then holds.
    efficiency: bits → eff_b, 1 for `reference`. params, tokens: least and most of the runs. residuals: by cell.
    """

    constants: dict[str, Constant]
    efficiency: dict[int, Constant]
    reference: int
    params: tuple[float, float]
    tokens: tuple[float, float]
    residuals: tuple[Residual, ...]
    runs: int

    def value(self, name: str) -> float:
        """Of a constant."""
        return self.constants[name].value

    def predict(self, params: float, tokens: float, bits: int) -> float:
        """The loss at N, D and b."""
        worth = params * self.efficiency[bits].value
        data = self.value("B") / tokens ** self.value("beta") if "B" in self.constants else 0.0
        return self.value("A") / worth ** self.value("alpha") + data + self.value("E")


def fit_loss(rows: Sequence[Row], *, draws: int, seed: int, notes: list[str]) -> FittedLoss | None:
    """Fit ``L = A/(N·eff_b)^α + B/D^β + E`` by least Huber loss of ``ln L − ln L̂`` (δ = 1e-3), from many starts.

    eff_b, one for each width, is how many float parameters a parameter of b bits is worth; it is 1 for float, or,
    without float runs, for the widest width. Of a size, length and width whose runs have several fractions of quantized
    training, those of the fraction with the least mean loss count: the law is of plans, which have the best fraction.
    Intervals are 95 % percentiles over refits to resampled residuals.

    Args:
      rows: the runs.
      draws, seed: of the bootstrap.
      notes: what the runs cannot say is added here.

    Returns:
      None where they cannot tell the sizes' term: one size alone, or fewer runs than constants.
    """
    rows = best_fractions(rows)
    sizes, lengths = {row.params for row in rows}, {row.tokens for row in rows}
    widths = sorted({_width(row) for row in rows})
    if len(sizes) < 2:
        notes.append(
            f"no loss law: all {len(rows)} runs have {min(sizes):.4g} parameters, so A, alpha and eff cannot be told "
            "from E; add runs of another size"
        )
        return None
    model = _Model(rows, widths, with_tokens=len(lengths) > 1)
    if len(model.cells) < model.size:
        notes.append(
            f"no loss law: {len(model.cells)} different sizes, lengths and widths for {model.size} constants; add runs"
        )
        return None
    if not model.with_tokens:
        notes.append(
            f"B and beta not identified: all runs have {min(lengths):.4g} tokens, whose term E holds; add runs of "
            "another length"
        )
    if len(widths) == 1:
        notes.append(f"eff not identified: all runs have {widths[0]} bits; add runs of another width, or float ones")
    best = model.best()
    drawn = model.bootstrap(best, draws, seed)
    constants, efficiency = model.constants(best, drawn)
    for name, found in [*constants.items(), *((f"eff({b})", found) for b, found in efficiency.items())]:
        if not found.identified:
            notes.append(
                f"{name} not identified: {found.value:.3g}, interval {found.low:.3g} to {found.high:.3g}; "
                "predictions between the runs may hold, others do not"
            )
    return FittedLoss(
        constants,
        efficiency,
        model.reference,
        (min(sizes), max(sizes)),
        (min(lengths), max(lengths)),
        tuple(model.residuals(best)),
        len(rows),
    )


def best_fractions(rows: Sequence[Row]) -> list[Row]:
    """Of each size, length and width the runs of the fraction with the least mean loss."""
    cells: dict[Any, dict[float, list[Row]]] = defaultdict(lambda: defaultdict(list))
    for row in rows:
        cells[row.params, row.tokens, _width(row)][row.fraction].append(row)
    return [
        row
        for cell in cells.values()
        for row in min(cell.values(), key=lambda group: sum(one.loss for one in group) / len(group))
    ]


def _width(row: Row) -> int:
    return 32 if row.bits >= FLOAT_BITS else row.bits


class _Model:
    """θ = (ln A, ln α, ln E, [ln B, ln β], ln eff of all widths but the reference) against the log losses of runs."""

    def __init__(self, rows: Sequence[Row], widths: Sequence[int], with_tokens: bool):
        self.rows, self.with_tokens = rows, with_tokens
        self.reference = widths[-1]
        self.free = list(widths[:-1])
        self.log_params = np.log([row.params for row in rows])
        self.log_tokens = np.log([row.tokens for row in rows])
        self.log_loss = np.log([row.loss for row in rows])
        self.which = np.array(
            [self.free.index(w) if (w := _width(row)) in self.free else len(self.free) for row in rows]
        )
        self.cells = {(row.params, row.tokens, _width(row)) for row in rows}
        self.first_worth = 5 if with_tokens else 3
        self.size = self.first_worth + len(self.free)
        least = float(self.log_loss.min())
        big = 700.0  # of a logarithm: no bound at all
        low = [-big, math.log(EXPONENTS[0]), least + math.log(1e-3)]
        high = [big, math.log(EXPONENTS[1]), least]
        if with_tokens:
            low, high = [*low, -big, math.log(EXPONENTS[0])], [*high, big, math.log(EXPONENTS[1])]
        self.low = np.array([*low, *[math.log(WORTH[0])] * len(self.free)])
        self.high = np.array([*high, *[math.log(WORTH[1])] * len(self.free)])

    def predict(self, theta: np.ndarray) -> np.ndarray:
        """ln L̂ of each run."""
        return np.logaddexp.reduce(self._log_terms(theta), axis=0)

    def jacobian(self, theta: np.ndarray) -> np.ndarray:
        """d ln L̂/dθ, [runs, θ]: each term counts by its share of the loss."""
        terms = self._log_terms(theta)
        shares = np.exp(terms - np.logaddexp.reduce(terms, axis=0))
        alpha = np.exp(theta[1])
        worth = np.append(theta[self.first_worth :], 0.0)[self.which]
        columns = [shares[0], -shares[0] * alpha * (self.log_params + worth), shares[1]]
        if self.with_tokens:
            columns += [shares[2], -shares[2] * np.exp(theta[4]) * self.log_tokens]
        columns += [np.where(self.which == index, -shares[0] * alpha, 0.0) for index in range(len(self.free))]
        return np.stack(columns, axis=1)

    def _log_terms(self, theta: np.ndarray) -> np.ndarray:
        worth = np.append(theta[self.first_worth :], 0.0)[self.which]
        terms = [theta[0] - np.exp(theta[1]) * (self.log_params + worth), np.full(len(self.rows), theta[2])]
        if self.with_tokens:
            terms.append(theta[3] - np.exp(theta[4]) * self.log_tokens)
        return np.clip(terms, -700, 700)

    def solve(self, start: np.ndarray, log_loss: np.ndarray, evaluations: int = 300) -> Any:
        """The nearest optimum."""
        from scipy.optimize import least_squares

        inside = np.clip(start, self.low + 1e-6, self.high - 1e-6)
        return least_squares(
            lambda theta: self.predict(theta) - log_loss,
            inside,
            jac=self.jacobian,
            bounds=(self.low, self.high),
            loss="huber",
            f_scale=HUBER,
            x_scale="jac",
            max_nfev=evaluations,
        )

    def best(self) -> np.ndarray:
        """The best of the optima from all starts."""
        first = [self.solve(start, self.log_loss, evaluations=40) for start in self._starts()]
        promising = sorted(first, key=lambda one: one.cost)[:_PROMISING]
        return min((self.solve(one.x, self.log_loss) for one in promising), key=lambda one: one.cost).x

    def _starts(self) -> list[np.ndarray]:
        loss = np.exp(self.log_loss)
        starts = []
        for alpha, beta, floor in itertools.product(_STARTS, _STARTS if self.with_tokens else (0.0,), _FLOORS):
            constant_part = floor * loss.min()
            rest = math.log(max(loss.mean() - constant_part, 1e-6) / (1 + self.with_tokens))
            theta = [rest + alpha * self.log_params.mean(), math.log(alpha), math.log(constant_part)]
            if self.with_tokens:
                theta += [rest + beta * self.log_tokens.mean(), math.log(beta)]
            theta += [math.log(1 - math.exp(-bits / 3)) for bits in self.free]
            starts.append(np.array(theta))
        return starts

    def bootstrap(self, best: np.ndarray, draws: int, seed: int) -> np.ndarray:
        """θ of refits to the fit plus residuals drawn with replacement: the design stays as it is."""
        generator = np.random.default_rng(seed)
        fitted = self.predict(best)
        degrees = max(len(self.rows) - self.size, 1)
        # A fit takes up some of the noise: residuals are smaller than it by this much.
        residuals = (self.log_loss - fitted) * math.sqrt(len(self.rows) / degrees)
        return np.stack(
            [self.solve(best, fitted + generator.choice(residuals, len(residuals))).x for _ in range(draws)]
        )

    def constants(self, best: np.ndarray, drawn: np.ndarray) -> tuple[dict[str, Constant], dict[int, Constant]]:
        """Names and widths to constants."""
        values, draws = np.exp(best), np.exp(drawn)
        exponents, floor = EXPONENTS, (math.exp(self.low[2]), math.exp(self.high[2]))
        names = {"A": (0, None), "alpha": (1, exponents)}
        if self.with_tokens:
            names |= {"B": (3, None), "beta": (4, exponents)}
        names |= {"E": (2, floor)}
        found = {name: constant(values[i], draws[:, i], bounds=bounds) for name, (i, bounds) in names.items()}
        for factor, exponent in (("A", "alpha"), ("B", "beta")):
            # The factor's interval is wide wherever the exponent's is a little: it goes by the exponent.
            if factor in found:
                found[factor] = dataclasses.replace(found[factor], identified=found[exponent].identified)
        worth = {
            bits: constant(values[self.first_worth + i], draws[:, self.first_worth + i], bounds=WORTH)
            for i, bits in enumerate(self.free)
        }
        worth[self.reference] = constant(1.0, np.ones(1), fixed=True)
        return found, worth

    def residuals(self, best: np.ndarray) -> list[Residual]:
        """Cell by cell."""
        predicted = np.exp(self.predict(best))
        cells: dict[Any, list[int]] = defaultdict(list)
        for index, row in enumerate(self.rows):
            cells[row.params, row.tokens, _width(row)].append(index)
        found = []
        for (params, tokens, bits), indices in sorted(cells.items()):
            loss = float(np.mean([self.rows[i].loss for i in indices]))
            law = float(predicted[indices[0]])
            found.append(Residual(params, tokens, bits, len(indices), loss, law, loss / law - 1))
        return found
