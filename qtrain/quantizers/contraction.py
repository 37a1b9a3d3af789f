"""Quantized dot products and convolutions: both operands on their grids, and a backward pass that says what it sees."""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any, NamedTuple

import jax
from jax import lax

from qtrain.errors import UsageError, did_you_mean
from qtrain.quantizers import noise
from qtrain.quantizers.base import Array, Quantizer, static_bits

RESIDUALS = ("quantized", "original")


@dataclasses.dataclass(frozen=True)
class Dot:
    """``lax.dot_general`` with its static choices bound: a hashable function of two operands."""

    dimension_numbers: Any
    precision: Any = None
    preferred_element_type: Any = None
    out_sharding: Any = None

    def __call__(self, lhs: Array, rhs: Array) -> Array:
        """The contraction, in float."""
        extra = {} if self.out_sharding is None else {"out_sharding": self.out_sharding}
        return lax.dot_general(
            lhs,
            rhs,
            self.dimension_numbers,
            precision=self.precision,
            preferred_element_type=self.preferred_element_type,
            **extra,
        )

    @property
    def contracted(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The contracted axes of each operand."""
        (lhs, rhs), _ = self.dimension_numbers
        return tuple(lhs), tuple(rhs)


@dataclasses.dataclass(frozen=True)
class Conv:
    """``lax.conv_general_dilated`` with its static choices bound: a hashable function of two operands."""

    window_strides: tuple[int, ...]
    padding: Any
    lhs_dilation: tuple[int, ...] | None = None
    rhs_dilation: tuple[int, ...] | None = None
    dimension_numbers: Any = None
    feature_group_count: int = 1
    batch_group_count: int = 1
    precision: Any = None
    preferred_element_type: Any = None

    def __call__(self, lhs: Array, rhs: Array) -> Array:
        """The convolution, in float."""
        return lax.conv_general_dilated(lhs, rhs, **{f.name: getattr(self, f.name) for f in dataclasses.fields(self)})

    @property
    def contracted(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The axes of each operand along which one scale is shared.

        A pixel is contracted by some outputs and not by others, so a scale per pixel does not factor out of the sum:
        all axes but the examples (lhs) and the filters (rhs).
        """
        ndim = len(self.window_strides) + 2
        numbers = lax.conv_dimension_numbers((1,) * ndim, (1,) * ndim, self.dimension_numbers)
        return (
            tuple(axis for axis in range(ndim) if axis != numbers.lhs_spec[0]),
            tuple(axis for axis in range(ndim) if axis != numbers.rhs_spec[0]),
        )


Contraction = Dot | Conv


@dataclasses.dataclass(frozen=True)
class Operands:
    """The static choices of one quantized contraction: a quantizer for each operand (None: left in float).

    Attributes:
      lhs, rhs: quantizers of the two operands.
      grad: quantizer of the cotangent of the result.
      residuals: what the backward pass multiplies the cotangent with: the "quantized" operands (the straight-through
        gradient of the product that was computed; AQT's `fully_quantized`, CPT), or the "original" ones (AQT's
        `config_v4` default). At 4 bits the two gradients differ by about 10 % in norm. Either way what the product
        hands back then passes through the gradient of each operand's own quantizer.
    """

    lhs: Quantizer | None = None
    rhs: Quantizer | None = None
    grad: Quantizer | None = None
    residuals: str = "quantized"

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

    A quantizer or width of None leaves that operand as it is.

    Raises:
      UsageError: for a concrete width that is none, or stochastic rounding without a seed.
    """
    quantized = _quantized(op, operands, lhs, rhs, traced)
    if operands.residuals == "original":
        out = _contract_original(op, *quantized, lax.stop_gradient(lhs), lax.stop_gradient(rhs))
    else:
        out = op(*quantized)
    if operands.grad is not None and traced.grad_bits is not None:
        static_bits(traced.grad_bits)  # Now: the backward pass is late, and may never come.
        out = quantize_cotangent(operands.grad, out, traced.grad_bits, _fold(traced.seed, 2))
    return out


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def quantize_cotangent(quantizer: Quantizer, y: Array, bits: Any, seed: Array | None) -> Array:
    """`y` itself; its cotangent g becomes Q_bits(g).

    CPT's gradient node: placed on a layer's output, the same quantized cotangent feeds the input gradient and the
    weight gradient.
    """
    return y


def _cotangent_forward(quantizer: Quantizer, y: Array, bits: Any, seed: Array | None) -> tuple[Array, Any]:
    return quantize_cotangent(quantizer, y, bits, seed), (bits, seed)


def _cotangent_backward(quantizer: Quantizer, residuals: Any, g: Array) -> tuple[Array, None, None]:
    bits, seed = residuals
    return quantizer(g, bits, key=seed), None, None


quantize_cotangent.defvjp(_cotangent_forward, _cotangent_backward)


def _fold(seed: Array | None, role: int) -> Array | None:
    return None if seed is None else noise.fold(seed, role)


def _quantized(op: Contraction, operands: Operands, lhs: Array, rhs: Array, traced: Traced) -> tuple[Array, Array]:
    lhs_axes, rhs_axes = op.contracted
    if operands.lhs is not None and traced.lhs_bits is not None:
        lhs = operands.lhs(lhs, traced.lhs_bits, traced.lhs_params, key=_fold(traced.seed, 0), axes=lhs_axes)
    if operands.rhs is not None and traced.rhs_bits is not None:
        rhs = operands.rhs(rhs, traced.rhs_bits, traced.rhs_params, key=_fold(traced.seed, 1), axes=rhs_axes)
    return lhs, rhs


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _contract_original(op: Contraction, lhs_q: Array, rhs_q: Array, lhs: Array, rhs: Array) -> Array:
    """``op(lhs_q, rhs_q)``; its gradient with respect to these two is that of ``op`` at (lhs, rhs)."""
    return op(lhs_q, rhs_q)


def _original_forward(
    op: Contraction, lhs_q: Array, rhs_q: Array, lhs: Array, rhs: Array
) -> tuple[Array, tuple[Array, Array]]:
    return _contract_original(op, lhs_q, rhs_q, lhs, rhs), (lhs, rhs)


def _original_backward(op: Contraction, residuals: tuple[Array, Array], g: Array) -> Any:
    _, vjp = jax.vjp(op, *residuals)
    return (*vjp(g), None, None)


_contract_original.defvjp(_original_forward, _original_backward)
