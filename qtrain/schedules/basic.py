"""Constant, linear and piecewise constant bits, and rounds of widths."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from qtrain.errors import UsageError
from qtrain.schedules.schedule import (
    MOST_STEPS,
    Schedule,
    increasing_steps,
    rounded_ratio,
    shown,
    whole_bits,
    whole_number,
)


@dataclasses.dataclass(frozen=True, repr=False)
class Constant(Schedule):
    """The same bits at every step; see `constant`."""

    builder = "constant"
    bits: int

    def __post_init__(self):
        object.__setattr__(self, "bits", whole_bits("bits", self.bits))

    def _bits(self, step: jax.Array) -> jax.Array:
        return jnp.full(step.shape, self.bits, jnp.float32)

    def _highest(self, total_steps: int | None) -> int:
        return self.bits


@dataclasses.dataclass(frozen=True, repr=False)
class Linear(Schedule):
    """A ramp; see `linear`."""

    builder = "linear"
    start: int
    end: int
    total_steps: int
    begin: int = 0

    def __post_init__(self):
        object.__setattr__(self, "start", whole_bits("start", self.start))
        object.__setattr__(self, "end", whole_bits("end", self.end))
        total_steps = whole_number("total_steps", self.total_steps, 1, MOST_STEPS)
        object.__setattr__(self, "total_steps", total_steps)
        note = f" (below total_steps={total_steps})"
        object.__setattr__(self, "begin", whole_number("begin", self.begin, 0, total_steps - 1, note))

    def _bits(self, step: jax.Array) -> jax.Array:
        passed = jnp.clip(step, self.begin, self.total_steps) - self.begin
        return rounded_ratio(self.start, self.end - self.start, passed, self.total_steps - self.begin)

    def _highest(self, total_steps: int | None) -> int:
        return max(self.start, self.end) if total_steps is None or total_steps > self.begin else self.start


@dataclasses.dataclass(frozen=True, repr=False)
class Piecewise(Schedule):
    """Constant bits between boundaries; see `piecewise`."""

    builder = "piecewise"
    boundaries: tuple[int, ...]
    values: tuple[int, ...]

    def __post_init__(self):
        boundaries = increasing_steps("boundaries", self.boundaries)
        if isinstance(self.values, str) or not isinstance(self.values, Sequence | np.ndarray):
            raise UsageError(f"values={shown(self.values)}: must be a list of bits")
        values = tuple(whole_bits(f"values[{i}]", bits) for i, bits in enumerate(self.values))
        if len(values) != len(boundaries) + 1:
            raise UsageError(
                f"values={shown(list(values))}: {len(boundaries)} boundaries need {len(boundaries) + 1} values, "
                f"got {len(values)}"
            )
        object.__setattr__(self, "boundaries", boundaries)
        object.__setattr__(self, "values", values)

    def _bits(self, step: jax.Array) -> jax.Array:
        piece = jnp.zeros_like(step)
        for boundary in self.boundaries:
            piece += (step >= boundary).astype(jnp.int32)
        return jnp.asarray(self.values, jnp.float32)[piece]

    def _highest(self, total_steps: int | None) -> int:
        first_steps = (0, *self.boundaries)
        last_steps = (*(boundary - 1 for boundary in self.boundaries), MOST_STEPS)
        run = MOST_STEPS if total_steps is None else total_steps
        pieces = zip(first_steps, last_steps, self.values, strict=True)
        return max(bits for first, last, bits in pieces if first < run and first <= last)


@dataclasses.dataclass(frozen=True, repr=False)
class Rounds(Schedule):
    """A list of widths, over and over; see `rounds`."""

    builder = "rounds"
    values: tuple[int, ...]

    def __post_init__(self):
        if isinstance(self.values, str) or not isinstance(self.values, Sequence | np.ndarray) or not len(self.values):
            raise UsageError(f"values={shown(self.values)}: must be a list of bits, one at least")
        values = tuple(whole_bits(f"values[{i}]", bits) for i, bits in enumerate(self.values))
        object.__setattr__(self, "values", values)

    def _bits(self, step: jax.Array) -> jax.Array:
        return jnp.asarray(self.values, jnp.float32)[step % len(self.values)]

    def _highest(self, total_steps: int | None) -> int:
        return max(self.values if total_steps is None else self.values[:total_steps])


def constant(bits: int) -> Constant:
    """The same bits at every step: ``q(t) = bits``. With 32 it means "not quantized".

    Args:
      bits: a whole number from 1 to 32; 24 and more mean float.

    Raises:
      UsageError: when `bits` is not that.

    >>> constant(8)(1000).item()
    8.0
    """
    return Constant(bits)


def linear(start: int, end: int, total_steps: int, begin: int = 0) -> Linear:
    """A ramp from `start` to `end` bits, rounded half to even.

    ``q(t) = rint(start + (end − start)·u)``, ``u = (t − begin)/(total_steps − begin)`` held within [0, 1]: `start`
    up to `begin`, `end` from `total_steps` on. As in optax the ramp ends *at* `total_steps`, one step after the last of
    the run. The rounding is done in integers and is exact, ties included.

    Args:
      start: bits before the ramp, 1 to 32.
      end: bits after it, 1 to 32; may be above or below `start`.
      total_steps: the step at which `end` is reached; at least 1.
      begin: the step at which the ramp begins, in [0, total_steps).

    Raises:
      UsageError: when an argument is outside what is said above.

    >>> [int(linear(8, 4, total_steps=8)(t)) for t in range(10)]
    [8, 8, 7, 6, 6, 6, 5, 4, 4, 4]
    """
    return Linear(start, end, total_steps, begin)


def piecewise(boundaries: Sequence[int], values: Sequence[int]) -> Piecewise:
    """Constant bits between boundaries: ``q(t) = values[i]`` for ``boundaries[i−1] ≤ t < boundaries[i]``.

    Also called `step`. `values` holds the bits themselves, one more of them than of boundaries.

    Args:
      boundaries: strictly increasing steps, each at least 0: the first step of each piece but the first.
      values: bits of each piece, 1 to 32.

    Raises:
      UsageError: when the boundaries do not increase, the lengths do not fit, or a value is no bit width.

    >>> piecewise([2, 5], [4, 6, 8])(np.arange(7)).tolist()
    [4.0, 4.0, 6.0, 6.0, 6.0, 8.0, 8.0]
    """
    return Piecewise(boundaries, values)  # type: ignore[arg-type]


def rounds(values: Sequence[int]) -> Rounds:
    """A list of widths, over and over: ``q(t) = values[t mod n]`` for n values.

    For training several widths at once: each of a round's n steps takes the same batch (``data.repeat`` n).

    Args:
      values: bits of each step of a round, 1 to 32, at least one of them.

    Raises:
      UsageError: when there is none, or a value is no bit width.

    >>> rounds([8, 6, 4, 2])(np.arange(6)).tolist()
    [8.0, 6.0, 4.0, 2.0, 8.0, 6.0]
    """
    return Rounds(values)  # type: ignore[arg-type]


step = piecewise
