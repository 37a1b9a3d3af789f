"""Counter-based noise for stochastic rounding, cheap enough to fuse into the rounding itself.

A threefry or rbg draw doubles the step of a small transformer block; hashing an element's index costs two integer
multiplications, needs no memory, and gives the same noise whatever the number of devices, because the index is that of
the global array.
"""

from __future__ import annotations

import zlib

import jax
import jax.numpy as jnp
from jax import lax

Array = jax.Array

# The multipliers of "lowbias32" (a published search for 32-bit mixers of low bias) and the golden-ratio increment.
_MULTIPLY_1 = 0x7FEB352D
_MULTIPLY_2 = 0x846CA68B
_GOLDEN = 0x9E3779B9


def seed(key: Array) -> Array:
    """Two uint32 words from a PRNG key (typed, or the older uint32 pair)."""
    return jax.random.bits(key, (2,), jnp.uint32)


def fold(seed: Array, data: int | str) -> Array:
    """Another seed for `data`: a number, or a name such as a layer's path."""
    number = zlib.crc32(data.encode()) if isinstance(data, str) else int(data) & 0xFFFFFFFF
    return _mix(seed + jnp.uint32(number) * jnp.uint32(_GOLDEN) + jnp.arange(2, dtype=jnp.uint32))


def uniform(seed: Array, shape: tuple[int, ...], salt: Array | None = None) -> Array:
    """float32 noise, uniform on multiples of 2⁻²⁴ in [0, 1), a pure function of (seed, index, salt).

    Args:
      seed: uint32 [2]. Any two seeds that differ give unrelated noise.
      shape: of the noise. Beyond 2³² elements it repeats.
      salt: float32, broadcastable to `shape`: mixed in by its upper 24 bits. A tensor's own scale, so that the
        iterations of a scanned layer, which share a seed, do not share their noise; the lower bits are left out because
        they depend on the order of a sum, and so on the number of devices.
    """
    # Both words depend on both: a bare difference in the second would only rotate the noise by a constant.
    first = _mix(_mix(seed[0] + jnp.uint32(_GOLDEN)) ^ seed[1])
    second = _mix(first + seed[0])
    index = jnp.zeros(shape, jnp.uint32)
    stride = 1
    for axis in reversed(range(len(shape))):
        index = index + lax.broadcasted_iota(jnp.uint32, shape, axis) * jnp.uint32(stride & 0xFFFFFFFF)
        stride *= shape[axis]
    counter = index * jnp.uint32(_GOLDEN) + first
    if salt is not None:
        counter = counter ^ (lax.bitcast_convert_type(salt.astype(jnp.float32), jnp.uint32) >> 8)
    bits = _mix(counter, second)
    # Through int32: unsigned-to-float conversion is not a vector instruction on most CPUs.
    return (bits >> 8).astype(jnp.int32).astype(jnp.float32) * jnp.float32(2.0**-24)


def _mix(x: Array, add: Array | int = 0) -> Array:
    x = (x ^ (x >> 16)) * jnp.uint32(_MULTIPLY_1)
    x = (x ^ (x >> 15)) + jnp.uint32(add)
    x = x * jnp.uint32(_MULTIPLY_2)
    return x ^ (x >> 16)
