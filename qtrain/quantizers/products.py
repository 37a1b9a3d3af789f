"""Products of coded tensors: integers multiplied, scales put back, zero points corrected.

With x̂ = c·s + o on either side, a·b = s_a s_b (c_a·c_b) + o_a s_b (1·c_b) + s_a o_b (c_a·1) + o_a o_b (1·1). Here 1 is
a tensor of ones *inside* the operand: a convolution's padding is an exact 0, not code 0, so the sums over a window are
convolutions of a mask of valid pixels. The corrections touch tensors reduced over the channels or the examples.

In a backward product the scale of the second operand is one number, and the cotangent's too: see
`qtrain.quantizers.native`. Offsets may differ from filter to filter and from example to example.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from qtrain.quantizers import integer
from qtrain.quantizers.coded import Coded
from qtrain.quantizers.operations import Contraction, Conv, Dot

Array = jax.Array
_Sums = tuple[Callable[[], Array], Callable[[], Array], Callable[[], Any]]


def forward(op: Contraction, a: Coded, b: Coded) -> Array:
    """``op`` on the values of `a` and `b`, float32."""
    left, right = spread(op, a.scale, b.scale)
    codes = integer.dot(op, a.codes, b.codes) if isinstance(op, Dot) else integer.conv(op, a.codes, b.codes)
    out = codes.astype(jnp.float32) * (left * right)
    if a.offset is None and b.offset is None:
        return out
    sums = _dot_sums(op, a.codes, b.codes) if isinstance(op, Dot) else _conv_sums(op, a.codes, b.codes)
    left_sum, right_sum, count = sums
    left_offset, right_offset = spread(op, _or_zero(a), _or_zero(b))
    if a.offset is not None:
        out = out + right_sum() * (left_offset * right)
    if b.offset is not None:
        out = out + (left_sum() * left + count() * left_offset) * right_offset
    return out


def lhs_gradient(op: Contraction, g: Coded, b: Coded, shape: tuple[int, ...]) -> Array:
    """What the cotangent `g` gives for the left operand of `op`, of `shape`; float32."""
    scale = jnp.reshape(g.scale, ()) * jnp.reshape(b.scale, ())
    if isinstance(op, Dot):
        out = integer.dot_lhs(op, g.codes, b.codes, len(shape)).astype(jnp.float32) * scale
        if g.offset is None and b.offset is None:
            return out
        # No batch axes here: g has the free axes of the left operand, then those of the right one.
        _, free = op.free(len(shape), b.codes.ndim)
        rows = g.codes.ndim - len(free)
        if b.offset is not None:
            weights = _only(b.offset, free, op.contracted[1])
            total = _weighted(g.codes, weights, tuple(range(rows, g.codes.ndim))) * jnp.reshape(g.scale, ())
            if g.offset is not None:
                total = total + jnp.reshape(g.offset, ()) * _total(weights, math.prod(g.codes.shape[rows:]))
            out = out + _put(total, op.free(len(shape), b.codes.ndim)[0], len(shape))
        if g.offset is not None:
            column = jnp.sum(b.codes, axis=free, keepdims=True, dtype=jnp.int32).astype(jnp.float32)
            column = column * jnp.reshape(g.offset * jnp.reshape(b.scale, ()), ())
            out = out + _carry(column, op.contracted[1], op.contracted[0], len(shape))
        return out
    out = integer.conv_lhs(op, g.codes, b.codes, shape).astype(jnp.float32) * scale
    if b.offset is not None:
        # Σ over window and filters of ĝ·o_b: the filters first, which leaves one channel.
        one = jnp.sum(g.codes.astype(jnp.float32) * b.offset.reshape(-1), axis=-1, keepdims=True)
        one = one * jnp.reshape(g.scale, ())
        if g.offset is not None:
            one = one + jnp.reshape(g.offset, ()) * _total(b.offset, b.codes.shape[-1])
        out = out + _transposed(op, one, jnp.ones((*b.codes.shape[:-2], 1, 1), jnp.float32), (*shape[:-1], 1))
    if g.offset is not None:
        kernel = jnp.sum(b.codes.astype(jnp.float32), axis=-1, keepdims=True) * jnp.reshape(b.scale, ())
        mask = jnp.broadcast_to(jnp.reshape(g.offset, ()), (1, *g.codes.shape[1:-1], 1))
        out = out + _transposed(op, mask, kernel, (1, *shape[1:]))
    return out


def rhs_gradient(op: Contraction, g: Coded, a: Coded, shape: tuple[int, ...]) -> Array:
    """What the cotangent `g` gives for the right operand of `op`, of `shape`; float32."""
    g_scale, a_scale = jnp.reshape(g.scale, ()), jnp.reshape(a.scale, ())
    if isinstance(op, Dot):
        out = integer.dot_rhs(op, g.codes, a.codes, len(shape)).astype(jnp.float32) * (g_scale * a_scale)
        if g.offset is None and a.offset is None:
            return out
        free, mine = op.free(a.codes.ndim, len(shape))
        if a.offset is not None:
            weights = _only(a.offset, free, op.contracted[0])
            rows = tuple(range(len(free)))
            total = _weighted(g.codes, weights, rows) * g_scale
            if g.offset is not None:
                total = total + jnp.reshape(g.offset, ()) * _total(weights, math.prod(g.codes.shape[: len(free)]))
            out = out + _put(total, mine, len(shape))
        if g.offset is not None:
            column = jnp.sum(a.codes, axis=free, keepdims=True, dtype=jnp.int32).astype(jnp.float32)
            column = column * (jnp.reshape(g.offset, ()) * a_scale)
            out = out + _carry(column, op.contracted[0], op.contracted[1], len(shape))
        return out
    out = integer.conv_rhs(op, g.codes, a.codes, shape).astype(jnp.float32) * (g_scale * a_scale)
    taps = shape[:-2]
    if a.offset is not None:
        image = jnp.sum(g.codes.astype(jnp.float32) * a.offset, axis=0, keepdims=True) * g_scale
        if g.offset is not None:
            image = image + jnp.reshape(g.offset, ()) * _total(a.offset, a.codes.shape[0])
        ones = jnp.ones((1, *a.codes.shape[1:-1], 1), jnp.float32)
        out = out + _kernel_gradient(op, image, ones, (*taps, 1, shape[-1]))
    if g.offset is not None:
        image = jnp.sum(a.codes, axis=0, keepdims=True, dtype=jnp.int32).astype(jnp.float32) * a_scale
        mask = jnp.broadcast_to(jnp.reshape(g.offset, ()), (1, *g.codes.shape[1:-1], 1))
        out = out + _kernel_gradient(op, mask, image, (*taps, shape[-2], 1))
    return out


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


def _dot_sums(op: Dot, left: Array, right: Array) -> _Sums:
    contracted = op.contracted
    zero = jnp.zeros((1,) * left.ndim), jnp.zeros((1,) * right.ndim)

    def left_sum() -> Array:
        total = jnp.sum(left, axis=contracted[0], keepdims=True, dtype=jnp.int32).astype(jnp.float32)
        return _spread_dot(op, total, zero[1])[0]

    def right_sum() -> Array:
        total = jnp.sum(right, axis=contracted[1], keepdims=True, dtype=jnp.int32).astype(jnp.float32)
        return _spread_dot(op, zero[0], total)[1]

    return left_sum, right_sum, lambda: float(math.prod(left.shape[i] for i in contracted[0]))


def _conv_sums(op: Conv, left: Array, right: Array) -> _Sums:
    plain = _float(op)
    mask = jnp.ones((1, *left.shape[1:-1], 1), jnp.float32)
    window = jnp.ones((*right.shape[:-2], 1, 1), jnp.float32)

    def left_sum() -> Array:
        return plain(jnp.sum(left, axis=-1, keepdims=True, dtype=jnp.int32).astype(jnp.float32), window)

    def right_sum() -> Array:
        return plain(mask, jnp.sum(right, axis=-2, keepdims=True, dtype=jnp.int32).astype(jnp.float32))

    return left_sum, right_sum, lambda: plain(mask, window) * float(right.shape[-2])


def _transposed(op: Conv, g: Array, kernel: Array, shape: tuple[int, ...]) -> Array:
    """The gradient of a float convolution's left operand, of `shape`."""
    (out,) = jax.linear_transpose(lambda x: _float(op)(x, kernel), jax.ShapeDtypeStruct(shape, jnp.float32))(g)
    return out


