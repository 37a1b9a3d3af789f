"""Double Rounding: integers of h bits, from which every narrower width follows by a shift."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from qtrain.errors import UsageError
from qtrain.quantizers.base import FLOAT_BITS, Array, Axes, static_bits
from qtrain.quantizers.granularity import Layout, Per, check_per
from qtrain.quantizers.learned import (
    Gradient,
    Grid,
    GridQuantizer,
    exact_power,
    floored,
    on_grid,
    scaled_gradient,
    signed_bounds,
)
from qtrain.quantizers.parameters import (
    as_stored,
    calibration,
    check_flags,
    elements_per_scale,
    mean_and_deviation,
    stored,
    usable,
)

NARROWEST = 2
"""The formula's codes of one bit are −1 and 0, which is no grid to train on."""

_PIECE = 1 << 16  # codes at a time, which stay in the cache


@dataclasses.dataclass(frozen=True)
class DoubleRounding(GridQuantizer):
    """Ŵ_l = W_l · s_h · 2^Δ, Δ = h − l: weights are rounded to h bits, and those integers once more to l bits.

    W_h = clip(rint(W/s_h), −2^(h−1), 2^(h−1) − 1) and W_l = clip(rint(W_h/2^Δ), −2^(l−1), 2^(l−1) − 1), ties to even
    both times. So `shift` makes W_l from W_h in integers, exactly, and a model that is stored at h bits is one of any
    width l. l is the `bits` of a call, traced or not, of 2 … h; a traced width below 2 acts as 2, one above h as h, and
    24 bits and above leave W as it is.

    Gradients, with both roundings passed straight through, for u = W/s_h:

    ==========  =====================  ==================  ====================
    ..          between the ends       u ≤ −2^Δ·2^(l−1)    u ≥ 2^Δ·(2^(l−1)−1)
    ==========  =====================  ==================  ====================
    ∂Ŵ_l/∂W     1                      0                   0
    ∂Ŵ_l/∂s_h   2^Δ·W_l − u            −2^Δ·2^(l−1)        2^Δ·(2^(l−1) − 1)
    ==========  =====================  ==================  ====================

    At l = h these are those of `LSQ`, as are the values. The clip at h bits has no say: the ends of l bits lie within.
    The gradient of s_h is multiplied by 1/√(N·(2^(l−1) − 1)), where N elements share it, as LSQ's is. Nothing flows to
    the bits. A stored s_h at or below zero acts as the smallest normal float32, with the gradient of s_h itself.

    Parameter: ``scale`` (s_h), the same at every width. It begins as 3σ_W/2^(h−1), so that h bits reach three standard
    deviations: LSQ's initial scale at 8 bits reaches further, and nearly all weights would be 0 at 2 bits.

    Attributes:
      high: h, the bits that are stored, 2 … 23.
      per: what shares a scale; see `qtrain.quantizers.granularity.layout`.
      gradient_scale: whether the gradient of s_h is multiplied by 1/√(N·(2^(l−1) − 1)).

    For weights: activations have a scale (and offset) of their own for each width, ``LSQ(signed=False, offset=True,
    across_bits="table", widths=…)``. Native execution: none, arithmetic is float ("fake") only.

    Double Rounding, 2025 (arXiv 2502.01199), whose gradient of the scale at l < h, and initial scale, are derived here.
    The authors' code was not available. Half a step of l bits is a tie between integers of h bits, which are no rare
    event: one code in 2^Δ, so that the tie rule is part of the method.

    >>> import jax.numpy as jnp
    >>> q, params = DoubleRounding(high=4), {"scale": jnp.float32(0.25)}
    >>> w = jnp.array([-1.6, -0.3, 0.5, 1.4])
    >>> print(q(w, 4, params), q(w, 2, params))
    [-1.5  -0.25  0.5   1.5 ] [-2.  0.  0.  1.]
    >>> print(shift(q.encode_high(w, params)[0], 2, high=4))
    [-2  0  0  1]

    Raises:
      UsageError: for a field that holds something it does not allow.
    """

    high: int = 8
    per: Per = "tensor"
    gradient_scale: bool = True

    def __post_init__(self) -> None:
        if isinstance(self.per, list):
            object.__setattr__(self, "per", tuple(self.per))
        check_per(self.per)
        check_flags(self, "gradient_scale")
        if not _whole(self.high) or not NARROWEST <= self.high < FLOAT_BITS:
            raise UsageError(f"high={self.high!r}: give a whole number of bits from {NARROWEST} to {FLOAT_BITS - 1}")

    @property
    def learns(self) -> bool:
        """It does."""
        return True

    def describe(self) -> str:
        """``double_rounding/tensor 2…8``."""
        return f"double_rounding/{self.per} {NARROWEST}…{self.high}"

    def bounds(self, bits: Any) -> tuple[Array, Array]:
        """−2^(l−1) and 2^(l−1) − 1 at the width that `bits` act as, float32."""
        return signed_bounds(self._in_force(bits))

    def init(self, x: Array, bits: Any = 8, *, axes: Axes | None = None) -> dict[str, Array]:
        """s_h = 3σ_W/2^(h−1), the same at all `bits`; see `Quantizer.init`.

        σ is the population's. For a constant tensor mean|x| takes its place, for one of zeros 1.
        """
        values, _, view = calibration(x, bits, self.per, axes)
        deviation = usable(mean_and_deviation(values, view)[1], values, view)
        return {"scale": as_stored(deviation * (3.0 / 2 ** (self.high - 1)), view)}

    def __call__(
        self,
        x: Array,
        bits: Any,
        params: Mapping[str, Array] | None = None,
        *,
        key: Array | None = None,
        axes: Axes | None = None,
    ) -> Array:
        """`x` rounded to h bits and then to `bits`, in the dtype of `x`; see the class and `Quantizer.__call__`.

        Raises:
          UsageError: for a concrete `bits` that is no width or none of 2 … h, or parameters that are absent or fit
            another tensor.
        """
        concrete = static_bits(bits)
        if concrete is not None and concrete >= FLOAT_BITS:
            return x
        inputs, grid, bits, _ = self._prepared(x, bits, params, axes)
        codes, in_steps = _codes(inputs, grid, self.high)
        gradient = self._gradient(inputs.astype(jnp.float32), in_steps, codes, grid)
        scale = lax.stop_gradient(grid.step).astype(x.dtype).astype(jnp.float32)
        quantized = (codes * scale).astype(x.dtype)
        if concrete is None:
            whole = bits >= FLOAT_BITS
            quantized = jnp.where(whole, lax.stop_gradient(inputs), quantized)
            factors = tuple(jnp.where(whole, 0.0, factor) for factor in gradient.factors)
            gradient = Gradient(gradient.inside | whole, gradient.parameters, factors)
        return on_grid(inputs, quantized, gradient).reshape(x.shape)

    def encode(
        self, x: Array, bits: Any, params: Mapping[str, Array] | None = None, *, axes: Axes | None = None
    ) -> tuple[Array, Array]:
        """W_l (int32, the shape of x) and s_h·2^Δ in the dtype of `x`.

        Raises:
          UsageError: as a call, and for concrete bits of 24 and above, which have no integer codes.
        """
        concrete = static_bits(bits)
        if concrete is not None and concrete >= FLOAT_BITS:
            raise UsageError(
                f"bits: {bits!r} leaves a tensor in float and has no integer codes; give at most {self.high}"
            )
        inputs, grid, _, _ = self._prepared(x, bits, params, axes)
        codes, _ = _codes(inputs, grid, self.high)
        return codes.astype(jnp.int32).reshape(x.shape), lax.stop_gradient(grid.step).astype(x.dtype)

    def encode_high(
        self, x: Array, params: Mapping[str, Array] | None = None, *, axes: Axes | None = None
    ) -> tuple[Array, Array]:
        """W_h (int32, the shape of x) and s_h in the dtype of `x`: what is stored; `narrowed` makes the rest of it."""
        return self.encode(x, self.high, params, axes=axes)

    def narrowed(self, codes: Any, scale: Any, bits: Any) -> tuple[Any, Any]:
        """What `encode` gives at `bits`, exactly, from what `encode_high` gave: W_l by `shift`, and s_h·2^Δ.

        Args:
          codes: W_h, int8, int16 or int32, an array of numpy or jax; W_l is of the same kind and dtype.
          scale: s_h.
          bits: l; 24 and above are no width of codes. A traced one acts as in a call.

        Raises:
          UsageError: for concrete bits that are none of 2 … h.
        """
        if static_bits(bits) is not None and not NARROWEST <= bits <= self.high:
            raise UsageError(_no_width(bits, self.high))
        self._check_width(bits)
        if not isinstance(codes, jax.Array) and static_bits(bits) is not None:
            by = self.high - int(bits)
            return shift(codes, by, self.high), (scale * np.float32(2**by)).astype(scale.dtype)
        delta = self.high - self._in_force(bits)
        return shift(codes, delta, self.high), (scale * exact_power(delta)).astype(scale.dtype)

    def position(
        self, x: Array, bits: Any, params: Mapping[str, Array] | None = None, *, axes: Axes | None = None
    ) -> Array:
        """Where `x` lies on the grid of l bits, in steps, before rounding and clipping: float32, its shape.

        Half-integers are where the code changes. A tie of W_h/2^Δ goes to the even code, whose stretch of x is thereby
        1 + 2^−Δ steps wide and that of an odd one 1 − 2^−Δ: a code's own stretch is measured in its width, and what
        lies beyond the first and the last transition by more than half a stretch in steps. Raises as `encode`.
        """
        concrete = static_bits(bits)
        if concrete is not None and concrete >= FLOAT_BITS:
            raise UsageError(
                f"bits: {bits!r} leaves a tensor in float and has no integer codes; give at most {self.high}"
            )
        inputs, grid, _, _ = self._prepared(x, bits, params, axes)
        codes, in_steps = _codes(inputs, grid, self.high)
        assert grid.source is not None and grid.width is not None
        odd = codes - 2.0 * jnp.floor(0.5 * codes)
        finer = jnp.where(grid.width < self.high, exact_power(grid.width - self.high), 0.0)
        stretch = 1.0 + finer * (1.0 - 2.0 * odd)
        away = in_steps - codes
        within = jnp.clip(away, -0.5 * stretch, 0.5 * stretch)
        return (codes + within / stretch + (away - within)).reshape(x.shape)

    def _in_force(self, bits: Any) -> Array:
        """The width that `bits` act as."""
        return jnp.clip(jnp.asarray(bits), NARROWEST, self.high)

    def _check_width(self, bits: Any) -> None:
        if not isinstance(bits, int | float | np.ndarray | np.number):
            return
        for width in np.ravel(bits):
            if width < FLOAT_BITS and not NARROWEST <= width <= self.high:
                raise UsageError(_no_width(width, self.high))

    def _grid(self, values: Array, bits: Array, view: Layout, params: Mapping[str, Array] | None) -> Grid:
        width = self._in_force(bits)
        low, high = signed_bounds(width)
        scale = stored(self, params, "scale", view)
        if self.gradient_scale:
            scale = scaled_gradient(scale, 1.0 / jnp.sqrt(elements_per_scale(view) * high))
        scale = floored(scale)
        step = scale * exact_power(self.high - width)
        return Grid(step, low, high, jnp.zeros_like(width, bool), source=scale, width=width.astype(jnp.float32))


