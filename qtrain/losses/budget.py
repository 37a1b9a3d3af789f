"""A budget of bits, bytes or bit operations that learned widths are held to, by a multiplier that adapts."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from qtrain import cost
from qtrain.errors import UsageError, did_you_mean
from qtrain.losses.shares import SCHEDULES
from qtrain.precision import Precision
from qtrain.quantizers import straight_through
from qtrain.widths import Widths

Array = jax.Array
Controller = dict[str, Array]
Budget = Callable[[Array, Any, Any, Precision, Controller], tuple[Array, Controller]]

UNITS = ("none", "bits", "bytes", "bitops")


def budget_from_config(config: Mapping[str, Any], widths: Widths, q_max: Precision, total_steps: int) -> Budget | None:
    """``(step, params, quant, precision, controller) -> (penalty, controller)``, or None without a budget.

    For a cost C of the current widths (average bits of a weight, bytes of the weights with their scales, or BitOps of a
    step as a share of those at q_max) and a budget B(t)::

        penalty  μ·max(0, C/B − 1)      μ ← max(0, μ + rate·(C/B − 1)) after each step, from 0

    dual ascent on min L s.t. C ≤ B: the multiplier grows while the budget is exceeded and the widths give way; within
    it they are left to the loss. C is the larger of the costs before and after rounding: of widths that move together,
    many cross a half in one step, which after rounding alone would be seen too late. A slow rate tells widths apart, a
    fast one moves all alike, since Adam, which moves them, knows no magnitudes. B(t) = target + (start − target)·(share
    of the schedule in force at t/N); `start` None: the target throughout.

    Args:
      config: ``unit`` (one of `UNITS`), ``target``, ``start``, ``schedule`` ("linear_down", "cosine_down", …, of
        `qtrain.losses.SCHEDULES`) and ``rate``.
      widths: of the model.
      q_max: the highest precision of the run, which "bitops" is a share of.
      total_steps: N.

    Raises:
      UsageError: for an unknown unit or schedule, a number out of range, or widths that nobody chooses.
    """
    unit, schedule = config["unit"], config["schedule"]
    for key, value, allowed in (("unit", unit, UNITS), ("schedule", schedule, tuple(SCHEDULES))):
        if value not in allowed:
            raise UsageError(f"budget.{key}={value!r}: give one of {allowed}.{did_you_mean(str(value), allowed)}")
    if unit == "none":
        return None
    if not widths.chosen:
        raise UsageError(
            f"budget.unit={unit!r}: no quantizer learns its width; give quant.weights='learned_width', or unit='none'"
        )
    start = config["target"] if config["start"] is None else config["start"]
    for key, value in (("target", config["target"]), ("start", start), ("rate", config["rate"])):
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
            raise UsageError(f"budget.{key}={value!r}: give a number above 0")
    if unit == "bitops" and max(config["target"], start) > 1:
        raise UsageError(f"budget.target={config['target']!r}: with unit='bitops' give a share of the cost at q_max")
    whole = float(cost.static(widths.plan.ops, q_max, 1))

    def spent(params: Any, quant: Any, precision: Precision, *, rounded: bool) -> Array:
        if unit == "bits":
            return widths.average_bits(params, quant, precision, rounded=rounded)
        if unit == "bytes":
            return widths.bytes(params, quant, precision, rounded=rounded)
        return widths.bitops(widths.plan.ops, params, quant, precision, rounded=rounded) / whole

    def penalty(
        step: Array, params: Any, quant: Any, precision: Precision, controller: Controller
    ) -> tuple[Array, Controller]:
        share = SCHEDULES[schedule](jnp.asarray(step, jnp.float32) / total_steps)
        allowed = config["target"] + (start - config["target"]) * share
        used = spent(params, quant, precision, rounded=True)
        smooth = spent(params, quant, precision, rounded=False)
        excess = straight_through(smooth, jnp.maximum(smooth, used)) / allowed - 1
        multiplier = controller["multiplier"]
        after = jnp.maximum(multiplier + config["rate"] * jax.lax.stop_gradient(excess), 0.0)
        new = {"multiplier": after, "spent": jax.lax.stop_gradient(used), "target": jnp.asarray(allowed, jnp.float32)}
        return multiplier * jnp.maximum(excess, 0.0), new

    return penalty


def initial_controller() -> Controller:
    """Nothing is asked for at first."""
    return {"multiplier": jnp.zeros(()), "spent": jnp.zeros(()), "target": jnp.zeros(())}
