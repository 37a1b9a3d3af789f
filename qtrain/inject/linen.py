"""A linen model with quantizers injected: same parameters, bits as an argument."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from flax.core import DenyList

from qtrain.cost import marker
from qtrain.cost.count import count
from qtrain.cost.ops import Ops
from qtrain.errors import UsageError, did_you_mean
from qtrain.inject.plan import Plan, Row, narrow
from qtrain.inject.resolve import Memory, Resolved, abstract, kernels, resolve, signature, split_static
from qtrain.inject.rules import Rule, default_rules
from qtrain.inject.trace import Contract, Trace, op_bits
from qtrain.precision import Precision
from qtrain.quantizers import Quantizer, contract, layout, noise
from qtrain.quantizers.base import static_bits

Array = jax.Array
Bits = Precision | Mapping[str, Precision]

# nn.jit inside a model caches by the structure of what it is given, so that a closed-over bit width would be frozen
# there, or a tracer leak. A random stream of a name never used before changes that structure: it traces anew.
_traces = itertools.count()

_STATE = DenyList("params")  # what a training step may write to


def quantize(
    model: nn.Module, rules: Rule | Sequence[Rule] | None = None, *, execute: Contract = contract
) -> QuantizedModel:
    """Inject quantizers into a Flax linen module, whoever wrote it, without touching it.

    Args:
      model: any linen module.
      rules: a rule or an ordered sequence of them; None means `default_rules()`: every Dense, DenseGeneral and Conv
        follows the schedule, the first and the last of them stay at 8 bits.
      execute: what carries out a quantized contraction; the default computes in float on quantized values.

    Returns:
      A `QuantizedModel`, whose ``init`` gives the parameters that ``model.init`` gives, bit for bit.

    Raises:
      UsageError: when `model` is not a linen module or a rule is none. What depends on the shapes (a rule that matches
        nothing) is raised by `plan`, `init` and `apply`.

    >>> import flax.linen as nn, jax, jax.numpy as jnp
    >>> qmodel = quantize(nn.Sequential([nn.Dense(16), nn.relu, nn.Dense(2)]), Rule())
    >>> variables = qmodel.init(jax.random.key(0), jnp.ones((1, 4)))
    >>> qmodel.apply(variables, jnp.ones((1, 4)), bits=Precision(weights=4, acts=4)).shape
    (1, 2)
    """
    if not isinstance(model, nn.Module):
        raise UsageError(f"quantize: {type(model).__name__} is not a flax.linen.Module instance")
    rules = default_rules() if rules is None else (rules,) if isinstance(rules, Rule) else tuple(rules)
    for rule in rules:
        if not isinstance(rule, Rule):
            raise UsageError(f"quantize: rules hold {rule!r}; give qtrain.Rule objects")
    return QuantizedModel(model, rules, execute)


@dataclasses.dataclass(frozen=True, eq=False)
class QuantizedModel:
    """A linen module with quantizers injected into its layers; made by `quantize`.

    Attributes:
      module: the model as it was.
      rules: in order; the first that matches a layer's path wins.
      execute: what carries out a quantized contraction.
    """

    module: nn.Module
    rules: tuple[Rule, ...]
    execute: Contract = contract
    _memory: Memory = dataclasses.field(default_factory=Memory, init=False, repr=False)

    def init(self, rngs: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """The variables of ``module.init``, and the quantizers' own.

        Returns:
          ``params`` and whatever other collections the model has, equal to the plain model's bit for bit; ``quant``:
          learned quantizer parameters (empty when no quantizer learns any); ``quant_stats``, only if a quantizer keeps
          running ranges: they start empty (count 0) and no gradient ever reaches them.

        Raises:
          UsageError: for a rule that does nothing, or running ranges that cannot be kept.
        """
        resolved = self._resolve(None, rngs, args, kwargs)
        trace = Trace(self.rules, resolved.assigned, create_statistics=True, contract=self.execute)
        with nn.intercept_methods(trace.intercept):
            variables = dict(self.module.init(_retraced(rngs), *args, **kwargs))
        return {"quant": {}, **variables}

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
          UsageError: for bits that are no width, a path without bits, rules that do nothing, a missing key.
        """
        if bits is None:
            return self.module.apply(variables, *args, rngs=rngs, mutable=mutable, method=method, **kwargs)
        _check_bits(bits)
        resolved = self._resolve(variables, rngs, args, kwargs, mutable, method)
        _check_paths(bits, resolved, self.rules)
        trace = Trace(self.rules, resolved.assigned, bits, _seed(rngs), contract=self.execute)
        with nn.intercept_methods(trace.intercept):
            out = self.module.apply(variables, *args, rngs=_retraced(rngs), mutable=mutable, method=method, **kwargs)
        astray = sorted(trace.records.keys() ^ resolved.records.keys())
        if astray:
            raise UsageError(
                f"layers {astray[:6]} are planned but were not reached in this trace, or the reverse: a transformation "
                "inside the model (nn.jit with a restricted rngs=) replays an older trace; let it lift every stream"
            )
        return out

    def plan(self, *args: Any, rngs: Any = None, **kwargs: Any) -> Plan:
        """What is quantized, how, and its share of the multiplications, for arguments of these shapes.

        Nothing is computed: arguments may be ``jax.ShapeDtypeStruct``.

        Args:
          *args: the model's arguments, as are further keywords.
          rngs: a key or a dict of them for ``module.init``; by default streams params, dropout and quant exist, and
            flax takes the first of these for any other.

        Raises:
          UsageError: for a rule that matches nothing, or none of whose matches can be quantized.
        """
        if not isinstance(rngs, Mapping):
            key = jax.random.key(0) if rngs is None else rngs
            rngs = {"params": key, "dropout": key}
        abstract_args, abstract_kwargs = jax.tree.map(abstract, (args, kwargs))
        dynamic, rebuild = split_static((abstract_args, abstract_kwargs))

        def initialise(dynamic: list[Any]) -> dict[str, Any]:
            inner_args, inner_kwargs = rebuild(dynamic)
            return self.init(rngs, *inner_args, **inner_kwargs)

        variables = jax.eval_shape(initialise, dynamic)

        rngs = {**rngs, "quant": jax.random.key(0)}

        def forward(variables: Any, *args: Any, **kwargs: Any) -> Any:
            bits = Precision(weights=8, acts=8, grads=8)  # any: the marker, not the value, says what is quantized
            return self.apply(variables, *args, bits=bits, rngs=rngs, mutable=_STATE, **kwargs)

        ops = count(forward, variables, *abstract_args, **abstract_kwargs)
        method = abstract_kwargs.pop("method", None)
        resolved = self._resolve(variables, rngs, abstract_args, abstract_kwargs, _STATE, method)
        unused = [rule.path for index, rule in enumerate(self.rules) if index not in resolved.assigned.values()]
        return Plan(tuple(_rows(resolved, self.rules, ops)), ops, tuple(unused))

    def _resolve(
        self, variables: Any, rngs: Any, args: Any, kwargs: Any, mutable: Any = True, method: Any = None
    ) -> Resolved:
        """The rules resolved for these shapes, from a trace that only writes the layers down; remembered."""
        key = signature((variables, rngs, args, kwargs), repr(mutable), method)
        known = self._memory.get(key)
        if known is not None:
            return known
        dynamic, rebuild = split_static((variables, rngs, args, kwargs))
        trace = Trace()

        def record(dynamic: list[Any]) -> Any:
            inner_variables, inner_rngs, inner_args, inner_kwargs = rebuild(dynamic)
            rngs = _retraced(inner_rngs)
            with nn.intercept_methods(trace.intercept):
                if inner_variables is None:
                    return self.module.init(rngs, *inner_args, **inner_kwargs).get("params", {})
                self.module.apply(
                    inner_variables, *inner_args, rngs=rngs, mutable=mutable, method=method, **inner_kwargs
                )

        created = jax.eval_shape(record, dynamic)
        owners = kernels(created if variables is None else variables.get("params", {}))
        resolved = resolve(self.rules, trace, owners, self._memory, initialising=variables is None)
        self._memory.put(key, resolved)
        return resolved


