"""Rules resolved against what a trace has seen of a model, and the memory of it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Hashable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from qtrain.errors import UsageError, did_you_mean
from qtrain.inject.assignment import assign, check_rules
from qtrain.inject.per_width import Held
from qtrain.inject.rows_in_use import Table
from qtrain.inject.rules import Rule, expanded
from qtrain.inject.trace import Record, Trace, check_statistics
from qtrain.quantizers import Quantizer
from qtrain.trees import leaf_name


@dataclasses.dataclass(frozen=True)
class Resolved:
    """The rules resolved against a model for arguments of given shapes.

    Attributes:
      records: path → what was seen of each quantizable layer, in order of execution.
      assigned: path → index of its rule, for those that a rule covers.
      notes: path → why a layer cannot be quantized.
      modules: path → type, of every module.
      skipped: paths that own a kernel, but which this call does not reach (an auxiliary head in evaluation).
    """

    records: Mapping[str, Record]
    assigned: Mapping[str, int]
    notes: Mapping[str, str]
    modules: Mapping[str, str]
    skipped: frozenset[str] = frozenset()

    def quantizers(self, rules: Sequence[Rule]) -> dict[tuple[str, str], Quantizer]:
        """(layer path, kind) → quantizer; a product of two activations also has the kind "acts_rhs"."""
        fields = {"weights": "weight", "acts": "act", "bias": "bias", "grads": "grad"}
        found: dict[tuple[str, str], Quantizer | None] = {}
        for path, index in self.assigned.items():
            own = fields | ({"acts_rhs": "act"} if self.records[path].op == "attention" else {})
            found |= {(path, kind): getattr(rules[index], f"{field}_quantizer") for kind, field in own.items()}
        return {owner: quantizer for owner, quantizer in found.items() if quantizer is not None}

    def executed(self, rules: Sequence[Rule], choices: Collection[str] = ()) -> dict[str, Rule]:
        """The layers whose rule asks for more than float arithmetic; `choices`: paths for which that was decided.

        Raises:
          UsageError: for a choice of a layer that is not quantized.
        """
        for path in choices:
            if path not in self.assigned and path not in self.skipped:
                near = did_you_mean(path, self.assigned)
                raise UsageError(f"execution[{path!r}]: no layer of that path is quantized.{near}")
        own = {path: rules[index] for path, index in self.assigned.items()}
        products = {path: rule for path, rule in own.items() if self.records[path].contraction is not None}
        return {path: rule for path, rule in products.items() if rule.execution != "fake"}

    @property
    def inside(self) -> frozenset[str]:
        """Paths of the modules that have something quantized inside them which is not their whole contraction."""
        return frozenset(self.records[path].owner for path in self.assigned)


class Memory:
    """What was resolved, by the shapes it was resolved for; the order of the layers in a whole pass; what is per width.

    Bounded, since an eager loop may bring new Python numbers or lambdas for ever.
    """

    def __init__(self, size: int = 128) -> None:
        self._size = size
        self._entries: dict[Hashable, Resolved] = {}
        self.order: Mapping[str, str] = {}
        self.covered: frozenset[str] = frozenset()
        self.held = Held()
        self.tables: dict[tuple[str, ...], Table] | None = None

    def __len__(self) -> int:
        return len(self._entries)

    def get(self, key: Hashable) -> Resolved | None:
        """What was remembered, if anything."""
        try:
            return self._entries.get(key)
        except TypeError:  # an argument that cannot be hashed may also change: it is resolved anew each time
            return None

    def put(self, key: Hashable, resolved: Resolved) -> None:
        """Remember."""
        if len(self._entries) >= self._size:
            self._entries.clear()
        try:
            self._entries[key] = resolved
        except TypeError:
            return

    def see(self, order: Mapping[str, str], covered: frozenset[str]) -> None:
        """Remember a pass that reaches every layer there is; the widest is kept."""
        if len(covered) > len(self.covered):
            self.order, self.covered = dict(order), covered


def resolve(
    rules: Sequence[Rule], trace: Trace, owners: frozenset[str], memory: Memory, *, initialising: bool
) -> Resolved:
    """The rules resolved against what `trace` has written down.

    Which layer is first or last is a fact of the model, not of the call: evaluation that skips an auxiliary head must
    not make another layer the last one. Where this call skips layers, the order is that of a pass which did not.

    Args:
      rules: in order.
      trace: after a pass that only writes the layers down.
      owners: paths of the parameters' tree that own a kernel.
      memory: of earlier passes.
      initialising: whether the pass created the parameters, so that it reached every layer.

    Raises:
      UsageError: for a rule that does nothing, and for a position that this call cannot tell.
    """
    records = {**trace.records, **trace.raw_parameters(rules)}
    quantizable = {path: record.op for path, record in records.items()}
    modules = frozenset(trace.modules)
    skipped = frozenset() if initialising else owners - modules
    if not quantizable and not skipped:
        raise UsageError(
            f"{trace.modules.get('', 'the model')} has no layer that can be quantized (Dense, Conv, Einsum, ...); "
            f"its modules: {', '.join(repr(path) for path in list(trace.modules)[:6])}"
        )
    order: Mapping[str, str] = quantizable
    if not skipped:
        memory.see(order, owners | modules)
    elif any(rule.position != "any" for rule in rules):
        if not owners | modules <= memory.covered:
            raise UsageError(
                f"a rule has a position, and this call does not reach {sorted(skipped)[:6]}: what is first or last is "
                "unknown; call plan or init before, so that they reach every layer, or name the layers by path"
            )
        order = memory.order
    check_rules(rules, trace.modules, quantizable, order, skipped)
    assigned, every = assign(rules, quantizable, order), expanded(rules)
    for path, index in assigned.items():
        check_statistics(every[index], records[path])
    return Resolved(records, assigned, trace.notes, trace.modules, skipped)


def kernels(params: Any) -> frozenset[str]:
    """Paths of the modules that own a parameter called kernel."""
    names = [leaf_name(path) for path, _ in jax.tree_util.tree_flatten_with_path(params)[0]]
    return frozenset("/".join(name[:-1]) for name in names if name and name[-1] == "kernel")


def signature(tree: Any, *static: Hashable) -> Hashable:
    """What a resolution depends on: the structure of `tree`, shapes and dtypes of its arrays, its other values."""
    leaves, treedef = jax.tree.flatten(tree)
    return treedef, *((x.shape, x.dtype) if is_array(x) else (type(x), x) for x in leaves), *static


def split_static(tree: Any) -> tuple[list[Any], Callable[[Sequence[Any]], Any]]:
    """The arrays of `tree`, abstract, and a function that puts arrays back among the rest."""
    treedef: Any
    leaves, treedef = jax.tree.flatten(tree)
    dynamic = [abstract(leaf) for leaf in leaves if is_array(leaf)]

    def rebuild(arrays: Sequence[Any]) -> Any:
        remaining = iter(arrays)
        return treedef.unflatten([next(remaining) if is_array(leaf) else leaf for leaf in leaves])

    return dynamic, rebuild


def abstract(x: Any) -> Any:
    """Shape and dtype of an array; anything else as it is."""
    return jax.ShapeDtypeStruct(x.shape, x.dtype) if is_array(x) else x


def is_array(x: Any) -> bool:
    """Whether a leaf is an array, concrete, traced or abstract."""
    return isinstance(x, jax.Array | np.ndarray | jax.ShapeDtypeStruct)
