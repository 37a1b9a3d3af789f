"""Tensors as codes of at most 8 bits: what an integer (or small-float) multiplication takes."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from qtrain.quantizers.scales import SMALLEST

Array = jax.Array


class Coded(NamedTuple):
    """A quantized tensor in 8 bits an element: x̂ = (codes + steps) · scale + offset.

    Attributes:
      codes: int8 (or an 8-bit float), the shape of x.
      scale: float32, broadcasts against the codes with axes kept: size 1 along every axis that shares a scale.
      offset: float32 likewise, or None where a whole number of steps says it all; see
        `qtrain.quantizers.zero_points.zero_point`.
      inside: where the quantizer passes the gradient on; None: everywhere.
      steps: whole numbers from −128 to 128, int32, likewise; None: 0.
    """

    codes: Array
    scale: Array
    offset: Array | None = None
    inside: Array | None = None
    steps: Array | None = None

    def decode(self) -> Array:
        """x̂, in float32."""
        codes = self.codes.astype(jnp.float32)
        values = (codes if self.steps is None else codes + self.steps.astype(jnp.float32)) * self.scale
        return values if self.offset is None else values + self.offset

    def gradient(self, g: Array, dtype: jnp.dtype) -> Array:
        """The gradient of x from that of x̂: straight through, where the quantizer lets it."""
        return (g if self.inside is None else jnp.where(self.inside, g, 0.0)).astype(dtype)


def foldable(coded: Coded) -> tuple[Coded, Array | None]:
    """`coded` with one scale, and the factors f that made it so: x̂ = f · ((codes + steps) · 1 + offset/f).

    Where several scales are used, f are the scales: multiplied into the cotangent *before* it is quantized they leave
    integer codes that contract along any axis. Returns f = None, and `coded` itself, for a single scale.

    A group whose values are all equal has a scale next to zero, and a cotangent times that would be lost. Its codes are
    0 (see `without_dead`), so that any factor will do: it gets the largest of the others'.
    """
    if coded.scale.size == 1:
        return coded, None
    factor = folding(coded.scale)
    offset = coded.offset
    if offset is not None:
        offset = offset / factor
    return coded._replace(scale=jnp.ones((1,) * coded.codes.ndim, jnp.float32), offset=offset), factor


def folding(scale: Array) -> Array:
    """The factors of `foldable` for such scales."""
    dead = _dead(scale)
    largest = jnp.max(jnp.where(dead, 0.0, scale))
    return jnp.where(dead, jnp.where(largest > 0, largest, 1.0), scale)


def without_dead(codes: Array, scale: Array) -> Array:
    """`codes`, or steps, 0 where the scale is next to zero: there the offset says it all."""
    return jnp.where(_dead(scale), 0.0, codes)


def _dead(scale: Array) -> Array:
    return scale <= 2 * SMALLEST
