"""ALRS, the adaptive learning rate of the scales in joint training of several widths (arXiv 2502.01199)."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from qtrain.errors import UsageError, did_you_mean
from qtrain.quantizers.base import FLOAT_BITS, static_bits

Array = jax.Array

SIGNS = ("clamp", "one_minus", "signed")


def width_factor(width: Any, high: int = 8) -> Array:
    """η_b = 10^(−Δ/2) for even Δ = high − b and 5·10^(−(Δ+1)/2) for odd: 1, 0.5, 0.1, 0.05, …; float32.

    Args:
      width: b, at most `high`; a Python number or an array, traced or not. A traced one above `high` counts as it.
      high: the widest of the widths, 1 … 23.

    Raises:
      UsageError: for a concrete width above `high`, or one that is none.
    """
    if isinstance(high, bool) or not isinstance(high, int) or not 1 <= high < FLOAT_BITS:
        raise UsageError(f"high={high!r}: give the widest width, a whole number of bits from 1 to {FLOAT_BITS - 1}")
    concrete = static_bits(width)
    if concrete is not None and concrete > high:
        raise UsageError(f"width={width!r}: it is above high={high}; give at most that, or the widest width as high")
    # A table, since powers of ten are not exact on every device.
    factors = [10.0 ** (-delta / 2) if delta % 2 == 0 else 5 * 10.0 ** (-(delta + 1) / 2) for delta in range(high)]
    width = jnp.asarray(width if concrete is None else concrete)
    return jnp.asarray(np.array(factors, np.float32))[jnp.clip(high - width.astype(jnp.int32), 0, high - 1)]


def mean_clipped_gradient(gradients: Any) -> Array:
    """m = mean_i min(max|clip(∇s^i, 1)|, 1) over the leaves i, float32 scalar; 0 of a tree without any.

    clip(·, 1) limits each element to −1 … 1, the maximum is over the elements of a leaf. A table of scales per width is
    one leaf, whose other rows have no gradient; so is the stack of a scanned layer, which counts as one layer.
    """
    leaves = [leaf for leaf in jax.tree.leaves(gradients) if leaf.size]
    if not leaves:
        return jnp.float32(0.0)
    each = [jnp.max(jnp.abs(jnp.clip(leaf.astype(jnp.float32), -1.0, 1.0))) for leaf in leaves]
    return jnp.minimum(jnp.mean(jnp.stack(each)), 1.0)  # a mean of ones may be rounded to above 1


def alrs_rate(learning_rate: Any, mean: Array | float, width: Any, high: int = 8, sign: str = "clamp") -> Array:
    """The learning rate of the scales at a width b: lr_b = η_b·(lr − m), float32 scalar.

    lr − m is negative for ordinary gradients, and what then is not stated:

    =============  ===================================================================================================
    "clamp"        η_b·max(lr − m, 0): scales stand still until their gradients are smaller than lr
    "one_minus"    η_b·lr·(1 − m): large gradients slow them down, and never turn them around
    "signed"       η_b·(lr − m): as printed; where it is negative, the loss is ascended
    =============  ===================================================================================================

    Args:
      learning_rate: lr, that of the weights.
      mean: m, of `mean_clipped_gradient`.
      width, high: of `width_factor`.
      sign: how a negative bracket is handled, of the above.

    Raises:
      UsageError: for a `sign` that is none of these, and as `width_factor`.

    >>> print(f"{alrs_rate(0.1, 0.04, 8):.3f} {alrs_rate(0.1, 0.5, 6, sign='one_minus'):.3f}")
    0.060 0.005
    """
    _check_sign(sign)
    learning_rate = jnp.asarray(learning_rate, jnp.float32)
    bracket = learning_rate * (1.0 - mean) if sign == "one_minus" else learning_rate - mean
    return width_factor(width, high) * (jnp.maximum(bracket, 0.0) if sign == "clamp" else bracket)


class AlrsState(NamedTuple):
    """State of `scale_by_alrs`.

    Attributes:
      count: updates so far, int32; one for each width of a step.
      rate: lr_b of the last update, float32, for metrics: 0 where "clamp" froze the scales.
      base: state of the base optimizer.
    """

    count: Array  # type: ignore[assignment]  # as optax calls it; hides tuple.count
    rate: Array
    base: Any


def scale_by_alrs(
    width: int | None,
    high: int,
    learning_rate: float | optax.Schedule,
    *,
    sign: str = "clamp",
    base: optax.GradientTransformation | None = None,
) -> optax.GradientTransformationExtraArgs:
    """s ← s − lr_b·d for the scales s: lr_b is made of the gradients as they come, d is what `base` makes of them.

    All leaves it is given are scales, the mean of `mean_clipped_gradient` is over them: put it behind
    ``optax.partition`` or ``optax.masked``. Unlike the ``scale_by_…`` of optax it holds the learning rate, and so the
    sign of descent. No weight decay.

    Args:
      width: b, where the transform is for one width; None: ``update(…, width=b)`` says it, and b may be traced.
      high: the widest of the widths.
      learning_rate: lr, or a schedule over the updates (one for each width of a step).
      sign: of `alrs_rate`.
      base: a transform with learning rate 1 that does not descend by itself, such as ``optax.trace(0.9)``; by default
        the gradient itself, which is what is stable where several widths train one scale: its gradient grows by 2^Δ
        and more as they narrow, which η_b undoes, but a momentum carries it into the next update at the widest, where
        η is 1. Without `qtrain.optim.only_rows_in_use` a row whose width is not the update's moves by its momentum.

    Returns:
      The transform; ``update(updates, state, params, *, width=None, **extra)``. State: `AlrsState`.

    Raises:
      UsageError: as `alrs_rate`, and for an update that is told no width.

    Double Rounding, 2025 (arXiv 2502.01199). The authors' code was not available.

    >>> optimizer = scale_by_alrs(None, 8, 0.1)
    >>> scales = {"a": jnp.float32(1.0), "b": jnp.float32(1.0)}
    >>> gradients = {"a": jnp.float32(0.02), "b": jnp.float32(-0.06)}
    >>> updates, state = optimizer.update(gradients, optimizer.init(scales), width=6)
    >>> print(f"{state.rate:.3f} {updates['a']:.5f} {updates['b']:.5f}")
    0.006 -0.00012 0.00036
    """
    _check_sign(sign)
    fixed = width
    width_factor(high if fixed is None else fixed, high)
    inner = optax.with_extra_args_support(optax.identity() if base is None else base)

    def init_fn(params: Any) -> AlrsState:
        return AlrsState(jnp.zeros((), jnp.int32), jnp.zeros((), jnp.float32), inner.init(params))

    def update_fn(
        updates: Any, state: AlrsState, params: Any = None, *, width: Any = None, **extra: Any
    ) -> tuple[Any, AlrsState]:
        width = fixed if width is None else width
        if width is None:
            raise UsageError(
                "width: an update of scale_by_alrs needs it; pass width= to update, or make it for one width"
            )
        lr = learning_rate(state.count) if callable(learning_rate) else learning_rate
        rate = alrs_rate(lr, mean_clipped_gradient(updates), width, high, sign)
        directions, base_state = inner.update(updates, state.base, params, **extra)
        moved = jax.tree.map(lambda d: (-rate * d.astype(jnp.float32)).astype(d.dtype), directions)
        return moved, AlrsState(optax.safe_increment(state.count), rate, base_state)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _check_sign(sign: str) -> None:
    if sign not in SIGNS:
        raise UsageError(f"sign={sign!r}: give one of {SIGNS}.{did_you_mean(str(sign), SIGNS)}")
