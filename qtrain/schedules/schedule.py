"""What every schedule shares: the step as an integer, the bits as float32, the checks of what a user wrote."""

from __future__ import annotations

import abc
import dataclasses
import functools
import itertools
import operator
import reprlib
from collections.abc import Callable, Iterable, Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from qtrain.errors import UsageError, did_you_mean

FLOAT_BITS = 32
"""The bits that stand for "not quantized". From 24 on float32 has no finer grid; we write 32."""

MOST_STEPS = 2**31 - 1
"""Steps are int32 inside a schedule."""

ScheduleLike = Callable[[Any], jax.Array]
"""Any pure function ``step -> bits``: a `Schedule` of this package, or a user's own function."""


def as_step(step: Any) -> jax.Array:
    """`step` as int32 of its own shape; steps below 0 count as 0, steps above 2³¹ − 1 as 2³¹ − 1.

    Args:
      step: a Python int, or a NumPy or JAX array of any integer type and shape; may be traced.

    Raises:
      UsageError: when `step` is not of an integer type.
    """
    if not isinstance(step, jax.Array):
        if isinstance(step, int) and not isinstance(step, bool):
            step = min(max(step, 0), MOST_STEPS)  # a Python int may be wider than any array's
        on_host = np.asarray(step)
        if on_host.dtype.kind in "iu":
            most = min(MOST_STEPS, np.iinfo(on_host.dtype).max)
            return jnp.asarray(np.clip(on_host, 0, most).astype(np.int32))
        raise UsageError(f"step={shown(step)}: must be an integer or an array of integers")
    if not jnp.issubdtype(step.dtype, jnp.integer):
        raise UsageError(f"step: must be of an integer type, got {step.dtype}{list(step.shape)}")
    step = jnp.maximum(step, 0)
    if jnp.iinfo(step.dtype).max > MOST_STEPS:
        step = jnp.minimum(step, MOST_STEPS)
    return step.astype(jnp.int32)


class Schedule(abc.ABC):
    """Base of the package's schedules: a frozen dataclass that is called with a step and returns bits.

    Two schedules are equal when their parameters are, and a schedule is hashable. It prints as the call that builds it,
    without the parameters left at their defaults.
    """

    builder: ClassVar[str]

    def __call__(self, step: Any) -> jax.Array:
        """Bits at `step`: float32 of `step`'s shape, holding whole numbers. Steps below 0 count as 0."""
        return self._bits(as_step(step))

    @abc.abstractmethod
    def _bits(self, step: jax.Array) -> jax.Array:
        """Bits at `step`, which is int32 and not negative."""

    def highest(self, total_steps: int | None = None) -> int:
        """The most bits the schedule asks for in a run of `total_steps` (of any length, when ``None``).

        This is q_max, the width of the static counterpart, so a cyclic schedule answers with its upper bound even where
        a run is too short to reach it.
        """
        return self._highest(None if total_steps is None else whole_number("total_steps", total_steps, 1, MOST_STEPS))

    @abc.abstractmethod
    def _highest(self, total_steps: int | None) -> int:
        """`highest`, of checked steps."""

    def __repr__(self) -> str:
        parts = []
        for field in dataclasses.fields(self):  # type: ignore[arg-type]
            value = getattr(self, field.name)
            if value != field.default:
                parts.append(f"{field.name}={value!r}")
        return f"{self.builder}({', '.join(parts)})"


def highest(schedule: ScheduleLike | None, total_steps: int | None = None) -> int | None:
    """`Schedule.highest` for any function ``step -> bits``, at most 32; ``None`` for ``None`` (not quantized).

    Raises:
      UsageError: when `schedule` is a plain function and `total_steps` is not given, so that it cannot be evaluated.
    """
    if schedule is None:
        return None
    if isinstance(schedule, Schedule):
        return min(schedule.highest(total_steps), FLOAT_BITS)
    if total_steps is None:
        raise UsageError(f"total_steps: needed to find the most bits that {shown(schedule)} asks for")
    return min(int(evaluate(schedule, total_steps).max()), FLOAT_BITS)


