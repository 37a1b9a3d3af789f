"""Products of 8-bit codes: a dot or convolution, and the two products of its backward pass.

Exact for integers: int8 × int8 is added in int32. Each product is formulated such that the compiler finds its fast
kernel, see `qtrain.quantizers.integer_cpu`; the integers are the same. Where more than `LONGEST` products are added,
their sum could pass int32: the contraction is cut, and its parts are added in float32.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from qtrain.quantizers import integer_cpu
from qtrain.quantizers.operations import Conv, Dot

Array = jax.Array

LONGEST = (2**31 - 1) // 2**14
"""The number of products of two int8 codes, at most 2¹⁴ each, whose sum fits int32 whatever they are."""


def hold(x: Array) -> Array:
    """`x`, kept in memory where the compiler would otherwise compute it again for each of its uses."""
    return integer_cpu.materialise(x) if jax.default_backend() == "cpu" else x


def dot(op: Dot, lhs: Array, rhs: Array) -> Array:
    """``op`` on codes: int32, or float32 (small floats; sums too long for int32)."""
    pairs = list(zip(*op.contracted, strict=True))
    length = math.prod(lhs.shape[i] for i, _ in pairs)
    if lhs.dtype == jnp.int8 and length > LONGEST:
        left, right = max(pairs, key=lambda pair: lhs.shape[pair[0]])
        size = lhs.shape[left]
        parts = math.ceil(size / max(LONGEST * size // length, 1))
        cuts = [size * part // parts for part in range(parts + 1)]
        sums = (
            dot(op, lax.slice_in_dim(lhs, low, high, axis=left), lax.slice_in_dim(rhs, low, high, axis=right))
            for low, high in itertools.pairwise(cuts)
        )
        return sum(part.astype(jnp.float32) for part in sums)  # type: ignore[return-value]
    if lhs.dtype == jnp.int8:
        return _batches(op, lhs, rhs) if op.batch[0] else _matrices(op, lhs, rhs)
    return _plain(op, lhs.dtype)(lhs, rhs)


def dot_lhs(op: Dot, g: Array, rhs: Array, ndim: int) -> Array:
    """What the cotangent's codes and the right operand's give for the left operand, which has `ndim` axes."""
    contracted, batch = op.contracted, op.batch
    free = op.free(ndim, rhs.ndim)
    start = len(batch[0]) + len(free[0])
    numbers = ((tuple(range(start, g.ndim)), free[1]), (tuple(range(len(batch[0]))), batch[1]))
    product = dot(Dot(numbers), g, rhs)  # axes: batch, free, contracted in the order of the right operand's
    order = (*batch[0], *free[0], *_paired(contracted[0], contracted[1]))
    return product.transpose(np.argsort(order))


def dot_rhs(op: Dot, g: Array, lhs: Array, ndim: int) -> Array:
    """What the cotangent's codes and the left operand's give for the right operand, which has `ndim` axes."""
    contracted, batch = op.contracted, op.batch
    free = op.free(lhs.ndim, ndim)
    start = len(batch[0])
    numbers = ((free[0], tuple(range(start, start + len(free[0])))), (batch[0], tuple(range(start))))
    product = dot(Dot(numbers), lhs, g)  # axes: batch, contracted in the order of the left operand's, free
    order = (*batch[1], *_paired(contracted[1], contracted[0]), *free[1])
    return product.transpose(np.argsort(order))


def conv(op: Conv, lhs: Array, rhs: Array) -> Array:
    """``op`` on codes, channels last: int32 (float32 for small floats)."""
    op = op.explicit(lhs.shape, rhs.shape)
    if _pointwise(op, rhs.shape):
        return dot(_channels(lhs.ndim, 0), _strided(op, lhs), rhs.reshape(rhs.shape[-2:]))
    if set(op.lhs_dilation or ()) != {1}:
        none = (1,) * len(op.window_strides)
        lhs = place(lhs, op.lhs_dilation or (), op.padding)
        op = dataclasses.replace(op, padding=((0, 0),) * len(none), lhs_dilation=none)
    wide = None
    if jax.default_backend() == "cpu" and lhs.dtype == jnp.int8:
        wide = integer_cpu.widen(op, lhs, rhs)
    if wide is None:
        return _within(op, lhs, rhs)
    shape = jax.eval_shape(_plain(op, lhs.dtype), lhs, rhs).shape
    op, lhs, rhs, longer = wide
    return _within(op, lhs, rhs).reshape(longer)[:, :, : shape[2]]


def conv_lhs(op: Conv, g: Array, rhs: Array, shape: tuple[int, ...]) -> Array:
    """What the codes of the cotangent and the kernel give for the left operand, of `shape`.

    A convolution of the cotangent, spread by the strides, with the kernel turned round and its channels exchanged.
    """
    op = op.explicit(shape, rhs.shape)
    strides = op.window_strides
    if _pointwise(op, rhs.shape):
        product = dot(_channels(g.ndim, 1), g, rhs.reshape(rhs.shape[-2:]))
        ends = [size - (n - 1) * s - 1 for size, n, s in zip(shape[1:-1], g.shape[1:-1], strides, strict=True)]
        gaps = [(0, end, s - 1) for end, s in zip(ends, strides, strict=True)]
        return lax.pad(product, jnp.zeros((), product.dtype), [(0, 0, 0), *gaps, (0, 0, 0)])
    padding = []
    for i, (low, _) in enumerate(op.padding):
        reach = (rhs.shape[i] - 1) * op.rhs_dilation[i]  # type: ignore[index]
        length = (g.shape[1 + i] - 1) * strides[i] + 1
        padding.append((reach - low, shape[1 + i] - length + low))
    turned = hold(jnp.flip(rhs, tuple(range(len(strides)))).swapaxes(-1, -2))
    one = (1,) * len(strides)
    return conv(dataclasses.replace(op, window_strides=one, padding=tuple(padding), lhs_dilation=strides), g, turned)


def conv_rhs(op: Conv, g: Array, lhs: Array, shape: tuple[int, ...]) -> Array:
    """What the codes of the cotangent and the left operand give for the kernel, of `shape`.

    A convolution whose examples are the input channels, and whose channels are the examples.
    """
    op = op.explicit(lhs.shape, shape)
    if _pointwise(op, shape):
        axes = tuple(range(lhs.ndim - 1))
        return dot(Dot(((axes, axes), ((), ()))), _strided(op, lhs), g).reshape(shape)
    examples = max(LONGEST // math.prod(g.shape[1:-1]), 1)
    if lhs.dtype == jnp.int8 and lhs.shape[0] > examples:
        cuts = [*range(0, lhs.shape[0], examples), lhs.shape[0]]
        parts = (conv_rhs(op, g[low:high], lhs[low:high], shape) for low, high in itertools.pairwise(cuts))
        return sum(part.astype(jnp.float32) for part in parts)  # type: ignore[return-value]
    first, *spatial, last = range(lhs.ndim)
    kernel = hold(place(g, op.window_strides).transpose(*spatial, first, last))
    padding = []
    for i, (low, _) in enumerate(op.padding):
        span = (shape[i] - 1) * op.rhs_dilation[i] + kernel.shape[i]  # type: ignore[index]
        padding.append((low, span - lhs.shape[1 + i] - low))
    across = dataclasses.replace(
        op, window_strides=op.rhs_dilation or (), rhs_dilation=(1,) * len(spatial), padding=tuple(padding)
    )
    swapped = hold(lhs.transpose(last, *spatial, first))
    return _within(across, swapped, kernel).transpose(*spatial, first, last)


def place(x: Array, strides: Sequence[int], padding: Sequence[tuple[int, int]] | None = None) -> Array:
    """`x`, channels last, with its pixels `strides` apart among zeros, and (low, high) more of them around.

    A gather of pixels, not a pad: XLA moves pads past whatever stands between, into an integer convolution, whose CPU
    kernel then returns garbage (see `_within`). Negative padding crops.
    """
    padding = padding or [(0, 0)] * len(strides)
    if set(strides) == {1} and all(pair == (0, 0) for pair in padding):
        return x
    sizes = x.shape[1:-1]
    pixels = math.prod(sizes)
    index = np.zeros((), np.int64)
    inside = np.ones((), bool)
    for size, stride, (low, high) in zip(sizes, strides, padding, strict=True):
        position = np.arange((size - 1) * stride + 1 + low + high) - low
        index = index[..., None] * size + position // stride
        inside = inside[..., None] & (position % stride == 0) & (position >= 0) & (position // stride < size)
    rows = x.reshape(x.shape[0], pixels, x.shape[-1])
    rows = jnp.concatenate([rows, jnp.zeros_like(rows[:, :1])], axis=1)
    chosen = jnp.asarray(np.where(inside, index, pixels).reshape(-1), jnp.int32)
    return jnp.take(rows, chosen, axis=1, mode="clip").reshape(x.shape[0], *inside.shape, x.shape[-1])


def _within(op: Conv, lhs: Array, rhs: Array) -> Array:
    """``op`` on codes. On a CPU, padding without which window or result would be larger than the image is written out.

    An s8 convolution that is not within its image, or one with a dilated input, has no kernel there and takes 40 times
    as long; and where a pad makes it one after XLA has chosen its kernel, that returns garbage.
    """
    if jax.default_backend() == "cpu" and lhs.dtype == jnp.int8:
        result = jax.eval_shape(_plain(op, lhs.dtype), lhs, rhs).shape
        sizes = zip(rhs.shape[:-2], result[1:-1], lhs.shape[1:-1], strict=True)
        pairs = [
            ((0, 0), pair) if max(taps, out) > size else (pair, (0, 0))
            for (taps, out, size), pair in zip(sizes, op.padding, strict=True)
        ]
        lhs = place(lhs, (1,) * len(pairs), [written for _, written in pairs])
        op = dataclasses.replace(op, padding=tuple(kept for kept, _ in pairs))
    return _plain(op, lhs.dtype)(lhs, rhs)


def _matrices(op: Dot, lhs: Array, rhs: Array) -> Array:
    """A dot of int8 without batch axes as one of two matrices, contracted along rows of the first."""
    free = op.free(lhs.ndim, rhs.ndim)
    pairs = sorted(zip(*op.contracted, strict=True))
    order = (*free[0], *(left for left, _ in pairs))
    length = math.prod(lhs.shape[left] for left, _ in pairs)
    shape = (*(lhs.shape[i] for i in free[0]), *(rhs.shape[i] for i in free[1]))
    rows, columns = math.prod(shape[: len(free[0])]), math.prod(shape[len(free[0]) :])
    if order != tuple(range(lhs.ndim)):
        lhs = hold(lhs.transpose(order).reshape(rows, length))
    right = tuple(axis for _, axis in pairs)
    axis = 0
    if (*free[1], *right) == tuple(range(rhs.ndim)):
        rhs, axis = rhs.reshape(columns, length), 1
    elif (*right, *free[1]) == tuple(range(rhs.ndim)):
        rhs = rhs.reshape(length, columns)
    else:
        rhs = hold(rhs.transpose(*right, *free[1]).reshape(length, columns))
    flat = Dot((((1,), (axis,)), ((), ())))
    return _plain(flat, lhs.dtype)(lhs.reshape(rows, length), rhs).reshape(shape)


def _batches(op: Dot, lhs: Array, rhs: Array) -> Array:
    """A dot of int8 with batch axes, contracted along rows of its first matrices."""
    batch, free, contracted = op.batch[0], op.free(lhs.ndim, rhs.ndim)[0], op.contracted[0]
    if contracted != tuple(range(lhs.ndim - len(contracted), lhs.ndim)):
        lhs = hold(lhs.transpose(*batch, *free, *contracted))
        first, last = tuple(range(len(batch))), tuple(range(lhs.ndim - len(contracted), lhs.ndim))
        op = Dot(((last, op.contracted[1]), (first, op.batch[1])))
    return _plain(op, lhs.dtype)(lhs, rhs)


def _plain(op: Any, dtype: Any) -> Any:
    """`op` as the backend's own operation, with the accumulator that codes of such a dtype need."""
    accumulator = jnp.int32 if dtype == jnp.int8 else jnp.float32
    op = dataclasses.replace(op, precision=None, preferred_element_type=accumulator)
    return dataclasses.replace(op, out_sharding=None) if isinstance(op, Dot) else op


def _paired(mine: tuple[int, ...], others: tuple[int, ...]) -> tuple[int, ...]:
    """Contracted axes of one operand, in the order in which the other's follow each other in its shape."""
    return tuple(axis for _, axis in sorted(zip(others, mine, strict=True)))


def _pointwise(op: Conv, kernel: tuple[int, ...]) -> bool:
    """Whether a convolution sees one pixel at a time, so that it is a dot over the channels."""
    window = {*kernel[:-2], *(op.lhs_dilation or ()), op.feature_group_count, op.batch_group_count}
    return window == {1} and all(pair == (0, 0) for pair in op.padding)


def _channels(ndim: int, axis: int) -> Dot:
    return Dot((((ndim - 1,), (axis,)), ((), ())))


def _strided(op: Conv, lhs: Array) -> Array:
    return lhs[(slice(None), *(slice(None, None, stride) for stride in op.window_strides))]
