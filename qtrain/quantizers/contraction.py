"""Quantized contractions: both operands on their grids, and a backward pass that says what it sees."""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from qtrain.errors import UsageError, did_you_mean
from qtrain.quantizers import native
from qtrain.quantizers.base import FLOAT_BITS, Array, Quantizer, static_bits
from qtrain.quantizers.coded import folding
from qtrain.quantizers.granularity import layout_of
from qtrain.quantizers.operations import Contraction

RESIDUALS = ("quantized", "original", "folded", "requantized")


@dataclasses.dataclass(frozen=True)
class Operands:
    """The static choices of one quantized contraction: a quantizer for each operand (None: left in float).

    Attributes:
      lhs, rhs: quantizers of the two operands.
      grad: quantizer of the cotangent of the result.
      residuals: what the backward pass multiplies the quantized cotangent ĝ with.

        * "quantized": the quantized operands x̂, ŵ (the straight-through gradient of the product that was computed;
          AQT's `fully_quantized`, CPT).
        * "original": the operands as they were (AQT's `config_v4` default). At 4 bits the two gradients differ by about
          10 % in norm.
        * "folded": x̂ and ŵ, and ĝ = Q(g·f)/f with f = s_x·s_w, the product of their scales where an operand has
          several. A scale that varies along a contraction (one per filter in the input gradient, one per example in
          the weight gradient) does not factor out of an integer sum; folded into the cotangent before that is
          quantized, it does. The gradient's step size then differs from filter to filter, in inverse proportion to
          the weights' scales; with a single scale on each operand it equals "quantized".
        * "requantized": each operand that has several scales, put on the same grid once more with a single one:
          Q'(x̂), Q'(ŵ).

        What the product hands back then passes through the gradient of each operand's own quantizer.
      paths: which of the three products run on integer codes, see `qtrain.quantizers.native`.
    """

    lhs: Quantizer | None = None
    rhs: Quantizer | None = None
    grad: Quantizer | None = None
    residuals: str = "quantized"
    paths: native.Paths = native.FLOAT

    def __post_init__(self) -> None:
        if self.residuals not in RESIDUALS:
            hint = did_you_mean(self.residuals, RESIDUALS)
            raise UsageError(f"residuals={self.residuals!r}: give one of {RESIDUALS}.{hint}")


class Traced(NamedTuple):
    """What may change from step to step: bits of the two operands and the cotangent, a seed, calibrated ranges."""

    lhs_bits: Any = None
    rhs_bits: Any = None
    grad_bits: Any = None
    seed: Array | None = None
    lhs_params: Any = None
    rhs_params: Any = None


def contract(op: Contraction, operands: Operands, lhs: Array, rhs: Array, traced: Traced) -> Array:
    """``op(Q(lhs), Q(rhs))``, with the cotangent of the result quantized before it reaches either operand.

    A quantizer or width of None leaves that operand as it is. Products that ``operands.paths`` names run on codes where
    both operands have a width, a number each; an array of widths (one per channel) is carried out in float.

    Raises:
      UsageError: for a concrete width that is none or too wide for its path, or stochastic rounding without a seed.
    """
    paths = operands.paths
    both = operands.lhs is not None and operands.rhs is not None
    widths = (traced.lhs_bits, traced.rhs_bits, traced.grad_bits)
    given = [b for b in widths if b is not None]
    if not paths.native or not both or any(b is None for b in widths[:2]) or any(jnp.ndim(b) for b in given):
        return _fake(op, operands, lhs, rhs, traced)
    concrete = [None if b is None else static_bits(b) for b in widths]
    wide = [b for b in concrete if b is not None and b > native.WIDEST]
    if wide and not paths.switch:
        raise UsageError(f"bits: {wide[0]} do not fit 8-bit codes; give at most {native.WIDEST}, or execution='fake'")
    if not paths.switch:
        return native.contract(op, operands, lhs, rhs, traced)
    return _switched(op, operands, tuple(concrete), lhs, rhs, traced)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _switched(op: Contraction, operands: Operands, concrete: Any, lhs: Array, rhs: Array, traced: Traced) -> Array:
    """Both programs; the width of the step chooses, for the product and for its backward pass."""
    traced = _with_concrete(traced, concrete)
    return lax.cond(
        _fits(traced.lhs_bits, traced.rhs_bits),
        lambda: native.contract(op, operands, lhs, rhs, traced),
        lambda: _fake(op, operands, lhs, rhs, traced),
    )


def _switched_forward(
    op: Contraction, operands: Operands, concrete: Any, lhs: Array, rhs: Array, traced: Traced
) -> tuple[Array, Any]:
    # Not the codes: the float program has none. The backward pass encodes once more.
    return _switched(op, operands, concrete, lhs, rhs, traced), (lhs, rhs, traced)


def _switched_backward(op: Contraction, operands: Operands, concrete: Any, saved: Any, g: Array) -> Any:
    lhs, rhs, traced = saved
    traced = _with_concrete(traced, concrete)

    def through(execute: Any) -> Any:
        return lambda: jax.vjp(lambda a, b: execute(op, operands, a, b, traced), lhs, rhs)[1](g)

    grad_bits = () if operands.grad is None or traced.grad_bits is None else (traced.grad_bits,)
    fits = _fits(traced.lhs_bits, traced.rhs_bits, *grad_bits)
    return (*lax.cond(fits, through(native.contract), through(_fake)), None)


_switched.defvjp(_switched_forward, _switched_backward)


