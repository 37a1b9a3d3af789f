"""What XLA's CPU backend has to be told to multiply 8-bit integers quickly. No other backend needs this file.

Measured with jax 0.10.2 on two cores with VNNI and AMX; every formulation gives the same integers as the plain one.
`tests/test_integer_cpu.py` has a canary for each (`pytest -m canary`), which fails once XLA no longer needs it.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from qtrain.quantizers.operations import Conv

Array = jax.Array

_FEW = 16
"""Channels, of input and output, up to which XLA has no integer kernel for an s8 convolution.

3×3, batch 64, 16×16 pixels: 16→16 channels 4.6 ms, 12→24 0.40, 16→17 0.33, 8→32 0.62 (float32: 1.1, 1.0, 0.9, 0.6).
"""


def materialise(x: Array) -> Array:
    """`x`, in memory: what reads it reads a buffer, instead of computing it once more in a layout of its own.

    A gather of all rows in order; XLA sees through barriers, copies and slices. Used for

    * a transposed operand: XLA folds a transpose into an integer dot or convolution, which then has no fast kernel
      (xᵀ·g of 256×1024×1024: 10.4 ms, instead of 0.6);
    * activations, codes and cotangents at the door of an operation: XLA's fusion computes a residual chain anew in each
      of its consumers, which grows with the square of the depth.
    """
    if not x.ndim:
        return x
    # As `jnp.take` does it, in two operations instead of twenty: a program has a hundred of these to compile.
    numbers = lax.GatherDimensionNumbers(
        offset_dims=tuple(range(1, x.ndim)), collapsed_slice_dims=(0,), start_index_map=(0,)
    )
    rows = lax.broadcasted_iota(jnp.int32, (x.shape[0], 1), 0)
    return lax.gather(x, rows, numbers, (1, *x.shape[1:]), mode=lax.GatherScatterMode.CLIP)


def widen(op: Conv, lhs: Array, rhs: Array) -> tuple[Conv, Array, Array, tuple[int, ...]] | None:
    """A convolution of few channels as one of r times as many: r neighbouring pixels of a row become one.

    [B, H, W, C] read as [B, H, W/r, rC] costs nothing. The kernel becomes [kh, t, rC, (r/s)C'], zero where an input
    pixel is not in the window of an output pixel: more multiplications, but on fast instructions (16→16 channels, 32×32
    pixels: 18 ms plainly, 0.9 this way).

    Returns:
      the convolution, its operands, and the shape of the result to read it as, whose rows may be longer than wanted;
      None where there is no need or no way.
    """
    if len(op.window_strides) != 2 or op.feature_group_count != 1 or op.batch_group_count != 1:
        return None
    if op.rhs_dilation != (1, 1) or op.lhs_dilation != (1, 1):
        return None
    (height, width), (kernel_height, taps, inputs, outputs) = lhs.shape[1:3], rhs.shape
    stride, pad = op.window_strides[1], op.padding[1][0]
    if max(inputs, outputs) > _FEW:
        return None
    out_height = _length(height, kernel_height, op.window_strides[0], op.padding[0])
    out_width = _length(width, taps, stride, op.padding[1])
    for pixels in (2, 4, 8):
        step = pixels // stride
        # The instructions take channels four at a time: 3→16 channels 3.1 ms two by two, 1.6 four by four.
        if pixels % stride or pixels * inputs % 4 or max(pixels * inputs, step * outputs) <= _FEW:
            continue
        # Output pixel step·j + b takes at tap the input pixel pixels·(j + u) + a: tap = pixels·u + a − stride·b + pad.
        first = -((pixels - 1 + pad) // pixels)
        last = (taps - 1 + stride * (step - 1) - pad) // pixels
        u, a, b = np.meshgrid(np.arange(first, last + 1), np.arange(pixels), np.arange(step), indexing="ij")
        tap = pixels * u + a - stride * b + pad
        tap = np.where((tap >= 0) & (tap < taps), tap, taps)
        padded = jnp.pad(rhs, ((0, 0), (0, 1), (0, 0), (0, 0)))
        kernel = padded[:, tap].transpose(0, 1, 2, 4, 3, 5)  # [kh, u, a, C, b, C']
        kernel = kernel.reshape(kernel_height, last - first + 1, pixels * inputs, step * outputs)
        columns, wanted = -(-width // pixels), -(-out_width // step)
        if columns * pixels > width:
            lhs = jnp.pad(lhs, ((0, 0), (0, 0), (0, columns * pixels - width), (0, 0)))
        viewed = lhs.reshape(lhs.shape[0], height, columns, pixels * inputs)
        padding = (op.padding[0], (-first, wanted - columns + last))
        wide = dataclasses.replace(op, window_strides=(op.window_strides[0], 1), padding=padding)
        return wide, viewed, materialise(kernel), (lhs.shape[0], out_height, wanted * step, outputs)
    return None


def _length(size: int, taps: int, stride: int, padding: tuple[int, int]) -> int:
    return (size + sum(padding) - taps) // stride + 1
