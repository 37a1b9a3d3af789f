"""The AQT baseline: the same rules carried out by AQT v2 (aqtp), whose bit widths are frozen at compile time."""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any

import jax

from qtrain.errors import UsageError, did_you_mean
from qtrain.inject import Rule
from qtrain.quantizers import Contraction, Conv, Dot, Operands, Traced, Uniform

_RESIDUALS = ("quantized", "original")


def aqt_rules(rules: tuple[Rule, ...]) -> tuple[Rule, ...]:
    """`rules` with AQT's numerics: grid ``aqt`` per channel where an operand is quantized, gradients in float.

    AQT's convolution has no quantized backward pass, so none is used: the baseline quantizes the forward pass, as
    ``config_v4(dlhs_bits=None, drhs_bits=None)`` and ``fully_quantized(bwd_bits=None)`` do.

    Raises:
      UsageError: for a rule that asks for an execution, or for residuals, which AQT does not have.
    """
    for rule in rules:
        if rule.execution != "fake":
            raise UsageError(
                f"quant.backend='aqt' with execution={rule.execution!r}: AQT carries out its contractions its own way; "
                "use quant.execution='fake', or quant.backend='qtrain'"
            )
        if rule.residuals not in _RESIDUALS:
            near = did_you_mean(rule.residuals, _RESIDUALS)
            raise UsageError(
                f"quant.backend='aqt' with residuals={rule.residuals!r}: AQT has {_RESIDUALS} alone; give one of "
                f"these, or use quant.backend='qtrain'.{near}"
            )
    grid = Uniform("aqt", per="channel")
    return tuple(
        dataclasses.replace(
            rule,
            weight_quantizer=None if rule.weight_quantizer is None else grid,
            act_quantizer=None if rule.act_quantizer is None else grid,
            grad_quantizer=None,
            bias_quantizer=None,
        )
        for rule in rules
    )


def execute(op: Contraction, operands: Operands, lhs: jax.Array, rhs: jax.Array, traced: Traced) -> jax.Array:
    """A quantized contraction by AQT: `execute` of `qtrain.quantize`.

    Dots: what ``config_v4`` builds where the backward pass sees the original operands, and ``fully_quantized`` where it
    sees the quantized ones, except that the two operands may have different widths. Convolutions: the forward pass of
    ``conv_general_dilated_make``. AQT's own has no gradient (its codes pass through a rounding without one), so that
    nothing before it would train; the backward pass here is the straight-through one, over the operands a dot's has.

    Raises:
      UsageError: bits that are not Python numbers: AQT needs them before it compiles.
    """
    from aqt.jax.v2 import config

    if traced.lhs_bits is None or traced.rhs_bits is None:
        return op(lhs, rhs)
    bits = (traced.lhs_bits, traced.rhs_bits)
    if not all(isinstance(b, int) for b in bits):
        raise UsageError("quant.backend='aqt' freezes bit widths at compile time: give bits as Python ints")
    lhs_bits, rhs_bits = (None if b >= 24 else b for b in bits)
    if isinstance(op, Conv):
        return _conv(op, lhs_bits, rhs_bits, operands.residuals, lhs, rhs)
    assert isinstance(op, Dot)
    dot = config.dot_general_make(
        lhs_bits=lhs_bits, rhs_bits=rhs_bits, bwd_bits=None, use_fwd_quant=operands.residuals == "quantized"
    )
    return dot(lhs, rhs, op.dimension_numbers, precision=op.precision)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2, 3))
def _conv(
    op: Conv, lhs_bits: int | None, rhs_bits: int | None, residuals: str, lhs: jax.Array, rhs: jax.Array
) -> jax.Array:
    return _conv_forward(op, lhs_bits, rhs_bits, residuals, lhs, rhs)[0]


def _conv_forward(
    op: Conv, lhs_bits: int | None, rhs_bits: int | None, residuals: str, lhs: jax.Array, rhs: jax.Array
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    from aqt.jax.v2 import aqt_conv_general, config

    raw = config.conv_general_dilated_make(lhs.ndim - 2, lhs_bits=lhs_bits, rhs_bits=rhs_bits)
    arguments: dict[str, Any] = {f.name: getattr(op, f.name) for f in dataclasses.fields(op)}
    out, quantized = aqt_conv_general.make_conv_general_dilated_with_qt(raw)(lhs, rhs, **arguments)
    if residuals == "original":
        return out, (lhs, rhs)
    return out, tuple(tensor.dequant().astype(x.dtype) for tensor, x in zip(quantized, (lhs, rhs), strict=True))


def _conv_backward(
    op: Conv,
    lhs_bits: int | None,
    rhs_bits: int | None,
    residuals: str,
    saved: tuple[jax.Array, jax.Array],
    g: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    return jax.vjp(op, *saved)[1](g)


_conv.defvjp(_conv_forward, _conv_backward)
