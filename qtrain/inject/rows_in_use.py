"""Of variables with a row for each width, the row that a step uses: what an optimizer may move."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from qtrain.inject.learned import LEARNED
from qtrain.inject.per_width import Held, Path, indices
from qtrain.inject.rules import Rule
from qtrain.inject.trace import effective_bits
from qtrain.precision import Precision
from qtrain.quantizers import Quantizer
from qtrain.quantizers.base import FLOAT_BITS
from qtrain.quantizers.parameters import RowInUse, table_row
from qtrain.trees import leaf_name

Array = jax.Array
Bits = Precision | Mapping[str, Precision]

_KINDS = {"weights": "weight_quantizer", "acts": "act_quantizer", "bias": "bias_quantizer", "acts_rhs": "act_quantizer"}


@dataclasses.dataclass(frozen=True)
class Table:
    """A learned parameter of a quantizer that has a row for each width.

    Attributes:
      axis: its axis of rows, behind those of a scan whose iterations have their own.
      layer: path of the layer.
      kind: "weights", "acts", "bias", or "acts_rhs" of a product of two activations.
      rule: the layer's.
    """

    axis: int
    layer: str
    kind: str
    rule: Rule

    def row(self, bits: Bits | None) -> Array:
        """The row in use at `bits`, int32; −1 where the tensor stays in float."""
        precision = bits.get(self.layer, Precision()) if isinstance(bits, Mapping) else bits or Precision()
        own = effective_bits(self.rule, precision)
        width = own.acts if self.kind.startswith("acts") else own.weights
        if width is None:
            return jnp.int32(-1)
        widths: tuple[int, ...] = table_widths(getattr(self.rule, _KINDS[self.kind]))
        return jnp.where(jnp.asarray(width) >= FLOAT_BITS, -1, table_row(widths, width))


def table_widths(quantizer: Quantizer | None) -> tuple[int, ...]:
    """The widths of a quantizer's table, ascending; () of one that has none."""
    quantizer = getattr(quantizer, "quantizer", quantizer)  # of one that wraps another, the other's
    return getattr(quantizer, "widths", None) or () if getattr(quantizer, "across_bits", "") == "table" else ()


def has_tables(rules: Sequence[Rule]) -> bool:
    """Whether any quantizer of `rules` has a table."""
    return any(table_widths(getattr(rule, field)) for rule in rules for field in _KINDS.values())


def tables(
    quant: Any,
    within: Mapping[tuple[str, str], Any],
    rules: Sequence[Rule],
    assigned: Mapping[str, int],
    init: Callable[[Sequence[Rule]], Any],
    known: Mapping[Path, Table],
) -> dict[Path, Table]:
    """The learned parameters with a row for each width, by name ("quant", module names …, kind, name).

    Args:
      quant: the collection, or its shapes.
      within: (path, kind) → the same parameters, as the layer made them inside whatever repeats it.
      rules, assigned: the rules, and path → index of a layer's rule.
      init: shapes of the collection under other rules; called only where shapes leave it open which axis is which.
      known: what was found before, which is kept.
    """
    found = dict(known)
    unclear = []
    for path, leaf in jax.tree_util.tree_flatten_with_path(quant)[0]:
        name = leaf_name(path)
        layer, kind = "/".join(name[:-2]), "".join(name[-2:-1])
        if (LEARNED, *name) in known or (layer, kind) not in within or layer not in assigned:
            continue
        if not (widths := table_widths(getattr(rules[assigned[layer]], _KINDS[kind]))):
            continue
        if not (own := within[layer, kind][name[-1]].shape):  # a number for all widths, such as the delta of EWGS
            continue
        axes = _possible_axes(leaf.shape, own, len(widths))
        found[LEARNED, *name] = Table(axes[0], layer, kind, rules[assigned[layer]])
        unclear += [name] if len(axes) > 1 else []
    if unclear:
        # A scan may be as long as the table: the axis is that which grows with the table.
        longer = {leaf_name(p): x for p, x in jax.tree_util.tree_flatten_with_path(init([*map(_longer, rules)]))[0]}
        shapes = {leaf_name(p): x.shape for p, x in jax.tree_util.tree_flatten_with_path(quant)[0]}
        for name in unclear:
            grown = [a != b for a, b in zip(longer[name].shape, shapes[name], strict=True)]
            found[LEARNED, *name] = dataclasses.replace(found[LEARNED, *name], axis=grown.index(True))
    return found


def rows_in_use(
    bits: Bits | None, variables: Any, held: Held, widths: Sequence[int], tables: Mapping[Path, Table]
) -> dict[Path, RowInUse]:
    """Name → the row in use of each of `variables` that has rows; see `QuantizedModel.rows`."""
    norms = indices(held, bits, widths, held.modules)
    found: dict[Path, RowInUse] = {}
    for path, _ in jax.tree_util.tree_flatten_with_path(variables)[0]:
        name = leaf_name(path)
        if name in norms:
            found[name] = RowInUse(0, jnp.asarray(norms[name], jnp.int32))
        elif name in tables:
            found[name] = RowInUse(tables[name].axis, tables[name].row(bits))
    return found


def _possible_axes(shape: tuple[int, ...], own: tuple[int, ...], rows: int) -> list[int]:
    """Where the first axis of `own`, of that many `rows`, may be in `shape`, which has further axes."""
    last = len(shape) - len(own)
    return [axis for axis in range(last + 1) if shape[axis] == rows and _within(own[1:], shape[axis + 1 :])]


def _within(few: tuple[int, ...], many: tuple[int, ...]) -> bool:
    remaining = iter(many)
    return all(size in remaining for size in few)


def _longer(rule: Rule) -> Rule:
    """`rule` with a row more in each table."""
    changed: dict[str, Any] = {}
    for field in _KINDS.values():
        quantizer = getattr(rule, field)
        if widths := table_widths(quantizer):
            another = next(width for width in range(1, FLOAT_BITS) if width not in widths)
            changed[field] = _with_widths(quantizer, tuple(sorted((*widths, another))))
    return dataclasses.replace(rule, **changed)


def _with_widths(quantizer: Any, widths: tuple[int, ...]) -> Any:
    inner = getattr(quantizer, "quantizer", None)
    changed = {"widths": widths} if inner is None else {"quantizer": _with_widths(inner, widths)}
    return dataclasses.replace(quantizer, **changed)
