"""Uniform quantizers: one step size, codes that are consecutive integers."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from qtrain.errors import UsageError, did_you_mean
from qtrain.quantizers.base import (
    FLOAT_BITS,
    Array,
    Axes,
    Quantizer,
    power_of_two,
    static_bits,
    straight_through,
    straight_through_inside,
)
from qtrain.quantizers.coded import Coded, without_dead
from qtrain.quantizers.granularity import Layout, Per, check_per, layout
from qtrain.quantizers.scales import positive, reduce_range, round_stochastically, signs
from qtrain.quantizers.zero_points import zero_point

GRIDS = ("symmetric", "aqt", "affine", "unsigned", "sign")
ROUNDINGS = ("nearest", "stochastic", "floor")

# Room for the roundings of s, 1/s and x·(1/s), so that a value on a grid point is not floored to the one below.
_FLOOR_SLACK = 2.0**-21


class AffineScale(NamedTuple):
    """Scale of an affine grid: x̂ = code · scale + offset."""

    scale: Array
    offset: Array


@dataclasses.dataclass(frozen=True)
class Uniform(Quantizer):
    """Fake quantization to a uniform grid at a traced width b, with a straight-through gradient.

    x̂ = c·s (+ x_min when affine),  c = clip(round(x/s), low, high). M = max|x| over the elements that share a scale:

    ============  =========================  ==================  =====================================================
    grid          s                          low … high          source
    ============  =========================  ==================  =====================================================
    symmetric     M / (2^(b−1) − 1)          ±(2^(b−1) − 1)      the usual signed grid; its end is M itself
    aqt           M / (2^(b−1) − ½)          ±(2^(b−1) − 1)      AQT v2: M maps to the far edge of the last bucket
    affine        (max − min) / (2^b − 1)    0 … 2^b − 1         CPT (Fu et al. 2021), float zero point: x − min
    unsigned      max(x, 0) / (2^b − 1)      0 … 2^b − 1         after ReLU; negative inputs become 0
    sign          mean|x|                    {−1, +1}            XNOR-Net (Rastegari et al. 2016); sign(0) = +1
    ============  =========================  ==================  =====================================================

    `symmetric` and `aqt` at 1 bit are the sign grid (their own would hold nothing but 0). Bits of 24 and above return
    `x` itself. Arithmetic is float32. Quotients are computed as x·(1/s) and M·(1/n), which is what XLA makes of a
    division by a broadcast scalar, so that compiled and eager calls, scalar and vector widths agree. s has the dtype
    of `x` and is at least the smallest normal float32: an all-zero tensor stays zero (±1e-38 on the sign grid), a
    constant one is reproduced. Finite inputs give finite results up to 1e37 in magnitude (at 1 bit, where the scale is
    the mean of n elements, up to 1e38/n). A NaN stays one; where the range is that of `x`, a NaN or an infinity makes
    everything that shares its scale NaN (or infinite).

    Gradient with respect to x: 1 everywhere, as in CPT's and AQT's defaults; with `clip_gradient`, 0 where x lies more
    than half a step outside the grid. With a range taken from `x` itself that happens only for the negative side of
    ``unsigned`` and, on the sign grid, beyond 3/2 mean|x|; elsewhere it matters with calibrated ranges. Nothing flows
    to the range or the bits.

    Attributes:
      grid: one of the above.
      per: "tensor" (one scale), "channel" (shared along the contracted axes; on a bare array one per index of the last
        axis), "row", "column", a tuple of axes that keep scales of their own, or an int group size. See
        `qtrain.quantizers.granularity.layout`.
      rounding: "nearest" (ties to even), "stochastic" (⌊x/s⌋, plus 1 with probability x/s − ⌊x/s⌋: unbiased, needs a
        key), or "floor" (a value within float32 rounding of a grid point is on it). The sign grid rounds one way only.
      clip_gradient: see above.
      statistics: momentum m of a running range r ← m·r + (1 − m)·range(x), kept in the collection ``quant_stats``:
        training uses each batch's own range and updates r, evaluation uses r (as CPT does, with 0.9). None: the range
        is always that of the tensor at hand. Not with a scale per example, which has no meaning for another batch.
      delay: training, too, uses r, as it was before this step (delayed scaling): the scale is known before the tensor
        is. With ``statistics=0.0`` that is the range of the previous step. What lies beyond it is clipped; the first
        step uses its own range. Only for weights and activations: a backward pass keeps no statistics.

    >>> import jax.numpy as jnp
    >>> q = Uniform(grid="symmetric", per="tensor")
    >>> print(q(jnp.array([-1.0, -0.4, 0.1, 0.7]), 3))
    [-1.         -0.33333334  0.          0.6666667 ]
    >>> codes, scale = q.encode(jnp.array([-1.0, -0.4, 0.1, 0.7]), 3)
    >>> print(codes, scale)
    [-3 -1  0  2] [0.33333334]
    """

    grid: str = "symmetric"
    per: Per = "channel"
    rounding: str = "nearest"
    clip_gradient: bool = False
    statistics: float | None = None
    delay: bool = False

    def __post_init__(self) -> None:
        if self.grid not in GRIDS:
            raise UsageError(f"grid={self.grid!r}: give one of {GRIDS}.{did_you_mean(self.grid, GRIDS)}")
        if self.rounding not in ROUNDINGS:
            hint = did_you_mean(self.rounding, ROUNDINGS)
            raise UsageError(f"rounding={self.rounding!r}: give one of {ROUNDINGS}.{hint}")
        if isinstance(self.per, list):
            object.__setattr__(self, "per", tuple(self.per))
        check_per(self.per)
        if self.statistics is not None and not 0.0 <= self.statistics < 1.0:
            raise UsageError(f"statistics={self.statistics!r}: give a momentum in [0, 1), or None for no running range")
        if self.delay and self.statistics is None:
            raise UsageError(
                "delay=True needs a running range to use: give statistics=0.0 for that of the previous step"
            )

    @property
    def stochastic(self) -> bool:
        """Whether a call needs a `key`."""
        return self.rounding == "stochastic"

    @property
    def ema(self) -> float | None:
        """Momentum of the running range, or None."""
        return self.statistics

    @property
    def delayed(self) -> bool:
        """Whether training uses the running range."""
        return self.delay

    @property
    def code_dtype(self) -> str:
        """int8: every grid of at most 8 bits has that many codes."""
        return "int8"

    def describe(self) -> str:
        """The choices that differ from plain rounding, in a few words: ``affine/tensor stochastic``."""
        words = [f"{self.grid}/{self.per}"]
        words += [self.rounding] if self.rounding != "nearest" else []
        words += ["clip_gradient"] if self.clip_gradient else []
        words += [f"ema={self.statistics}"] if self.statistics is not None else []
        words += ["delayed"] if self.delay else []
        return " ".join(words)

    def __call__(
        self,
        x: Array,
        bits: Any,
        params: Mapping[str, Array] | None = None,
        *,
        key: Array | None = None,
        axes: Axes | None = None,
    ) -> Array:
        """`x` on the grid of width `bits`; see the class and `Quantizer.__call__`.

        Args:
          x: float32 or bfloat16, any shape.
          bits: a whole number, or an array that broadcasts against the scale.
          params: a range from `range`, to be used instead of that of `x`.
          key: PRNG key or seed, for stochastic rounding.
          axes: contracted axes, which give ``per="channel"`` its meaning.

        Raises:
          UsageError: for a concrete `bits` that is no width, or stochastic rounding without a key.
        """
        concrete = static_bits(bits)
        if concrete is not None and concrete >= FLOAT_BITS:
            return x
        view = layout(x.shape, self.per, axes)
        values = lax.stop_gradient(x).reshape(view.shape)
        bits = jnp.asarray(bits if concrete is None else concrete)
        scale = self._scale(values, bits, view, params, concrete)
        codes, in_steps = self._codes(values, bits, scale, key)
        quantized = self._values(codes, scale)
        if concrete is None:
            quantized = jnp.where(bits >= FLOAT_BITS, values, quantized)
        quantized = quantized.reshape(x.shape)
        if not self.clip_gradient:
            return straight_through(x, quantized)
        inside = self._inside(in_steps, bits, x.dtype) | (bits >= FLOAT_BITS)
        return straight_through_inside(x, quantized, inside.reshape(x.shape))

    def encode(
        self,
        x: Array,
        bits: Any,
        params: Mapping[str, Array] | None = None,
        *,
        key: Array | None = None,
        axes: Axes | None = None,
    ) -> tuple[Array, Any]:
        """Integer codes of `x` and the scale that decodes them.

        Returns:
          codes: int32, the shape of `x`.
          scale: dtype of `x`, an array that broadcasts against the codes (for a group size: against the codes with the
            grouped axis split), or an `AffineScale` of two.

        Raises:
          UsageError: as a call, and for concrete bits of 24 and above, which have no integer codes.
        """
        concrete = static_bits(bits)
        if concrete is not None and concrete >= FLOAT_BITS:
            raise UsageError(f"bits: {bits!r} leaves a tensor in float and has no integer codes; give at most 23")
        view = layout(x.shape, self.per, axes)
        values = lax.stop_gradient(x).reshape(view.shape)
        bits = jnp.asarray(bits if concrete is None else concrete)
        scale = self._scale(values, bits, view, params, concrete)
        codes, _ = self._codes(values, bits, scale, key)
        return codes.astype(jnp.int32).reshape(x.shape), scale

    def coded(
        self,
        x: Array,
        bits: Any,
        params: Mapping[str, Array] | None = None,
        *,
        key: Array | None = None,
        axes: Axes | None = None,
    ) -> Coded:
        """`x` as int8 codes, for widths of at most 8 bits; see `Quantizer.coded`. Not with a group size."""
        concrete = static_bits(bits)
        view = layout(x.shape, self.per, axes)
        values = lax.stop_gradient(x)
        bits = jnp.asarray(bits if concrete is None else concrete)
        scale = self._scale(values, bits, view, params, concrete)
        codes, in_steps = self._codes(values, bits, scale, key)
        steps = offset = None
        if self.grid in ("affine", "unsigned"):
            lowest = None
            if isinstance(scale, AffineScale):
                lowest = scale.offset.astype(jnp.float32)
                scale = scale.scale
            shift, steps, offset = zero_point(scale.astype(jnp.float32), lowest, power_of_two(bits))
            codes = codes - shift
        scale = scale.astype(jnp.float32)
        inside = self._inside(in_steps, bits, x.dtype) if self.clip_gradient else None
        return Coded(without_dead(codes, scale).astype(jnp.int8), scale, offset, inside, steps)

    def scale(
        self, x: Array, bits: Any, params: Mapping[str, Array] | None = None, *, axes: Axes | None = None
    ) -> Array:
        """The step size of the grid at `bits`, float32, one for each group of elements that share it (axes kept)."""
        concrete = static_bits(bits)
        view = layout(x.shape, self.per, axes)
        bits = jnp.asarray(bits if concrete is None else concrete)
        scale = self._scale(lax.stop_gradient(x).reshape(view.shape), bits, view, params, concrete)
        return (scale.scale if isinstance(scale, AffineScale) else scale).astype(jnp.float32)

    def decode(self, codes: Array, scale: Any, *, axes: Axes | None = None) -> Array:
        """The values that `codes` stand for, in the dtype of `scale`; equals the call on what was encoded.

        Exactly so; of ``affine``, whose product and sum a compiler may fuse, up to the rounding of the product.
        """
        view = layout(codes.shape, self.per, axes)
        return self._values(codes.reshape(view.shape).astype(jnp.float32), scale).reshape(codes.shape)

    def bounds(self, bits: Any) -> tuple[Array, Array]:
        """The lowest and the highest code at `bits`, float32; of the sign grid −1 and 1."""
        return self._bounds(jnp.asarray(bits))

    def position(
        self, x: Array, bits: Any, params: Mapping[str, Array] | None = None, *, axes: Axes | None = None
    ) -> Array:
        """Where `x` lies on the grid, in steps, before rounding and clipping: float32, its shape.

        Half-integers from the first to the last of `transitions` are where the code changes: for ``rounding="floor"``
        it is x/s − ½ (of stochastic rounding: where either neighbour is as likely). On the sign grid, whose levels are
        2s apart, it is (x/s − 1)/2.

        Raises:
          UsageError: as `encode`.
        """
        concrete = static_bits(bits)
        if concrete is not None and concrete >= FLOAT_BITS:
            raise UsageError(f"bits: {bits!r} leaves a tensor in float and has no grid; give at most 23")
        view = layout(x.shape, self.per, axes)
        values = lax.stop_gradient(x).reshape(view.shape)
        bits = jnp.asarray(bits if concrete is None else concrete)
        in_steps = self._in_steps(values, self._scale(values, bits, view, params, concrete))
        position = in_steps - 0.5 if self.rounding == "floor" else in_steps
        return jnp.where(self._one_bit(bits), 0.5 * (in_steps - 1.0), position).reshape(x.shape)

    def transitions(self, bits: Any) -> tuple[Array, Array]:
        """The `position` of the lowest and of the highest point where the code changes."""
        low, high = self.bounds(bits)
        sign = self._one_bit(jnp.asarray(bits))
        return jnp.where(sign, -0.5, low + 0.5), jnp.where(sign, -0.5, high - 0.5)

    def range(self, x: Array, *, axes: Axes | None = None) -> dict[str, Array]:
        """The statistics of `x` that its scale is made from: float32, one for each scale.

        ``absmax`` and ``absmean`` for symmetric, aqt and sign; ``min`` and ``max`` for affine; ``max`` for unsigned.
        """
        view = layout(x.shape, self.per, axes)
        values = lax.stop_gradient(x).reshape(view.shape)
        return {name: reduce_range(values, name, view.axes) for name in self._statistics_names}

    @property
    def _statistics_names(self) -> tuple[str, ...]:
        return {"affine": ("min", "max"), "unsigned": ("max",)}.get(self.grid, ("absmax", "absmean"))

    def _scale(
        self, values: Array, bits: Array, view: Layout, params: Mapping[str, Array] | None, concrete: int | None
    ) -> Any:
        def statistic(name: str) -> Array:
            return reduce_range(values, name, view.axes) if params is None else params[name].reshape(view.scale_shape)

        dtype = values.dtype
        if self.grid == "affine":
            lowest = statistic("min").astype(dtype).astype(jnp.float32)
            step = (statistic("max") - lowest) * (1.0 / self._bounds(bits)[1])
            return AffineScale(positive(step).astype(dtype), lowest.astype(dtype))
        if self.grid == "unsigned":
            return positive(statistic("max") * (1.0 / self._bounds(bits)[1])).astype(dtype)
        if self.grid == "sign":
            return positive(statistic("absmean")).astype(dtype)
        inverse = 1.0 / (self._bounds(bits)[1] + (0.5 if self.grid == "aqt" else 0.0))

        def at_one_bit() -> Array:
            return statistic("absmean")

        def wider() -> Array:
            return statistic("absmax") * inverse

        if concrete is not None:
            step = at_one_bit() if concrete == 1 else wider()
        elif isinstance(values, jax.core.Tracer) and not bits.ndim and params is None and _branches():
            step = lax.cond(bits == 1, at_one_bit, wider)
        else:
            step = jnp.where(bits == 1, at_one_bit(), wider())
        return positive(step).astype(dtype)

    def _bounds(self, bits: Array) -> tuple[Array, Array]:
        """Lowest and highest code at `bits`, float32."""
        bits = jnp.minimum(bits, FLOAT_BITS)
        if self.grid in ("affine", "unsigned"):
            return jnp.float32(0.0), power_of_two(bits) - 1.0
        if self.grid == "sign":
            return jnp.float32(-1.0), jnp.float32(1.0)
        high = jnp.maximum(power_of_two(bits - 1) - 1.0, 1.0)
        return -high, high

    def _one_bit(self, bits: Array) -> Array:
        """Where `bits` means the sign grid."""
        return (bits == 1) & (self.grid in ("symmetric", "aqt")) | (self.grid == "sign")

    def _inside(self, in_steps: Array, bits: Array, dtype: Any) -> Array:
        low, high = self._bounds(bits)
        # The scale's own rounding must not push the tensor's largest value, which may lie exactly half a step out.
        slack = 1.0 + 2.0 * float(jnp.finfo(dtype).eps)
        return (in_steps >= (low - 0.5) * slack) & (in_steps <= (high + 0.5) * slack)

    def _in_steps(self, values: Array, scale: Any) -> Array:
        """x/s, or (x − x_min)/s, in float32."""
        values = values.astype(jnp.float32)
        if isinstance(scale, AffineScale):
            values = values - scale.offset.astype(jnp.float32)
            scale = scale.scale
        return values * (1.0 / scale.astype(jnp.float32))

    def _codes(self, values: Array, bits: Array, scale: Any, key: Array | None) -> tuple[Array, Array]:
        """Whole codes as float32, and x/s before rounding."""
        step = scale.scale if isinstance(scale, AffineScale) else scale
        in_steps = self._in_steps(values, scale)
        if self.grid == "sign":
            return signs(values), in_steps
        if self.rounding == "stochastic":
            rounded = round_stochastically(in_steps, key, step)
        elif self.rounding == "floor":
            rounded = jnp.floor(jnp.maximum(in_steps * (1 - _FLOOR_SLACK), in_steps * (1 + _FLOOR_SLACK)))
        else:
            rounded = jnp.round(in_steps)
        low, high = self._bounds(bits)
        codes = jnp.clip(rounded, low, high)
        if self.grid in ("symmetric", "aqt"):
            codes = jnp.where(bits == 1, signs(values), codes)
        return codes, in_steps

    def _values(self, codes: Array, scale: Any) -> Array:
        if isinstance(scale, AffineScale):
            values = codes * scale.scale.astype(jnp.float32) + scale.offset.astype(jnp.float32)
            return values.astype(scale.scale.dtype)
        return (codes * scale.astype(jnp.float32)).astype(scale.dtype)


def _branches() -> bool:
    """Whether to branch between two ranges instead of computing both: a CPU pays for each pass over the tensor.

    An accelerator fuses the two reductions and pays for the branch. Outside a trace it would be compiled by every call.
    """
    return jax.default_backend() == "cpu"
