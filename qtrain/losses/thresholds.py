"""A schedule on the threshold λ of nested quantization layers: how eager scales are to grow, over training."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from qtrain.errors import UsageError, did_you_mean
from qtrain.inject import Weight
from qtrain.losses.shares import SCHEDULES

Array = jax.Array


def thresholds_from_config(
    config: Mapping[str, Any], weights: Sequence[Weight], total_steps: int
) -> Callable[[Array, Any], Any]:
    """``(step, quant) -> quant`` with the thresholds λ(t) = λ·(f + (1 − f)·(share of the schedule in force at t/N)).

    λ is each quantizer's own ``threshold``, which stays as it is in the state.

    Args:
      config: ``schedule`` (one of `SCHEDULES`) and ``final_factor`` f, above 0: what remains where the share is 0.
      weights: the quantized weights.
      total_steps: N.

    Raises:
      UsageError: for an unknown schedule, a factor out of range, or no quantizer with a threshold.
    """
    schedule, floor = config["schedule"], config["final_factor"]
    if schedule not in SCHEDULES:
        near = did_you_mean(str(schedule), SCHEDULES)
        raise UsageError(f"quant.threshold.schedule={schedule!r}: give one of {tuple(SCHEDULES)}.{near}")
    if isinstance(floor, bool) or not isinstance(floor, int | float) or not 0 < floor < math.inf:
        raise UsageError(f"quant.threshold.final_factor={floor!r}: give a number above 0")
    if schedule == "constant":
        return lambda step, quant: quant
    if all(getattr(weight.quantizer, "threshold", None) is None for weight in weights):
        raise UsageError(
            f"quant.threshold.schedule={schedule!r}: no weight has a threshold; give 'constant', or "
            "quant.weights='nested', whose scales follow the ratio of gradients"
        )

    def scheduled(step: Array, quant: Any) -> Any:
        factor = floor + (1 - floor) * SCHEDULES[schedule](jnp.asarray(step, jnp.float32) / total_steps)
        return jax.tree_util.tree_map_with_path(
            lambda path, leaf: leaf * factor if path[-1].key == "threshold" else leaf, quant
        )

    return scheduled
