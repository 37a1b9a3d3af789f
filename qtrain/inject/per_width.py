"""Variables that are held once for each width: those of norm layers, whose statistics differ from width to width."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

from qtrain.errors import UsageError
from qtrain.inject.rules import Rule
from qtrain.inject.trace import Trace
from qtrain.precision import Precision
from qtrain.quantizers.base import static_bits
from qtrain.quantizers.parameters import check_widths, table_row
from qtrain.trees import leaf_name

Array = jax.Array
Bits = Precision | Mapping[str, Precision]
Path = tuple[str, ...]

STATISTICS = "batch_stats"
COLLECTIONS = ("params", STATISTICS)
"""Collections of which norm layers have variables."""

NORMS = (nn.BatchNorm, nn.LayerNorm, nn.RMSNorm, nn.GroupNorm, nn.InstanceNorm)


@dataclasses.dataclass(frozen=True)
class Leaf:
    """A variable that is held per width.

    Attributes:
      module: path of the module that it belongs to.
      follows: path of the layer whose weight bits choose the row; None where no layer follows the schedule: row 0.
      shape: of a row.
    """

    module: str
    follows: str | None
    shape: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Held:
    """What of a model is held per width.

    Attributes:
      leaves: name, (collection, module names …, name), → what is held per width.
      known: names of all parameters and statistics that the model was seen to have.
    """

    leaves: Mapping[Path, Leaf] = dataclasses.field(default_factory=dict)
    known: frozenset[Path] = frozenset()

    def merged(self, other: Held) -> Held:
        """With what `other` has seen; of what both have, that of the one that has seen more."""
        less, more = sorted((self, other), key=lambda held: len(held.known))
        return Held({**less.leaves, **more.leaves}, self.known | other.known)

    @property
    def modules(self) -> dict[str, str | None]:
        """Path of each module that has variables held per width → the layer it follows."""
        return {leaf.module: leaf.follows for leaf in self.leaves.values()}


def checked(widths: Sequence[int]) -> tuple[int, ...]:
    """`widths`, descending.

    Raises:
      UsageError: when they are not different whole numbers of bits from 1 to 23.
    """
    try:
        given = tuple(widths)
        ascending = tuple(sorted(given))
        if given:
            check_widths(ascending)
    except (TypeError, UsageError):
        raise UsageError(
            f"quantize: per_width={widths!r}: give different whole numbers of bits from 1 to 23, such as (8, 6, 4, 2)"
        ) from None
    return tuple(int(width) for width in reversed(ascending))


def find(trace: Trace, shapes: Mapping[str, Any], rules: Sequence[Rule], assigned: Mapping[str, int]) -> Held:
    """The variables of norm layers, and the layer that each of these follows.

    A norm layer follows the last layer executed before it whose weights follow the schedule, else the first one after
    it: its statistics are those of what that layer computes, or of what enters it. A module that is called several
    times counts at its first call.

    Args:
      trace: of an initialisation, in which the layers were only written down.
      shapes: the variables it created.
      rules, assigned: the rules, and path → index of a layer's rule.
    """
    order = list(trace.records)
    following = {
        path
        for path, index in assigned.items()
        if rules[index].weight_quantizer is not None and rules[index].weights is None and path in trace.records
    }

    def followed(module: str) -> str | None:
        position = trace.reached.get(module, 0)
        before = [path for path in order[:position] if path in following]
        after = [path for path in order[position:] if path in following]
        return before[-1] if before else after[0] if after else None

    leaves = named(shapes)
    owners = {name: _owner(name, trace.types) for name in leaves}
    keep_statistics = {owner for name, owner in owners.items() if name[0] == STATISTICS}
    held = {}
    for name, owner in owners.items():
        norm = owner in keep_statistics or any(issubclass(kind, NORMS) for kind in trace.types.get(owner, ()))
        # The stored integers of a quantized layer are one for all widths, whatever statistics it keeps besides.
        if norm and (name[0] == STATISTICS or owner not in trace.records):
            held[name] = Leaf(owner, followed(owner), tuple(leaves[name].shape))
    return Held(held, frozenset(leaves))


def _owner(leaf: Path, modules: Mapping[str, Any]) -> str:
    """Path of the innermost module that a variable is in: a parameter may be a tree itself."""
    paths = ("/".join(leaf[1:end]) for end in range(len(leaf) - 1, 0, -1))
    return next((path for path in paths if path in modules), "")


def broadcast(variables: Any, held: Held, widths: Sequence[int]) -> Any:
    """`variables` of the plain model with as many equal rows, on a new leading axis, as there are `widths`."""
    return _map(lambda name, leaf: _repeated(leaf, widths) if name in held.leaves else leaf, variables)


def without_rows(variables: Any, held: Held, widths: Sequence[int]) -> Any:
    """The shapes of `variables` of the plain model.

    Raises:
      UsageError: for a variable that has no rows, or another number of them.
    """

    def bare(name: Path, leaf: Any) -> Any:
        if name not in held.leaves:
            return leaf
        expected = held.leaves[name].shape
        if leaf.shape != (len(widths), *expected):
            fix = "give variables of this model"
            if leaf.shape == expected:
                fix = "variables of a plain model get rows by qmodel.with_rows(variables, *args)"
            raise UsageError(
                f"per_width={tuple(widths)}: {'/'.join(name)!r} has shape {leaf.shape}, and a row for each width makes "
                f"it {(len(widths), *expected)}; {fix}"
            )
        return jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype)

    return _map(bare, variables)


def check_known(variables: Mapping[str, Any], held: Held, bits: Bits | None) -> None:
    """Refuse bits that differ from layer to layer as long as it is unknown which layer a norm follows.

    Raises:
      UsageError: for variables of layers that no pass has reached, one of which may be just before a norm.
    """
    if isinstance(bits, Mapping) and held.leaves and (unknown := sorted(named(variables).keys() - held.known)):
        shown = ["/".join(name) for name in unknown[:3]]
        raise UsageError(
            f"bits for each layer choose the variables of norms, and this call does not reach what has {shown}: which "
            "layer a norm follows is unknown; call plan or init before, so that they reach every layer"
        )


def indices(held: Held, bits: Bits | None, widths: Sequence[int], reached: Mapping[str, Any]) -> dict[Path, Any]:
    """The row of each variable that is held per width: a Python int, or int32 where bits are arrays.

    Args:
      held: what is.
      bits: as `QuantizedModel.apply` takes them.
      widths: descending.
      reached: the modules that the call reaches; others need no bits.

    Raises:
      UsageError: for a mapping without the bits of a layer that a norm follows.
    """
    known: dict[str | None, Any] = {}
    for owner, layer in held.modules.items():
        if layer in known:
            continue
        if layer is None or bits is None:
            known[layer] = 0
        elif not isinstance(bits, Mapping):
            known[layer] = row(widths, bits.weights)
        elif layer in bits:
            known[layer] = row(widths, bits[layer].weights)
        elif owner in reached:
            raise UsageError(
                f"bits has no entry for {layer!r}, whose width chooses the variables of {owner!r}; give a Precision"
            )
    return {name: known.get(leaf.follows, 0) for name, leaf in held.leaves.items()}


def row(widths: Sequence[int], bits: Any) -> Any:
    """The row of `bits` in a table of descending `widths`: that of the nearest width below, else of the lowest.

    An int for bits that are a Python number (None, float: 0), else int32.
    """
    if bits is None:
        return 0
    ascending = tuple(reversed(widths))
    concrete = static_bits(bits)
    if concrete is None:
        return len(widths) - 1 - table_row(ascending, bits)
    return len(widths) - 1 - sum(concrete >= width for width in ascending[1:])


def selected(variables: Any, rows: Mapping[Path, Any]) -> Any:
    """`variables` as the plain model has them, of the given rows."""

    def select(name: Path, leaf: Any) -> Any:
        index = rows.get(name)
        if index is None:
            return leaf
        # Behind a barrier the model's own program is what it is for plain variables, so that its results are, too: a
        # compiler may contract a product and a sum, depending on what is fused with them.
        taken = leaf[index] if isinstance(index, int) else lax.dynamic_index_in_dim(leaf, index, 0, keepdims=False)
        return lax.optimization_barrier(taken)

    return _map(select, variables)


def scattered(updated: Any, variables: Any, rows: Mapping[Path, Any], widths: Sequence[int]) -> Any:
    """`updated`, which a call of the model has written, back in its rows of `variables`; other rows are as they were.

    A variable that the call has created gets equal rows.
    """
    before = named(variables)

    def scatter(name: Path, leaf: Any) -> Any:
        if name not in rows:
            return leaf
        if name not in before:
            return _repeated(leaf, widths)
        whole = jnp.asarray(before[name])
        return lax.dynamic_update_index_in_dim(whole, leaf.astype(whole.dtype), rows[name], 0)

    return _map(scatter, updated)


def of_norms(variables: Mapping[str, Any]) -> dict[str, Any]:
    """Of `variables` the collections that norm layers have some in."""
    return {name: value for name, value in variables.items() if name in COLLECTIONS}


def named(variables: Mapping[str, Any]) -> dict[Path, Any]:
    """The leaves of these collections, by name."""
    return {leaf_name(path): leaf for path, leaf in jax.tree_util.tree_flatten_with_path(of_norms(variables))[0]}


def _repeated(leaf: Array, widths: Sequence[int]) -> Array:
    return jnp.broadcast_to(leaf[None], (len(widths), *leaf.shape))


def _map(function: Callable[[Path, Any], Any], variables: Mapping[str, Any]) -> dict[str, Any]:
    """`variables` with `function` of name and leaf in the place of each leaf that `named` gives."""
    mine = of_norms(variables)
    mapped = jax.tree_util.tree_map_with_path(lambda path, leaf: function(leaf_name(path), leaf), mine)
    return {name: mapped.get(name, value) for name, value in variables.items()}
