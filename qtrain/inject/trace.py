"""One pass through a linen model with the quantizers injected, or with the layers merely written down."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import flax.core
import flax.linen as nn
import jax
import jax.numpy as jnp

from qtrain.cost import marker
from qtrain.errors import UsageError
from qtrain.inject.learned import Learned, check_learned
from qtrain.inject.rules import Rule
from qtrain.precision import Precision
from qtrain.quantizers import Contraction, Conv, Dot, Operands, Quantizer, Traced, layout, noise
from qtrain.quantizers.native import Paths

Array = jax.Array
Contract = Callable[[Contraction, Operands, Array, Array, Traced], Array]

STATISTICS = "quant_stats"
"""The collection of running ranges."""

# Layer type → (operation, field that takes its function).
_LAYERS: dict[type, tuple[str, str]] = {
    nn.Dense: ("dot", "dot_general"),
    nn.DenseGeneral: ("dot", "dot_general"),
    nn.Conv: ("conv", "conv_general_dilated"),
}
_NOT_REACHED = (nn.ConvTranspose, nn.ConvLocal, nn.Einsum, nn.Embed, nn.OptimizedLSTMCell)


class _Unrepeated:
    """A value that hashes anew each time.

    ``nn.jit`` inside a model replays the trace of any module of equal fields, whatever its path, and with it the bits
    and rules that were closed over. It compares hashes of the module's fields and of its scope's flags: with this among
    them, no two are equal.
    """

    _count = itertools.count()

    def __hash__(self) -> int:
        return next(self._count)


_FLAG = "quant_trace"
_PHANTOM = ("setup", "<lambda>")  # linen also calls these on a clone that checks a setup, whose path is not the model's


@dataclasses.dataclass(frozen=True)
class Record:
    """What a pass saw of one quantizable layer."""

    path: str
    module: str
    op: str
    lhs: jax.ShapeDtypeStruct
    rhs: jax.ShapeDtypeStruct
    contraction: Contraction

    @property
    def contracted(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The contracted axes of each operand."""
        return self.contraction.contracted


@dataclasses.dataclass
class Trace:
    """The state of one pass: what it is to do, and what it has seen.

    Attributes:
      rules, assigned: path → index of the rule; None while the layers are only being written down.
      bits: the step's `Precision`, one for every layer or one a path; None to inject nothing.
      seed: noise seed, for rules that round stochastically.
      create_statistics: whether running ranges are being created (initialisation).
      learned: what quantizers have learned, or create.
      initial_bits: with `create_statistics`, the bits for which learned parameters are created.
      contract: carries out a quantized contraction.
      choose: how its products are computed, from the rule, what was seen, and the bits; None: in float.
      records, modules, notes: what was seen: the layers in order of execution, the type of every module, and why a
        layer cannot be quantized; all by path.
      types, reached: by path, the classes of the modules there (several where these share a scope), and how many layers
        had been executed when the first was called.
    """

    rules: tuple[Rule, ...] = ()
    assigned: Mapping[str, int] | None = None
    bits: Precision | Mapping[str, Precision] | None = None
    seed: Array | None = None
    create_statistics: bool = False
    learned: Learned = dataclasses.field(default_factory=Learned)
    initial_bits: Precision | Mapping[str, Precision] | None = None
    contract: Contract | None = None
    choose: Callable[[Rule, Record, Precision], Paths] | None = None
    records: dict[str, Record] = dataclasses.field(default_factory=dict)
    modules: dict[str, str] = dataclasses.field(default_factory=dict)
    notes: dict[str, str] = dataclasses.field(default_factory=dict)
    types: dict[str, set[type]] = dataclasses.field(default_factory=dict)
    reached: dict[str, int] = dataclasses.field(default_factory=dict)

    def intercept(self, call: Callable[..., Any], args: Any, kwargs: Any, context: nn.module.InterceptorContext) -> Any:
        """The linen interceptor: for the time of its call, a supported layer has another contraction."""
        module, scope = context.module, context.module.scope
        if scope is None:
            return call(*args, **kwargs)
        if not scope.has_flag(_FLAG):
            never_replay(module)
        if context.method_name in _PHANTOM:
            return call(*args, **kwargs)
        path = "/".join(module.path)
        self.modules.setdefault(path, type(module).__name__)
        self.types.setdefault(path, set()).add(type(module))
        self.reached.setdefault(path, len(self.records))
        found = next((spec for kind, spec in _LAYERS.items() if isinstance(module, kind)), None)
        if context.method_name != "__call__" or found is None:
            if isinstance(module, _NOT_REACHED):
                self.notes[path] = f"{type(module).__name__} is not reached by the injection"
            return call(*args, **kwargs)
        op, field = found
        own = getattr(module, field), getattr(module, f"{field}_cls")
        injected = next((function for function in own if isinstance(function, _Injected)), None)
        if injected is not None:
            # A subclass's super().__call__, perhaps inside a transformation, where the scope is another.
            with injected.within(scope):
                return call(*args, **kwargs)
        if any(function is not None for function in own):
            self.notes[path] = f"sets a {field} of its own"
            return call(*args, **kwargs)
        injected = _Injected(self, scope, path, type(module).__name__, op)
        fields: dict[str, Any] = {field: injected}
        rule = injected.rule
        if self.active and rule is not None and rule.bias_quantizer is not None:
            fields["promote_dtype"] = injected.promote_with_bias(module.promote_dtype)
        with _replaced(module, fields):
            return call(*args, **kwargs)

    @property
    def active(self) -> bool:
        """Whether the pass quantizes, or creates what quantizers keep."""
        return self.bits is not None or self.create_statistics

    def rule(self, path: str) -> Rule | None:
        """The rule of a path, or None."""
        return None if self.assigned is None or path not in self.assigned else self.rules[self.assigned[path]]

    def precision(self, path: str) -> Precision:
        """The step's bits for a path."""
        bits = self.initial_bits if self.create_statistics else self.bits
        if isinstance(bits, Mapping):
            return bits.get(path, Precision())
        return bits if bits is not None else Precision()


