"""The rows of a plan: what was resolved, joined with what was counted."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence

from qtrain.cost import marker
from qtrain.cost.ops import Ops
from qtrain.inject.plan import Row, narrow
from qtrain.inject.record import Record, op_bits
from qtrain.inject.resolve import Resolved
from qtrain.inject.rules import WEIGHTED, Rule
from qtrain.quantizers import Quantizer, layout_of


def rows(resolved: Resolved, rules: Sequence[Rule], ops: Ops, shared: Collection[str] = ()) -> tuple[Row, ...]:
    """A row for each layer, quantized or not, and for whatever else multiplies, in order of execution.

    `shared`: paths of scanned layers whose iterations have their learned quantizer parameters in common.
    """
    macs: dict[str, int] = {}
    unmarked: dict[str, Ops] = {}
    for path, group in ops.by_path().items():
        plain = Ops(op for op in group if op.marker is None)
        macs[path] = sum(op.forward for op in group if op.marker is not None)
        if plain:
            unmarked[path] = plain
    found: list[Row] = []
    told: set[str] = set()
    for path, record in resolved.records.items():
        index = resolved.assigned.get(path)
        if index is None:
            if row := _unruled(record, unmarked, told):
                found.append(row)
            continue
        rule = rules[index]
        bits = op_bits(path, rule, record.op)
        scales = 0
        if record.rhs is not None and rule.weight_quantizer is not None and hasattr(rule.weight_quantizer, "per"):
            scales = layout_of(rule.weight_quantizer, record.rhs.shape, record.contracted[1]).num_scales
            # A kernel that is stacked for a scan or vmap has the scales of every iteration.
            stacked = max((op.rhs.parameter_size for op in ops.by_path().get(path, ())), default=0)
            scales *= max(stacked // max(math.prod(record.rhs.shape), 1), 1)
        found.append(
            Row(
                path,
                record.module,
                record.op,
                bits,
                weights=_describe(rule.weight_quantizer),
                acts=_describe(rule.act_quantizer),
                grads=_describe(rule.grad_quantizer),
                bias=_describe(rule.bias_quantizer),
                residuals=rule.residuals,
                macs=macs.get(path, 0) or _take(unmarked, path),
                weight_scales=scales,
                note=_note(rule, bits, path in shared),
            )
        )
    for path, note in resolved.notes.items():
        found.append(Row(path, resolved.modules[path], "", marker.OpBits(path), note=note, macs=_take(unmarked, path)))
    for path, group in unmarked.items():
        kinds = "two activations" if all("weight" not in (op.lhs.kind, op.rhs.kind) for op in group) else "not a layer"
        note = f"not reached by the injection: {kinds}"
        module = resolved.modules.get(path, "")
        found.append(Row(path, module, group[0].kind, marker.OpBits(path), note=note, macs=group.forward))
    return tuple(found)


def _unruled(record: Record, unmarked: dict[str, Ops], told: set[str]) -> Row | None:
    """The row of an operation that no rule covers; one for all parts of a module that the count does not tell apart."""
    path, note = record.path, "no rule" if record.op in WEIGHTED else f"no rule with ops={record.op!r}"
    if record.op == "embed":
        return Row(path, record.module, record.op, marker.OpBits(path), note=note)
    if record.op == "attend":
        return Row(path, record.module, record.op, marker.OpBits(path), note=note, macs=_take(unmarked, record.owner))
    if path not in unmarked and path != record.owner:
        path = record.owner
        if path in told:
            return None
        told.add(path)
    return Row(path, record.module, record.op, marker.OpBits(path), note=note, macs=_take(unmarked, path))


def _take(unmarked: dict[str, Ops], path: str) -> int:
    group = unmarked.pop(path, None)
    return group.forward if group else 0


def _note(rule: Rule, bits: marker.OpBits, shared: bool) -> str:
    notes = []
    if shared:
        notes.append("one learned scale for every iteration")
    if rule.position != "any":
        notes.append("first or last layer")
    if not any(map(narrow, (bits.weights, bits.acts, bits.grads))):
        notes.append("float by rule")
    if rule.residuals != "quantized":
        folded = rule.residuals == "folded"
        notes.append("scales folded into the cotangent" if folded else f"backward sees {rule.residuals} operands")
    if rule.bias_quantizer is not None:
        notes.append(f"bias {rule.bias_quantizer.describe()}")
    return "; ".join(notes)


def _describe(quantizer: Quantizer | None) -> str:
    return "float" if quantizer is None else quantizer.describe()