def _with_concrete(traced: Traced, concrete: Any) -> Traced:
    """`traced` with its widths that are Python numbers as such again, after a transformation made arrays of them."""
    given = (traced.lhs_bits, traced.rhs_bits, traced.grad_bits)
    lhs, rhs, grad = (array if number is None else number for number, array in zip(concrete, given, strict=True))
    return traced._replace(lhs_bits=lhs, rhs_bits=rhs, grad_bits=grad)


def _fits(*bits: Any) -> Array:
    return jnp.all(jnp.stack([jnp.asarray(b) <= native.WIDEST for b in bits]))


def _fake(op: Contraction, operands: Operands, lhs: Array, rhs: Array, traced: Traced) -> Array:
    lhs_q, rhs_q = _quantized(op, operands, lhs, rhs, traced)
    factor = None
    if operands.residuals == "original":
        out = _contract_other(op, lhs_q, rhs_q, lax.stop_gradient(lhs), lax.stop_gradient(rhs))
    elif operands.residuals == "requantized":
        left = _requantized(operands.lhs, lhs_q, traced.lhs_bits, op.contracted[0])
        right = _requantized(operands.rhs, rhs_q, traced.rhs_bits, op.contracted[1])
        out = _contract_other(op, lhs_q, rhs_q, left, right)
    else:
        out = op(lhs_q, rhs_q)
        if operands.residuals == "folded":
            left_factor = _factor(operands.lhs, lhs, traced.lhs_bits, traced.lhs_params, op.contracted[0])
            right_factor = _factor(operands.rhs, rhs, traced.rhs_bits, traced.rhs_params, op.contracted[1])
            factor = native.folding_factor(op, left_factor, right_factor, lhs.ndim, rhs.ndim)
    if operands.grad is not None and traced.grad_bits is not None:
        static_bits(traced.grad_bits)  # Now: the backward pass is late, and may never come.
        out = quantize_cotangent(operands.grad, out, traced.grad_bits, native.fold(traced.seed, 2), factor)
    return out


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def quantize_cotangent(
    quantizer: Quantizer, y: Array, bits: Any, seed: Array | None, factor: Array | None = None
) -> Array:
    """`y` itself; its cotangent g becomes Q_bits(g), or Q_bits(g·factor)/factor.

    CPT's gradient node: placed on a layer's output, the same quantized cotangent feeds the input gradient and the
    weight gradient.
    """
    return y


def _cotangent_forward(
    quantizer: Quantizer, y: Array, bits: Any, seed: Array | None, factor: Array | None = None
) -> tuple[Array, Any]:
    return quantize_cotangent(quantizer, y, bits, seed, factor), (bits, seed, factor)


def _cotangent_backward(quantizer: Quantizer, residuals: Any, g: Array) -> tuple[Array, None, None, None]:
    bits, seed, factor = residuals
    if factor is None:
        return quantizer(g, bits, key=seed), None, None, None
    scaled = quantizer(g.astype(jnp.float32) * factor, bits, key=seed)
    return (scaled / factor).astype(g.dtype), None, None, None


quantize_cotangent.defvjp(_cotangent_forward, _cotangent_backward)


def _quantized(op: Contraction, operands: Operands, lhs: Array, rhs: Array, traced: Traced) -> tuple[Array, Array]:
    lhs_axes, rhs_axes = op.contracted
    seed = traced.seed
    if operands.lhs is not None and traced.lhs_bits is not None:
        lhs = operands.lhs(lhs, traced.lhs_bits, traced.lhs_params, key=native.fold(seed, 0), axes=lhs_axes)
    if operands.rhs is not None and traced.rhs_bits is not None:
        rhs = operands.rhs(rhs, traced.rhs_bits, traced.rhs_params, key=native.fold(seed, 1), axes=rhs_axes)
    return lhs, rhs


def _several(quantizer: Quantizer | None, x: Array, bits: Any, axes: tuple[int, ...]) -> bool:
    """Whether an operand is quantized with several scales."""
    if quantizer is None or bits is None or not hasattr(quantizer, "per"):
        return False
    return layout_of(quantizer, x.shape, axes).num_scales > 1


def _factor(quantizer: Any, x: Array, bits: Any, params: Any, axes: tuple[int, ...]) -> Array | None:
    if not _several(quantizer, x, bits, axes) or isinstance(quantizer.per, int):
        return None  # a group of rows has a scale in the middle of the contraction, which no factor can stand for
    concrete = static_bits(bits)
    if concrete is not None and concrete >= FLOAT_BITS:
        return None
    return folding(quantizer.scale(x, bits, params, axes=axes))


def _requantized(quantizer: Any, x: Array, bits: Any, axes: tuple[int, ...]) -> Array:
    x = lax.stop_gradient(x)
    return native.single(quantizer)(x, bits) if _several(quantizer, x, bits, axes) else x


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _contract_other(op: Contraction, lhs_q: Array, rhs_q: Array, lhs: Array, rhs: Array) -> Array:
    """``op(lhs_q, rhs_q)``; its gradient with respect to these two is that of ``op`` at (lhs, rhs)."""
    return op(lhs_q, rhs_q)


def _other_forward(
    op: Contraction, lhs_q: Array, rhs_q: Array, lhs: Array, rhs: Array
) -> tuple[Array, tuple[Array, Array]]:
    return _contract_other(op, lhs_q, rhs_q, lhs, rhs), (lhs, rhs)


def _other_backward(op: Contraction, residuals: tuple[Array, Array], g: Array) -> Any:
    _, vjp = jax.vjp(op, *residuals)
    return (*vjp(g), None, None)


_contract_other.defvjp(_other_forward, _other_backward)
