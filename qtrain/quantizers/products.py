"""Products of coded tensors: integers multiplied, scales put back, zero points corrected.

A convolution's padding is an exact 0, not code 0, so the sums over a window that zero points need are convolutions of a
mask of valid pixels. They touch tensors reduced over the channels or the examples; see `qtrain.quantizers.zero_points`.

In a backward product the scale of the second operand is one number, and the cotangent's too: see
`qtrain.quantizers.native`. Offsets may differ from filter to filter and from example to example.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

from qtrain.quantizers import integer
from qtrain.quantizers.coded import Coded
from qtrain.quantizers.operations import Contraction, Conv, Dot
from qtrain.quantizers.zero_points import Sums, combined

Array = jax.Array


def forward(op: Contraction, a: Coded, b: Coded) -> Array:
    """``op`` on the values of `a` and `b`, float32."""
    left, right = spread(op, a.scale, b.scale)
    if isinstance(op, Dot):
        codes = integer.dot(op, a.codes, b.codes)
        length = math.prod(a.codes.shape[i] for i in op.contracted[0])
        count = jnp.full((), length, jnp.float32)
        first = functools.partial(_sum, a.codes, op.contracted[0])
        second = functools.partial(_sum, b.codes, op.contracted[1])
        left_sum, right_sum = (lambda: spread(op, first(), b.scale)[0]), (lambda: spread(op, a.scale, second())[1])
    else:
        codes, length = integer.conv(op, a.codes, b.codes), math.prod(b.codes.shape[:-1])
        mask, window = _ones(1, *a.codes.shape[1:-1], 1), _ones(*b.codes.shape[:-2], 1, 1)
        count = _float(op)(mask, window) * float(b.codes.shape[-2]) if _offsets(a, b) else mask
        left_sum = lambda: _window_sum(op, _sum(a.codes, (-1,)), b.codes.shape[:-2])  # noqa: E731
        right_sum = lambda: _float(op)(mask, _sum(b.codes, (-2,)).astype(jnp.float32))  # noqa: E731

    def both(u: Array, v: Array) -> Array:
        u, v = spread(op, u, v)
        return count.astype(jnp.result_type(u, v)) * (u * v)

    left_of = functools.cache(left_sum)
    right_of = functools.cache(right_sum)
    sums = Sums(
        codes,
        length,
        left=lambda w: left_of().astype(w.dtype) * spread(op, a.scale, w)[1],
        right=lambda w: right_of().astype(w.dtype) * spread(op, w, b.scale)[0],
        both=both,
    )
    return combined(sums, a, b, left, right)


def lhs_gradient(op: Contraction, g: Coded, b: Coded, shape: tuple[int, ...]) -> Array:
    """What the cotangent `g` gives for the left operand of `op`, of `shape`; float32."""
    if isinstance(op, Dot):
        # With zero points there are no batch axes: g has the left operand's free axes, then the right one's.
        mine, free = op.free(len(shape), b.codes.ndim)
        axes = tuple(range(g.codes.ndim - len(free), g.codes.ndim))
        codes = integer.dot_lhs(op, g.codes, b.codes, len(shape))
        return _dot_gradient(codes, g, b, axes, free, (op.contracted[1], op.contracted[0]), mine)
    window, mask = _ones(*b.codes.shape[:-2], 1, 1), _ones(1, *g.codes.shape[1:-1], 1)

    def over_window(channel: Array) -> Array:
        return _input_gradient(op, channel, window, (channel.shape[0], *shape[1:-1], 1))

    def of_filters() -> Array:
        kernel = _sum(b.codes, (-1,)).astype(jnp.float32)
        return _input_gradient(op, mask, kernel, (1, *shape[1:]))

    codes = integer.conv_lhs(op, g.codes, b.codes, shape)
    return _conv_gradient(codes, g, b, -1, math.prod(b.codes.shape[:-2]), over_window, of_filters)


def rhs_gradient(op: Contraction, g: Coded, a: Coded, shape: tuple[int, ...]) -> Array:
    """What the cotangent `g` gives for the right operand of `op`, of `shape`; float32."""
    if isinstance(op, Dot):
        free, mine = op.free(a.codes.ndim, len(shape))
        codes = integer.dot_rhs(op, g.codes, a.codes, len(shape))
        return _dot_gradient(codes, g, a, tuple(range(len(free))), free, op.contracted, mine)
    ones, mask = _ones(1, *a.codes.shape[1:-1], 1), _ones(1, *g.codes.shape[1:-1], 1)

    def over_pixels(image: Array) -> Array:
        return _kernel_gradient(op, image, ones, (*shape[:-2], 1, image.shape[-1]))

    def of_examples() -> Array:
        image = _sum(a.codes, (0,)).astype(jnp.float32)
        return _kernel_gradient(op, mask, image, (*shape[:-1], 1))

    codes = integer.conv_rhs(op, g.codes, a.codes, shape)
    return _conv_gradient(codes, g, a, 0, math.prod(g.codes.shape[1:-1]), over_pixels, of_examples)


def _conv_gradient(
    codes: Array,
    g: Coded,
    other: Coded,
    axis: int,
    taps: int,
    over: Callable[[Array], Array],
    of_other: Callable[[], Array],
) -> Array:
    """A convolution's gradient from its product of codes.

    Args:
      codes, g, other: the product, and what it is of.
      axis: of the cotangent, and of the `other` operand, that is contracted: filters (−1) or examples (0). It is summed
        first, which leaves one channel, or one image.
      taps: how many of these sums are then added.
      over: adds them.
      of_other: the product with ones in the place of the cotangent.
    """
    other = _without_steps(other)
    one = functools.cache(lambda: over(_sum(g.codes, (axis,)).astype(jnp.float32)))
    valid = functools.cache(lambda: over(_ones(1, *g.codes.shape[1:-1], 1)))
    of_other = functools.cache(of_other)

    def left(w: Array) -> Array:
        if w.size == 1:
            return one().astype(w.dtype) * w.reshape(())
        weights = w.reshape([-1 if i == axis % w.ndim else 1 for i in range(w.ndim)])
        return over(_weighted(g.codes, weights, (axis,)))

    def both(u: Array, v: Array) -> Array:
        total = u.reshape(()) * _total(v, other.codes.shape[axis])
        return total * valid().astype(total.dtype)

    length = taps * other.codes.shape[axis]
    sums = Sums(codes, length, left, lambda w: of_other().astype(w.dtype) * w.reshape(()), both)
    return combined(sums, g, other, g.scale.reshape(()), other.scale.reshape(()))


def _dot_gradient(
    codes: Array,
    g: Coded,
    other: Coded,
    axes: tuple[int, ...],
    free: tuple[int, ...],
    paired: tuple[tuple[int, ...], tuple[int, ...]],
    mine: tuple[int, ...],
) -> Array:
    """A dot's gradient from its product of codes.

    `axes` of the cotangent are contracted with the axes `free` of the `other` operand, whose contracted axes are those
    of the result, ``paired``; the cotangent's other axes are the axes `mine` of the result.
    """
    other = _without_steps(other)
    column = functools.cache(lambda: _carry(_sum(other.codes, free), *paired, codes.ndim))
    length = math.prod(g.codes.shape[i] for i in axes)

    def left(w: Array) -> Array:
        shape = [w.shape[free[axes.index(i)]] if i in axes else 1 for i in range(g.codes.ndim)]
        total = _weighted(g.codes, w.transpose(*free, *paired[0]).reshape(shape), axes)
        return _put(total.reshape([n for i, n in enumerate(total.shape) if i not in axes]), mine, codes.ndim)

    def both(u: Array, v: Array) -> Array:
        return (u.reshape(()) * _total(v, length)).reshape((1,) * codes.ndim)

    sums = Sums(codes, length, left, lambda w: column().astype(w.dtype) * w.reshape(()), both)
    return combined(sums, g, other, g.scale.reshape(()), other.scale.reshape(()))


def _without_steps(x: Coded) -> Coded:
    """`x` with its steps in the offset, where there are several: the sums over their axis are taken once, in float32.

    The cotangent's steps, a single number, stay whole, and with them sums that do not grow with their length.
    """
    if x.steps is None or x.steps.size == 1:
        return x
    moved = x.steps.astype(jnp.float32) * x.scale
    return x._replace(steps=None, offset=moved if x.offset is None else moved + x.offset)


def spread(op: Contraction, left: Array, right: Array) -> tuple[Array, Array]:
    """Scales of two operands, of size 1 along what they are shared over, in the axes of the result."""
    return _spread_dot(op, left, right) if isinstance(op, Dot) else _spread_conv(op, left, right)


def _spread_dot(op: Dot, left: Array, right: Array) -> tuple[Array, Array]:
    free = op.free(left.ndim, right.ndim)
    shape = [left.shape[i] for i in op.batch[0]] + [left.shape[i] for i in free[0]] + [1] * len(free[1])
    left = left.transpose(*op.batch[0], *free[0], *op.contracted[0]).reshape(shape)
    shape = [right.shape[i] for i in op.batch[1]] + [1] * len(free[0]) + [right.shape[i] for i in free[1]]
    return left, right.transpose(*op.batch[1], *free[1], *op.contracted[1]).reshape(shape)


def _spread_conv(op: Conv, left: Array, right: Array) -> tuple[Array, Array]:
    _, _, out = op.specs

    def along(axis: int, values: Array) -> Array:
        return values.reshape([-1 if i == axis else 1 for i in range(len(out))])

    return along(out[0], left), along(out[1], right)


def _window_sum(op: Conv, x: Array, taps: tuple[int, ...]) -> Array:
    """Σ over the windows of a convolution of one channel: shifted and added, since a convolution of one is slow."""
    exact = op.explicit(x.shape, (*taps, 1, 1))
    for axis, count in enumerate(taps, start=1):  # one axis after the other: 3 + 3 terms, not 9
        low, high = exact.padding[axis - 1]
        step, stride = (exact.rhs_dilation or ())[axis - 1], exact.window_strides[axis - 1]
        length = (x.shape[axis] + low + high - (count - 1) * step - 1) // stride + 1
        x = lax.pad(x, jnp.zeros((), x.dtype), [(low, high, 0) if i == axis else (0, 0, 0) for i in range(x.ndim)])
        starts = range(0, count * step, step)
        parts = [lax.slice_in_dim(x, at, at + (length - 1) * stride + 1, stride, axis) for at in starts]
        x = sum(parts[1:], start=parts[0])
    return x


def _input_gradient(op: Conv, g: Array, kernel: Array, shape: tuple[int, ...]) -> Array:
    """The gradient of a float convolution's left operand, of `shape`."""
    (out,) = jax.linear_transpose(lambda x: _float(op)(x, kernel), jax.ShapeDtypeStruct(shape, jnp.float32))(g)
    return out