def shift(codes: Any, delta: Any, high: int = 8) -> Any:
    """clip(rint(codes/2^Δ), −2^(l−1), 2^(l−1) − 1) in integers, l = high − Δ: what narrows stored codes, exactly.

    (q + 2^(Δ−1) − 1 + ((q >> Δ) & 1)) >> Δ, ties to even, for Δ ≥ 1. Codes that clip are brought to the last one that
    does not first: the sum then fits in the dtype, and no wider copy is made.

    Args:
      codes: q, integers of `high` bits, in int8, int16 or int32; numpy or jax. The result is of the same kind.
      delta: Δ, 0 … high − 1; whole, or a traced int that broadcasts against the codes.
      high: h.

    Raises:
      UsageError: for codes that are no signed integers or too narrow for `high` bits, and for a concrete Δ that is
        none of 0 … high − 1.

    >>> print(shift(np.array([-7, -6, -2, 2, 5, 6, 7], np.int8), 2, high=4))
    [-2 -2  0  0  1  1  1]
    """
    _check_shift(codes, delta, high)
    if _numpy(codes, delta) and np.ndim(codes) and not np.ndim(delta):
        return _shifted_in_pieces(codes, int(delta), high)
    xp: Any = np if _numpy(codes, delta) else jnp
    delta = xp.asarray(delta).astype(np.int32)
    one = xp.asarray(1, np.int32)
    top = (2 ** (high - 1) - (one << delta)).astype(codes.dtype)
    below_half = xp.maximum(((one << delta) >> 1) - 1, 0).astype(codes.dtype)
    parity = xp.minimum(delta, 1).astype(codes.dtype)  # a shift by 0 has no ties
    delta = delta.astype(codes.dtype)
    codes = xp.minimum(codes, top)
    return (codes + (below_half + ((codes >> delta) & parity))) >> delta


