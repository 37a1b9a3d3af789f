"""Small floats: codes that are floating-point numbers of 4, 6 or 8 bits."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import lax

from qtrain.errors import UsageError, did_you_mean
from qtrain.quantizers.base import (
    FLOAT_BITS,
    Array,
    Axes,
    Quantizer,
    static_bits,
    straight_through,
    straight_through_inside,
)
from qtrain.quantizers.coded import Coded
from qtrain.quantizers.formats import ALIASES, FORMATS, exponent_of, format_of, keep_bits, spacing_of
from qtrain.quantizers.granularity import Layout, Per, check_per, layout
from qtrain.quantizers.scales import positive, reduce_range, round_stochastically

ROUNDINGS = ("nearest", "stochastic")


class _Grid(NamedTuple):
    """A format at a traced width: mantissa bits (int32) and largest value (float32), of the shape of the bits."""

    mantissa: Array
    largest: Array


@dataclasses.dataclass(frozen=True)
class Float(Quantizer):
    """Fake quantization to a small floating-point format at a traced width b, with a straight-through gradient.

    x̂ = s·cast(x/s),  s = M / largest,  M = max|x| over the elements that share a scale

    ======================  ====  ========  ========  ===============  ==============================================
    format                  bits  exponent  mantissa  largest          known from
    ======================  ====  ========  ========  ===============  ==============================================
    e4m3 (is e4m3fn)        8     4         3         448              Micikevicius et al. 2022; NVIDIA, OCP: forward
    e5m2                    8     5         2         57344            the same: gradients
    e4m3fnuz, e5m2fnuz      8     4, 5      3, 2      240, 57344       Noune et al. 2022; Graphcore, AMD: no −0
    e4m3b11fnuz             8     4         3         30               exponent bias 11 (Sun et al. 2019)
    e3m4                    8     3         4         15.5             IEEE-like
    e3m2fn, e2m3fn, e2m1fn  6, 4  3, 2, 2   2, 3, 1   28, 7.5, 6       OCP microscaling; also without "fn"
    ======================  ====  ========  ========  ===============  ==============================================

    **Width.** Precision is data here too: b ≥ 24 returns `x`; from the format's own width upwards the format; each bit
    less gives up one mantissa bit, down to none (powers of two). Exponent bits are never given up, so that a smaller
    width is a subset of the format; with no mantissa bit there are no subnormals. A concrete b below
    1 + exponent bits is an error, a traced one counts as that many. `largest` is that of the width, so that M itself
    is always on the grid. Between powers of two a tie goes to the larger, as IEEE 754 has it for one digit.

    **Rounding** to nearest, ties to even, subnormals included, is that of the ml_dtypes cast bit for bit, except that
    it saturates: what lies beyond `largest` becomes `largest`, never an infinity or NaN. Arithmetic is float32; x/s is
    computed as x·(1/s), which is what XLA makes of a division by a broadcast scalar.

    **Scale.** s has the dtype of `x`, is at least the smallest normal float32, and keeps so few significant bits (23 −
    mantissa) that s times a code is exact in float32: quantizing twice is quantizing once, and M is reproduced to
    2⁻¹⁹ relative (bfloat16: 2⁻⁷). An all-zero tensor stays zero. With `scaled=False`, s is 1: a saturating cast.
    Every finite input gives a finite result; a NaN or an infinity makes everything that shares its scale NaN. With a
    scale that does not come from `x`, a NaN stays by itself and an infinity saturates.

    **Gradient** with respect to x: 1 everywhere; with `clip_gradient`, 0 where |x/s| exceeds `largest` by more than
    half the spacing there, which happens only unscaled or with a calibrated range. Nothing flows to range or bits.

    Attributes:
      format: one of `FORMATS`; an alias is replaced by what it stands for.
      per: which elements share a scale, as for `Uniform`; "tensor" where there is none.
      rounding: "nearest", or "stochastic": down or up to the neighbours on the grid, with the probability that makes it
        unbiased (needs a key). Unscaled, the layers of a scan share their noise, which is salted with the scale.
      scaled: see above.
      clip_gradient: see above.
      statistics: momentum of a running range in ``quant_stats``, as for `Uniform`; its name there is ``absmax``.

    Raises:
      UsageError: for a field that holds something it does not allow, and for `per` or `statistics` without a scale.

    >>> import jax.numpy as jnp
    >>> q = Float("e4m3")
    >>> x = jnp.array([-3.5, -1.4, 0.35, 2.45])
    >>> print(q(x, 8))
    [-3.5     -1.375    0.34375  2.5    ]
    >>> codes, scale = q.encode(x, 8)
    >>> print(codes, codes.dtype, scale)
    [-448 -176 44 320] float8_e4m3fn [0.0078125]
    >>> print(q(x, 5))
    [-3.5    -1.75    0.4375  1.75  ]
    """

    format: str = "e4m3"
    per: Per = "tensor"
    rounding: str = "nearest"
    scaled: bool = True
    clip_gradient: bool = False
    statistics: float | None = None

    def __post_init__(self) -> None:
        if self.format not in FORMATS:
            raise UsageError(f"format={self.format!r}: give one of {FORMATS}.{did_you_mean(self.format, FORMATS)}")
        object.__setattr__(self, "format", ALIASES.get(self.format, self.format))
        if self.rounding not in ROUNDINGS:
            hint = did_you_mean(self.rounding, ROUNDINGS)
            raise UsageError(f"rounding={self.rounding!r}: a small float takes one of {ROUNDINGS}.{hint}")
        if isinstance(self.per, list):
            object.__setattr__(self, "per", tuple(self.per))
        check_per(self.per)
        if self.statistics is not None and not 0.0 <= self.statistics < 1.0:
            raise UsageError(f"statistics={self.statistics!r}: give a momentum in [0, 1), or None for no running range")
        if not self.scaled and (self.per != "tensor" or self.statistics is not None):
            name = "statistics" if self.per == "tensor" else "per"
            raise UsageError(f"{name}={getattr(self, name)!r}: scaled=False has no scale; leave {name} out")

    @property
    def stochastic(self) -> bool:
        """Whether a call needs a `key`."""
        return self.rounding == "stochastic"

    @property
    def ema(self) -> float | None:
        """Momentum of the running range, or None."""
        return self.statistics

    @property
    def code_dtype(self) -> str | None:
        """The format's own dtype if it has 8 bits."""
        form = format_of(self.format)
        return str(form.dtype) if form.width == 8 else None

    def describe(self) -> str:
        """The choices that differ from a scaled cast, in a few words: ``e5m2/tensor stochastic``."""
        words = [f"{self.format}/{self.per}" if self.scaled else f"{self.format} unscaled"]
        words += [self.rounding] if self.rounding != "nearest" else []
        words += ["clip_gradient"] if self.clip_gradient else []
        words += [f"ema={self.statistics}"] if self.statistics is not None else []
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
        """`x` on the format's grid at width `bits`; see the class and `Quantizer.__call__`.

        Args:
          x: float32 or bfloat16, any shape.
          bits: a whole number, or an array that broadcasts against the scale.
          params: a range from `range`, to be used instead of that of `x`.
          key: PRNG key or seed, for stochastic rounding.
          axes: contracted axes, which give ``per="channel"`` its meaning.

        Raises:
          UsageError: for concrete `bits` that are no width of the format, stochastic rounding without a key, or a range
            without a scale.
        """
        concrete = self._static_bits(bits)
        if concrete is not None and concrete >= FLOAT_BITS:
            return x
        view = layout(x.shape, self.per, axes)
        values = lax.stop_gradient(x).reshape(view.shape)
        bits = jnp.asarray(bits if concrete is None else concrete)
        grid = self._grid(bits)
        scale = self._scale(values, grid, view, params)
        codes, in_units = self._codes(values, grid, scale, key)
        quantized = _decoded(codes, scale)
        if concrete is None:
            quantized = jnp.where(bits >= FLOAT_BITS, values, quantized)
        quantized = quantized.reshape(x.shape)
        if not self.clip_gradient:
            return straight_through(x, quantized)
        inside = _inside(in_units, grid) | (bits >= FLOAT_BITS)
        return straight_through_inside(x, quantized, inside.reshape(x.shape))

    def encode(
        self,
        x: Array,
        bits: Any,
        params: Mapping[str, Array] | None = None,
        *,
        key: Array | None = None,
        axes: Axes | None = None,
    ) -> tuple[Array, Array]:
        """Small floats that stand for `x`, and the scale that decodes them.

        Returns:
          codes: the shape of `x`; the format's own dtype if it has 8 bits, else float32 holding the format's values.
          scale: dtype of `x`, an array that broadcasts against the codes (for a group size: against the codes with the
            grouped axis split).

        Raises:
          UsageError: as a call, and for concrete bits of 24 and above, which have no codes.
        """
        concrete = self._static_bits(bits)
        if concrete is not None and concrete >= FLOAT_BITS:
            raise UsageError(f"bits: {bits!r} leaves a tensor in float and has no codes; give at most {FLOAT_BITS - 1}")
        view = layout(x.shape, self.per, axes)
        values = lax.stop_gradient(x).reshape(view.shape)
        grid = self._grid(jnp.asarray(bits if concrete is None else concrete))
        scale = self._scale(values, grid, view, params)
        codes, _ = self._codes(values, grid, scale, key)
        return codes.astype(format_of(self.format).dtype).reshape(x.shape), scale

    def coded(
        self,
        x: Array,
        bits: Any,
        params: Mapping[str, Array] | None = None,
        *,
        key: Array | None = None,
        axes: Axes | None = None,
    ) -> Coded:
        """`x` as 8-bit floats; see `Quantizer.coded`. Only for formats of 8 bits, and not with a group size."""
        concrete = self._static_bits(bits)
        grid = self._grid(jnp.asarray(bits if concrete is None else concrete))
        values = lax.stop_gradient(x)
        scale = self._scale(values, grid, layout(x.shape, self.per, axes), params)
        codes, in_units = self._codes(values, grid, scale, key)
        inside = _inside(in_units, grid) if self.clip_gradient else None
        return Coded(codes.astype(format_of(self.format).dtype), scale.astype(jnp.float32), None, inside)

    def scale(
        self, x: Array, bits: Any, params: Mapping[str, Array] | None = None, *, axes: Axes | None = None
    ) -> Array:
        """The scale at `bits`, float32, one for each group of elements that share it (axes kept)."""
        concrete = self._static_bits(bits)
        grid = self._grid(jnp.asarray(bits if concrete is None else concrete))
        view = layout(x.shape, self.per, axes)
        return self._scale(lax.stop_gradient(x).reshape(view.shape), grid, view, params).astype(jnp.float32)

    def decode(self, codes: Array, scale: Array, *, axes: Axes | None = None) -> Array:
        """The values that `codes` stand for, in the dtype of `scale`; equals the call on what was encoded, exactly."""
        view = layout(codes.shape, self.per, axes)
        return _decoded(codes.reshape(view.shape).astype(jnp.float32), scale).reshape(codes.shape)

    def range(self, x: Array, *, axes: Axes | None = None) -> dict[str, Array]:
        """The statistics of `x` that its scale is made from: ``absmax``, float32, one for each scale."""
        view = layout(x.shape, self.per, axes)
        return {"absmax": reduce_range(lax.stop_gradient(x).reshape(view.shape), "absmax", view.axes)}

    def _static_bits(self, bits: Any) -> int | None:
        concrete = static_bits(bits)
        given = bits.min(initial=FLOAT_BITS) if isinstance(bits, np.ndarray) else concrete
        form = format_of(self.format)
        least = form.width - form.mantissa
        if given is not None and given < least:
            raise UsageError(
                f"bits: {int(given)} is too few for format {self.format!r}, whose sign and exponent take {least}; "
                f"give at least {least}, or use Uniform"
            )
        return concrete

    def _grid(self, bits: Array) -> _Grid:
        form = format_of(self.format)
        bits = jnp.minimum(bits, form.width).astype(jnp.int32)
        mantissa = jnp.maximum(bits - (form.width - form.mantissa), 0)
        # What is left of the largest value when the mantissa bits that were given up are cleared.
        kept = jnp.left_shift(jnp.int32(-1), 23 - mantissa)
        largest = lax.bitcast_convert_type(jnp.float32(form.largest), jnp.int32) & kept
        return _Grid(mantissa, lax.bitcast_convert_type(largest, jnp.float32))

    def _scale(self, values: Array, grid: _Grid, view: Layout, params: Mapping[str, Array] | None) -> Array:
        dtype = values.dtype
        if not self.scaled:
            if params is not None:
                raise UsageError("params: scaled=False has no scale for a range to set; leave params out")
            return jnp.ones(view.scale_shape, dtype)
        largest = reduce_range(values, "absmax", view.axes) if params is None else params["absmax"]
        largest = largest.reshape(view.scale_shape).astype(jnp.float32)
        # Room for the scale's rounding: scale · largest is finite, too.
        room = float(jnp.finfo(dtype).max) * (1 - 2.0**-6)
        largest = jnp.where(jnp.isinf(largest), largest, jnp.minimum(largest, room))
        # Rounded to so few bits that s · largest is exact, s is the scale of its own result. It is so in bfloat16, too,
        # where both are rounded alike, because the largest value of every format and width is (2^j − 1)·2^k.
        step = keep_bits(largest * (1.0 / grid.largest), 23 - format_of(self.format).mantissa)
        return positive(step).astype(dtype)

    def _codes(self, values: Array, grid: _Grid, scale: Array, key: Array | None) -> tuple[Array, Array]:
        """Values of the format as float32, and x/s before rounding."""
        form = format_of(self.format)
        in_units = values.astype(jnp.float32)
        if self.scaled:
            in_units = in_units * (1.0 / scale.astype(jnp.float32))
        clipped = jnp.clip(in_units, -grid.largest, grid.largest)
        exponent = jnp.maximum(exponent_of(clipped), form.least)
        # Scaled by a power of two, the grid of the value's binade is the whole numbers.
        in_steps = clipped * spacing_of(-exponent, -grid.mantissa)
        rounded = round_stochastically(in_steps, key, scale) if self.stochastic else jnp.round(in_steps)
        codes = rounded * spacing_of(exponent, grid.mantissa)
        return codes if form.signed_zero else jnp.where(codes == 0.0, 0.0, codes), in_units


def _inside(in_units: Array, grid: _Grid) -> Array:
    """Where the gradient passes, if it is clipped: up to half a spacing beyond the largest value."""
    return jnp.abs(in_units) <= grid.largest + 0.5 * spacing_of(exponent_of(grid.largest), grid.mantissa)


def _decoded(codes: Array, scale: Array) -> Array:
    return (codes * scale.astype(jnp.float32)).astype(scale.dtype)