def _kernel_gradient(op: Conv, g: Array, lhs: Array, shape: tuple[int, ...]) -> Array:
    """The gradient of a float convolution's kernel, of `shape`."""
    (out,) = jax.linear_transpose(lambda k: _float(op)(lhs, k), jax.ShapeDtypeStruct(shape, jnp.float32))(g)
    return out


def _float(op: Conv) -> Conv:
    return dataclasses.replace(op, precision=lax.Precision.HIGHEST, preferred_element_type=None)


def _offsets(*coded: Coded) -> bool:
    return any(x.offset is not None or x.steps is not None for x in coded)


def _ones(*shape: int) -> Array:
    return jnp.ones(shape, jnp.float32)


def _sum(codes: Array, axes: tuple[int, ...]) -> Array:
    """Σ of codes over `axes`, which are kept, int32."""
    return jnp.sum(codes, axis=axes, keepdims=True, dtype=jnp.int32)


def _weighted(codes: Array, weights: Array, axes: tuple[int, ...]) -> Array:
    """Σ over `axes`, which are kept, of codes times weights that broadcast against them, in the weights' dtype."""
    if weights.size == 1:
        return _sum(codes, axes).astype(weights.dtype) * weights.reshape(())
    return jnp.sum(codes.astype(weights.dtype) * weights, axis=axes, keepdims=True)


def _total(weights: Array, length: int) -> Array:
    """Σ of weights that stand for `length` numbers."""
    return jnp.sum(weights) * (length // max(weights.size, 1))


def _put(values: Array, axes: tuple[int, ...], ndim: int) -> Array:
    """`values` along `axes` of `ndim`, size 1 elsewhere."""
    return values.reshape([values.shape[axes.index(i)] if i in axes else 1 for i in range(ndim)])


def _carry(values: Array, source: tuple[int, ...], target: tuple[int, ...], ndim: int) -> Array:
    """`values`, of size 1 but along `source`, along the paired axes `target` of another operand."""
    order = [source[target.index(i)] for i in sorted(target)]
    rest = [i for i in range(values.ndim) if i not in source]
    flat = values.transpose(*rest, *order).reshape([values.shape[i] for i in order])
    return _put(flat, tuple(sorted(target)), ndim)
