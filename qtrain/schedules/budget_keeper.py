"""A controller that ends a run at a budget of bit operations, and lets a training signal say when they are spent."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from qtrain.errors import UsageError
from qtrain.precision import Precision
from qtrain.schedules.controller import Array, Controller, Signals, State, levels_of, number, shown_levels
from qtrain.schedules.schedule import one_of, whole_number

SIGNALS = ("loss", "grad_norm", "noise", "none")
"""What the spending is tilted by: a measured signal, or for comparison noise of the same kind, or nothing."""

_MEASURED = 2  # the first of SIGNALS
_SLACK = 1e-3  # of a step: so that rounding does not take one from a share that is a whole number of steps


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class BudgetKeeper(Controller):
    """See `budget_keeper`; all fields are data.

    Attributes:
      levels: of the base.
      costs: BitOps of a step at each level, as shares of the highest level's, float32 [levels].
      unit: BitOps of a step at the highest level, float32.
      budget: BitOps of the run, as ``high + low``, float32 [2].
      pace: of what is left at the start of each interval, the share that is meant for it; float32 [intervals].
      total_steps, interval, signal, gain, memory, noise_seed: as `budget_keeper` takes them; signal: its index.
    """

    name: ClassVar[str] = "budget_keeper"
    levels: Precision
    costs: Any
    unit: Any
    budget: Any
    pace: Any
    total_steps: Any
    interval: Any
    signal: Any
    gain: Any
    memory: Any
    noise_seed: Any

    def init(self, grads: Mapping[str, Any]) -> State:
        """Nothing is spent, and the first interval is at its pace."""
        nothing = jnp.zeros(_MEASURED)
        plan = self._plan(jnp.zeros((), jnp.int32), self._left(jnp.zeros(()), jnp.zeros(())), jnp.zeros(()))
        return {
            **plan,
            "level": self._level(plan, jnp.zeros((), jnp.int32)),
            "signal": jnp.zeros(()),
            "totals": nothing,
            "last": nothing,
            "seen": jnp.zeros((), jnp.int32),
            "mean": nothing,
            "variance": nothing,
        }

    def update(self, state: State, signals: Signals) -> State:
        """Where an interval ends, what the next one may spend; always, the level of the next step."""
        step = jnp.asarray(signals.step, jnp.int32) + 1
        during = {**state, "totals": state["totals"] + jnp.stack([signals.loss, signals.grad_norm])}
        left = self._left(signals.bitops.high, signals.bitops.low)
        after = self.where_ends(step % self.interval == 0, BudgetKeeper._after_interval, during, step, left)
        return {**after, "level": self._level(after, step)}

    def _after_interval(self, state: State, step: Array, left: Array) -> State:
        value = jnp.log(jnp.maximum(state["totals"] / self.interval, jnp.finfo(jnp.float32).tiny))
        growth = value - state["last"]
        # The first interval has nothing to have grown from.
        rate = jnp.where(state["seen"] > 0, 1 / jnp.minimum(jnp.maximum(state["seen"], 1), self.memory), 0.0)
        off = growth - state["mean"]
        mean = state["mean"] + rate * off
        variance = (1 - rate) * (state["variance"] + rate * off * off)
        scores = (growth - mean) / (2 * jnp.sqrt(variance))
        scores = jnp.where(jnp.isfinite(scores), scores, 0.0)
        key = jax.random.fold_in(jax.random.key(self.noise_seed), step // self.interval)
        controls = jnp.stack([jax.random.normal(key) / 2, jnp.zeros(())])
        signal = jnp.clip(jnp.append(scores, controls)[self.signal], -1, 1)
        finite = jnp.isfinite(growth)
        return {
            **state,
            **self._plan(step, left, signal),
            "signal": signal,
            "totals": jnp.zeros(_MEASURED),
            "last": jnp.where(finite, value, state["last"]),
            "seen": state["seen"] + 1,
            "mean": jnp.where(finite, mean, state["mean"]),
            "variance": jnp.where(finite, variance, state["variance"]),
        }

    def metrics(self, state: State) -> dict[str, Array]:
        """``level`` and ``signal``, −1 … 1."""
        return {"level": state["level"], "signal": state["signal"]}

    def describe(self) -> str:
        """Its parameters, in a line."""
        return (
            f"budget_keeper: {shown_levels(self.levels)}; ends at {self.bitops:.4g} BitOps, or less than a step's "
            f"difference below; signal {SIGNALS[int(self.signal)]}, gain {self.gain:g}; every {self.interval} steps"
        )

    @property
    def bitops(self) -> float:
        """The budget as a Python number."""
        return float(np.asarray(self.budget, np.float64).sum())

    def _left(self, high: Array, low: Array) -> Array:
        """What is left of the budget, in steps at the highest level."""
        budget = jnp.asarray(self.budget)
        return ((budget[0] - high) + (budget[1] - low)) / self.unit

    def _plan(self, step: Array, left: Array, signal: Array) -> State:
        """The interval that begins at `step`: the lower of its two levels, and how many of its steps have the other."""
        costs, pace = jnp.asarray(self.costs), jnp.asarray(self.pace)
        remaining = jnp.maximum(self.total_steps - step, 1)
        length = jnp.minimum(self.interval, remaining)
        after = remaining - length
        share = pace.at[step // self.interval].get(mode="clip")
        wanted = left * share * (1 + self.gain * signal)
        # What the rest of the run can still make up for, at the highest level throughout or at the lowest.
        least = jnp.maximum(length * costs[0], left - after * costs[-1])
        most = jnp.minimum(length * costs[-1], left - after * costs[0])
        each = jnp.minimum(jnp.maximum(wanted, least), most) / length
        lower = jnp.clip(jnp.sum(costs <= each) - 1, 0, self.count - 2)
        fraction = jnp.clip((each - costs[lower]) / (costs[lower + 1] - costs[lower]), 0, 1)
        upper = jnp.floor(fraction * length + _SLACK).astype(jnp.int32)
        return {"lower": lower.astype(jnp.int32), "upper_from": (step + length - upper).astype(jnp.int32)}

    def _level(self, plan: State, step: Array) -> Array:
        return plan["lower"] + (step >= plan["upper_from"]).astype(jnp.int32)


def budget_keeper(
    levels: Precision,
    costs: Sequence[float],
    pace: Any,
    budget: float,
    interval: int,
    signal: str = "loss",
    gain: float = 0.5,
    memory: float = 10.0,
    noise_seed: int = 0,
) -> BudgetKeeper:
    """Bits that end a run at a budget of bit operations whatever the signal, and spend them where the signal says.

    The run is cut into intervals, in each of which at most two neighbouring levels are used: the lower first, then the
    other. At the start of one, with R left of the budget and n steps left, of which the interval takes m::

        wanted   w = R · (pace of this interval / pace of all that are left) · (1 + gain·s)
        held to  R − (n − m)·c_high  ≤  w  ≤  R − (n − m)·c_low        what the rest of the run can make up for
        spent    ⌊·⌋ of the steps at the upper level that make the interval cost w

    By induction R stays within [n·c_low, n·c_high + δ], δ the largest difference in cost between neighbouring levels,
    and in the last interval w = R: **the run ends within [budget − δ, budget]**, for any signal. δ is less than the
    cost of a step: in general 1 % of the budget from a hundred steps on. R is measured: what steps were charged.

    The signal s is −1 … 1 and about 0 on average, so that gain moves spending in time and is not a drift against the
    budget: x_e = ln(X_e/X_{e−1}), X the interval's mean of what is watched, and ::

        s = clip((x_e − mean) / (2·deviation), −1, 1)       both over about `memory` intervals, exponentially weighted

    "loss": the training loss. Where it falls more slowly than it did, or rises, more is spent; where it falls faster,
    less. A negative `gain` turns that round. "grad_norm": likewise the gradient's norm. "noise": s = clip(ν/2, −1, 1),
    ν standard normal, drawn for each interval by `noise_seed` (in a config `seed`): as lively and about nothing;
    "none": 0, so that the run keeps to the pace. These two are what a signal has to beat.

    Args:
      levels: bits of each level, the cheapest first, for each kind that is decided, as many for each.
      costs: BitOps of a step at each level, increasing.
      pace: what to spend at each step relative to others, float [total_steps], above 0: of a schedule, its cost.
      budget: BitOps of the run, from total_steps·costs[0] to total_steps·costs[−1].
      interval: m, steps between decisions, at least 1.
      signal: one of `SIGNALS`.
      gain: −1 … 1; 0 is "none".
      memory: at least 2 intervals.
      noise_seed: of "noise".

    The method is our own. The state is some fifteen numbers.

    Raises:
      UsageError: a budget that cannot be met, with what can be; a number out of range.
    """
    checked = levels_of(levels)
    count = len(jax.tree.leaves(checked)[0])
    per_step, per_pace = np.asarray(costs, np.float64), np.asarray(pace, np.float64)
    if per_step.shape != (count,) or not np.all(np.diff(per_step) > 0) or not per_step[0] > 0:
        raise UsageError(f"costs={list(map(float, per_step))}: give {count} increasing numbers above 0, one a level")
    if per_pace.ndim != 1 or not len(per_pace) or not np.all(np.isfinite(per_pace) & (per_pace > 0)):
        raise UsageError("pace: give a number above 0 for each step")
    steps, (lowest, highest) = len(per_pace), (per_step[0], per_step[-1])
    span = whole_number("interval", interval, 1, 2**30)
    slack = 1e-9 * highest * steps  # a budget that is one of the bounds, computed otherwise
    if not lowest * steps - slack <= budget <= highest * steps + slack:
        raise UsageError(
            f"budget={budget:.6g} BitOps cannot be met: the run costs from {lowest * steps:.6g} at the lowest level "
            f"throughout to {highest * steps:.6g} at the highest"
        )
    spans = np.add.reduceat(per_pace, np.arange(0, steps, span))
    high = np.float32(budget)
    return BudgetKeeper(
        levels=checked,
        costs=(per_step / highest).astype(np.float32),
        unit=np.asarray(highest, np.float32),
        budget=np.asarray([high, np.float32(budget - np.float64(high))], np.float32),
        pace=(spans / np.cumsum(spans[::-1])[::-1]).astype(np.float32),
        total_steps=np.asarray(steps, np.int32),
        interval=np.asarray(span, np.int32),
        signal=np.asarray(SIGNALS.index(one_of("signal", signal, SIGNALS)), np.int32),
        gain=number("gain", gain, -1.0, 1.0),
        memory=number("memory", memory, 2.0, 1e6),
        noise_seed=np.asarray(whole_number("noise_seed", noise_seed, 0, 2**32 - 1), np.uint32),
    )
