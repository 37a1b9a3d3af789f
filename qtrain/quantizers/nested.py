"""The nested quantization layer: a floor onto a grid whose step is learned from gradients against parameters."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from qtrain.errors import UsageError, did_you_mean
from qtrain.quantizers.base import FLOAT_BITS, Array, Axes, Quantizer, static_bits, straight_through
from qtrain.quantizers.granularity import Layout
from qtrain.quantizers.learned import Gradient, exact_power, on_grid
from qtrain.quantizers.parameters import as_stored, elements_per_scale, stored
from qtrain.quantizers.scales import SMALLEST, reduce_range

GRANULARITIES = ("tensor", "row", "column", "spatial", "channel", "filter")
SCALE_GRADIENTS = ("ratio", "loss")
REDUCTIONS = ("sum", "mean")

_FINEST = 2.0**-23  # of the largest magnitude: float32 has no finer step there, and codes stay exact in it
_WITHOUT_WIDTH = 8  # as for every quantizer's init: at 24 bits and above nothing is rounded
_SMALL = 0.5  # where a short polynomial is tanh
_SERIES = (1.0, -0.33333138, 0.13325712, -0.05303465, 0.01721986)  # tanh(x)/x in powers of x²

_Ends = tuple[Array, Array]


@dataclasses.dataclass(frozen=True)
class Nested(Quantizer):
    """P_r = s·⌊P/s⌋ for a parameter P (kernel or bias) with a step s of its own, which grows where P may be coarse.

    P_q = ⌊P/s⌋ is the largest integer whose level P_q·s, rounded to the dtype of P, does not exceed P; so a level is
    its own value, on every device. Nothing is clipped: the bits of a step have no influence on values or gradients,
    but that 24 and above leave P as it is. How many levels there are follows from s, and `width` says.

    The gradient to P is the upstream one, g = ∂L/∂P_r, as it is. That of s is stated, not derived:

    ===========  ===================================================================================================
    "ratio"      r = |g|/max(ε, |P_r|), g_s = −tanh(λ − r) where r < λ and 0 elsewhere, m = max|P_q|;
                 ∇s = Σ (or the mean) of g_s·m, over the elements that share s
    "loss"       ∇s = Σ g·(⌊P/s⌋ − P/s): the derivative of s·⌊P/s⌋ with the floor passed straight through
    ===========  ===================================================================================================

    "ratio" is never positive, so that descent only makes s coarser, where gradients are small against the parameter;
    λ sets how eagerly. A zero P_r makes r huge and resists. It is not linear in g: reverse mode only, and a tensor used
    twice, or in each iteration of a scan, sums what each use says. Loss terms on s (`qtrain.losses`) come on top.
    "loss" is for a step that the loss and such terms train. (The true derivative, ⌊P/s⌋, holds P at its code and would
    scale the weights as a whole; straight through, as LSQ does it, s is told of the rounding alone.)

    A step below max|P|/2²³ of the elements that share it, or below the smallest normal float32, acts as that, with the
    gradient of s itself: s may be driven to 0 or below and come back, and codes fit an int32.

    Parameters: ``scale``; for "ratio" the frozen ``threshold``, a float32 scalar that holds λ and may be written to
    while training.

    Attributes:
      per: what shares s. Of a vector only "tensor"; of a matrix (dense) also "row" (one s per index of axis 0) and
        "column" (of the last axis); of a kernel […, I, O] of rank 3 and above (convolution) also "spatial" (per index
        of the leading axes), "channel" (of I) and "filter" (of O).
      threshold: λ to begin with, above 0; by default 0.1. For "ratio" alone, as are the next two.
      scale_gradient: "ratio" or "loss".
      reduce: "sum" (by default) or "mean", over the elements that share s.
      epsilon: ε, above 0; by default 1e-8.

    For weights and biases; native execution: none, arithmetic is float ("fake") only.

    >>> import jax.numpy as jnp
    >>> print(Nested()(jnp.array([-0.6, -0.5, 0.2, 0.9]), 8, {"scale": 0.5, "threshold": 0.1}))
    [-1.  -0.5  0.   0.5]

    Raises:
      UsageError: for a field that holds something it does not allow, or that "loss" has no use for.
    """

    per: str = "tensor"
    threshold: float | None = None
    scale_gradient: str = "ratio"
    reduce: str | None = None
    epsilon: float | None = None

    def __post_init__(self) -> None:
        for name, allowed in (("per", GRANULARITIES), ("scale_gradient", SCALE_GRADIENTS)):
            value = getattr(self, name)
            if not isinstance(value, str) or value not in allowed:
                raise UsageError(f"{name}={value!r}: give one of {allowed}.{did_you_mean(str(value), allowed)}")
        for name, default in (("threshold", 0.1), ("reduce", "sum"), ("epsilon", 1e-8)):
            if self.scale_gradient == "ratio" and getattr(self, name) is None:
                object.__setattr__(self, name, default)
            elif self.scale_gradient == "loss" and getattr(self, name) is not None:
                value = getattr(self, name)
                raise UsageError(f"{name}={value!r}: scale_gradient='loss' has no {name}; leave it out, or use 'ratio'")
        if self.scale_gradient == "loss":
            return
        for name in ("threshold", "epsilon"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0.0 < value < math.inf:
                raise UsageError(f"{name}={value!r}: give a number above 0")
        if self.reduce not in REDUCTIONS:
            hint = did_you_mean(str(self.reduce), REDUCTIONS)
            raise UsageError(f"reduce={self.reduce!r}: give one of {REDUCTIONS}.{hint}")

    @property
    def learns(self) -> bool:
        """It does."""
        return True

    @property
    def frozen(self) -> frozenset[str]:
        """λ, which a schedule may write, but no optimizer."""
        return frozenset({"threshold"}) if self.scale_gradient == "ratio" else frozenset()

    @property
    def chooses_width(self) -> bool:
        """It does: by its step."""
        return True

    def describe(self) -> str:
        """``nested/row``, ``nested/row/loss``, and what differs from the usual."""
        if self.scale_gradient == "loss":
            return f"nested/{self.per}/loss"
        words = [f"nested/{self.per}"]
        words += [f"threshold {self.threshold:g}"] if self.threshold != 0.1 else []
        words += ["mean"] if self.reduce == "mean" else []
        return " ".join(words)

    def layout(self, shape: Sequence[int]) -> Layout:
        """Which elements of a tensor of `shape` share a step.

        Raises:
          UsageError: where `per` does not fit the rank.
        """
        ndim = len(shape)
        every = tuple(range(ndim))
        fitting: dict[str, tuple[int, ...]] = {"tensor": ()}
        if ndim == 2:
            fitting |= {"row": (0,), "column": (1,)}
        elif ndim > 2:
            fitting |= {"spatial": every[:-2], "channel": every[-2:-1], "filter": every[-1:]}
        if self.per not in fitting:
            raise UsageError(
                f"per={self.per!r} does not fit a tensor of shape {tuple(shape)}, which has rank {ndim}; give one of "
                f"{tuple(fitting)}"
            )
        return Layout(tuple(shape), tuple(axis for axis in every if axis not in fitting[self.per]))

    def init(self, x: Array, bits: Any = 8, *, axes: Axes | None = None) -> dict[str, Array]:
        """s = max|P|/2^(bits − 1) over the elements that share it, and λ; see `Quantizer.init`.

        24 bits and above count as 8. Where these elements are all 0, the tensor's largest magnitude stands for theirs,
        and of a tensor of zeros 1: a bias begins there, what it will hold is unknown, and 1 leaves it steps of
        2^(1 − bits), coarse enough that "ratio" need not climb from the smallest float.

        Raises:
          UsageError: where `per` does not fit the rank.
        """
        concrete = static_bits(bits)
        view = self.layout(x.shape)
        bits = jnp.asarray(bits if concrete is None else concrete)
        bits = jnp.where(bits >= FLOAT_BITS, _WITHOUT_WIDTH, bits)
        largest = reduce_range(lax.stop_gradient(x).astype(jnp.float32), "absmax", view.axes)
        overall = jnp.max(largest, initial=0.0)
        largest = jnp.where(largest >= SMALLEST, largest, jnp.where(overall >= SMALLEST, overall, 1.0))
        params = {"scale": as_stored(largest * exact_power(1 - bits), view)}
        return params | ({"threshold": jnp.float32(self.threshold)} if self.scale_gradient == "ratio" else {})

    def __call__(
        self,
        x: Array,
        bits: Any,
        params: Mapping[str, Array] | None = None,
        *,
        key: Array | None = None,
        axes: Axes | None = None,
    ) -> Array:
        """P_r in the dtype of `x`; see the class and `Quantizer.__call__`. `key` and `axes` have no influence.

        Raises:
          UsageError: for a concrete `bits` that is no width, a rank that `per` does not fit, or parameters that are
            absent or fit another tensor.
        """
        concrete = static_bits(bits)
        if concrete is not None and concrete >= FLOAT_BITS:
            return x
        values, step, view, ends = self._prepared(x, params)
        codes, scale = _codes(values, step, x.dtype)
        # Integers know no −0. The form matters: XLA computes what has two operands of full size once for all that ask.
        quantized = jnp.where(codes == 0, 0.0, codes * scale).astype(x.dtype)
        rounds = jnp.asarray(True) if concrete is not None else jnp.asarray(bits) < FLOAT_BITS
        if concrete is None:
            quantized = jnp.where(rounds, quantized, lax.stop_gradient(x))
        if self.scale_gradient == "loss":
            away = jnp.where(rounds, _steps_away(codes, values, scale), 0.0)
            return on_grid(x, quantized, Gradient(jnp.ones(x.shape, bool), (step,), (away,)))
        assert params is not None and self.reduce is not None and self.epsilon is not None
        if "threshold" not in params:
            raise UsageError(f"{self.describe()}: it needs its parameter 'threshold'; pass params=, made by init(x)")
        threshold = lax.stop_gradient(jnp.asarray(params["threshold"], jnp.float32)).reshape(())
        m = jnp.maximum(*(jnp.abs(_codes(end, step, x.dtype)[0]) for end in ends))
        factor = m if self.reduce == "sum" else m / elements_per_scale(view)
        return _by_ratio((view.axes, float(self.epsilon)), x, step, quantized, factor, threshold, rounds)

    def by_loss(
        self, x: Array, bits: Any, params: Mapping[str, Array] | None = None, *, axes: Axes | None = None
    ) -> Array:
        """A call with the gradient of "loss", whatever the `scale_gradient`: what a loss term on P_r needs."""
        return Nested(self.per, scale_gradient="loss")(x, bits, params, axes=axes)

    def encode(
        self, x: Array, bits: Any, params: Mapping[str, Array] | None = None, *, axes: Axes | None = None
    ) -> tuple[Array, Array]:
        """P_q (int32, at most 2²³ + 1 in magnitude) and the step that decodes it, in the dtype of `x`.

        Raises:
          UsageError: as a call, and for concrete bits of 24 and above, which have no integer codes.
        """
        concrete = static_bits(bits)
        if concrete is not None and concrete >= FLOAT_BITS:
            raise UsageError(f"bits: {bits!r} leaves a tensor in float and has no integer codes; give at most 23")
        values, step, view, _ = self._prepared(x, params)
        codes, scale = _codes(values, step, x.dtype)
        # Codes cannot hold a NaN, and what has diverged would become 0: their step does.
        diverged = jnp.any(jnp.isnan(values), axis=view.axes, keepdims=True)
        return codes.astype(jnp.int32), jnp.where(diverged, jnp.nan, scale).astype(x.dtype)

    def decode(self, codes: Array, scale: Array, *, axes: Axes | None = None) -> Array:
        """The values that `codes` stand for, in the dtype of `scale`; equals the call on what was encoded, exactly."""
        return (codes.astype(jnp.float32) * scale.astype(jnp.float32)).astype(scale.dtype)

    def position(
        self, x: Array, bits: Any, params: Mapping[str, Array] | None = None, *, axes: Axes | None = None
    ) -> Array:
        """P/s − ½, float32: half-integers are where the code changes, and rounding to the nearest gives it."""
        values, step, _, _ = self._prepared(x, params)
        return values / _represented(lax.stop_gradient(step), x.dtype) - 0.5

    def transitions(self, bits: Any, params: Mapping[str, Array] | None = None) -> tuple[Array, Array]:
        """−∞ and ∞: nothing is clipped."""
        return jnp.float32(-jnp.inf), jnp.float32(jnp.inf)

    def scale(
        self, x: Array, bits: Any, params: Mapping[str, Array] | None = None, *, axes: Axes | None = None
    ) -> Array:
        """The step in force, float32, axes kept; differentiable to the parameter ``scale``, not to `x`."""
        _, step, _, _ = self._prepared(x, params)
        return straight_through(step, _represented(lax.stop_gradient(step), x.dtype))

    def width(
        self,
        x: Array | None,
        bits: Any,
        params: Mapping[str, Array] | None = None,
        *,
        axes: Axes | None = None,
        rounded: bool = True,
    ) -> Array:
        """⌈log2(max P_q − min P_q + 1)⌉, the mean over the elements: what codes of fixed width take, float32 scalar.

        0 where all have the same code. Whole also with ``rounded=False``, since it is counted. Without a gradient: the
        loss term `bin_count` is its differentiable bound. At 24 bits and above it is `bits`.

        Raises:
          UsageError: as a call; or without `x`.
        """
        if x is None:
            raise UsageError(f"{self.describe()}: its width depends on the tensor; give x")
        _, step, _, ends = self._prepared(lax.stop_gradient(x), params)
        lowest, highest = (_codes(end, step, x.dtype)[0].astype(jnp.int32) for end in ends)
        spanned = (highest - lowest) if x.size else jnp.zeros((1,), jnp.int32)
        each = (32 - lax.clz(spanned)).astype(jnp.float32)  # of n = spanned + 1 levels ⌈log2 n⌉, exactly
        bits = jnp.asarray(bits, jnp.float32)
        return jnp.mean(jnp.where(bits >= FLOAT_BITS, bits, jnp.mean(each)))

    def _prepared(self, x: Array, params: Mapping[str, Array] | None) -> tuple[Array, Array, Layout, _Ends]:
        """x in float32 without a gradient, the step (positive; differentiable to the parameter), layout and ends."""
        view = self.layout(x.shape)
        values = lax.stop_gradient(x).astype(jnp.float32)
        scale = stored(self, params, "scale", view)
        ends = extremes(values, view.axes)
        least = jnp.maximum(jnp.maximum(*map(jnp.abs, ends)) * _FINEST, SMALLEST)
        return values, straight_through(scale, jnp.maximum(lax.stop_gradient(scale), least)), view, ends


def extremes(values: Array, axes: tuple[int, ...]) -> _Ends:
    """The least and the largest of the elements over `axes`, which are kept; 0 of an empty tensor.

    P_q is monotone in P, so that the ends of the codes are the codes of the ends. A compiler has these operations once
    in a program, whoever asks: a call, `Nested.width`, a loss term. On a CPU they pass over NaN.
    """
    initial = None if values.size else 0.0
    lowest = jnp.min(values, axis=axes, keepdims=True, initial=initial)
    return lowest, jnp.max(values, axis=axes, keepdims=True, initial=initial)


def _represented(value: Array, dtype: Any) -> Array:
    """`value` rounded to `dtype`, in float32. Not by two conversions: a compiler may leave both out."""
    if dtype == jnp.float32:
        return value
    kind = jnp.finfo(dtype)
    return lax.reduce_precision(value, kind.nexp, kind.nmant)


def _codes(values: Array, step: Array, dtype: Any) -> tuple[Array, Array]:
    """The largest integers whose levels do not exceed `values`, as float32; and the step in `dtype`, as float32."""
    scale = _represented(lax.stop_gradient(step), dtype)
    codes = jnp.floor(values / scale)
    # The quotient is rounded, on some devices more than once, and a level may lie on either side of the integer.
    codes = jnp.where(_represented((codes + 1.0) * scale, dtype) <= values, codes + 1.0, codes)
    codes = jnp.where(_represented(codes * scale, dtype) > values, codes - 1.0, codes)
    return codes, scale


def _steps_away(codes: Array, values: Array, scale: Array) -> Array:
    """⌊P/s⌋ − P/s to float32's accuracy: P/s itself would be rounded relative to the code, not to the difference."""
    # In two parts of 12 bits the product with a code of up to 12 bits is exact.
    upper = lax.bitcast_convert_type(lax.bitcast_convert_type(scale, jnp.int32) & -(1 << 12), jnp.float32)
    return ((codes * upper - values) + codes * (scale - upper)) / scale


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _by_ratio(
    static: tuple[tuple[int, ...], float],
    x: Array,
    step: Array,
    quantized: Array,
    factor: Array,
    threshold: Array,
    rounds: Array,
) -> Array:
    """`quantized`; see `Nested`. `static`: the axes that share a step, ε; `factor`: m, over the count for a mean."""
    return quantized


