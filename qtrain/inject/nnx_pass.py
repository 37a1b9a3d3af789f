"""One pass through an nnx model: functions of the module, its arguments and what its quantizers keep."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from qtrain.errors import UsageError, did_you_mean
from qtrain.inject.checks import Bits, check_bits, check_paths
from qtrain.inject.execution import Choice, choose
from qtrain.inject.learned import LEARNED, Learned
from qtrain.inject.nnx_layers import injected, survey
from qtrain.inject.nnx_variables import Kept, QuantVariables
from qtrain.inject.resolve import Memory, Resolved, is_array, resolve, signature, split_static
from qtrain.inject.rules import Rule, expanded
from qtrain.inject.trace import STATISTICS, Contract, Record, Trace
from qtrain.precision import Precision
from qtrain.quantizers import noise
from qtrain.quantizers.native import Paths

Array = jax.Array
Method = str | Callable[..., Any] | None
Choose = Callable[[Rule, Record, Precision], Paths]


@dataclasses.dataclass(frozen=True)
class Call:
    """The arguments of a model's call: positional ones, keywords, and the method if it is not ``__call__``."""

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    method: Method = None

    def __call__(self, module: Any) -> Any:
        """Calls the module."""
        if self.method is None:
            return module(*self.args, **self.kwargs)
        if callable(self.method):
            return self.method(module, *self.args, **self.kwargs)
        if not callable(getattr(module, self.method, None)):
            names = [n for n in dir(type(module)) if not n.startswith("_") and callable(getattr(type(module), n))]
            near = did_you_mean(self.method, names)
            raise UsageError(f"method={self.method!r}: {type(module).__name__} has no such method.{near}")
        return getattr(module, self.method)(*self.args, **self.kwargs)

    @property
    def tree(self) -> Any:
        """The arguments as a pytree."""
        return self.args, dict(self.kwargs)

    def of(self, tree: Any) -> Call:
        """The same call with the arguments of another `tree`."""
        args, kwargs = tree
        return Call(args, kwargs, self.method)


@dataclasses.dataclass(frozen=True, eq=False)
class Settings:
    """The static part of a quantized nnx model; compared by identity, so that ``nnx.jit`` can hash it.

    Attributes: as of the linen `QuantizedModel`, and the memory of what was resolved.
    """

    rules: tuple[Rule, ...]
    execute: Contract
    widest: Precision
    narrowest: Precision
    choices: Mapping[str, Choice] = dataclasses.field(default_factory=dict)
    memory: Memory = dataclasses.field(default_factory=Memory, repr=False)

    @functools.cached_property
    def expanded(self) -> tuple[Rule, ...]:
        """The rules as they apply to each kind of operation; see `qtrain.inject.rules.expanded`."""
        return expanded(self.rules)

    def choose(self, rule: Rule, record: Record, bits: Precision | None = None) -> Choice:
        """How a layer's products are computed."""
        recorded, backend = self.choices.get(record.path), jax.default_backend()
        return choose(rule, record, self.widest, backend, narrowest=self.narrowest, bits=bits, recorded=recorded)

    def paths(self, rule: Rule, record: Record, bits: Precision | None = None) -> Paths:
        """The same without the reasons."""
        return self.choose(rule, record, bits).paths

    def chosen(self, resolved: Resolved) -> dict[str, Choice]:
        """The choice of each layer whose rule asks for more than float arithmetic.

        Raises:
          UsageError: for a choice of a layer that is not quantized.
        """
        asked = resolved.executed(self.expanded, self.choices)
        return {path: self.choose(rule, resolved.records[path]) for path, rule in asked.items()}


