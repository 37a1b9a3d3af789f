"""Schedules made of schedules: deficits, late quantization, joins, bounds and shifts."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from qtrain.errors import UsageError
from qtrain.schedules.schedule import (
    FLOAT_BITS,
    MOST_STEPS,
    Schedule,
    ScheduleLike,
    bits_or_schedule,
    call,
    highest,
    increasing_steps,
    shown,
    whole_bits,
    whole_number,
)


def _most(parts: Sequence[tuple[ScheduleLike, int | None]]) -> int:
    """The most bits that any of the (schedule, steps it runs for) asks for."""
    return max(highest(schedule, steps) or 0 for schedule, steps in parts)


@dataclasses.dataclass(frozen=True, repr=False)
class Window(Schedule):
    """One schedule within a span of steps, another around it; see `window`."""

    builder = "window"
    start: int
    length: int
    inside: Any
    outside: Any

    def __post_init__(self):
        object.__setattr__(self, "start", whole_number("start", self.start, 0, MOST_STEPS))
        object.__setattr__(self, "length", whole_number("length", self.length, 0, MOST_STEPS))
        object.__setattr__(self, "inside", bits_or_schedule("inside", self.inside))
        object.__setattr__(self, "outside", bits_or_schedule("outside", self.outside))

    def _bits(self, step: jax.Array) -> jax.Array:
        # step − start, not start + length, which may pass the end of int32
        within = (step >= self.start) & (step - self.start < self.length)
        return jnp.where(within, call(self.inside, step), call(self.outside, step))

    def _highest(self, total_steps: int | None) -> int:
        run = MOST_STEPS if total_steps is None else total_steps
        enters = self.length > 0 and self.start < run
        leaves = self.start > 0 or self.length < run
        parts = [(self.inside, total_steps)] * enters + [(self.outside, total_steps)] * leaves
        return _most(parts)


@dataclasses.dataclass(frozen=True, repr=False)
class Delayed(Schedule):
    """Float at first, quantized later; see `delayed`."""

    builder = "delayed"
    start: int
    bits: Any
    restart: bool = False

    def __post_init__(self):
        object.__setattr__(self, "start", whole_number("start", self.start, 0, MOST_STEPS))
        object.__setattr__(self, "bits", bits_or_schedule("bits", self.bits))
        if not isinstance(self.restart, bool):
            raise UsageError(f"restart={shown(self.restart)}: must be True or False")

    def _bits(self, step: jax.Array) -> jax.Array:
        own_step = jnp.maximum(step - self.start, 0) if self.restart else step
        return jnp.where(step < self.start, jnp.float32(FLOAT_BITS), call(self.bits, own_step))

    def _highest(self, total_steps: int | None) -> int:
        return FLOAT_BITS if self.start > 0 else _most([(self.bits, total_steps)])


@dataclasses.dataclass(frozen=True, repr=False)
class Joined(Schedule):
    """Schedules one after another; see `join`."""

    builder = "join"
    schedules: tuple[Any, ...]
    boundaries: tuple[int, ...]

    def __post_init__(self):
        boundaries = increasing_steps("boundaries", self.boundaries)
        if callable(self.schedules) or isinstance(self.schedules, str) or not isinstance(self.schedules, Sequence):
            raise UsageError(f"schedules={shown(self.schedules)}: must be a list of schedules")
        schedules = tuple(bits_or_schedule(f"schedules[{i}]", value) for i, value in enumerate(self.schedules))
        if len(schedules) != len(boundaries) + 1:
            raise UsageError(
                f"schedules: {len(boundaries)} boundaries need {len(boundaries) + 1} schedules, got {len(schedules)}"
            )
        object.__setattr__(self, "schedules", schedules)
        object.__setattr__(self, "boundaries", boundaries)

    def _bits(self, step: jax.Array) -> jax.Array:
        bits = call(self.schedules[0], step)
        for boundary, schedule in zip(self.boundaries, self.schedules[1:], strict=True):
            bits = jnp.where(step < boundary, bits, call(schedule, jnp.maximum(step - boundary, 0)))
        return bits

    def _highest(self, total_steps: int | None) -> int:
        firsts = (0, *self.boundaries)
        ends = (*self.boundaries, total_steps)
        parts: list[tuple[ScheduleLike, int | None]] = []
        for schedule, first, end in zip(self.schedules, firsts, ends, strict=True):
            if total_steps is not None:
                end = min(end if end is not None else total_steps, total_steps)
            if end is None or end > first:
                parts.append((schedule, None if end is None else end - first))
        return _most(parts)


@dataclasses.dataclass(frozen=True, repr=False)
class Clipped(Schedule):
    """A schedule held within bounds; see `clip`."""

    builder = "clip"
    schedule: Any
    low: int
    high: int

    def __post_init__(self):
        object.__setattr__(self, "schedule", bits_or_schedule("schedule", self.schedule))
        object.__setattr__(self, "low", whole_bits("low", self.low))
        object.__setattr__(self, "high", whole_bits("high", self.high))
        if self.low > self.high:
            raise UsageError(f"low={self.low}: must not be above high={self.high}")

    def _bits(self, step: jax.Array) -> jax.Array:
        return jnp.clip(call(self.schedule, step), self.low, self.high)

    def _highest(self, total_steps: int | None) -> int:
        return min(max(_most([(self.schedule, total_steps)]), self.low), self.high)


@dataclasses.dataclass(frozen=True, repr=False)
class Shifted(Schedule):
    """A schedule that starts later or earlier; see `shift`."""

    builder = "shift"
    schedule: Any
    steps: int

    def __post_init__(self):
        object.__setattr__(self, "schedule", bits_or_schedule("schedule", self.schedule))
        object.__setattr__(self, "steps", whole_number("steps", self.steps, -MOST_STEPS, MOST_STEPS))

    def _bits(self, step: jax.Array) -> jax.Array:
        latest = MOST_STEPS + min(self.steps, 0)  # an earlier start must not carry the step past the end of int32
        return call(self.schedule, jnp.maximum(jnp.minimum(step, latest) - self.steps, 0))

    def _highest(self, total_steps: int | None) -> int:
        return _most([(self.schedule, None if total_steps is None else max(total_steps - self.steps, 1))])


def window(start: int, length: int, inside: Any, outside: Any) -> Window:
    """`inside` for `length` steps from `start` on, `outside` before and after: a precision deficit, for one.

    ``q(t) = inside(t)`` for ``start ≤ t < start + length``, else ``outside(t)``. Both see the run's own step t.

    Args:
      start: the window's first step, at least 0.
      length: its steps, at least 0 (0: `outside` throughout).
      inside: bits, or a schedule.
      outside: bits, or a schedule.

    Raises:
      UsageError: when an argument is outside what is said above.

    The deficits of the study of critical learning periods (Achille et al. 2018; Wolfe & Kyrillidis 2024):
    ``window(0, R, q_min, q_max)`` for the removal curve, ``window(onset, length, q_min, q_max)`` for the sliding one.

    >>> import numpy as np
    >>> window(2, 3, inside=3, outside=8)(np.arange(7)).tolist()
    [8.0, 8.0, 3.0, 3.0, 3.0, 8.0, 8.0]
    """
    return Window(start, length, inside, outside)


def delayed(start: int, bits: Any, restart: bool = False) -> Delayed:
    """Float (32 bits) before step `start`, `bits` from there on: late quantization.

    ``q(t) = 32`` for ``t < start``, else ``bits(t)``, or ``bits(t − start)`` with `restart`.

    Args:
      start: the first quantized step, at least 0.
      bits: bits, or a schedule.
      restart: whether a schedule in `bits` counts steps from `start` on instead of from the beginning of the run.

    Raises:
      UsageError: when an argument is outside what is said above.

    >>> import numpy as np
    >>> delayed(2, 4)(np.arange(4)).tolist()
    [32.0, 32.0, 4.0, 4.0]
    """
    return Delayed(start, bits, restart)


def join(schedules: Sequence[Any], boundaries: Sequence[int]) -> Joined:
    """Schedules one after another, each of which counts steps from its own beginning, as in optax's ``join_schedules``.

    ``q(t) = schedules[i](t − boundaries[i−1])`` for ``boundaries[i−1] ≤ t < boundaries[i]``.

    Args:
      schedules: schedules or bits, one more of them than of boundaries.
      boundaries: strictly increasing steps, at least 0: the first step of each schedule but the first.

    Raises:
      UsageError: when the boundaries do not increase or the lengths do not fit.

    >>> import numpy as np
    >>> from qtrain.schedules import linear
    >>> join([8, linear(3, 5, total_steps=2)], [2])(np.arange(5)).tolist()
    [8.0, 8.0, 3.0, 4.0, 5.0]
    """
    return Joined(schedules, boundaries)  # type: ignore[arg-type]


def clip(schedule: Any, low: int, high: int) -> Clipped:
    """`schedule` held within [low, high] bits: ``q(t) = min(max(schedule(t), low), high)``.

    Raises:
      UsageError: when `low` is above `high`, or one of them is no bit width.
    """
    return Clipped(schedule, low, high)


def shift(schedule: Any, steps: int) -> Shifted:
    """`schedule`, `steps` later: ``q(t) = schedule(max(t − steps, 0))``, so its first bits hold until it starts.

    With negative `steps` it starts in the middle: the first −steps steps are left out.

    Raises:
      UsageError: when `steps` is no whole number.
    """
    return Shifted(schedule, steps)