def _by_ratio_forward(static: Any, x: Array, step: Array, quantized: Array, *rest: Array) -> tuple[Array, Any]:
    return quantized, (quantized, *rest)


def _by_ratio_backward(static: tuple[tuple[int, ...], float], saved: Any, g: Array) -> tuple[Array | None, ...]:
    (axes, epsilon), (quantized, factor, threshold, rounds) = static, saved

    def pressed(tanh: Callable[[Array], Array]) -> Array:
        size = jnp.maximum(jnp.abs(quantized.astype(jnp.float32)), epsilon)
        short = threshold - jnp.abs(g.astype(jnp.float32)) / size
        return jnp.sum(jnp.where((short > 0) & rounds, -tanh(short), 0.0), axis=axes, keepdims=True)

    if jax.default_backend() == "cpu":
        # There tanh takes as long as all the rest of this; elsewhere a branch would cost more.
        total = lax.cond(threshold <= _SMALL, lambda: pressed(_tanh_of_small), lambda: pressed(jnp.tanh))
    else:
        total = pressed(jnp.tanh)
    return g, total * factor, None, None, None, None


_by_ratio.defvjp(_by_ratio_forward, _by_ratio_backward)


def _tanh_of_small(x: Array) -> Array:
    """tanh x for |x| up to `_SMALL`, within 2e-7 of it: x times a polynomial in x², fitted to tanh(x)/x there."""
    square, series = x * x, jnp.zeros(())
    for coefficient in reversed(_SERIES):
        series = series * square + coefficient
    return x * series
