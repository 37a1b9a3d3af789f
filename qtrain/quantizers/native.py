"""Native execution: the three products of a quantized contraction on 8-bit codes, at traced widths.

Codes of every width up to 8 bits fit int8, so one compiled program multiplies int8 matrices whatever the width of the
step. The forward product, the input gradient (dlhs) and the weight gradient (drhs) each run on codes or in float.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from qtrain.quantizers import integer, noise, products
from qtrain.quantizers.base import Array, Quantizer, static_bits
from qtrain.quantizers.coded import Coded, foldable
from qtrain.quantizers.granularity import layout
from qtrain.quantizers.operations import Contraction, Conv, Dot

WIDEST = 8
"""Bits of the widest code."""

PRODUCTS = ("forward", "dlhs", "drhs")

_NAMES = ("activations", "weights", "gradients")
_FIELDS = ("act_quantizer", "weight_quantizer", "grad_quantizer")


@dataclasses.dataclass(frozen=True)
class Paths:
    """What each product of a contraction is computed with: "float", "int8" or "fp8".

    Attributes:
      forward, dlhs, drhs: the product itself, the gradient of its left operand, that of its right operand.
      switch: widths may pass `WIDEST`: the program holds both, and chooses by the width of the step.
    """

    forward: str = "float"
    dlhs: str = "float"
    drhs: str = "float"
    switch: bool = False

    @property
    def native(self) -> bool:
        """Whether any product runs on codes."""
        return {self.forward, self.dlhs, self.drhs} != {"float"}


FLOAT = Paths()
"""Nothing on codes."""


class Widths(NamedTuple):
    """Bits of left operand, right operand and cotangent: those that are Python numbers; None for an array's."""

    lhs: int | None
    rhs: int | None
    grad: int | None


def contract(op: Contraction, operands: Any, lhs: Array, rhs: Array, traced: Any) -> Array:
    """As `qtrain.quantizers.contract`, on codes where ``operands.paths`` says so; both operands have a width.

    The gradient is straight through, of the first order: forward-mode derivatives and second derivatives are an error.
    What is saved for the backward pass are the codes, a quarter of the bytes of float32.
    """
    given = (traced.lhs_bits, traced.rhs_bits, traced.grad_bits)
    static = Widths(*(None if b is None else static_bits(b) for b in given))
    arrays = tuple(array if number is None else None for number, array in zip(static, given, strict=True))
    quantized_cotangent = operands.grad is not None and traced.grad_bits is not None
    if not quantized_cotangent:
        paths = dataclasses.replace(operands.paths, dlhs="float", drhs="float")
        operands = dataclasses.replace(operands, grad=None, paths=paths)
    varying = (arrays, traced.seed, traced.lhs_params, traced.rhs_params)
    return _contract(op, operands, static, lhs, rhs, varying)


def obstacles(
    op: Contraction,
    operands: Any,
    lhs: jax.ShapeDtypeStruct,
    rhs: jax.ShapeDtypeStruct,
    bits: Sequence[int | None] = (None, None, None),
) -> dict[str, str]:
    """Product → why it cannot run on codes; those that can are absent.

    Args:
      op: the contraction.
      operands: its quantizers and what the backward pass sees.
      lhs, rhs: shapes of the operands, activations and weights.
      bits: fixed widths of the operands and the cotangent; None where a width may be any.
    """
    quantizers = (operands.lhs, operands.rhs, operands.grad)
    found = {"forward": _forward_obstacle(op, quantizers, (lhs, rhs), bits)}
    backward = found["forward"] or _operand_obstacle(2, operands.grad, bits[2])
    if backward is None and operands.residuals == "original":
        backward = "residuals='original' multiplies with float operands; use 'quantized', 'folded' or 'requantized'"
    if backward is None and operands.grad.per != "tensor":
        backward = f"grad_quantizer {operands.grad.describe()} has several scales; use per='tensor'"
    if backward is None and operands.grad.code_dtype != operands.lhs.code_dtype:
        backward = "the gradients' codes are of another kind than the operands'"
    if backward is None and isinstance(op, Conv):
        backward = _conv_backward_obstacle(op, lhs, rhs)
    for index, product in enumerate(("drhs", "dlhs")):
        # dlhs contracts along what the right operand keeps, drhs along what the left one does.
        reason = backward
        if reason is None and operands.residuals == "quantized" and _scales(op, operands, lhs, rhs)[index] > 1:
            reason = (
                f"the scales of the {_NAMES[index]} vary along it; residuals='folded' or 'requantized', or "
                "per='tensor', would let it"
            )
        found[product] = reason
    return {product: reason for product, reason in found.items() if reason is not None}