class _Injected:
    """The function an injected layer calls in place of ``lax.dot_general`` or ``lax.conv_general_dilated``."""

    def __init__(self, trace: Trace, scope: flax.core.Scope, path: str, module: str, op: str) -> None:
        self.trace, self.scope, self.path, self.module, self.op = trace, scope, path, module, op
        self.rule = trace.rule(path)

    @contextlib.contextmanager
    def within(self, scope: flax.core.Scope) -> Iterator[None]:
        """Reads and writes running ranges in `scope`: outside a transformation they would leak its tracers."""
        outer, self.scope = self.scope, scope
        try:
            yield
        finally:
            self.scope = outer

    def __call__(self, lhs: Array, rhs: Array, *args: Any, **kwargs: Any) -> Array:
        op = _dot(*args, **kwargs) if self.op == "dot" else _conv(*args, **kwargs)
        trace, path, rule = self.trace, self.path, self.rule
        contracted = op.contracted
        record = Record(path, self.module, self.op, _shape(lhs), _shape(rhs), op)
        trace.records.setdefault(path, record)
        if rule is None:
            return op(lhs, rhs)
        bits = effective_bits(rule, trace.precision(path))
        if trace.bits is None:
            if trace.create_statistics:
                self._params("acts", rule.act_quantizer, lhs, bits.acts, contracted[0])
                self._params("weights", rule.weight_quantizer, rhs, bits.weights, contracted[1])
            return op(lhs, rhs)
        paths = Paths() if trace.choose is None else trace.choose(rule, record, bits)
        operands = Operands(rule.act_quantizer, rule.weight_quantizer, rule.grad_quantizer, rule.residuals, paths)
        used = ((operands.lhs, bits.acts), (operands.rhs, bits.weights), (operands.grad, bits.grads))
        seed = self._seed(path, any(q is not None and b is not None and q.stochastic for q, b in used))
        traced = Traced(
            lhs_bits=bits.acts,
            rhs_bits=bits.weights,
            grad_bits=bits.grads,
            seed=seed,
            lhs_params=self._params("acts", rule.act_quantizer, lhs, bits.acts, contracted[0]),
            rhs_params=self._params("weights", rule.weight_quantizer, rhs, bits.weights, contracted[1]),
        )
        assert trace.contract is not None
        with jax.named_scope(marker.encode(op_bits(path, rule))):
            return trace.contract(op, operands, lhs, rhs, traced)

    def promote_with_bias(self, promote: Callable[..., Any]) -> Callable[..., Any]:
        """`promote` followed by the quantization of the bias, which is added outside the contraction."""
        rule = self.rule
        assert rule is not None and rule.bias_quantizer is not None
        quantizer: Quantizer = rule.bias_quantizer
        bits = effective_bits(rule, self.trace.precision(self.path)).weights

        def promoted(inputs: Array, kernel: Array, bias: Array | None, **kwargs: Any) -> tuple[Any, ...]:
            inputs, kernel, bias = promote(inputs, kernel, bias, **kwargs)
            if bias is None:
                return inputs, kernel, bias
            params = self.trace.learned.parameters(self.scope, self.path, "bias", quantizer, bias, bits)
            if bits is not None and self.trace.bits is not None:
                bias = quantizer(bias, bits, params, key=self._seed(f"{self.path}/bias", quantizer.stochastic))
            return inputs, kernel, bias

        return promoted

    def _seed(self, name: str, needed: bool) -> Array | None:
        if self.trace.seed is not None:
            return noise.fold(self.trace.seed, name)
        if needed:
            raise UsageError(
                f"layer {self.path!r} rounds stochastically and has no key: pass rngs={{'quant': key}} to apply"
            )
        return None

    def _params(
        self, name: str, quantizer: Quantizer | None, x: Array, bits: Any, axes: tuple[int, ...]
    ) -> Mapping[str, Array] | None:
        """What the quantizer of an operand keeps: its learned parameters, or a range; None for nothing."""
        if quantizer is not None and quantizer.learns:
            return self.trace.learned.parameters(self.scope, self.path, name, quantizer, x, bits, axes)
        return self._statistics(name, quantizer, x, axes)

    def _statistics(self, name: str, quantizer: Quantizer | None, x: Array, axes: tuple[int, ...]) -> Any:
        """The range to quantize `x` with, or None for its own; updates the running one where it may."""
        momentum = None if quantizer is None else quantizer.ema
        if quantizer is None or momentum is None:
            return None
        scope = self.scope
        own = quantizer.range(x, axes=axes)  # type: ignore[attr-defined]
        if not scope.has_variable(STATISTICS, name):
            if self.trace.create_statistics and scope.is_mutable_collection(STATISTICS):
                zeros = jax.tree.map(jnp.zeros_like, own)
                scope.put_variable(STATISTICS, name, {**zeros, "count": jnp.zeros((), jnp.int32)})
                return None
            raise UsageError(unreachable_statistics(self.path))
        running = scope.get_variable(STATISTICS, name)
        seen = running["count"] > 0
        ranges = {key: running[key] for key in own}
        if not scope.is_mutable_collection(STATISTICS):
            return jax.tree.map(lambda r, new: jnp.where(seen, r, new), ranges, own)
        if not self.trace.create_statistics:
            moved = jax.tree.map(lambda r, new: jnp.where(seen, momentum * r + (1 - momentum) * new, new), ranges, own)
            scope.put_variable(STATISTICS, name, {**moved, "count": running["count"] + 1})
            if quantizer.delayed:
                return jax.tree.map(lambda r, new: jnp.where(seen, r, new), ranges, own)
        return None


