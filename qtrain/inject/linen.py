"""A linen model with quantizers injected: same parameters, bits as an argument."""

from __future__ import annotations

import dataclasses
import itertools
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.core import DenyList

from qtrain.cost.count import count
from qtrain.errors import UsageError, did_you_mean
from qtrain.inject import parameters
from qtrain.inject import per_width as per_widths
from qtrain.inject.checks import Bits, check_bits, check_paths, limits
from qtrain.inject.execution import Choice, choose
from qtrain.inject.learned import LEARNED, Learned
from qtrain.inject.per_width import Held
from qtrain.inject.plan import Plan
from qtrain.inject.resolve import Memory, Resolved, abstract, is_array, kernels, resolve, signature, split_static
from qtrain.inject.rows import rows
from qtrain.inject.rows_in_use import RowInUse, has_tables, rows_in_use, tables
from qtrain.inject.rules import Rule, default_rules, expanded
from qtrain.inject.trace import Contract, Record, Trace
from qtrain.inject.weights import Weight, weights
from qtrain.precision import Precision
from qtrain.quantizers import Quantizer, contract, noise
from qtrain.quantizers.native import Paths

Array = jax.Array

# nn.jit inside a model caches by the structure of what it is given, so that a closed-over bit width would be frozen
# there, or a tracer leak. A random stream of a name never used before changes that structure: it traces anew.
_traces = itertools.count()

_STATE = DenyList("params")  # what a training step may write to


def quantize(
    model: nn.Module,
    rules: Rule | Sequence[Rule] | None = None,
    *,
    execute: Contract = contract,
    widest: Precision | int | None = None,
    narrowest: Precision | int | None = None,
    per_width: Sequence[int] = (),
) -> QuantizedModel:
    """Inject quantizers into a Flax linen module, whoever wrote it, without touching it.

    Args:
      model: any linen module; an nnx one goes to `qtrain.inject.nnx.quantize`, which see.
      rules: a rule or an ordered sequence of them; None means `default_rules()`: every product of weights and
        activations follows the schedule, the first and the last of them stay at 8 bits.
      execute: what carries out a quantized contraction; the default computes in float on quantized values, or on
        codes where `Rule.execution` asks for it.
      widest: the most bits that traced ones will ever take, for each kind or for all: a promise that nothing can check,
        by which layers that run on codes are compiled without a float program. At up to 8 bits they need none. None, or
        more than 8: such a layer has both and switches between them (``lax.cond``), which is right at any width. Bits
        that are Python numbers speak for themselves.
      narrowest: the fewest bits that traced ones will ever take; above 8 no codes hold them, which `plan` then says.
      per_width: widths, such as (8, 6, 4, 2), for each of which norm layers have variables of their own (switchable
        batch norm, Yu et al., Slimmable Neural Networks, ICLR 2019); () for one set. See `QuantizedModel.per_width`.

    Returns:
      A `QuantizedModel`, whose ``init`` gives the parameters that ``model.init`` gives, bit for bit.

    Raises:
      UsageError: when `model` is not a linen module, a rule is none, or `per_width` holds what is no width. What
        depends on the shapes (a rule that matches nothing) is raised by `plan`, `init` and `apply`.

    >>> import flax.linen as nn, jax, jax.numpy as jnp
    >>> qmodel = quantize(nn.Sequential([nn.Dense(16), nn.relu, nn.Dense(2)]), Rule())
    >>> variables = qmodel.init(jax.random.key(0), jnp.ones((1, 4)))
    >>> qmodel.apply(variables, jnp.ones((1, 4)), bits=Precision(weights=4, acts=4)).shape
    (1, 2)
    """
    if "flax.nnx" in sys.modules and isinstance(model, sys.modules["flax.nnx"].Module):
        from qtrain.inject import nnx  # here: importing nnx takes a while, and most runs have no use for it

        limited: Any = {"widest": widest, "narrowest": narrowest, "per_width": per_width}
        return nnx.quantize(model, rules, execute=execute, **limited)  # type: ignore[return-value]
    if not isinstance(model, nn.Module):
        raise UsageError(f"quantize: {type(model).__name__} is not a flax.linen.Module instance")
    rules = default_rules() if rules is None else (rules,) if isinstance(rules, Rule) else tuple(rules)
    for rule in rules:
        if not isinstance(rule, Rule):
            raise UsageError(f"quantize: rules hold {rule!r}; give qtrain.Rule objects")
    ends = limits("widest", widest), limits("narrowest", narrowest)
    return QuantizedModel(model, rules, execute, *ends, per_width=per_widths.checked(per_width))


