"""A quantizer whose bit width is learned by gradient, beside its range."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from qtrain.errors import UsageError
from qtrain.quantizers.base import FLOAT_BITS, Array, Axes, static_bits, straight_through
from qtrain.quantizers.granularity import Layout, Per, check_per
from qtrain.quantizers.learned import (
    Gradient,
    Grid,
    GridQuantizer,
    exact_power,
    floored,
    signed_bounds,
    unsigned_bounds,
)
from qtrain.quantizers.parameters import as_stored, calibration, check_flags, stored, usable
from qtrain.quantizers.scales import reduce_range


@dataclasses.dataclass(frozen=True)
class LearnedWidth(GridQuantizer):
    """x̂ = s · rint(clip(x/s, −Q_N, Q_P)) with s = r/2^(b̄ − 1): a learned range r, and a learned width b.

    b is continuous, b̄ = min(rint(clip(b, low, high)), bits): a step's bits are a cap that a schedule may move, and 24
    and above leave x as it is. Ends as those of `LSQ` and `TRS`. Signed: Q_N = 2^(b̄−1), Q_P = 2^(b̄−1) − 1, at b̄ = 1
    the sign grid {−r, +r}. Unsigned: s = r/2^b̄, Q_N = 0, Q_P = 2^b̄ − 1. So r is a range: it means the same at every
    width, and a width that changes halves or doubles s exactly.

    Gradients, with both roundings passed straight through, for u = x/s:

    =========  =====================  ===================  =====================
    ..         −Q_N < u < Q_P         u ≤ −Q_N             u ≥ Q_P
    =========  =====================  ===================  =====================
    ∂x̂/∂x      1                      0                    0
    ∂x̂/∂r      (rint(u) − u)·s/r      −Q_N·s/r             Q_P·s/r
    ∂x̂/∂b      ln2·(x − x̂)            0                    ln2·s
    =========  =====================  ===================  =====================

    ∂s/∂b = −ln2·s; the lower end −r (or 0) does not depend on b, the upper one r − s does. On the sign grid, with
    sign(u) for rint(u), both ends are ±r and pass nothing to b. Where b lies beyond what is in force (below ``low``,
    above ``high`` or the bits), a gradient by which descent would take it further out is dropped, and one that brings
    it back passes: a clip of its own would hold it there for good. That is not linear: reverse mode only. A stored r at
    or below zero acts as the smallest normal float32, with the gradient of r itself.

    Parameters: ``scale`` (r) and ``width`` (b). Without a price on width (see `width`) the loss draws b towards
    ``high``.

    Attributes:
      signed: for weights; unsigned is for what follows a ReLU (negative values become 0).
      per: what shares a range and a width, by name or by axes; see `qtrain.quantizers.granularity.layout`.
      low, high: the narrowest and the widest b̄, 1 … 23.
      initial: b to begin with, from ``low`` to ``high``; None: the bits that `init` is given, within these.

    Native execution: none, arithmetic is float ("fake") only.

    Uhlich et al., Mixed Precision DNNs, ICLR 2020 (arXiv 1905.11452), who learn step and range; Sun et al., HGQ, 2024
    (arXiv 2405.00645), where a continuous number of fractional bits is passed straight through its rounding and the
    step is a power of two; ours is r times one.

    >>> import jax, jax.numpy as jnp
    >>> x, q = jnp.array([-1.2, -0.3, 0.1, 0.9]), LearnedWidth()
    >>> print(q(x, 8, {"scale": 1.0, "width": 2.4}), q(x, 8, {"scale": 1.0, "width": 2.6}))
    [-1.  -0.5  0.   0.5] [-1.   -0.25  0.    0.75]

    Raises:
      UsageError: for a field that holds something it does not allow.
    """

    signed: bool = True
    per: Per = "tensor"
    low: int = 2
    high: int = 8
    initial: float | None = None

    def __post_init__(self) -> None:
        if isinstance(self.per, list):
            object.__setattr__(self, "per", tuple(self.per))
        check_per(self.per)
        if isinstance(self.per, int):
            raise UsageError(f"per={self.per!r}: a width is not learned in groups of elements; give a name or axes")
        check_flags(self, "signed")
        for name in ("low", "high"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value < FLOAT_BITS:
                raise UsageError(f"{name}={value!r}: give a whole number of bits from 1 to {FLOAT_BITS - 1}")
        if self.low > self.high:
            raise UsageError(f"low={self.low!r}: it is above high={self.high!r}; give at most that")
        if self.initial is not None:
            number = isinstance(self.initial, int | float) and not isinstance(self.initial, bool)
            if not number or not self.low <= self.initial <= self.high:
                raise UsageError(f"initial={self.initial!r}: give a width from low={self.low} to high={self.high}")

    @property
    def learns(self) -> bool:
        """It does."""
        return True

    @property
    def chooses_width(self) -> bool:
        """It does."""
        return True

    def describe(self) -> str:
        """``learned_width/signed/tensor 2…8``."""
        begins = "" if self.initial is None else f" from {self.initial:g}"
        return f"learned_width/{'signed' if self.signed else 'unsigned'}/{self.per} {self.low}…{self.high}{begins}"

    def bounds(self, bits: Any, params: Mapping[str, Array] | None = None) -> tuple[Array, Array]:
        """−Q_N and Q_P at b̄, float32, or without `params` at `bits`; signed at 1 bit −1 and 1."""
        width = jnp.asarray(bits) if params is None else lax.stop_gradient(self._width(params["width"], bits))
        return signed_bounds(width) if self.signed else unsigned_bounds(width)

    def transitions(self, bits: Any, params: Mapping[str, Array] | None = None) -> tuple[Array, Array]:
        """The `position` of the lowest and of the highest point where the code changes; without `params` at `bits`."""
        low, high = self.bounds(bits, params)
        sign = (low == -1.0) & (high == 1.0)
        return jnp.where(sign, -0.5, low + 0.5), jnp.where(sign, -0.5, high - 0.5)

    def init(self, x: Array, bits: Any = 8, *, axes: Axes | None = None) -> dict[str, Array]:
        """r = max|x| (unsigned: max x) over the elements that share it, b as ``initial`` says; see `Quantizer.init`.

        Where that is nothing r is mean|x|, of zeros 1. 24 bits and above count as 8.
        """
        values, bits, view = calibration(x, bits, self.per, axes)
        largest = reduce_range(values, "absmax" if self.signed else "max", view.axes)
        width = jnp.clip(bits.astype(jnp.float32), self.low, self.high) if self.initial is None else self.initial
        width = jnp.broadcast_to(jnp.asarray(width, jnp.float32), view.scale_shape)
        return {"scale": as_stored(usable(largest, values, view), view), "width": as_stored(width, view)}

    def width(
        self,
        x: Array | None,
        bits: Any,
        params: Mapping[str, Array] | None = None,
        *,
        axes: Axes | None = None,
        rounded: bool = True,
    ) -> Array:
        """b̄, the mean over the elements, float32 scalar; its gradient to ``width`` is that of a mean of b.

        With ``rounded=False`` the mean of b itself, between the same ends, and with the same gradient.

        The price of a width: bytes and BitOps are products with it. Beyond the ends as in the class. At 24 bits and
        above it is `bits`, without a gradient. `x` may be None.

        Raises:
          UsageError: without the parameter.
        """
        if params is None or "width" not in params:
            raise UsageError(f"{self.describe()}: it needs its parameter 'width'; pass params=, made by init(x, bits)")
        bits = jnp.asarray(bits)
        # As many elements share one width as another.
        width = self._width(params["width"], bits)
        if not rounded:
            own = lax.stop_gradient(jnp.asarray(params["width"], jnp.float32))
            width = straight_through(width, jnp.clip(own, self.low, jnp.minimum(bits, self.high)))
        return jnp.mean(jnp.where(bits >= FLOAT_BITS, bits.astype(jnp.float32), width))

    def _width(self, width: Array, bits: Any) -> Array:
        """b̄, float32, straight through to `width` as the class says."""
        bits = jnp.asarray(bits if static_bits(bits) is None else static_bits(bits))
        width, high = jnp.broadcast_arrays(jnp.asarray(width, jnp.float32), jnp.minimum(bits, self.high))
        return _rounded_between(width, self.low, high)

    def _grid(self, values: Array, bits: Array, view: Layout, params: Mapping[str, Array] | None) -> Grid:
        reach = stored(self, params, "scale", view)
        width = self._width(stored(self, params, "width", view), bits)
        whole = lax.stop_gradient(width)
        low, high = signed_bounds(whole) if self.signed else unsigned_bounds(whole)
        step = floored(reach * exact_power((1 if self.signed else 0) - whole))
        return Grid(step, low, high, (whole == 1) & self.signed, source=reach, width=width)

    def _gradient(self, inputs: Array, in_steps: Array, codes: Array, grid: Grid) -> Gradient:
        assert grid.source is not None and grid.width is not None
        inside = (in_steps > grid.low) & (in_steps < grid.high)
        residual = codes - jnp.where(inside, in_steps, 0.0)
        inverse = 1.0 / (-grid.low if self.signed else grid.high + 1.0)  # s/r, a power of two
        top = jnp.where((codes >= grid.high) & ~grid.sign, 1.0, 0.0)
        to_width = math.log(2.0) * lax.stop_gradient(grid.step) * jnp.where(inside, -residual, top)
        return Gradient(inside, (grid.source, grid.width), (residual * inverse, to_width))


@jax.custom_vjp
def _rounded_between(value: Array, low: Any, high: Array) -> Array:
    """min(max(rint(value), low), high); its cotangent passes but where descent would take `value` further out."""
    return jnp.minimum(jnp.maximum(jnp.round(value), low), high.astype(jnp.float32))


def _rounded_between_forward(value: Array, low: Any, high: Array) -> tuple[Array, Any]:
    return _rounded_between(value, low, high), (value, jnp.asarray(low, jnp.float32), high)


def _rounded_between_backward(saved: Any, g: Array) -> tuple[Array, None, None]:
    value, low, high = saved
    out = ((value > high) & (g < 0)) | ((value < low) & (value <= high) & (g > 0))
    return jnp.where(out, 0.0, g), None, None


_rounded_between.defvjp(_rounded_between_forward, _rounded_between_backward)