def never_replay(module: nn.Module) -> None:
    """Makes ``nn.jit`` trace what lies below `module` for each call: submodules inherit the flags of its scope.

    Those that it was given as fields have their scopes already.
    """
    for found in _modules(module):
        if isinstance(found.scope, flax.core.Scope) and not found.scope.has_flag(_FLAG):
            found.scope.flags = flax.core.freeze({**found.scope.flags, _FLAG: _Unrepeated()})


def _modules(value: Any) -> Iterator[nn.Module]:
    """The modules in a value, and in the fields of those."""
    if isinstance(value, nn.Module):
        yield value
        value = [getattr(value, field.name, None) for field in dataclasses.fields(value) if field.name != "parent"]
    if isinstance(value, Mapping | list | tuple):
        for item in value.values() if isinstance(value, Mapping) else value:
            yield from _modules(item)


@contextlib.contextmanager
def _replaced(module: nn.Module, fields: Mapping[str, Any]) -> Iterator[None]:
    """`module` with other fields; it is ours, since linen binds a clone of what the user made.

    Not a clone of our own: that would run a subclass's ``setup`` twice, and capture its intermediates twice.
    """
    before = {name: getattr(module, name) for name in fields}
    try:
        for name, value in fields.items():
            object.__setattr__(module, name, value)
        yield
    finally:
        for name, value in before.items():
            object.__setattr__(module, name, value)