def resolved_for(settings: Settings, module: nnx.Module, call: Call) -> Resolved:
    """The rules resolved for arguments of these shapes, from a trace that only writes the layers down; remembered."""
    graphdef, state = nnx.split(module)
    signed = signature((state, call.tree), graphdef, call.method)
    known = settings.memory.get(signed)
    if known is not None:
        return known
    found = survey(module)
    owners = found.owners
    if not (found.layers or found.staged):
        names = ", ".join(repr(path) for path in list(found.modules)[:6])
        raise UsageError(
            f"{type(module).__name__} has no layer that can be quantized (Linear, Conv, Einsum, ...); its modules: "
            f"{names}"
        )
    dynamic, rebuild = split_static((state, call.tree))
    trace = Trace()

    def record(arrays: list[Any]) -> None:
        inner_state, tree = rebuild(arrays)
        copy = nnx.merge(graphdef, inner_state)
        kept = Kept(QuantVariables())
        # The module itself, too: a function among its fields may close over its layers, which the copy's are not.
        with injected(module, found, trace, kept), injected(copy, survey(copy), trace, kept):
            call.of(tree)(copy)

    jax.eval_shape(record, dynamic)
    if not trace.records:
        names = ", ".join(repr(path) for path in sorted(owners)[:6])
        raise UsageError(
            f"{type(module).__name__}: this call reaches none of its layers ({names}): they are not called, or only "
            "from a function that was traced before and closes over them"
        )
    trace.notes.update(found.notes)
    # A layer that this call passes over may be reached by another: what its rules are is not decided here.
    reached = {path: name for path, name in found.modules.items() if path not in owners or path in trace.records}
    trace.modules.update(reached)
    resolved = resolve(settings.rules, trace, owners, settings.memory, initialising=False)
    settings.memory.put(signed, resolved)
    return resolved


def quantized(
    settings: Settings,
    module: nnx.Module,
    call: Call,
    bits: Bits,
    learned: Learned,
    kept: Kept,
    key: Array | None,
    paths: Choose | None,
) -> Any:
    """What the module returns, quantized to `bits`; its products carried out as `paths` says, None: in float."""
    check_bits(bits)
    resolved = resolved_for(settings, module, call)
    check_paths(bits, resolved, settings.expanded)
    seed = None if key is None else noise.seed(key)
    options: dict[str, Any] = {"contract": settings.execute, "choose": paths, "learned": learned}
    trace = Trace(settings.expanded, resolved.assigned, bits, seed, inside=resolved.inside, **options)
    with injected(module, survey(module), trace, kept):
        out = call(module)
    astray = sorted(
        (resolved.assigned.keys() - trace.records.keys()) | (trace.records.keys() - resolved.records.keys())
    )
    if astray:
        raise UsageError(
            f"layers {astray[:6]} are planned but were not reached in this trace, or the reverse: a transformation "
            "inside the model (a jax.jit that closes over a layer) replays an older trace; use nnx.jit with the layer "
            "as an argument"
        )
    return out


def created(settings: Settings, module: nnx.Module, call: Call, bits: Bits | None, learned: Learned) -> tuple[Any, Any]:
    """Learned parameters and running ranges as they begin, from a pass through the float model."""
    resolved = resolved_for(settings, module, call)
    kept = Kept(QuantVariables(), creating=frozenset({LEARNED, STATISTICS}))
    options: dict[str, Any] = {"create_statistics": True, "initial_bits": bits, "learned": learned}
    trace = Trace(settings.expanded, resolved.assigned, contract=settings.execute, inside=resolved.inside, **options)
    with injected(module, survey(module), trace, kept):
        call(module)
    return kept.created[LEARNED], kept.created[STATISTICS]


def collections(state: nnx.State) -> tuple[dict[str, Any], Callable[[Mapping[str, Any]], nnx.State]]:
    """``params`` and, for the other numbers that a product may be made of, ``state``; and the way back.

    Keys and counters of random streams are neither: they stay as they are.
    """
    found: dict[str, Any] = {"params": {}, "state": {}}
    places: list[tuple[str, ...]] = []
    leaves, treedef = jax.tree_util.tree_flatten_with_path(state, is_leaf=lambda x: isinstance(x, nnx.Variable))
    for path, variable in leaves:
        names = tuple(jax.tree_util.keystr((key,), simple=True) for key in path)
        value = variable.get_value() if isinstance(variable, nnx.Variable) else variable
        inexact = is_array(value) and jnp.issubdtype(value.dtype, jnp.inexact)
        places.append(("params" if isinstance(variable, nnx.Param) else "state", *names) if inexact else ())
        if inexact:
            at(found, places[-1][:-1])[names[-1]] = value

    def restore(variables: Mapping[str, Any]) -> nnx.State:
        values = []
        for (_, leaf), place in zip(leaves, places, strict=True):
            value = leaf.get_value() if isinstance(leaf, nnx.Variable) else leaf
            value = at(variables, place[:-1])[place[-1]] if place else value
            # Always a new variable: one of another trace could not be written.
            values.append(leaf.replace(value) if isinstance(leaf, nnx.Variable) else value)
        return jax.tree_util.tree_unflatten(treedef, values)

    return found, restore


def at(tree: Any, names: Sequence[str]) -> Any:
    """The mapping at a path of nested ones, made where there is none."""
    for name in names:
        tree = tree.setdefault(name, {})
    return tree
