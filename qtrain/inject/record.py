"""What a pass sees of an operation that can be quantized, and what its rule makes of it."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax

from qtrain.cost import marker
from qtrain.errors import UsageError
from qtrain.inject.learned import check_learned
from qtrain.inject.rules import Rule
from qtrain.precision import Precision
from qtrain.quantizers import Contraction, Quantizer, layout

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class Record:
    """What a pass saw of one quantizable operation.

    Attributes:
      path: of the layer, or of the part of a module.
      module: type of the module.
      op: one of `qtrain.inject.rules.OPS`.
      lhs, rhs: the operands. Of what is no product there is one: a table or parameter (rhs), an output (lhs).
      contraction: what multiplies them; None: nothing does.
      axes: of each operand those that share a scale per channel; None: those that are contracted.
      owner: path of the module that it is a part of, or is.
      leaf: name of the parameter that `rhs` is, "" where it is none.
    """

    path: str
    module: str
    op: str
    lhs: jax.ShapeDtypeStruct | None
    rhs: jax.ShapeDtypeStruct | None
    contraction: Contraction | None
    axes: tuple[tuple[int, ...] | None, tuple[int, ...] | None] | None = None
    owner: str = ""
    leaf: str = ""

    @property
    def contracted(self) -> tuple[Any, Any]:
        """The contracted axes of each operand; for a scale per channel, those that share one."""
        if self.axes is not None:
            return self.axes
        assert self.contraction is not None
        return self.contraction.contracted


def effective_bits(rule: Rule, precision: Precision) -> Precision:
    """The bits of a layer: fixed by its rule, else the step's; None where its rule has no quantizer."""

    def choose(quantizer: Quantizer | None, fixed: int | None, scheduled: Any) -> Any:
        return None if quantizer is None else fixed if fixed is not None else scheduled

    return Precision(
        weights=choose(rule.weight_quantizer or rule.bias_quantizer, rule.weights, precision.weights),
        acts=choose(rule.act_quantizer, rule.acts, precision.acts),
        grads=choose(rule.grad_quantizer, rule.grads, precision.grads),
    )


def op_bits(path: str, rule: Rule, op: str = "") -> marker.OpBits:
    """The marker of a layer under its rule; `op`: what it does.

    A width that a quantizer chooses is no fixed one, whatever its limit.
    """
    free: dict[str, Any] = {
        kind: None
        for kind, quantizer in (("weights", rule.weight_quantizer), ("acts", rule.act_quantizer))
        if quantizer is not None and quantizer.chooses_width
    }
    without_bias = dataclasses.replace(rule, bias_quantizer=None, **free)
    follow = effective_bits(without_bias, Precision("schedule", "schedule", "schedule"))
    return marker.OpBits(path, follow.weights, follow.acts, follow.grads, rule.residuals, pair=op == "attention")


def check_statistics(rule: Rule, record: Record) -> None:
    """Refuse a running range, or learned parameters, whose shape would depend on the batch.

    Raises:
      UsageError: naming the layer.
    """
    operands = [(record.lhs, record.contracted[0])]
    if record.op == "attention":
        operands.append((record.rhs, record.contracted[1]))
    if record.op == "param" and rule.weight_quantizer is not None and rule.weight_quantizer.ema is not None:
        raise UsageError(
            f"parameter {record.path!r}: weight_quantizer {rule.weight_quantizer.describe()!r} keeps a running range, "
            "which a parameter outside a layer has no place for; use statistics=None"
        )
    quantizer = rule.act_quantizer
    for operand, axes in operands:
        if operand is None or quantizer is None:
            continue
        check_learned(rule, record.path, operand.shape, axes)
        if quantizer.ema is None:
            continue
        kept = set(range(len(operand.shape))) - set(axes)
        if not kept <= set(layout(operand.shape, quantizer.per, axes).axes):  # type: ignore[attr-defined]
            raise UsageError(
                f"layer {record.path!r}: act_quantizer {quantizer.describe()!r} keeps a running range with a scale per "
                "example, which has no meaning for another batch; use per='tensor'"
            )


def shape_of(x: Array) -> jax.ShapeDtypeStruct:
    """Shape and dtype."""
    return jax.ShapeDtypeStruct(x.shape, x.dtype)
