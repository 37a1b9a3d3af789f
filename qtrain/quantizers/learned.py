"""What the quantizers with a trained range share: their grid, its gradients to the input and to the parameters."""

from __future__ import annotations

import abc
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from qtrain.errors import UsageError
from qtrain.quantizers.base import (
    FLOAT_BITS,
    Array,
    Axes,
    Quantizer,
    power_of_two,
    static_bits,
    straight_through,
)
from qtrain.quantizers.granularity import Layout, Per, layout
from qtrain.quantizers.scales import SMALLEST, signs
from qtrain.quantizers.uniform import AffineScale


class Grid(NamedTuple):
    """A grid at one width: code c stands for c · unit + offset, and x lies at (x − offset)/step.

    Attributes:
      step: float32, one for each scale, at least the smallest normal number; differentiable to the parameters.
      low, high: the first and the last code.
      sign: whether it is the grid {−unit, +unit} of one bit, with codes ∓1.
      offset: float32 likewise, or None for 0.
      unit: float32 likewise, where a code does not stand for a step of the input; None: it does.
      source: the parameter that the step is made from, where the gradient is stated for that; None: for the step.
      width: float32 likewise, the width that the step is made for, where it is learned.
    """

    step: Array
    low: Array
    high: Array
    sign: Array
    offset: Array | None = None
    unit: Array | None = None
    source: Array | None = None
    width: Array | None = None


class Gradient(NamedTuple):
    """The gradient of a quantizer: ∂/∂x = slope where `inside`, 0 elsewhere; ∂/∂(parameters[i]) = factors[i].

    Attributes:
      inside: bool, the shape of x.
      parameters: arrays that broadcast against x.
      factors: float32, the shape of x.
      slope: float32, broadcasts against x; None: 1.
    """

    inside: Array
    parameters: tuple[Array, ...] = ()
    factors: tuple[Array, ...] = ()
    slope: Array | None = None