def unreachable_statistics(path: str) -> str:
    """The message for a layer whose running ranges cannot be kept."""
    return (
        f"layer {path!r} keeps running ranges (statistics=), but collection {STATISTICS!r} does not reach it: "
        f"initialise with qmodel.init; inside nn.scan or nn.vmap add variable_axes={{{STATISTICS!r}: 0}}, or use "
        "statistics=None"
    )


def effective_bits(rule: Rule, precision: Precision) -> Precision:
    """The bits of a layer: fixed by its rule, else the step's; None where its rule has no quantizer."""

    def choose(quantizer: Quantizer | None, fixed: int | None, scheduled: Any) -> Any:
        return None if quantizer is None else fixed if fixed is not None else scheduled

    return Precision(
        weights=choose(rule.weight_quantizer or rule.bias_quantizer, rule.weights, precision.weights),
        acts=choose(rule.act_quantizer, rule.acts, precision.acts),
        grads=choose(rule.grad_quantizer, rule.grads, precision.grads),
    )


def op_bits(path: str, rule: Rule) -> marker.OpBits:
    """The marker of a layer under its rule. A width that a quantizer chooses is no fixed one, whatever its limit."""
    free: dict[str, Any] = {
        kind: None
        for kind, quantizer in (("weights", rule.weight_quantizer), ("acts", rule.act_quantizer))
        if quantizer is not None and quantizer.chooses_width
    }
    without_bias = dataclasses.replace(rule, bias_quantizer=None, **free)
    follow = effective_bits(without_bias, Precision("schedule", "schedule", "schedule"))
    return marker.OpBits(path, follow.weights, follow.acts, follow.grads, rule.residuals)


def check_statistics(rule: Rule, record: Record) -> None:
    """Refuse a running range, or learned parameters, whose shape would depend on the batch.

    Raises:
      UsageError: naming the layer.
    """
    check_learned(rule, record.path, record.lhs.shape, record.contracted[0])
    quantizer = rule.act_quantizer
    if quantizer is None or quantizer.ema is None:
        return
    kept = set(range(len(record.lhs.shape))) - set(record.contracted[0])
    if not kept <= set(layout(record.lhs.shape, quantizer.per, record.contracted[0]).axes):  # type: ignore[attr-defined]
        raise UsageError(
            f"layer {record.path!r}: act_quantizer {quantizer.describe()!r} keeps a running range with a scale per "
            "example, which has no meaning for another batch; use per='tensor'"
        )


def _dot(
    dimension_numbers: Any, precision: Any = None, preferred_element_type: Any = None, *, out_sharding: Any = None
) -> Dot:
    (lhs, rhs), (lhs_batch, rhs_batch) = dimension_numbers
    numbers = ((tuple(lhs), tuple(rhs)), (tuple(lhs_batch), tuple(rhs_batch)))
    return Dot(numbers, precision, preferred_element_type, out_sharding)


def _conv(window_strides: Any, padding: Any, **kwargs: Any) -> Conv:
    padding = padding if isinstance(padding, str) else tuple(tuple(pair) for pair in padding)
    for name in ("lhs_dilation", "rhs_dilation"):
        kwargs[name] = None if kwargs.get(name) is None else tuple(kwargs[name])
    return Conv(tuple(window_strides), padding, **kwargs)


def _shape(x: Array) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype)