def _rows(resolved: Resolved, rules: Sequence[Rule], ops: Ops) -> list[Row]:
    macs: dict[str, int] = {}
    unmarked: dict[str, Ops] = {}
    for path, group in ops.by_path().items():
        plain = Ops(op for op in group if op.marker is None)
        macs[path] = sum(op.forward for op in group if op.marker is not None)
        if plain:
            unmarked[path] = plain
    rows = []
    for path, record in resolved.records.items():
        index = resolved.assigned.get(path)
        if index is None:
            note = "no rule"
            rows.append(Row(path, record.module, record.op, marker.OpBits(path), note=note, macs=_take(unmarked, path)))
            continue
        rule = rules[index]
        bits = op_bits(path, rule)
        scales = 0
        if rule.weight_quantizer is not None and hasattr(rule.weight_quantizer, "per"):
            scales = layout(record.rhs.shape, rule.weight_quantizer.per, record.contracted[1]).num_scales
            # A kernel that is stacked for a scan or vmap has the scales of every iteration.
            stacked = max((op.rhs.parameter_size for op in ops.by_path().get(path, ())), default=0)
            scales *= max(stacked // max(math.prod(record.rhs.shape), 1), 1)
        rows.append(
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
                note=_note(rule, bits),
            )
        )
    for path, note in resolved.notes.items():
        rows.append(Row(path, resolved.modules[path], "", marker.OpBits(path), note=note, macs=_take(unmarked, path)))
    for path, group in unmarked.items():
        kinds = "two activations" if all("weight" not in (op.lhs.kind, op.rhs.kind) for op in group) else "not a layer"
        note = f"not reached by the injection: {kinds}"
        module = resolved.modules.get(path, "")
        rows.append(Row(path, module, group[0].kind, marker.OpBits(path), note=note, macs=group.forward))
    return rows