def _kernel_gradient(op: Conv, g: Array, lhs: Array, shape: tuple[int, ...]) -> Array:
    """The gradient of a float convolution's kernel, of `shape`."""
    (out,) = jax.linear_transpose(lambda k: _float(op)(lhs, k), jax.ShapeDtypeStruct(shape, jnp.float32))(g)
    return out


def _float(op: Conv) -> Conv:
    return dataclasses.replace(op, precision=lax.Precision.HIGHEST, preferred_element_type=None)


def _or_zero(x: Coded) -> Array:
    return jnp.zeros((1,) * x.codes.ndim, jnp.float32) if x.offset is None else x.offset


def _only(values: Array, axes: tuple[int, ...], rest: tuple[int, ...]) -> Array:
    """`values`, of size 1 along the axes `rest`, without these."""
    return values.transpose(*axes, *rest).reshape([values.shape[i] for i in axes])


def _weighted(codes: Array, weights: Array, axes: tuple[int, ...]) -> Array:
    """Σ over `axes`, which are consecutive, of codes times weights, float32."""
    if weights.size == 1:
        # Exact, where a float32 sum over many rows loses what is left of codes that cancel.
        return jnp.sum(codes, axis=axes, dtype=jnp.int32).astype(jnp.float32) * weights.reshape(())
    rest = codes.ndim - axes[-1] - 1 if axes else 0
    return jnp.sum(codes.astype(jnp.float32) * weights.reshape(*weights.shape, *(1,) * rest), axis=axes)


def _total(weights: Array, length: int) -> Array:
    """Σ of weights that stand for `length` numbers."""
    return jnp.sum(weights) * (length / weights.size)


def _put(values: Array, axes: tuple[int, ...], ndim: int) -> Array:
    """`values` along `axes` of `ndim`, size 1 elsewhere."""
    return values.reshape([values.shape[axes.index(i)] if i in axes else 1 for i in range(ndim)])


def _carry(values: Array, source: tuple[int, ...], target: tuple[int, ...], ndim: int) -> Array:
    """`values`, of size 1 but along `source`, along the paired axes `target` of another operand."""
    order = [source[target.index(i)] for i in sorted(target)]
    rest = [i for i in range(values.ndim) if i not in source]
    flat = values.transpose(*rest, *order).reshape([values.shape[i] for i in order])
    return _put(flat, tuple(sorted(target)), ndim)
