"""What the quantizers of an nnx model keep: the types of variables, their tree, and a layer's place in it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from flax import nnx
from jax.extend import core

from qtrain.errors import UsageError
from qtrain.inject.learned import LEARNED
from qtrain.inject.trace import STATISTICS


class Quant(nnx.Variable):
    """A parameter that a quantizer learns; to be differentiated and trained, but no ``nnx.Param`` of the model."""


class QuantStat(nnx.Variable):
    """A running range, or how often it was updated; never differentiated."""


class QuantVariables(nnx.Module):
    """A level of the tree of the quantizers' variables: an attribute for each name.

    Not an ``nnx.Dict``, of whose methods a layer called ``keys`` or ``items`` would take the place.
    """


def variables_of(values: Mapping[str, Any], kind: type[nnx.Variable]) -> QuantVariables:
    """Nested mappings of arrays as variables of a kind."""
    level = QuantVariables()
    for name, value in values.items():
        setattr(level, name, variables_of(value, kind) if isinstance(value, Mapping) else kind(value))
    return level


def children(level: QuantVariables) -> dict[str, Any]:
    """Name → variable or further level."""
    return {name: value for name, value in vars(level).items() if isinstance(value, QuantVariables | nnx.Variable)}


def values_of(level: QuantVariables) -> dict[str, Any]:
    """Nested dicts of the arrays of a tree of variables."""
    return {
        name: value.get_value() if isinstance(value, nnx.Variable) else values_of(value)
        for name, value in children(level).items()
    }


@dataclasses.dataclass
class Kept:
    """What the quantizers of one pass keep from call to call.

    Attributes:
      statistics: running ranges, variables.
      frozen: quantize by the running ranges and leave them as they are.
      creating: the collections that this pass creates.
      created: collection → nested dicts of what it has created.
    """

    statistics: QuantVariables
    frozen: bool = False
    creating: frozenset[str] = frozenset()
    created: dict[str, dict[str, Any]] = dataclasses.field(default_factory=lambda: {LEARNED: {}, STATISTICS: {}})
    level: Any = dataclasses.field(default_factory=lambda: _level())

    @property
    def inside(self) -> bool:
        """Whether the pass is inside a transformation of the model's own, out of which no array can be handed."""
        return _level() != self.level


def _level() -> Any:
    return core.get_opaque_trace_state(convention="nnx")


class Place:
    """A layer's place among what quantizers keep: what its scope is to the injection of a linen model."""

    def __init__(self, path: str, kept: Kept) -> None:
        self.path, self.kept = path, kept

    def has_variable(self, collection: str, name: str) -> bool:
        """Whether there is an entry. Learned parameters that are not being created are read from the whole tree."""
        if collection in self.kept.creating:
            return name in self._created(collection)
        if collection == LEARNED:
            return False
        if name not in self._statistics():
            raise UsageError(
                f"layer {self.path!r} keeps running ranges (statistics=), and has none yet: call qmodel.init with the "
                "model's arguments, or use statistics=None"
            )
        return True

    def get_variable(self, collection: str, name: str) -> Any:
        """The entry."""
        if collection in self.kept.creating:
            return self._created(collection)[name]
        return values_of(self._statistics()[name])

    def put_variable(self, collection: str, name: str, values: Mapping[str, Any]) -> None:
        """Writes the entry."""
        if collection in self.kept.creating:
            self._created(collection)[name] = values
            return
        for key, variable in children(self._statistics()[name]).items():
            variable.set_value(values[key])

    def is_mutable_collection(self, collection: str) -> bool:
        """Whether it may be written."""
        if collection == LEARNED:
            return LEARNED in self.kept.creating and not self.kept.inside
        if self.kept.inside and not self.kept.frozen:
            raise UsageError(
                f"layer {self.path!r} keeps running ranges (statistics=), which cannot be updated from inside a "
                "transformation of the model's own (nnx.scan, nnx.vmap, nnx.remat): use statistics=None"
            )
        return not self.kept.frozen

    def _created(self, collection: str) -> dict[str, Any]:
        place = self.kept.created[collection]
        for name in self.path.split("/") if self.path else ():
            place = place.setdefault(name, {})
        return place

    def _statistics(self) -> dict[str, Any]:
        found = children(self.kept.statistics)
        for name in self.path.split("/") if self.path else ():
            found = children(found[name]) if isinstance(found.get(name), QuantVariables) else {}
        return found