class GridQuantizer(Quantizer):
    """A quantizer whose codes are consecutive integers and whose gradient goes to parameters, too.

    A subclass gives the grid at a width (`_grid`), and where its gradient differs, `_gradient`. Codes are
    clip(rint((x − offset)/step), low, high), ties to even; the quotient is computed as (x − offset)·(1/step), in
    float32. Step and offset are rounded to the dtype of x first, as a weight is that a bfloat16 layer uses. A NaN in x
    stays one. There are no 8-bit codes for native execution: `code_dtype` is None.
    """

    per: Per

    @abc.abstractmethod
    def bounds(self, bits: Any) -> tuple[Array, Array]:
        """The lowest and the highest code at `bits`, float32; of the sign grid −1 and 1."""

    @abc.abstractmethod
    def _grid(self, values: Array, bits: Array, view: Layout, params: Mapping[str, Array] | None) -> Grid:
        """The grid at `bits`; `values` is x in float32, viewed as `view` says, and takes no gradient."""

    def _one_bit(self, bits: Array) -> Array:
        """Where `bits` means the sign grid."""
        return jnp.zeros_like(bits, bool)

    def _transformed(self, x: Array, bits: Array, view: Layout) -> Array:
        """What is put on the grid, of the shape of x: x itself, or a differentiable function of it."""
        return x

    def _gradient(self, inputs: Array, in_steps: Array, codes: Array, grid: Grid) -> Gradient:
        """Straight through the rounding: ∂/∂step = code − (x − offset)/step inside, code outside; ∂/∂offset = 0, 1."""
        inside = (in_steps > grid.low) & (in_steps < grid.high)
        residual = codes - jnp.where(inside, in_steps, 0.0)
        if grid.offset is None:
            return Gradient(inside, (grid.step,), (residual,))
        return Gradient(inside, (grid.step, grid.offset), (residual, jnp.where(inside, 0.0, 1.0)))

    def _check_width(self, bits: Any) -> None:
        """Refuse concrete bits that the quantizer has no parameters for."""

    def __call__(
        self,
        x: Array,
        bits: Any,
        params: Mapping[str, Array] | None = None,
        *,
        key: Array | None = None,
        axes: Axes | None = None,
    ) -> Array:
        """`x` on the grid of width `bits`, in the dtype of `x`; see the class and `Quantizer.__call__`.

        Raises:
          UsageError: for a concrete `bits` that is no width, or parameters that are absent or fit another tensor.
        """
        concrete = static_bits(bits)
        if concrete is not None and concrete >= FLOAT_BITS:
            return x
        inputs, grid, bits, _ = self._prepared(x, bits, params, axes)
        values = lax.stop_gradient(inputs).astype(jnp.float32)
        codes, in_steps = _codes(values, grid, x.dtype)
        gradient = self._gradient(inputs.astype(jnp.float32), in_steps, codes, grid)
        quantized = _values(codes, _encoded_scale(grid, x.dtype))
        if concrete is None:
            whole = bits >= FLOAT_BITS
            quantized = jnp.where(whole, values.astype(x.dtype), quantized)
            gradient = Gradient(
                gradient.inside | whole,
                gradient.parameters,
                tuple(jnp.where(whole, 0.0, factor) for factor in gradient.factors),
                None if gradient.slope is None else jnp.where(whole, 1.0, gradient.slope),
            )
        return on_grid(inputs, quantized, gradient).reshape(x.shape)

    def encode(
        self, x: Array, bits: Any, params: Mapping[str, Array] | None = None, *, axes: Axes | None = None
    ) -> tuple[Array, Any]:
        """Integer codes of `x` (int32, its shape) and what decodes them, in the dtype of `x`: an array, or an
        `AffineScale` where there is an offset.

        Raises:
          UsageError: as a call, and for concrete bits of 24 and above, which have no integer codes.
        """
        values, grid = self._on_grid_of(x, bits, params, axes)
        codes, _ = _codes(values, grid, x.dtype)
        return codes.astype(jnp.int32).reshape(x.shape), _encoded_scale(grid, x.dtype)

    def decode(self, codes: Array, scale: Any, *, axes: Axes | None = None) -> Array:
        """The values that `codes` stand for, in the dtype of `scale`; equals the call on what was encoded, exactly."""
        view = layout(codes.shape, self.per, axes)
        return _values(codes.reshape(view.shape).astype(jnp.float32), scale).reshape(codes.shape)

    def position(
        self, x: Array, bits: Any, params: Mapping[str, Array] | None = None, *, axes: Axes | None = None
    ) -> Array:
        """Where `x` lies on the grid, in steps, before rounding and clipping: float32, its shape.

        Half-integers from the first to the last of `transitions` are where the code changes. On the sign grid, whose
        levels are 2s apart, it is (x/s − 1)/2. Raises as `encode`.
        """
        values, grid = self._on_grid_of(x, bits, params, axes)
        _, in_steps = _codes(values, grid, x.dtype)
        return jnp.where(grid.sign, 0.5 * (in_steps - 1.0), in_steps).reshape(x.shape)

    def transitions(self, bits: Any) -> tuple[Array, Array]:
        """The `position` of the lowest and of the highest point where the code changes."""
        low, high = self.bounds(bits)
        sign = self._one_bit(jnp.asarray(bits))
        return jnp.where(sign, -0.5, low + 0.5), jnp.where(sign, -0.5, high - 0.5)

    def scale(
        self, x: Array, bits: Any, params: Mapping[str, Array] | None = None, *, axes: Axes | None = None
    ) -> Array:
        """What one code stands for at `bits`, float32, for each group of elements that share it (axes kept).

        Differentiable to the parameters as the step is, through the rounding to the dtype of `x` as if there were none.
        """
        _, grid, _, view = self._prepared(x, bits, params, axes)
        scale = grid.step if grid.unit is None else grid.unit
        scale = straight_through(scale, _rounded(scale, x.dtype))
        return jnp.broadcast_to(scale, jnp.broadcast_shapes(scale.shape, view.scale_shape))

    def _prepared(self, x: Array, bits: Any, params: Any, axes: Axes | None) -> tuple[Array, Grid, Array, Layout]:
        concrete = static_bits(bits)
        self._check_width(bits if concrete is None else concrete)
        view = layout(x.shape, self.per, axes)
        bits = jnp.asarray(bits if concrete is None else concrete)
        x = x.reshape(view.shape)
        grid = self._grid(lax.stop_gradient(x).astype(jnp.float32), bits, view, params)
        return self._transformed(x, bits, view), grid, bits, view

    def _on_grid_of(self, x: Array, bits: Any, params: Any, axes: Axes | None) -> tuple[Array, Grid]:
        concrete = static_bits(bits)
        if concrete is not None and concrete >= FLOAT_BITS:
            raise UsageError(f"bits: {bits!r} leaves a tensor in float and has no integer codes; give at most 23")
        inputs, grid, _, _ = self._prepared(x, bits, params, axes)
        return lax.stop_gradient(inputs).astype(jnp.float32), grid