def evaluate(schedule: ScheduleLike, total_steps: int) -> np.ndarray:
    """Bits at the steps 0 … total_steps − 1, by the jitted schedule: a NumPy float32 array on the host.

    >>> from qtrain.schedules import constant
    >>> evaluate(constant(4), 3)
    array([4., 4., 4.], dtype=float32)
    """
    total_steps = whole_number("total_steps", total_steps, 1, MOST_STEPS)
    size = min(total_steps, 2**20)  # bounds the memory of a long run; every chunk has one shape, so one compilation
    try:
        hash(schedule)
        jitted: Callable = functools.partial(_jitted, schedule)
    except TypeError:  # a user's callable object
        jitted = jax.jit(lambda step: call(schedule, step))
    chunks = [
        np.asarray(jitted(start + np.arange(size, dtype=np.int32))) for start in range(0, total_steps - size + 1, size)
    ]
    rest = total_steps - size * len(chunks)
    if rest:
        chunks.append(np.asarray(jitted(np.arange(total_steps - size, total_steps, dtype=np.int32)))[-rest:])
    return np.concatenate(chunks)


def call(schedule: ScheduleLike, step: jax.Array) -> jax.Array:
    """`schedule(step)` as float32 of `step`'s shape, also for a user's function that returns a Python number."""
    return jnp.broadcast_to(jnp.asarray(schedule(step), jnp.float32), step.shape)


# Equal schedules share a compilation: a table and a picture of them evaluate each several times.
_jitted = jax.jit(call, static_argnums=0)


def rounded_ratio(start: int, slope: int, numerator: jax.Array, denominator: int) -> jax.Array:
    """``rint(start + slope · numerator / denominator)``, half to even, in integers: float32 of `numerator`'s shape.

    Exact, ties included, so that jit, eager and every backend agree: XLA turns a float division by a constant into a
    product with its rounded reciprocal, which moves ties. Needs 0 ≤ numerator ≤ denominator and |slope| < 32.
    """
    excess = max(0, denominator.bit_length() - 26)  # keeps slope · numerator inside int32, at a cost below 2⁻²⁰ bits
    numerator, denominator = numerator >> excess, denominator >> excess
    whole, rest = jnp.divmod(slope * numerator, denominator)
    whole = start + whole
    up = (2 * rest > denominator) | ((2 * rest == denominator) & (whole % 2 == 1))
    return jnp.where(up, whole + 1, whole).astype(jnp.float32)


def shown(value: Any) -> str:
    """`value` for a one-line message."""
    return " ".join(reprlib.repr(value).split())


def whole_number(key: str, value: Any, least: int, most: int | None = None, note: str = "") -> int:
    """`value` as an int in [least, most], or a `UsageError` that names `key`; a whole float such as 8.0 will do."""
    number: int | None = None
    if not isinstance(value, bool | np.bool_ | str | bytes):
        if isinstance(value, float | np.floating) and float(value).is_integer():
            number = int(value)
        else:
            try:
                number = operator.index(value)
            except TypeError:  # also what a traced array raises: parameters of a schedule are plain numbers
                number = None
    if number is None or number < least or (most is not None and number > most):
        bounds = f"of at least {least}" if most is None else f"from {least} to {most}"
        raise UsageError(f"{key}={shown(value)}: must be a whole number {bounds}{note}")
    return number


def whole_bits(key: str, value: Any) -> int:
    """`value` as bits: a whole number from 1 to 32; 24 and more mean float."""
    return whole_number(key, value, 1, FLOAT_BITS, " (bits; 24 and more mean float)")


def bits_or_schedule(key: str, value: Any) -> ScheduleLike:
    """A schedule as it is; a number of bits as `constant` bits; a `UsageError` that names `key` otherwise."""
    from qtrain.schedules.basic import Constant

    if callable(value):
        return value
    try:
        return Constant(value)
    except UsageError:
        raise UsageError(
            f"{key}={shown(value)}: must be a schedule, or a whole number of bits from 1 to {FLOAT_BITS}"
        ) from None


def one_of(key: str, value: Any, choices: Iterable[str]) -> str:
    """`value` where it is one of `choices`; a `UsageError` with the nearest of them otherwise."""
    choices = list(choices)
    if isinstance(value, str) and value in choices:
        return value
    near = did_you_mean(str(value), choices) or did_you_mean(str(value).upper(), choices)
    raise UsageError(f"{key}={shown(value)}: must be one of {', '.join(choices)}.{near}")


def increasing_steps(key: str, steps: Any) -> tuple[int, ...]:
    """`steps` as a tuple of strictly increasing whole numbers of at least 0, or a `UsageError` that names `key`."""
    if isinstance(steps, str) or not isinstance(steps, Sequence | np.ndarray):
        raise UsageError(f"{key}={shown(steps)}: must be a list of steps")
    whole = tuple(whole_number(f"{key}[{i}]", step, 0, MOST_STEPS) for i, step in enumerate(steps))
    if any(after <= before for before, after in itertools.pairwise(whole)):
        raise UsageError(f"{key}={shown(list(whole))}: must increase from one step to the next")
    return whole