def slower(op: Contraction, operands: Any, lhs: Any, rhs: Any, backend: str) -> dict[str, str]:
    """Product → why float is faster on `backend`, where it is or where nobody has measured; for execution="auto".

    Measured on two CPU cores with VNNI and AMX, forward and backward together against fake quantization: codes pay
    where an element that is encoded takes part in enough multiplications (2048×64×64: 31 of them, 0.97; 2048×32×32: 16,
    1.04; 4096×16×16: 8, 1.28). A convolution of an image of 3 channels takes 2 to 4 times as long on codes, its weight
    gradient a fifth.
    """
    if backend != "cpu":
        reason = f"not measured on {backend}; execution='native' would run it on codes"
        return dict.fromkeys(PRODUCTS, reason)
    if {q.code_dtype for q in (operands.lhs, operands.rhs) if q is not None} != {"int8"}:
        return dict.fromkeys(PRODUCTS, "a CPU has no instructions for small floats")
    out = jax.eval_shape(op, lhs, rhs)
    if isinstance(op, Dot):
        if op.batch[0]:
            return dict.fromkeys(PRODUCTS, "batched products of codes are slower on a CPU")
        macs = out.size * _size([lhs.shape[i] for i in op.contracted[0]])
    elif op.feature_group_count > 1 or op.batch_group_count > 1 or len(op.window_strides) != 2:
        return dict.fromkeys(PRODUCTS, "only convolutions over two axes, without groups, are faster on codes on a CPU")
    else:
        macs = out.size * _size(rhs.shape[:-1])
    found = {}
    reuse = macs / max(lhs.size + rhs.size + out.size, 1)
    if macs < _FEWEST_MACS or reuse < _LEAST_REUSE:
        words = f"{macs:,} MACs, {reuse:.0f} for each element that is encoded"
        found = dict.fromkeys(PRODUCTS, f"too small for codes to pay on a CPU ({words})")
    if isinstance(op, Conv):
        if rhs.shape[-2] < _FEWEST_CHANNELS:
            found |= dict.fromkeys(("forward", "dlhs"), f"{rhs.shape[-2]} input channels have no fast kernel on a CPU")
        if macs >= _FEWEST_MACS_OF_A_KERNEL:
            found.pop("drhs", None)
    return found


_FEWEST_MACS = 2**20
_LEAST_REUSE = 24
_FEWEST_CHANNELS = 8
_FEWEST_MACS_OF_A_KERNEL = 2**22
"""The float gradient of a convolution's kernel is slow on a CPU: codes pay there sooner."""


