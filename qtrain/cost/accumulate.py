"""A running total in the train state that loses no small increment."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np


class Total(NamedTuple):
    """A sum kept as the unevaluated ``high + low``, two float32 arrays of one shape, |low| ≤ half an ulp of high.

    About 48 significant bits, where one float32 stops growing once the increments fall below 2⁻²⁴ of the total. A
    pytree of two arrays: it can be donated, checkpointed and vmapped as it is, and needs no 64-bit mode.
    """

    high: jax.Array
    low: jax.Array


def zero(shape: tuple[int, ...] = ()) -> Total:
    """The empty total; with a `shape`, one per run of a vectorized sweep."""
    return Total(jnp.zeros(shape, jnp.float32), jnp.zeros(shape, jnp.float32))


def add(total: Total, increment: Any) -> Total:
    """``total + increment``, the increment rounded to float32 first; traced.

    Knuth's TwoSum, s = fl(a + b) with its exact error e = (a − (s − b′)) + (b − b′), b′ = s − a, then the error joins
    `low` and the pair is normalized (Dekker's double-length addition). The relative error per addition is about 2⁻⁴⁸.
    XLA keeps the order of floating-point additions on every backend, so that none of this is simplified away.
    """
    sum_, error = _two_sum(total.high, jnp.asarray(increment, jnp.float32))
    return Total(*_two_sum(sum_, total.low + error))


def value(total: Total) -> Any:
    """The total on the host: a float, or a float64 array when there are several."""
    sums = np.asarray(total.high, np.float64) + np.asarray(total.low, np.float64)
    return sums.item() if sums.ndim == 0 else sums


def _two_sum(a: jax.Array, b: jax.Array) -> tuple[jax.Array, jax.Array]:
    sum_ = a + b
    of_b = sum_ - a
    return sum_, (a - (sum_ - of_b)) + (b - of_b)
