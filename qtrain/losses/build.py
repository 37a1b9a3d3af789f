"""The penalty that a config asks for: a sum of terms, each at its rate."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from qtrain.errors import UsageError, did_you_mean
from qtrain.inject import Weight
from qtrain.losses import terms
from qtrain.losses.shares import SCHEDULES
from qtrain.precision import Precision

Array = jax.Array
Penalty = Callable[[Array, Any, Any, Precision], Array]

LOSSES: dict[str, Callable[[Sequence[Weight], Any, Any, Precision], Array]] = {
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


def penalty_from_config(
    config: Mapping[str, Mapping[str, Any]], weights: Sequence[Weight], total_steps: int
) -> Penalty | None:
    """``(step, params, quant, precision) -> Σ rate(step)·term``, or None where every rate is 0.

    Args:
      config: name of a term → ``rate`` (at least 0) and ``schedule`` (one of `SCHEDULES`).
      weights: the quantized weights.
      total_steps: of the run.

    Raises:
      UsageError: for an unknown name, a rate out of range, no quantized weight, or weights whose quantizers have not
        what the term is about (a learned scale).
    """
    chosen = []
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
            chosen.append((rate, SCHEDULES[schedule], LOSSES[name]))
    if not chosen:
        return None

    def penalty(step: Array, params: Any, quant: Any, precision: Precision) -> Array:
        progress = jnp.asarray(step, jnp.float32) / total_steps
        parts = [rate * share(progress) * term(weights, params, quant, precision) for rate, share, term in chosen]
        return sum(parts, jnp.zeros(()))

    return penalty