@dataclasses.dataclass(frozen=True, eq=False)
class QuantizedModel:
    """A linen module with quantizers injected into its layers; made by `quantize`.

    Attributes:
      module: the model as it was.
      rules: in order; the first that matches a layer's path wins.
      execute: what carries out a quantized contraction.
      widest, narrowest: per kind, the range of traced bits, Python ints; None where it is not known.
      choices: path → how the layer's products are computed, whatever the shapes of a call; see `with_choices`.
      per_width: descending widths, or (). With n of them the ``params`` and ``batch_stats`` of norm layers (linen's
        BatchNorm, LayerNorm, RMSNorm, GroupNorm and InstanceNorm, and any other module that keeps ``batch_stats``) have
        a leading axis of n rows, of which a call uses one and gives the others back as they are. The row is that of
        the weight bits of the layer before the norm: the last one executed that follows the schedule, else the first
        after it; so that bits for each path mix rows. Bits that are none of the widths take the row of the nearest one
        below, else of the lowest; the float model (``bits=None``), and a model none of whose layers follows the
        schedule, the first row. The row is data: one program serves all widths.
    """

    module: nn.Module
    rules: tuple[Rule, ...]
    execute: Contract = contract
    widest: Precision = dataclasses.field(default_factory=Precision)
    narrowest: Precision = dataclasses.field(default_factory=Precision)
    choices: Mapping[str, Choice] = dataclasses.field(default_factory=dict)
    per_width: tuple[int, ...] = ()
    _memory: Memory = dataclasses.field(default_factory=Memory, init=False, repr=False)

    @property
    def expanded(self) -> tuple[Rule, ...]:
        """The rules as they apply to each kind of operation; see `qtrain.inject.rules.expanded`."""
        return expanded(self.rules)

    def init(self, rngs: Any, *args: Any, bits: Bits | None = None, **kwargs: Any) -> dict[str, Any]:
        """The variables of ``module.init``, and the quantizers' own.

        Args:
          rngs, *args, **kwargs: as for ``module.init``.
          bits: the precision for which learned parameters begin; None: 8 bits, for those whose beginning depends on it.

        Returns:
          ``params`` and whatever other collections the model has, equal to the plain model's bit for bit (as is each
          row of what is held `per_width`); ``quant``: learned quantizer parameters (empty when no quantizer learns
          any), those of activations as they should be for the given input: see `calibrate`; ``quant_stats``, only if a
          quantizer keeps running ranges: they start empty (count 0) and no gradient ever reaches them.

        Raises:
          UsageError: for a rule that does nothing, or running ranges that cannot be kept.
        """
        variables, learned = self._init(rngs, args, kwargs, bits)
        self._find_tables(variables[LEARNED], learned, rngs, args, kwargs)
        return per_widths.broadcast(variables, self._memory.held, self.per_width) if self.per_width else variables

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

    def calibrate(
        self, variables: Mapping[str, Any], *args: Any, bits: Bits, rngs: Any = None, **kwargs: Any
    ) -> dict[str, Any]:
        """`variables` with the learned quantizer parameters made anew: from the weights, and from one batch.

        The batch passes through the model quantized to `bits`, each layer's quantizers beginning from what reaches it,
        as LSQ's authors do in their first step. For weights loaded from a float checkpoint, and for activations once
        real data is at hand. Not inside ``jit``: it compiles a program of its own.

        Args:
          variables: ``params`` and the model's other collections; an older ``quant`` is not looked at.
          *args, **kwargs, rngs: the model's arguments for one batch, as for `apply`.
          bits: the precision that training begins with.

        Returns:
          `variables` with a new ``quant``; nothing else is changed (running ranges, batch statistics). A layer in a
          scan whose ``variable_axes`` do not list ``quant`` gets one set of parameters, the average over iterations.
        """
        given = {name: value for name, value in variables.items() if name != LEARNED}
        learned = Learned(create=True, observe=True)
        _, rebuild = split_static((given, bits, rngs, args, kwargs))
        leaves = [leaf for leaf in jax.tree.leaves((given, bits, rngs, args, kwargs)) if is_array(leaf)]

        def forward(arrays: list[Any]) -> Any:
            inner, inner_bits, inner_rngs, inner_args, inner_kwargs = rebuild(arrays)
            options: dict[str, Any] = {"learned": learned}
            _, state = self._apply(
                inner, inner_args, inner_kwargs, inner_bits, inner_rngs, _STATE, None, self._paths, **options
            )
            return state.get(LEARNED, {}), learned.outside

        own, learned.outside = jax.jit(forward)(leaves)
        jax.effects_barrier()
        if len(learned.seen.keys() ^ learned.shared.keys()) or any(not seen for seen in learned.seen.values()):
            raise UsageError("calibrate: call it outside jit; the model has layers inside a scan or vmap")
        return {**variables, LEARNED: learned.merged(own)}

    def with_choices(self, choices: Mapping[str, Choice | Mapping[str, Any]]) -> QuantizedModel:
        """The same model with execution chosen once and for all.

        A layer that is named here computes its products so at every shape, which keeps evaluation at another batch size
        and a resumed run at the arithmetic of the start; the others choose by the shapes of each call. Only what cannot
        run is left to the call: a product on codes falls back to float, or is refused, as without a choice.

        Args:
          choices: layer path → `Choice` (``plan.choices``), or the mapping that ``Choice.to_json`` made of one.

        Raises:
          UsageError: for a mapping that is no choice. `plan` refuses the path of a layer that is not quantized.
        """
        known = {path: c if isinstance(c, Choice) else Choice.from_json(path, c) for path, c in choices.items()}
        other = dataclasses.replace(self, choices=known)
        object.__setattr__(other, "_memory", self._memory)  # choices take no part in what is resolved
        return other

    def apply(
        self,
        variables: Mapping[str, Any],
        *args: Any,
        bits: Bits | None = None,
        rngs: Any = None,
        mutable: Any = False,
        method: Any = None,
        **kwargs: Any,
    ) -> Any:
        """The model's output, quantized to `bits`; the plain float model without them.

        Args:
          variables: as `init` gives them; a float checkpoint's collections will do when no quantizer keeps anything.
          *args: the model's own arguments, as are further keywords.
          bits: a `Precision` for every layer that follows the schedule, or ``{path: Precision}`` with one for each of
            them. May be traced: one compilation serves all widths. ``nn.jit`` inside the model is then traced anew by
            every call, so jit the call itself.
          rngs: as for ``module.apply``; ``rngs["quant"]`` is the key of stochastic rounding, needed only if a rule asks
            for it. Fold it with the step yourself; each layer folds it with its path.
          mutable: as for ``module.apply``. With ``quant_stats`` among them, running ranges are updated and each tensor
            is quantized by its own range; otherwise by the running one.
          method: as for ``module.apply``.

        Raises:
          UsageError: for bits that are no width, a path without bits, rules that do nothing, a missing key, and
            ``execution="native"`` where it cannot run: numbers above 8 as `bits`, say.
        """
        if bits is None:
            held = self.held(variables, *args, rngs=rngs, **_with_method(kwargs, method))
            if held.leaves:
                per_widths.without_rows(variables, held, self.per_width)
            rows = per_widths.indices(held, None, self.per_width, {})
            bare = per_widths.selected(variables, rows) if rows else variables
            out = self.module.apply(bare, *args, rngs=rngs, mutable=mutable, method=method, **kwargs)
            return self._scattered(out, variables, rows, mutable)
        return self._apply(variables, args, kwargs, bits, rngs, mutable, method, self._paths)

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
        held = self.held(variables, *args, rngs=rngs, **_with_method(kwargs, method))
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

    def rows(self, bits: Bits | None, variables: Any) -> dict[tuple[str, ...], RowInUse]:
        """Of the variables that have a row for each width, the rows that a step at `bits` uses.

        Of norm layers those of `per_width`; of quantizers' learned tables (``LSQ(across_bits="table")``) the row of the
        layer's own bits of that kind, which a rule may fix.

        Args:
          bits: as `apply` takes them.
          variables: ``{"params": …, "quant": …}``, arrays or shapes; what else there is has no rows.

        Returns:
          Name, such as ``("params", "BatchNorm_0", "scale")``, → axis (static) and row (int32, data). For
          `qtrain.optim.only_rows_in_use`.

        Raises:
          UsageError: when neither `init` nor `plan` has been called; a mapping of `bits` without a layer that a norm
            follows.
        """
        held, found = self._memory.held, self._memory.tables
        if (self.per_width and not held.known) or (found is None and has_tables(self.rules)):
            raise UsageError("rows: call plan or init before: which variables have rows is not known yet")
        return rows_in_use(bits, variables, held, self.per_width, found or {})

    def with_rows(self, variables: Mapping[str, Any], *args: Any, rngs: Any = None, **kwargs: Any) -> dict[str, Any]:
        """Variables of the plain model, such as a float checkpoint's, with equal rows for each of `per_width`.

        Args:
          variables: by collection, without rows.
          *args, **kwargs: the model's arguments, for their shapes; as for `plan`.

        >>> import flax.linen as nn, jax, jax.numpy as jnp
        >>> model = nn.Sequential([nn.Dense(16), nn.LayerNorm(), nn.Dense(2)])
        >>> variables = model.init(jax.random.key(0), jnp.ones((1, 4)))
        >>> rows = quantize(model, Rule(), per_width=(8, 4, 2)).with_rows(variables, jnp.ones((1, 4)))
        >>> rows["params"]["layers_1"]["scale"].shape
        (3, 16)
        """
        return per_widths.broadcast(variables, self.held(variables, *args, rngs=rngs, **kwargs), self.per_width)

    def _paths(self, rule: Rule, record: Record, bits: Precision | None = None) -> Paths:
        return self._choose(rule, record, bits).paths

    def _choose(self, rule: Rule, record: Record, bits: Precision | None = None) -> Choice:
        recorded = self.choices.get(record.path)
        backend = jax.default_backend()
        widest, narrowest = self.widest, self.narrowest
        if record.op == "attention":
            # Both operands are activations: the right one has their quantizer and bits.
            rule = dataclasses.replace(rule, weight_quantizer=rule.act_quantizer, weights=rule.acts)
            widest, narrowest = (dataclasses.replace(ends, weights=ends.acts) for ends in (widest, narrowest))
            bits = None if bits is None else dataclasses.replace(bits, weights=bits.acts)
        return choose(rule, record, widest, backend, narrowest=narrowest, bits=bits, recorded=recorded)

    def plan(self, *args: Any, rngs: Any = None, **kwargs: Any) -> Plan:
        """What is quantized, how, and its share of the multiplications, for arguments of these shapes.

        Nothing is computed: arguments may be ``jax.ShapeDtypeStruct``.

        Args:
          *args: the model's arguments, as are further keywords.
          rngs: a key or a dict of them for ``module.init``; by default streams params, dropout and quant exist, and
            flax takes the first of these for any other.

        Raises:
          UsageError: for a rule that matches nothing, or none of whose matches can be quantized; for a layer that
            cannot run on codes and whose rule has ``execution="native"``.
        """
        if not isinstance(rngs, Mapping):
            key = jax.random.key(0) if rngs is None else rngs
            rngs = {"params": key, "dropout": key}
        abstract_args, abstract_kwargs = jax.tree.map(abstract, (args, kwargs))
        dynamic, rebuild = split_static((abstract_args, abstract_kwargs))

        shared: set[str] = set()

        def initialise(dynamic: list[Any]) -> dict[str, Any]:
            inner_args, inner_kwargs = rebuild(dynamic)
            variables, learned = self._init(rngs, inner_args, inner_kwargs, None)
            self._find_tables(variables[LEARNED], learned, rngs, inner_args, inner_kwargs)
            shared.update(path for path, _ in learned.shared)
            return variables

        variables = jax.eval_shape(initialise, dynamic)

        rngs = {**rngs, "quant": jax.random.key(0)}

        method = abstract_kwargs.pop("method", None)

        def forward(variables: Any, *args: Any, **kwargs: Any) -> Any:
            # Any: the marker, not the value, says what is quantized. Traced, since some quantizers know no 8 bits, but
            # for a backend of another library, which may know no traced ones.
            eight = jnp.full((), 8.0) if self.execute is contract else 8
            bits = Precision(weights=eight, acts=eight, grads=eight)
            # Products in float whatever the rules say: the count describes the model, not the formulation, which on
            # codes has corrections for zero points, and both branches of a switch.
            return self._run(resolved, variables, args, kwargs, bits, rngs, _STATE, method)

        resolved = self._resolve(variables, rngs, abstract_args, abstract_kwargs, _STATE, method)
        choices = self._choices(resolved)
        ops = count(forward, variables, *abstract_args, **abstract_kwargs)
        used = {index % len(self.rules) for index in resolved.assigned.values()}
        unused = [rule.path for index, rule in enumerate(self.rules) if index not in used]
        norms = self._memory.held.modules
        plan = Plan(rows(resolved, self.expanded, ops, shared), ops, tuple(unused), {}, self.per_width, norms)
        return plan.with_choices(choices)

    def weights(self, *args: Any, rngs: Any = None, **kwargs: Any) -> tuple[Weight, ...]:
        """The parameters that are quantized, an entry each, in order of execution; arguments as for `plan`."""
        resolved, params = self.initial(rngs, args, kwargs)
        return weights(resolved, self.expanded, params)

    def quantizers(self, *args: Any, rngs: Any = None, **kwargs: Any) -> dict[tuple[str, str], Quantizer]:
        """(layer path, "weights" | "acts" | "bias" | "grads") → quantizer; arguments as for `plan`."""
        fields = {
            "weights": "weight_quantizer",
            "acts": "act_quantizer",
            "bias": "bias_quantizer",
            "grads": "grad_quantizer",
        }
        assigned = self.initial(rngs, args, kwargs)[0].assigned
        found = {
            (path, kind): getattr(self.expanded[index], field)
            for path, index in assigned.items()
            for kind, field in fields.items()
        }
        return {owner: quantizer for owner, quantizer in found.items() if quantizer is not None}

    def initial(self, rngs: Any, args: Any, kwargs: Any) -> tuple[Resolved, Any]:
        """The rules resolved for initialisation, and the shapes of the parameters."""
        keys = rngs if isinstance(rngs, Mapping) else dict.fromkeys(("params", "dropout"), jax.random.key(0))
        dynamic, rebuild = split_static(jax.tree.map(abstract, (args, kwargs)))

        def initialise(dynamic: list[Any]) -> Any:
            inner_args, inner_kwargs = rebuild(dynamic)
            return self.module.init(dict(keys), *inner_args, **inner_kwargs)["params"]

        resolved = self._resolve(None, keys, *rebuild(dynamic))
        return resolved, jax.eval_shape(initialise, dynamic)

    def _choices(self, resolved: Resolved) -> dict[str, Choice]:
        """The choice of each layer whose rule asks for more than float arithmetic."""
        for path in self.choices:
            if path not in resolved.assigned and path not in resolved.skipped:
                near = did_you_mean(path, resolved.assigned)
                raise UsageError(f"execution[{path!r}]: no layer of that path is quantized.{near}")
        rules = {path: self.expanded[index] for path, index in resolved.assigned.items()}
        products = {path: rule for path, rule in rules.items() if resolved.records[path].contraction is not None}
        asked = {path: rule for path, rule in products.items() if rule.execution != "fake"}
        return {path: self._choose(rule, resolved.records[path]) for path, rule in asked.items()}

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


def _with_method(kwargs: Mapping[str, Any], method: Any) -> dict[str, Any]:
    return dict(kwargs) if method is None else {**kwargs, "method": method}


def _seed(rngs: Any) -> Array | None:
    return noise.seed(rngs["quant"]) if isinstance(rngs, Mapping) and "quant" in rngs else None


def _retraced(rngs: Any) -> dict[str, Any]:
    streams = dict(rngs) if isinstance(rngs, Mapping) else {} if rngs is None else {"params": rngs}
    return {**streams, f"quant_trace_{next(_traces)}": jax.random.key(0)}