def _take(unmarked: dict[str, Ops], path: str) -> int:
    group = unmarked.pop(path, None)
    return group.forward if group else 0


def _note(rule: Rule, bits: marker.OpBits) -> str:
    notes = []
    if rule.position != "any":
        notes.append("first or last layer")
    if not any(map(narrow, (bits.weights, bits.acts, bits.grads))):
        notes.append("float by rule")
    if rule.residuals != "quantized":
        notes.append(f"backward sees {rule.residuals} operands")
    if rule.bias_quantizer is not None:
        notes.append(f"bias {rule.bias_quantizer.describe()}")
    return "; ".join(notes)


def _describe(quantizer: Quantizer | None) -> str:
    return "float" if quantizer is None else quantizer.describe()


def _check_bits(bits: Bits) -> None:
    for precision in bits.values() if isinstance(bits, Mapping) else (bits,):
        if not isinstance(precision, Precision):
            raise UsageError(f"bits={precision!r}: give a qtrain.Precision, or a mapping from layer path to one")
        for value in (precision.weights, precision.acts, precision.grads):
            if isinstance(value, jax.Array) and not isinstance(value, jax.core.Tracer) and value.is_fully_addressable:
                value = np.asarray(value)
            if value is not None:
                static_bits(value)


def _check_paths(bits: Bits, resolved: Resolved, rules: Sequence[Rule]) -> None:
    if not isinstance(bits, Mapping):
        return
    known = {path: op_bits(path, rules[index]) for path, index in resolved.assigned.items()}
    elsewhere = {path for path in resolved.skipped if any(rule.matches(path) for rule in rules)}
    for path in bits:
        if path not in known and path not in elsewhere:
            raise UsageError(f"bits[{path!r}]: no layer of that path is quantized.{did_you_mean(path, known)}")
    followers = [path for path, b in known.items() if "schedule" in (b.weights, b.acts, b.grads)]
    missing = [path for path in followers if path not in bits]
    if missing:
        raise UsageError(f"bits has no entry for {missing[:6]}, which follow the schedule; give a Precision for each")


def _seed(rngs: Any) -> Array | None:
    return noise.seed(rngs["quant"]) if isinstance(rngs, Mapping) and "quant" in rngs else None


def _retraced(rngs: Any) -> dict[str, Any]:
    streams = dict(rngs) if isinstance(rngs, Mapping) else {} if rngs is None else {"params": rngs}
    return {**streams, f"quant_trace_{next(_traces)}": jax.random.key(0)}