def _shifted_in_pieces(codes: np.ndarray, delta: int, high: int) -> np.ndarray:
    """`shift` by one Δ without temporaries of full size: what a server waits for when it changes the width."""
    shifted = np.empty(codes.shape, codes.dtype)
    source, target, number = codes.reshape(-1), shifted.reshape(-1), codes.dtype.type
    # An array, since NumPy takes the minimum of an array and a number one element at a time.
    top = np.full(min(source.size, _PIECE), 2 ** (high - 1) - 2**delta, codes.dtype)
    clipped = np.empty_like(top)
    by, below_half, parity = number(delta), number(max(2**delta // 2, 1) - 1), number(min(delta, 1))
    for first in range(0, source.size, _PIECE):
        piece = target[first : first + _PIECE]
        kept = np.minimum(source[first : first + _PIECE], top[: piece.size], out=clipped[: piece.size])
        np.right_shift(kept, by, out=piece)
        piece &= parity
        piece += below_half
        piece += kept
        piece >>= by
    return shifted


def bare_shift(codes: Any, delta: Any, high: int = 8) -> Any:
    """codes >> Δ, which is ⌊codes/2^Δ⌋: half a step too low on average. For comparison; arguments of `shift`.

    >>> print(bare_shift(np.array([-7, -6, -2, 2, 5, 6, 7], np.int8), 2, high=4))
    [-2 -2 -1  0  1  1  1]
    """
    _check_shift(codes, delta, high)
    xp: Any = np if _numpy(codes, delta) else jnp
    return codes >> xp.asarray(delta).astype(codes.dtype)


def _codes(inputs: Array, grid: Grid, high: int) -> tuple[Array, Array]:
    """W_l as float32, and W/(s_h·2^Δ) before rounding. Step and quotient as those of `GridQuantizer`."""
    assert grid.source is not None and grid.width is not None
    scale = lax.stop_gradient(grid.source).astype(inputs.dtype).astype(jnp.float32)
    in_steps = lax.stop_gradient(inputs).astype(jnp.float32) * (1.0 / scale)
    lowest, highest = signed_bounds(high)
    stored_codes = jnp.clip(jnp.round(in_steps), lowest, highest)
    inverse = exact_power(grid.width - high)
    codes = jnp.clip(jnp.round(stored_codes * inverse), grid.low, grid.high)
    return jnp.where(codes == 0, 0.0, codes), in_steps * inverse  # integers know no −0


def _check_shift(codes: Any, delta: Any, high: int) -> None:
    if not np.issubdtype(codes.dtype, np.signedinteger):
        raise UsageError(f"codes: dtype {codes.dtype} has no shift that rounds; give int8, int16 or int32")
    if not _whole(high) or not 1 <= high <= min(np.iinfo(codes.dtype).bits, FLOAT_BITS):
        raise UsageError(f"high={high!r}: {codes.dtype} holds no codes of that many bits; give a wider dtype, or fewer")
    if not isinstance(delta, jax.Array) and not np.all((np.asarray(delta) >= 0) & (np.asarray(delta) < high)):
        raise UsageError(f"delta={delta!r}: codes of {high} bits can be shifted by 0 … {high - 1}")


def _numpy(codes: Any, delta: Any) -> bool:
    return not isinstance(codes, jax.Array) and not isinstance(delta, jax.Array)


def _no_width(bits: Any, high: int) -> str:
    return (
        f"bits: {bits} is none of {NARROWEST} … {high}, which {high} stored bits can be rounded to; "
        f"give one of them, or a larger 'high' in training"
    )


def _whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