def _forward_obstacle(
    op: Contraction, quantizers: Sequence[Quantizer | None], shapes: Sequence[Any], bits: Sequence[int | None]
) -> str | None:
    for index in (0, 1):
        reason = _operand_obstacle(index, quantizers[index], bits[index])
        if reason is not None:
            return reason
        per, contracted = quantizers[index].per, op.contracted[index]  # type: ignore[union-attr]
        view = layout(shapes[index].shape, per, contracted)
        if view.shape != shapes[index].shape or not set(contracted) <= set(view.axes):
            words = quantizers[index].describe()  # type: ignore[union-attr]
            return f"{_FIELDS[index]} {words} has scales that vary along the contraction; use per='channel' or 'tensor'"
    left, right = quantizers[0], quantizers[1]
    assert left is not None and right is not None
    if left.code_dtype != right.code_dtype:
        return f"activations and weights have codes of two kinds ({left.code_dtype}, {right.code_dtype})"
    offsets = any(getattr(q, "grid", None) in ("affine", "unsigned") for q in quantizers if q is not None)
    if isinstance(op, Dot):
        if op.batch[0] and offsets:
            return "a zero point is not corrected in a batched product; use grid='symmetric'"
        return None
    if not op.channels_last:
        return "the convolution is not laid out channels last"
    if op.batch_group_count > 1:
        return "a convolution in groups of examples runs in float"
    if op.feature_group_count > 1 and offsets:
        return "a zero point is not corrected in a grouped convolution; use grid='symmetric'"
    if offsets and op.lhs_dilation is not None and set(op.lhs_dilation) != {1}:
        return "a zero point is not corrected in a convolution with a dilated input; use grid='symmetric'"
    length = _size(shapes[1].shape[:-1])
    return f"its window has {length:,} elements, whose sum may not fit int32" if length > integer.LONGEST else None


def _operand_obstacle(index: int, quantizer: Quantizer | None, bits: int | None) -> str | None:
    if quantizer is None:
        return f"its {_NAMES[index]} are not quantized ({_FIELDS[index]}=None)"
    if quantizer.code_dtype is None or not hasattr(quantizer, "per"):
        return f"{_FIELDS[index]} {quantizer.describe()} has no 8-bit codes"
    if bits is not None and bits > WIDEST:
        return f"{bits} bits of its {_NAMES[index]} do not fit {quantizer.code_dtype} codes (at most {WIDEST})"
    return None


def _conv_backward_obstacle(op: Conv, lhs: Any, rhs: Any) -> str | None:
    if op.feature_group_count > 1:
        return "the backward pass of a grouped convolution runs in float"
    exact = op.explicit(lhs.shape, rhs.shape)
    if set(exact.lhs_dilation or ()) != {1}:
        return "the backward pass of a convolution with a dilated input runs in float"
    length = _size(rhs.shape[:-2]) * rhs.shape[-1]
    if length > integer.LONGEST:
        return f"its window has {length:,} elements of the cotangent, whose sum may not fit int32"
    if _size(lhs.shape[1:-1]) > integer.LONGEST:
        return f"an image has more than {integer.LONGEST:,} pixels, whose sum may not fit int32"
    return None


def _scales(op: Contraction, operands: Any, lhs: Any, rhs: Any) -> tuple[int, int]:
    pairs = zip((operands.lhs, operands.rhs), (lhs, rhs), op.contracted, strict=True)
    left, right = (layout(x.shape, q.per, contracted).num_scales for q, x, contracted in pairs)
    return left, right


def _size(shape: Sequence[int]) -> int:
    size = 1
    for length in shape:
        size *= length
    return size


@partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _contract(op: Contraction, operands: Any, static: Widths, lhs: Array, rhs: Array, varying: Any) -> Array:
    return _forward(op, operands, static, lhs, rhs, varying)[0]


def _forward(
    op: Contraction, operands: Any, static: Widths, lhs: Array, rhs: Array, varying: Any
) -> tuple[Array, tuple[Any, ...]]:
    arrays, seed, lhs_params, rhs_params = varying
    widths = [b if b is not None else array for b, array in zip(static, arrays, strict=True)]
    dtype = jnp.result_type(lhs.dtype, rhs.dtype)
    left = _encode(operands.lhs, integer.hold(lhs), widths[0], lhs_params, fold(seed, 0), op.contracted[0])
    right = _encode(operands.rhs, rhs, widths[1], rhs_params, fold(seed, 1), op.contracted[1])
    if operands.paths.forward == "float":
        out = op(left.decode().astype(lhs.dtype), right.decode().astype(rhs.dtype))
    else:
        out = products.forward(op, left, right).astype(op.preferred_element_type or dtype)
    originals = (lhs, rhs) if operands.residuals == "original" else (jnp.zeros((), lhs.dtype), jnp.zeros((), rhs.dtype))
    return out, (left, right, widths, seed, originals)


