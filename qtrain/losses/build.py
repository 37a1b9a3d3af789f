"""The penalty that a config asks for: a sum of terms, each at its rate."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qtrain.errors import UsageError, did_you_mean
from qtrain.inject import Weight
from qtrain.losses import terms
from qtrain.losses.shares import SCHEDULES
from qtrain.precision import Precision

Array = jax.Array
Term = Callable[[Sequence[Weight], Any, Any, Precision], Array]

LOSSES: dict[str, Term] = {
    "dampening": terms.dampening,
    "inverse_scale": terms.inverse_scale,
    "bin_count": terms.bin_count,
    "deviation": terms.deviation,
}
"""Name in a config → term."""

_PROBLEMS: dict[str, Callable[[Sequence[Weight]], str | None]] = {
    "dampening": terms.unsuited,
    "inverse_scale": terms.unscaled,
    "bin_count": terms.unscaled,
    "deviation": terms.unscaled,
}


@dataclasses.dataclass(frozen=True)
class Penalty:
    """``(step, params, quant, precision) -> Σ rate(step)·term``; made by `penalty_from_config`.

    Attributes:
      chosen: name → (rate, share of it that is in force at a progress from 0 to 1, term).
      weights: the quantized weights.
      total_steps: of the run.
      rates: name → the rates of all steps, float32 [total_steps], traced or not; None: they are computed.
    """

    chosen: Mapping[str, tuple[float, Callable[[Array], Array], Term]]
    weights: Sequence[Weight]
    total_steps: int
    rates: Mapping[str, Array] | None = None

    def __call__(self, step: Array, params: Any, quant: Any, precision: Precision) -> Array:
        """The penalty, a float32 scalar."""
        terms = {name: term(self.weights, params, quant, precision) for name, (_, _, term) in self.chosen.items()}
        return sum((self._rate(name, step) * term for name, term in terms.items()), jnp.zeros(()))

    def table(self) -> dict[str, np.ndarray]:
        """What `rates` may be: the rate of each term at every step."""
        steps = jnp.arange(self.total_steps)
        return {name: np.asarray(jnp.broadcast_to(self._rate(name, steps), steps.shape)) for name in self.chosen}

    def _rate(self, name: str, step: Array) -> Array:
        if self.rates is not None:
            return jnp.asarray(self.rates[name])[step]
        rate, share, _ = self.chosen[name]
        return rate * share(jnp.asarray(step, jnp.float32) / self.total_steps)


def penalty_from_config(
    config: Mapping[str, Mapping[str, Any]], weights: Sequence[Weight], total_steps: int
) -> Penalty | None:
    """The penalty of a config's section ``losses``, or None where every rate is 0.

    Args:
      config: name of a term → ``rate`` (at least 0) and ``schedule`` (one of `SCHEDULES`).
      weights: the quantized weights.
      total_steps: of the run.

    Raises:
      UsageError: for an unknown name, a rate out of range, no quantized weight, or weights whose quantizers have not
        what the term is about (a learned scale).
    """
    chosen = {}
    for name, entry in config.items():
        key = f"losses.{name}"
        if name not in LOSSES:
            raise UsageError(f"{key}: no such term; there are {sorted(LOSSES)}.{did_you_mean(name, LOSSES)}")
        rate, schedule = entry["rate"], entry["schedule"]
        if isinstance(rate, bool) or not isinstance(rate, int | float) or not 0 <= rate < math.inf:
            raise UsageError(f"{key}.rate={rate!r}: give a number of at least 0; 0 leaves the term out")
        if schedule not in SCHEDULES:
            near = did_you_mean(str(schedule), SCHEDULES)
            raise UsageError(f"{key}.schedule={schedule!r}: give one of {tuple(SCHEDULES)}.{near}")
        if rate and not weights:
            raise UsageError(f"{key}.rate={rate}: there is no quantized weight to penalise; set it to 0")
        problem = _PROBLEMS[name](weights) if rate else None
        if problem is not None:
            raise UsageError(f"{key}.rate={rate}: {problem}, or set it to 0")
        if rate:
            chosen[name] = rate, SCHEDULES[schedule], LOSSES[name]
    return Penalty(chosen, tuple(weights), total_steps) if chosen else None
