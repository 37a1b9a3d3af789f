"""What counted operations cost at given bits: BitOps, quadratic, linear and with accumulator, and bytes."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from qtrain.cost.bits import FLOAT_FROM, ArrayBits, Precisions, operand_bits, requested_bits, validated
from qtrain.cost.ops import PASSES, Ops, check_passes, native_bits
from qtrain.errors import UsageError


def bitops(ops: Ops, precision: Precisions, passes: Iterable[str] = PASSES) -> Any:
    """Quadratic bit operations of one training step: Σ MACs · b_l · b_r over the products of `passes`.

    Per op Y = X·W with cotangent G: forward b_x·b_w, input gradient dX = G·Wᵀ b_g·b_w, weight gradient dW = Xᵀ·G
    b_x·b_g, each times that product's MACs. An operand counts the bits its marker says (fixed, or those of
    `precision`); when nothing quantizes it, or at 24 bits and above, the bits of its dtype: 32, or 16 for bfloat16. So
    do the operands that a backward pass on the original ones sees (``residuals="original"``).

    Args:
        ops: from `count`.
        precision: a `Precision`, or one for each path that follows the schedule; ``None`` is the plain float model.
            Its fields may be arrays, traced or not, of any one shape (a number per run, say).
        passes: which of ``forward``, ``input_gradient``, ``weight_gradient``.

    Returns:
        An exact Python int when all bits are Python or NumPy numbers; a float32 array when some are arrays.

    Raises:
        UsageError: bits that are not a whole number of at least 1; a path without precision; an unknown pass.

    In the accounting of Wolfe & Kyrillidis (arXiv 2403.02243) a step costs the forward MACs times (q² + 2·q·b_g)/32²:
    `relative` divides by 32². Theirs charges every layer the input gradient; here the first layer has none.
    """
    precision = validated(ops, precision)
    return _total(_products(ops, precision, check_passes(passes)), precision, lambda left, right: left * right)


def linear(ops: Ops, precision: Precisions, passes: Iterable[str] = PASSES) -> Any:
    """Linear cost: Σ MACs · p with p = max(b_l, b_r) rounded up to 4, 8 or 16, else 32: what hardware units offer.

    The widths of AQT's Pareto study (arXiv 2105.03536), whose numbers are for ``passes=("forward",)``. Arguments,
    result and errors as for `bitops`.
    """

    def width(left: Any, right: Any) -> Any:
        if isinstance(left, int):
            return next((width for width in (4, 8, 16) if max(left, right) <= width), 32)
        bits = jnp.maximum(left, right)
        return jnp.where(bits <= 4, 4, jnp.where(bits <= 8, 8, jnp.where(bits <= 16, 16, 32)))

    precision = validated(ops, precision)
    return _total(_products(ops, precision, check_passes(passes)), precision, width)


def bitops_accumulator(ops: Ops, precision: Precisions) -> Any:
    """Forward bit operations with the adder: Σ MACs · (b_l·b_r + b_l + b_r + log2 K), K products per output element.

    For a convolution K = n·k², UNIQ's formula (arXiv 1804.10969) per output position. A float, or a float32 array for
    traced bits; arguments and errors as for `bitops`.
    """
    adders = math.fsum(op.forward * math.log2(op.contraction) for op in ops if op.contraction)
    precision = validated(ops, precision)
    products = _products(ops, precision, ("forward",))
    return _total(products, precision, lambda left, right: left * right + left + right) + adders


def relative(ops: Ops, precision: Precisions, passes: Iterable[str] = PASSES) -> Any:
    """`bitops` as a share of the same products at 32 × 32 bits."""
    names = check_passes(passes)
    macs = sum(getattr(ops, name) for name in names)
    if not macs:
        raise UsageError(f"relative: the ops have no MACs in {', '.join(names)}; count a model that has dots")
    return bitops(ops, precision, names) / (macs * 32**2)


def breakdown(ops: Ops, precision: Precisions) -> dict[str, dict[str, Any]]:
    """`bitops` of each path (in order of execution) and each pass: ``{path: {"forward": ..., ...}}``."""
    return {path: {name: bitops(group, precision, (name,)) for name in PASSES} for path, group in ops.by_path().items()}


def memory_bits(ops: Ops, precision: Precisions) -> Any:
    """Bits of the weights that enter the ops: Σ weights · b, without scales (AQT's memory)."""
    stored = _stored(ops, validated(ops, precision))
    return sum(weight.size * weight.bits for weight in stored)


def weight_bytes(ops: Ops, precision: Precisions, scales: Mapping[str, int] | None = None) -> Any:
    """Bytes of the weights that enter the ops, packed: Σ (weights · b / 8 + 4 · scales).

    Args:
        ops: from `count`. Biases, norms and embeddings that are only looked up are in no op and so not in the sum.
        precision: as for `bitops`. A leaf that several ops share is stored once, at the largest of their bits.
        scales: number of float32 scales of each path's weight. A path that is not named has one per output channel (per
            iteration of a scan), as ``per="channel"`` has; a weight that is not quantized has none.
    """
    total: Any = 0
    for weight in _stored(ops, validated(ops, precision)):
        number = (scales or {}).get(weight.path, weight.channels)
        total = total + weight.size * weight.bits / 8 + 4 * number * weight.quantized
    return total


def saving(effective: float, static: float) -> float:
    """1 − effective/static: the share of the cost at constant q_max that a schedule spares."""
    if not static > 0:
        raise UsageError(f"saving: the static cost is {static}; allowed: above 0; count a model that has dots")
    return 1 - effective / static


def _products(ops: Ops, precision: Precisions, passes: tuple[str, ...]) -> dict[tuple[Any, Any], int]:
    """MACs of each pair of factors: the same two bit widths, whether numbers or symbols of traced ones."""
    products: dict[tuple[Any, Any], int] = {}

    def add(left: Any, right: Any, macs: int) -> None:
        key = tuple(sorted((left, right), key=repr))
        products[key] = products.get(key, 0) + macs

    for op in ops:
        left_role, right_role = op.roles()
        left = operand_bits(op, precision, left_role, op.lhs.native_bits)
        right = operand_bits(op, precision, right_role, op.rhs.native_bits)
        cotangent = operand_bits(op, precision, "grads", native_bits(op.output_dtype))
        if "forward" in passes:
            add(left, right, op.forward)
        if op.marker is not None and op.marker.residuals == "original":
            left, right = op.lhs.native_bits, op.rhs.native_bits
        for operand, other in ((op.lhs, right), (op.rhs, left)):
            name = "weight_gradient" if operand.kind == "weight" else "input_gradient"
            if operand.needs_gradient and name in passes:
                add(cotangent, other, op.forward)
    return products


def _total(products: Mapping[tuple[Any, Any], int], precision: Precisions, combine: Callable[[Any, Any], Any]) -> Any:
    """Σ MACs · combine(b_l, b_r): exact for ints; for arrays one short weighted sum, its coefficients found here."""
    factors = list(dict.fromkeys(factor for pair in products for factor in pair))
    if not any(isinstance(factor, ArrayBits) for factor in factors):
        return sum(macs * combine(left, right) for (left, right), macs in products.items())
    values = [f.value(precision) if isinstance(f, ArrayBits) else jnp.float32(f) for f in factors]
    bits = jnp.stack(jnp.broadcast_arrays(*values), axis=-1)
    left, right = (np.array([factors.index(pair[side]) for pair in products]) for side in (0, 1))
    macs = np.array([float(macs) for macs in products.values()], np.float32)
    return jnp.sum(macs * combine(bits[..., left], bits[..., right]), axis=-1)


@dataclasses.dataclass
class _Stored:
    """One leaf of weights as it is kept: the widest bits of the ops that use it."""

    path: str
    size: int
    channels: int
    bits: Any
    quantized: Any


def _stored(ops: Ops, precision: Precisions) -> list[_Stored]:
    stored: dict[str, _Stored] = {}
    for op in ops:
        for operand in (op.lhs, op.rhs):
            if operand.kind != "weight" or (op.marker is not None and op.marker.pair):
                continue  # what attention multiplies is made of weights at most, which count where they are multiplied
            bits = operand_bits(op, precision, "weights", operand.native_bits)
            asked = requested_bits(op, precision, "weights")
            quantized = False if asked is None else asked < FLOAT_FROM
            bits = bits.value(precision) if isinstance(bits, ArrayBits) else bits
            leaf = stored.get(operand.parameter)
            if leaf is None:
                channels = operand.parameter_size // max(op.contraction, 1)
                stored[operand.parameter] = _Stored(op.path, operand.parameter_size, channels, bits, quantized)
            else:
                both = isinstance(bits, int) and isinstance(leaf.bits, int)
                leaf.bits = max(bits, leaf.bits) if both else jnp.maximum(bits, leaf.bits)
                leaf.quantized = leaf.quantized & quantized
    return list(stored.values())
