"""Zero points: what a product of codes lacks where codes stand for s·(c + z) + r, put back without losing digits.

With z whole, the product of two such tensors is, for B(u, v) the product of codes or weights as the operation pairs and
adds them,

  s_u s_v [B(c_u, c_v) + B(c_u, z_v) + B(z_u, c_v) + B(z_u, z_v)]
  + s_u [B(c_u, r_v) + B(z_u, r_v)] + s_v [B(r_u, c_v) + B(r_u, z_v)] + B(r_u, r_v)

The bracket of integers is added in integers: codes after a ReLU lie at one end of their range, and nearly all of
B(c_u, c_v) then cancels, which in float32 costs up to four digits.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from qtrain.quantizers.coded import Coded, without_dead

Array = jax.Array

_LONGEST = (2**31 - 1) // 2**16
"""The number of products of two codes, each with 128 steps added to it, whose sum fits int32 whatever they are."""


@dataclasses.dataclass(frozen=True)
class Sums:
    """A product of codes, and the sums that its zero points need, in the axes of the result (or of size 1).

    Attributes:
      codes: B(c_u, c_v), int32 or float32.
      length: how many products are added in an element of it.
      left: w ↦ B(c_u, w) for weights w of the shape of v's scales; integers for integers, else float32.
      right: w ↦ B(w, c_v), likewise.
      both: (w, w′) ↦ B(w, w′).
    """

    codes: Array
    length: int
    left: Callable[[Array], Array]
    right: Callable[[Array], Array]
    both: Callable[[Array, Array], Array]


def combined(sums: Sums, u: Coded, v: Coded, u_scale: Array, v_scale: Array) -> Array:
    """The product of the values of `u` and `v`, float32; the scales are those in the axes of the result."""
    terms = [sums.codes]
    terms += [] if v.steps is None else [sums.left(v.steps)]
    terms += [] if u.steps is None else [sums.right(u.steps)]
    terms += [] if u.steps is None or v.steps is None else [sums.both(u.steps, v.steps)]
    out = _added(terms, sums.length) * (u_scale * v_scale)
    if v.offset is not None:
        total = sums.left(v.offset)
        out = out + u_scale * (total if u.steps is None else total + sums.both(u.steps, v.offset))
    if u.offset is not None:
        total = sums.right(u.offset)
        out = out + v_scale * (total if v.steps is None else total + sums.both(u.offset, v.steps))
    return out if u.offset is None or v.offset is None else out + sums.both(u.offset, v.offset)


def zero_point(scale: Array, lowest: Array | None, codes: Array) -> tuple[Array, Array, Array | None]:
    """Where int8 codes of a grid of so many `codes`, 0 … n − 1, which stand for scale · code + lowest, have their zero.

    Returns:
      shift: what is taken from a code so that it fits int8, float32: the code of the value 0 where that is possible, so
        that sums of codes do not cancel. With 256 codes it is 128 whatever they stand for.
      steps, offset: what makes up for it, see `Coded`; offset is None for a grid that begins at 0 (`lowest` is None).
        A group whose values are all equal has no steps, only an offset.
    """
    if lowest is None:
        shift = jnp.broadcast_to(jnp.clip(0.0, codes - 128.0, 128.0), scale.shape)
        return shift, without_dead(shift, scale).astype(jnp.int32), None
    zero = jnp.clip(jnp.round(-lowest * (1.0 / scale)), -256.0, 256.0)
    shift = jnp.clip(zero, codes - 128.0, 128.0)
    steps = without_dead(jnp.clip(shift - zero, -128.0, 128.0), scale)
    # lowest + scale · (shift − steps) cancels. In two parts of 12 bits the product is exact.
    upper = lax.bitcast_convert_type(lax.bitcast_convert_type(scale, jnp.int32) & -(1 << 12), jnp.float32)
    count = shift - steps
    return shift, steps.astype(jnp.int32), (lowest + count * upper) + count * (scale - upper)


def _added(terms: list[Array], length: int) -> Array:
    """The sum of integers, float32, also where the sum itself does not fit int32 (each of the terms does)."""
    total: Any = sum(terms[1:], start=terms[0])
    whole = total.astype(jnp.float32)
    if length <= _LONGEST or len(terms) == 1 or total.dtype != jnp.int32:
        return whole
    # What int32 holds is right but for a multiple of 2³², and a sum in float32 is right to far less than that.
    about: Any = sum((term.astype(jnp.float32) for term in terms[1:]), start=terms[0].astype(jnp.float32))
    return whole + 2.0**32 * jnp.round((about - whole) * 2.0**-32)
