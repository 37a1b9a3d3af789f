"""Small floating-point formats: what their grids follow from, and exact arithmetic on binades."""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from jax import lax

Array = jax.Array

# Name → type of ml_dtypes. The bare "e4m3" is what hardware and papers mean by it, not ml_dtypes' IEEE-like type (max
# 240) of that name.
_TYPES = {
    "e4m3fn": "float8_e4m3fn",
    "e4m3fnuz": "float8_e4m3fnuz",
    "e4m3b11fnuz": "float8_e4m3b11fnuz",
    "e5m2": "float8_e5m2",
    "e5m2fnuz": "float8_e5m2fnuz",
    "e3m4": "float8_e3m4",
    "e3m2fn": "float6_e3m2fn",
    "e2m3fn": "float6_e2m3fn",
    "e2m1fn": "float4_e2m1fn",
}
ALIASES = {"e4m3": "e4m3fn", "e3m2": "e3m2fn", "e2m3": "e2m3fn", "e2m1": "e2m1fn"}

FORMATS = (*ALIASES, *_TYPES)
"""Names that `Float` takes."""


class Format(NamedTuple):
    """What a format's grid follows from, all of it asked of ml_dtypes.

    Attributes:
      width: bits of a value: 1 + exponent bits + `mantissa`.
      mantissa: stored mantissa bits m.
      least: exponent of the smallest normal value; below it the values are spaced as in its binade.
      largest: largest finite value.
      signed_zero: whether −0 is a value of its own.
      dtype: that of codes: the type itself if it has 8 bits; float32 below, since XLA's CPU has no 6-bit floats.
    """

    width: int
    mantissa: int
    least: int
    largest: float
    signed_zero: bool
    dtype: np.dtype


@functools.cache
def format_of(name: str) -> Format:
    """The facts of a format named as in `FORMATS`."""
    kind = np.dtype(getattr(ml_dtypes, _TYPES[ALIASES.get(name, name)]))
    info = ml_dtypes.finfo(kind)
    return Format(
        width=info.bits,
        mantissa=int(info.nmant),
        least=int(np.frexp(np.float64(info.smallest_normal))[1]) - 1,
        largest=float(info.max),
        signed_zero=bool(np.signbit(np.array(-0.0).astype(kind).astype(np.float32))),
        dtype=kind if info.bits == 8 else np.dtype(np.float32),
    )


def exponent_of(values: Array) -> Array:
    """⌊log₂|x|⌋, int32, from the bits of a normal float32; below −126 for 0 and subnormals."""
    return (lax.bitcast_convert_type(values, jnp.int32) >> 23 & 0xFF) - 127


def spacing_of(exponent: Array, mantissa: Array) -> Array:
    """2^(exponent − mantissa) as float32, exactly; between 2^−126 and 2^127."""
    return lax.bitcast_convert_type((exponent - mantissa + 127) << 23, jnp.float32)


def keep_bits(values: Array, bits: int) -> Array:
    """Positive float32 `values` rounded to `bits` significant bits; NaN and infinity as they are."""
    dropped = 24 - bits
    integers = lax.bitcast_convert_type(values, jnp.int32) + (1 << (dropped - 1))
    rounded = lax.bitcast_convert_type(integers & -(1 << dropped), jnp.float32)
    return jnp.where(jnp.isfinite(values), rounded, values)
