"""Laws of one's own runs: a loss law with a worth for each width, and the constant of the fraction law."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from qtrain.errors import UsageError
from qtrain.planner.constants import Constant
from qtrain.planner.fit_fraction import FittedFraction, fit_fraction
from qtrain.planner.fit_loss import FittedLoss, fit_loss
from qtrain.planner.fraction import FractionLaw
from qtrain.planner.laws import LossLaw, Setting
from qtrain.planner.runs import Row

DRAWS = 100


@dataclasses.dataclass(frozen=True)
class Fitted:
    """What `fit` found.

    loss: the loss law, None where the runs cannot say. fraction: likewise. notes: what they cannot say, and why.
    runs: how many there are.
    """

    loss: FittedLoss | None
    fraction: FittedFraction | None
    notes: tuple[str, ...]
    runs: int

    def loss_law(self) -> LossLaw:
        """The loss law as `plan_budget` takes it.

        Raises:
          UsageError: where it could not be fitted.
        """
        found = self.loss
        if found is None:
            raise UsageError(f"the runs identified no loss law: {' '.join(self.notes)}")
        terms = [f"{found.value('A'):.4g}/(params*eff(bits))^{found.value('alpha'):.4g}"]
        if "B" in found.constants:
            terms.append(f"{found.value('B'):.4g}/tokens^{found.value('beta'):.4g}")
        terms.append(f"{found.value('E'):.4g}")
        worth = ", ".join(f"eff({bits}) = {found.efficiency[bits].value:.4g}" for bits in sorted(found.efficiency))

        def evaluate(setting: Setting) -> float:
            return float(found.predict(setting.params, setting.tokens, setting.bits))

        return LossLaw(
            name="fitted",
            equation=f"L = {' + '.join(terms)}; {worth}",
            source=f"fitted to {found.runs} runs",
            widths=tuple(sorted(found.efficiency)),
            ranges={"params": found.params, "tokens": found.tokens},
            evaluate=evaluate,
            doubts=_doubts(
                "loss", found.constants | {f"eff({bits})": worth for bits, worth in found.efficiency.items()}
            ),
        )

    def fraction_law(self) -> FractionLaw:
        """The fraction law as `plan_budget` takes it.

        Raises:
          UsageError: where it could not be fitted.
        """
        found = self.fraction
        if found is None:
            raise UsageError(f"the runs identified no fraction law: {' '.join(self.notes)}")
        ratios = [cell.tokens_per_byte for cell in found.cells if cell.used]
        sizes = [cell.params for cell in found.cells if cell.used]
        return FractionLaw(
            constant=found.constant.value,
            low=min(ratios),
            high=max(ratios),
            params=(min(sizes), max(sizes)),
            widths=tuple(sorted({cell.bits for cell in found.cells if cell.used})),
            name="fitted",
            source=f"fitted to {found.runs} runs; 95 % interval of the constant {_interval(found.constant)}",
            doubts=_doubts("fraction", {"its constant": found.constant}),
        )


def _doubts(law: str, constants: Mapping[str, Constant]) -> tuple[str, ...]:
    return tuple(
        f"the runs of the {law} law (fitted) do not identify {name}: {found.value:.4g} {_interval(found)}"
        for name, found in constants.items()
        if not found.identified
    )


def _interval(constant: Constant) -> str:
    return f"[{constant.low:.4g}, {constant.high:.4g}]"


def fit(rows: Sequence[Row], *, draws: int = DRAWS, seed: int = 0) -> Fitted:
    """Fit ``L = A/(N·eff_b)^α + B/D^β + E`` and ``f* = exp(−a/ln S)`` to runs.

    See `fit_loss` and `fit_fraction`. A law that the runs cannot identify is None, and a note says what they lack.

    Args:
      rows: the runs.
      draws: of the bootstrap. seed: of it.

    Raises:
      UsageError: no runs, or draws below 1.
    """
    if not rows:
        raise UsageError("no run to fit to: give folders or tables of runs")
    if draws < 1:
        raise UsageError(f"--draws {draws}: give at least 1")
    notes: list[str] = []
    loss = fit_loss(rows, draws=draws, seed=seed, notes=notes)
    fraction = fit_fraction(rows, draws=draws, seed=seed, notes=notes)
    return Fitted(loss, fraction, tuple(notes), len(rows))


def as_json(fitted: Fitted) -> dict[str, Any]:
    """Plain data."""
    return dataclasses.asdict(fitted)
