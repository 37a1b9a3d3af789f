"""Which widths a file stands for, and what separate models of each would take."""

from __future__ import annotations

import jax

from qtrain.export import coding
from qtrain.export.encode import scale_leaves
from qtrain.export.model import Exported
from qtrain.export.switching import can_narrow
from qtrain.inject import QuantizedModel
from qtrain.inject.learned import LEARNED, Learned
from qtrain.quantizers import LSQ, DoubleRounding
from qtrain.quantizers.double_rounding import NARROWEST


def trained_widths(qmodel: QuantizedModel, exported: Exported) -> tuple[int, ...]:
    """The widths, descending, that the model was trained for and can be had at; none where it stays as it is."""
    following = [one for one in exported.stored.values() if not one.fixed]
    if not following or not all(map(can_narrow, following)):
        return ()
    tables = (q.widths for rule in qmodel.rules if isinstance(q := rule.act_quantizer, LSQ) and rule.acts is None)
    trained = {*qmodel.per_width, *(width for table in tables for width in table or ())}
    highest = min(one.bits for one in following)
    return tuple(sorted((width for width in trained if NARROWEST <= width <= highest), reverse=True))


def bytes_alone(exported: Exported, width: int) -> int:
    """Bytes of the tensors of a model of that width alone: its codes packed, one row of whatever is held per width."""
    source = exported.source
    stored, rest = source.narrowed(source.requested(width))
    total = sum(value.nbytes for value in jax.tree.leaves(rest))
    for one in stored.values():
        total += sum(array.nbytes for array in coding.to_bytes(one.codes)[1].values())
        total += sum(4 * leaf.size for leaf in scale_leaves(one.scale).values())
    learned = Learned(rest.get(LEARNED, {}))
    for path, rule in zip(source.acts, exported.qmodel.rules, strict=True):
        rows = getattr(rule.act_quantizer, "widths", None) or (width,)
        total -= sum(table.nbytes - table.nbytes // len(rows) for table in learned.at(path).get("acts", {}).values())
    return total


def remark(exported: Exported) -> str:
    """What to say of integers that other widths would follow from, had they been exported at their full width."""
    for name, one in exported.stored.items():
        if not one.fixed and isinstance(one.quantizer, DoubleRounding) and not can_narrow(one):
            high = one.quantizer.high
            return f"{name} is at {one.bits} of {high} bits, so that no other width follows; --bits {high} gives all"
    return ""
