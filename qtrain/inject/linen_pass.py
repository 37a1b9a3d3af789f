"""One pass through a linen model: what its rules mean for the shapes of a call, and the call itself."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
from flax.core import DenyList

from qtrain.errors import UsageError
from qtrain.inject import parameters
from qtrain.inject import per_width as per_widths
from qtrain.inject.checks import Bits, check_bits, check_paths
from qtrain.inject.execution import Choice, choose
from qtrain.inject.learned import LEARNED, Learned
from qtrain.inject.per_width import Held
from qtrain.inject.resolve import Memory, Resolved, abstract, kernels, resolve, signature, split_static
from qtrain.inject.rows_in_use import has_tables, tables
from qtrain.inject.rules import Rule, expanded
from qtrain.inject.trace import Contract, Record, Trace
from qtrain.precision import Precision
from qtrain.quantizers import contract, noise
from qtrain.quantizers.native import Paths

Array = jax.Array

# nn.jit inside a model caches by the structure of what it is given, so that a closed-over bit width would be frozen
# there, or a tracer leak. A random stream of a name never used before changes that structure: it traces anew.
_traces = itertools.count()

STATE = DenyList("params")
"""What a training step may write to."""


@dataclasses.dataclass(frozen=True, eq=False)
class Passes:
    """What `qtrain.inject.QuantizedModel`, which says what the fields are, does with its module."""

    module: nn.Module
    rules: tuple[Rule, ...]
    execute: Contract = contract
    widest: Precision = dataclasses.field(default_factory=Precision)
    narrowest: Precision = dataclasses.field(default_factory=Precision)
    choices: Mapping[str, Choice] = dataclasses.field(default_factory=dict)
    per_width: tuple[int, ...] = ()
    _memory: Memory = dataclasses.field(default_factory=Memory, init=False, repr=False)

    @functools.cached_property
    def expanded(self) -> tuple[Rule, ...]:
        """The rules as they apply to each kind of operation; see `qtrain.inject.rules.expanded`."""
        return expanded(self.rules)

    def _init(self, rngs: Any, args: Any, kwargs: Any, bits: Bits | None) -> tuple[dict[str, Any], Learned]:
        """The variables as the plain model has them, without rows, and what quantizers have created."""
        resolved = self._resolve(None, rngs, args, kwargs)
        learned = Learned(create=True)
        options: dict[str, Any] = {"create_statistics": True, "initial_bits": bits, "learned": learned}
        trace = Trace(self.expanded, resolved.assigned, contract=self.execute, inside=resolved.inside, **options)
        with nn.intercept_methods(trace.intercept):
            variables = dict(self.module.init(_retraced(rngs), *args, **kwargs))
        parameters.create(trace, resolved, variables.get("params", {}))
        return {**variables, LEARNED: learned.merged(variables.get(LEARNED, {}))}, learned

    def _find_tables(self, quant: Any, learned: Learned, rngs: Any, args: Any, kwargs: Any) -> None:
        """Remember which learned parameters have a row for each width, and on which axis."""
        if not has_tables(self.rules):
            return

        def shapes(rules: Sequence[Rule]) -> Any:
            other = dataclasses.replace(self, rules=tuple(rules))
            dynamic, rebuild = split_static((rngs, args, kwargs))

            def initialise(dynamic: list[Any]) -> Any:
                inner_rngs, inner_args, inner_kwargs = rebuild(dynamic)
                return other._init(inner_rngs, inner_args, inner_kwargs, None)[0][LEARNED]

            return jax.eval_shape(initialise, dynamic)

        assigned = self._resolve(None, rngs, args, kwargs).assigned
        known = self._memory.tables or {}
        self._memory.tables = tables(quant, learned.shapes, self.expanded, assigned, shapes, known)

    def _apply(
        self,
        variables: Mapping[str, Any],
        args: Any,
        kwargs: Any,
        bits: Bits,
        rngs: Any,
        mutable: Any,
        method: Any,
        paths: Callable[[Rule, Record, Precision], Paths] | None,
        learned: Learned | None = None,
    ) -> Any:
        """`apply` with the products carried out as `paths` says; None: in float."""
        check_bits(bits)
        held = self.held(variables, *args, rngs=rngs, **with_method(kwargs, method))
        shapes = per_widths.without_rows(variables, held, self.per_width) if held.leaves else variables
        resolved = self._resolve(shapes, rngs, args, kwargs, mutable, method)
        check_paths(bits, resolved, self.expanded)
        per_widths.check_known(variables, held, bits)
        rows = per_widths.indices(held, bits, self.per_width, resolved.modules)
        bare = per_widths.selected(variables, rows) if rows else variables
        out = self._run(resolved, bare, args, kwargs, bits, rngs, mutable, method, paths, learned)
        return self._scattered(out, variables, rows, mutable)

    def _run(
        self,
        resolved: Resolved,
        variables: Mapping[str, Any],
        args: Any,
        kwargs: Any,
        bits: Bits,
        rngs: Any,
        mutable: Any,
        method: Any,
        paths: Callable[[Rule, Record, Precision], Paths] | None = None,
        learned: Learned | None = None,
    ) -> Any:
        """`_apply` on the variables of the plain model."""
        if learned is None:
            learned = Learned(variables.get(LEARNED, {}))
        options: dict[str, Any] = {"contract": self.execute, "choose": paths, "learned": learned}
        trace = Trace(self.expanded, resolved.assigned, bits, _seed(rngs), inside=resolved.inside, **options)
        variables = parameters.quantized(trace, resolved, variables)
        with nn.intercept_methods(trace.intercept):
            out = self.module.apply(variables, *args, rngs=_retraced(rngs), mutable=mutable, method=method, **kwargs)
        # What no rule is for may be passed over; parameters are quantized before the call.
        planned = {path for path in resolved.assigned if resolved.records[path].op != "param"}
        astray = sorted((planned - trace.records.keys()) | (trace.records.keys() - resolved.records.keys()))
        if astray:
            raise UsageError(
                f"layers {astray[:6]} are planned but were not reached in this trace, or the reverse: a transformation "
                "inside the model (nn.jit with a restricted rngs=) replays an older trace; let it lift every stream"
            )
        return out

    def _scattered(self, out: Any, variables: Any, rows: Mapping[Any, Any], mutable: Any) -> Any:
        """What a call returns, with the collections it has written in their rows."""
        if not rows or mutable is False:
            return out
        result, updated = out
        return result, per_widths.scattered(updated, variables, rows, self.per_width)

    def held(self, variables: Any, *args: Any, rngs: Any = None, **kwargs: Any) -> Held:
        """Which variables are held `per_width`, and the layer that each follows; arguments as for `apply`.

        Nothing is computed. Where `variables` has what the model was not seen with before, a pass of shapes through its
        ``init`` tells.
        """
        memory = self._memory
        if self.per_width and not per_widths.named(variables).keys() <= memory.held.known:
            key = jax.random.key(0)
            keys = rngs if isinstance(rngs, Mapping) else {} if rngs is None else {"params": rngs}
            abstract_args, abstract_kwargs = jax.tree.map(abstract, (args, kwargs))
            self._resolve(None, {"params": key, "dropout": key, **keys}, abstract_args, abstract_kwargs)
        return memory.held

    def _paths(self, rule: Rule, record: Record, bits: Precision | None = None) -> Paths:
        return self._choose(rule, record, bits).paths

    def _choose(self, rule: Rule, record: Record, bits: Precision | None = None) -> Choice:
        recorded = self.choices.get(record.path)
        backend = jax.default_backend()
        return choose(rule, record, self.widest, backend, narrowest=self.narrowest, bits=bits, recorded=recorded)

    def _resolve(
        self, variables: Any, rngs: Any, args: Any, kwargs: Any, mutable: Any = True, method: Any = None
    ) -> Resolved:
        """The rules resolved for these shapes, from a trace that only writes the layers down; remembered."""
        key = signature((variables, rngs, args, kwargs), repr(mutable), method)
        known = self._memory.get(key)
        if known is not None:
            return known
        dynamic, rebuild = split_static((variables, rngs, args, kwargs))
        trace = Trace(self.rules)

        def record(dynamic: list[Any]) -> Any:
            inner_variables, inner_rngs, inner_args, inner_kwargs = rebuild(dynamic)
            rngs = _retraced(inner_rngs)
            with nn.intercept_methods(trace.intercept):
                if inner_variables is None:
                    return per_widths.of_norms(self.module.init(rngs, *inner_args, **inner_kwargs))
                self.module.apply(
                    inner_variables, *inner_args, rngs=rngs, mutable=mutable, method=method, **inner_kwargs
                )

        created = jax.eval_shape(record, dynamic)
        owners = kernels((created if variables is None else variables).get("params", {}))
        resolved = resolve(self.rules, trace, owners, self._memory, initialising=variables is None)
        if self.per_width and variables is None:
            found = per_widths.find(trace, created, self.expanded, resolved.assigned)
            self._memory.held = self._memory.held.merged(found)
        self._memory.put(key, resolved)
        return resolved


def with_method(kwargs: Mapping[str, Any], method: Any) -> dict[str, Any]:
    """Keywords with the method, where there is one."""
    return dict(kwargs) if method is None else {**kwargs, "method": method}


def _seed(rngs: Any) -> Array | None:
    return noise.seed(rngs["quant"]) if isinstance(rngs, Mapping) and "quant" in rngs else None


def _retraced(rngs: Any) -> dict[str, Any]:
    streams = dict(rngs) if isinstance(rngs, Mapping) else {} if rngs is None else {"params": rngs}
    return {**streams, f"quant_trace_{next(_traces)}": jax.random.key(0)}
