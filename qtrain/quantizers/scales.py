"""What quantizers of every grid share: the range a scale is made from, scales that are never zero, random rounding."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp

from qtrain.errors import UsageError
from qtrain.quantizers import noise

Array = jax.Array

SMALLEST = float(jnp.finfo(jnp.float32).tiny)
"""The smallest normal float32: a scale is never zero, its reciprocal is finite. CPT's 1e-8 would flatten gradients."""


def reduce_range(values: Array, name: str, axes: tuple[int, ...]) -> Array:
    """A statistic ("absmax", "absmean", "min", "max") over `axes`, which are kept; float32, of an empty tensor 0."""
    values = values.astype(jnp.float32)
    if name == "absmean":
        count = max(math.prod(values.shape[axis] for axis in axes), 1)
        return jnp.sum(jnp.abs(values), axis=axes, keepdims=True) / count
    if name == "min":
        return jnp.min(values, axis=axes, keepdims=True, initial=None if values.size else 0.0)
    if name == "absmax":
        largest = jnp.max(jnp.abs(values), axis=axes, keepdims=True, initial=0.0)
    else:
        largest = jnp.max(values, axis=axes, keepdims=True, initial=None if values.size else 0.0)
    if jax.default_backend() == "cpu":
        # XLA's CPU kernel for a maximum passes over NaN, and codes cannot hold one: what has diverged would become 0.
        largest = largest + jnp.sum(values - values, axis=axes, keepdims=True)
    return largest


def signs(values: Array) -> Array:
    """1 where `values` are at least 0, −1 below, float32; a NaN, which is neither, stays one."""
    return jnp.where(values >= 0, 1.0, jnp.where(values < 0, -1.0, values.astype(jnp.float32)))


def positive(step: Array) -> Array:
    """`step`, or `SMALLEST` where it is less; NaN stays NaN."""
    return jnp.maximum(step, SMALLEST)


def round_stochastically(in_steps: Array, key: Array | None, salt: Array) -> Array:
    """⌊y⌋, plus 1 with probability y − ⌊y⌋: unbiased.

    Args:
      in_steps: y, float32.
      key: PRNG key (typed, or the older uint32 pair), or a uint32 [2] seed of `qtrain.quantizers.noise`.
      salt: the scale; see `qtrain.quantizers.noise.uniform`.

    Raises:
      UsageError: without a key.
    """
    if key is None:
        raise UsageError("rounding='stochastic' needs a key: pass key=, or rngs={'quant': key} to apply")
    words = noise.seed(key) if jnp.issubdtype(key.dtype, jax.dtypes.prng_key) else key
    below = jnp.floor(in_steps)
    # Not ⌊y + u⌋: the sum is rounded, which would lift codes of many bits, even those on the grid.
    return jnp.where(noise.uniform(words, in_steps.shape, salt) < in_steps - below, below + 1.0, below)