def distance_to_transition(
    quantizer: Any, x: Array, bits: Any, params: Mapping[str, Array] | None = None, *, axes: Axes | None = None
) -> Array:
    """How far each element is from the nearest point where its code would change: float32, in steps, at least 0.

    Inside the grid |frac(p) − ½| for the `position` p; beyond its ends the distance to the first or last transition.
    `quantizer`: `Uniform` or one of those here.
    """
    position = quantizer.position(x, bits, params, axes=axes)
    # The ends of a grid whose width is learned are not those of the step's bits.
    ends = {"params": params} if quantizer.chooses_width else {}
    first, last = quantizer.transitions(bits, **ends)
    return jnp.abs(position - jnp.clip(jnp.floor(position) + 0.5, first, last))


@jax.custom_jvp
def on_grid(x: Array, quantized: Array, gradient: Gradient) -> Array:
    """`quantized`, with the gradient that `gradient` states (in every order and mode)."""
    return quantized


@on_grid.defjvp
def _on_grid_jvp(primals: tuple[Array, Array, Gradient], tangents: tuple[Array, Any, Gradient]) -> tuple[Array, Array]:
    _, quantized, gradient = primals
    x_dot = tangents[0].astype(jnp.float32)
    if gradient.slope is not None:
        x_dot = gradient.slope * x_dot
    dot = jnp.where(gradient.inside, x_dot, 0.0)
    for factor, parameter_dot in zip(gradient.factors, tangents[2].parameters, strict=True):
        dot = dot + factor * parameter_dot
    return on_grid(*primals), dot.astype(quantized.dtype)


@jax.custom_jvp
def _scaled_gradient(x: Array, factor: Array) -> Array:
    return x


@_scaled_gradient.defjvp
def _scaled_gradient_jvp(primals: tuple[Array, Array], tangents: tuple[Array, Any]) -> tuple[Array, Array]:
    return _scaled_gradient(*primals), tangents[0] * primals[1]


def scaled_gradient(x: Array, factor: Array) -> Array:
    """`x`, exactly, in the shape that it and `factor` broadcast to; its gradient is multiplied by `factor`."""
    return _scaled_gradient(jnp.broadcast_to(x, jnp.broadcast_shapes(x.shape, jnp.shape(factor))), factor)


def floored(scale: Array) -> Array:
    """max(scale, the smallest normal float32), with gradient 1: a scale that was driven to 0 or below can come back."""
    return straight_through(scale, jnp.maximum(scale, SMALLEST))


def exact_power(exponent: Array) -> Array:
    """2^exponent for whole exponents −126…127, exactly, as float32: from its bits, since exp2 is not exact."""
    biased = jnp.asarray(lax.stop_gradient(exponent)).astype(jnp.int32) + 127
    return lax.bitcast_convert_type(biased << 23, jnp.float32)


def signed_bounds(bits: Any) -> tuple[Array, Array]:
    """−2^(b−1) and 2^(b−1) − 1, float32; at 1 bit −1 and 1, of the sign grid."""
    half = power_of_two(jnp.minimum(bits, FLOAT_BITS) - 1)
    return -half, jnp.maximum(half - 1.0, 1.0)


def unsigned_bounds(bits: Any) -> tuple[Array, Array]:
    """0 and 2^b − 1, float32."""
    return jnp.float32(0.0), power_of_two(jnp.minimum(bits, FLOAT_BITS)) - 1.0


def _codes(values: Array, grid: Grid, dtype: Any) -> tuple[Array, Array]:
    """Whole codes as float32, and (x − offset)/step before rounding."""
    step = _rounded(grid.step, dtype)
    if grid.offset is not None:
        values = values - _rounded(grid.offset, dtype)
    in_steps = values * (1.0 / step)
    codes = jnp.clip(jnp.round(in_steps), grid.low, grid.high)
    return jnp.where(grid.sign, signs(in_steps), codes), in_steps


def _rounded(value: Array, dtype: Any) -> Array:
    return lax.stop_gradient(value).astype(dtype).astype(jnp.float32)


def _encoded_scale(grid: Grid, dtype: Any) -> Any:
    scale = lax.stop_gradient(grid.step if grid.unit is None else grid.unit).astype(dtype)
    return scale if grid.offset is None else AffineScale(scale, lax.stop_gradient(grid.offset).astype(dtype))


def _values(codes: Array, scale: Any) -> Array:
    if isinstance(scale, AffineScale):
        step, offset = scale.scale.astype(jnp.float32), scale.offset.astype(jnp.float32)
        # Whether a compiler fuses a product with the sum must not matter. In two parts of 12 bits it is exact.
        upper = lax.bitcast_convert_type(lax.bitcast_convert_type(step, jnp.int32) & -(1 << 12), jnp.float32)
        return ((offset + codes * upper) + codes * (step - upper)).astype(scale.scale.dtype)
    return (codes * scale.astype(jnp.float32)).astype(scale.dtype)