def _backward(op: Contraction, operands: Any, static: Widths, saved: Any, g: Array) -> tuple[Array, Array, None]:
    left, right, (lhs_bits, rhs_bits, grad_bits), seed, (lhs, rhs) = saved
    lhs_bits, rhs_bits, grad_bits = (
        b if b is not None else traced for b, traced in zip(static, (lhs_bits, rhs_bits, grad_bits), strict=True)
    )
    paths = operands.paths
    a, b, left_factor, right_factor = left, right, None, None
    if operands.residuals == "folded":
        (a, left_factor), (b, right_factor) = foldable(left), foldable(right)
    elif operands.residuals == "requantized":
        a, b = requantized(operands.lhs, left, lhs_bits), requantized(operands.rhs, right, rhs_bits)
    cotangent = None
    values = g
    if operands.grad is not None:
        factor = folding_factor(op, left_factor, right_factor, left.codes.ndim, right.codes.ndim)
        scaled = g if factor is None else g.astype(jnp.float32) * factor
        cotangent = _encode(operands.grad, integer.hold(scaled), grad_bits, None, fold(seed, 2), None)
        if "float" in (paths.dlhs, paths.drhs):
            values = cotangent.decode() if factor is None else cotangent.decode() / factor
    shapes = (left.codes.shape, right.codes.shape)
    floats = None
    if "float" in (paths.dlhs, paths.drhs):
        if operands.residuals != "original":
            a_values, b_values = (left, right) if operands.residuals == "folded" else (a, b)
            lhs, rhs = a_values.decode().astype(lhs.dtype), b_values.decode().astype(rhs.dtype)
        floats = jax.vjp(op, lhs, rhs)[1](values.astype(g.dtype))
    if paths.dlhs == "float":
        dlhs = floats[0]  # type: ignore[index]
    else:
        dlhs = products.lhs_gradient(op, cotangent, b, shapes[0])  # type: ignore[arg-type]
        dlhs = dlhs if left_factor is None else dlhs * (1.0 / left_factor)
    if paths.drhs == "float":
        drhs = floats[1]  # type: ignore[index]
    else:
        drhs = products.rhs_gradient(op, cotangent, a, shapes[1])  # type: ignore[arg-type]
        drhs = drhs if right_factor is None else drhs * (1.0 / right_factor)
    return left.gradient(dlhs, lhs.dtype), right.gradient(drhs, rhs.dtype), None


_contract.defvjp(_forward, _backward)


def _encode(quantizer: Quantizer, x: Array, bits: Any, params: Any, seed: Array | None, axes: Any) -> Coded:
    coded = quantizer.coded(x, bits, params, key=seed, axes=axes)
    return coded._replace(codes=integer.hold(coded.codes))


def requantized(quantizer: Quantizer, coded: Coded, bits: Any) -> Coded:
    """`coded` once more, on the same grid with a single scale, where it has several."""
    if coded.scale.size == 1:
        return coded
    return _encode(single(quantizer), coded.decode(), bits, None, None, None)


def single(quantizer: Quantizer) -> Quantizer:
    """The same grid with one scale, rounded to nearest."""
    changes = {"per": "tensor", "rounding": "nearest", "statistics": None, "delay": False}
    fields = {field.name for field in dataclasses.fields(quantizer)}  # type: ignore[arg-type]
    return dataclasses.replace(quantizer, **{k: v for k, v in changes.items() if k in fields})  # type: ignore[type-var]


def folding_factor(
    op: Contraction, left: Array | None, right: Array | None, left_ndim: int, right_ndim: int
) -> Array | None:
    """The factors of two operands, in the axes of the result; None where neither has any."""
    if left is None and right is None:
        return None
    left = jnp.ones((1,) * left_ndim, jnp.float32) if left is None else left
    right = jnp.ones((1,) * right_ndim, jnp.float32) if right is None else right
    left, right = products.spread(op, left, right)
    return left * right


def fold(seed: Array | None, role: int) -> Array | None:
    """The noise seed of the left operand (0), the right one (1) or the cotangent (2)."""
    return None if seed is None else noise.fold(seed, role)
