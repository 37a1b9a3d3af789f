"""The rules by which a transition-adaptive learning rate follows its target, and what their settings may be."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from qtrain.errors import UsageError, did_you_mean

Array = jax.Array

RULES = ("additive", "multiplicative", "proportional")
TARGET_SCALES = ("sqrt_bits",)
SMALLEST_RATE = 1e-8  # the authors' ε: it keeps rates finite where nothing moves


class Scalars(NamedTuple):
    """What a rule reads and writes: vectors as in `TransitionState`. The last two are the proportional rule's."""

    running: Array
    rate: Array
    target: Array
    mean_rate: Any = None
    factor: Any = None


@dataclasses.dataclass(frozen=True)
class Rule:
    """A rule with its settings; the equations are those of `scale_by_transition_rate`.

    Attributes:
      name: one of `RULES`.
      momentum: m.
      gain: η of the additive rule, γ of the proportional one.
      limit: largest U, or None.
    """

    name: str
    momentum: Any
    gain: Any
    limit: Any

    def begin(self, old: Scalars, target: Array) -> Scalars:
        """At the first update: K = R_0, U = U_0."""
        if self.name != "proportional":
            return Scalars(target, old.rate, target)
        return Scalars(target, old.rate, target, old.rate, old.rate / jnp.maximum(target, SMALLEST_RATE))

    def __call__(self, old: Scalars, transitions: Array, target: Array) -> Scalars:
        """After an update that found `transitions` k and has the target R."""
        m = self.momentum
        running = m * old.running + (1 - m) * transitions
        mean_rate = factor = None
        if self.name == "additive":
            rate = jnp.maximum(old.rate + self.gain * (target - running), 0.0)
        elif self.name == "multiplicative":
            rate = m * old.rate + (1 - m) * old.rate * target / (running + SMALLEST_RATE)
        else:
            mean_rate = m * old.mean_rate + (1 - m) * old.rate
            factor = mean_rate / (running + SMALLEST_RATE)
            factor = jnp.clip(factor, old.factor * jnp.exp(-self.gain), old.factor * jnp.exp(self.gain))
            # Not beyond what the limit lets through, or it would take long to come back from there.
            factor = jnp.minimum(factor, self.limit / jnp.maximum(target, SMALLEST_RATE))
            rate = factor * target
        return Scalars(
            running, rate if self.limit is None else jnp.minimum(rate, self.limit), target, mean_rate, factor
        )


def checked_rule(
    name: str, target: Any, initial_rate: Any, momentum: Any, gain: Any, max_rate: Any, target_scale: str | None
) -> Rule:
    """The rule with its defaults filled in.

    Raises:
      UsageError: a number out of range, as far as it is known (not traced); an unknown name.
    """
    if name not in RULES:
        raise UsageError(f"rule={name!r}: give one of {RULES}.{did_you_mean(name, RULES)}")
    if target_scale is not None and target_scale not in TARGET_SCALES:
        near = did_you_mean(target_scale, TARGET_SCALES)
        raise UsageError(f"target_scale={target_scale!r}: give None or one of {TARGET_SCALES}.{near}")
    if gain is not None and name == "multiplicative":
        raise UsageError(f"gain={gain!r}: the multiplicative rule has none; leave it out, or take another rule")
    proportional = name == "proportional"
    with jax.ensure_compile_time_eval():
        first = target(jnp.zeros((), jnp.int32)) if callable(target) else target
    begins = "target(0)" if callable(target) else "target"
    if proportional:
        _number(begins, first, "a number above 0, as the proportional rule begins with V = U_0/R_0", above=0)
    else:
        _number(begins, first, "a number of at least 0", least=0)
    _number("initial_rate", initial_rate, "a number above 0", above=0)
    _number("momentum", momentum, "a number from 0 to below 1", least=0, below=1)
    if gain is not None:
        _number("gain", gain, "a number above 0", above=0)
    if max_rate is not None:
        least = 0 if isinstance(initial_rate, jax.core.Tracer) else initial_rate
        _number("max_rate", max_rate, f"a number of at least initial_rate, {least}", least=least)
    if gain is None:
        gain = 0.02 if proportional else initial_rate
    limit = 100 * initial_rate if max_rate is None and name != "additive" else max_rate
    return Rule(name, momentum, gain, limit)


def _number(
    key: str, value: Any, allowed: str, *, least: float = -math.inf, above: float = -math.inf, below: float = math.inf
) -> None:
    if isinstance(value, jax.core.Tracer):
        return
    if isinstance(value, jax.Array):
        value = np.asarray(value)  # while something else is traced, its comparisons would be, too
    scalar = not isinstance(value, bool | str) and np.ndim(value) == 0 and value is not None
    if not scalar or not (least <= value and above < value < below and math.isfinite(value)):
        raise UsageError(f"{key}={value!r}: give {allowed}")
