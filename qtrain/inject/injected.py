"""The function that stands in for a layer's contraction: it quantizes the operands as the layer's rule says."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import flax.core
import jax
import jax.numpy as jnp

from qtrain.cost import marker
from qtrain.errors import UsageError
from qtrain.inject.record import Record, effective_bits, op_bits, shape_of
from qtrain.quantizers import Contraction, Conv, Dot, Operands, Quantizer, Traced, noise
from qtrain.quantizers.native import Paths

if TYPE_CHECKING:
    from qtrain.inject.trace import Trace

Array = jax.Array

STATISTICS = "quant_stats"
"""The collection of running ranges."""


@dataclasses.dataclass(frozen=True)
class PartScope:
    """The place of a part of a module in the collections of what quantizers keep: a name in the module's own scope.

    Not a scope of flax's: that would take the name from the module's children.
    """

    scope: Any
    part: str

    def _own(self, collection: str) -> dict[str, Any]:
        return dict(self.scope.get_variable(collection, self.part, None) or {})

    def has_variable(self, collection: str, name: str) -> bool:
        """As a scope's."""
        return name in self._own(collection)

    def get_variable(self, collection: str, name: str) -> Any:
        """As a scope's."""
        return self._own(collection)[name]

    def put_variable(self, collection: str, name: str, value: Any) -> None:
        """As a scope's."""
        self.scope.put_variable(collection, self.part, {**self._own(collection), name: value})

    def is_mutable_collection(self, collection: str) -> bool:
        """As a scope's."""
        return self.scope.is_mutable_collection(collection)


class Injected:
    """The function an injected layer calls in place of ``lax.dot_general`` or ``lax.conv_general_dilated``."""

    def __init__(
        self,
        trace: Trace,
        scope: Any,
        path: str,
        module: str,
        op: str,
        owner: str | None = None,
        leaf: str | None = None,
    ) -> None:
        self.trace, self.scope, self.path, self.module, self.op = trace, scope, path, module, op
        self.owner = path if owner is None else owner
        self.leaf = leaf if leaf is not None else f"{path}/kernel" if path else "kernel"
        self.rule = trace.rule(path)
        self.weights_at: tuple[Any, str] | None = None  # where parameters of its weights are kept, if elsewhere

    @contextlib.contextmanager
    def within(self, scope: flax.core.Scope) -> Iterator[None]:
        """Reads and writes running ranges in `scope`: outside a transformation they would leak its tracers."""
        outer, self.scope = self.scope, scope
        try:
            yield
        finally:
            self.scope = outer

    def __call__(self, lhs: Array, rhs: Array, *args: Any, **kwargs: Any) -> Array:
        """In place of ``lax.dot_general`` or ``lax.conv_general_dilated``."""
        return self.product(_dot(*args, **kwargs) if self.op == "dot" else _conv(*args, **kwargs), lhs, rhs)

    def product(self, op: Contraction, lhs: Array, rhs: Array) -> Array:
        """``op(lhs, rhs)`` under the rule of the path."""
        trace, path, rule = self.trace, self.path, self.rule
        contracted = op.contracted
        lhs_shape, rhs_shape = shape_of(lhs), shape_of(rhs)
        record = Record(path, self.module, self.op, lhs_shape, rhs_shape, op, owner=self.owner, leaf=self.leaf)
        trace.records.setdefault(path, record)
        if rule is None:
            return op(lhs, rhs)
        bits = effective_bits(rule, trace.precision(path))
        right, right_bits = rule.weight_quantizer, bits.weights
        if self.op == "attention":
            right, right_bits = rule.act_quantizer, bits.acts

        def params() -> tuple[Any, Any]:
            left = self.keeps("acts", rule.act_quantizer, lhs, bits.acts, contracted[0])
            if self.op == "attention":
                return left, self.keeps("acts_rhs", right, rhs, right_bits, contracted[1])
            with self.at(*(self.weights_at or (self.scope, self.path))):
                return left, self.keeps("weights", right, rhs, right_bits, contracted[1])

        if trace.bits is None:
            if trace.create_statistics:
                params()
            return op(lhs, rhs)
        paths = Paths() if trace.choose is None else trace.choose(rule, record, bits)
        operands = Operands(rule.act_quantizer, right, rule.grad_quantizer, rule.residuals, paths)
        used = ((operands.lhs, bits.acts), (operands.rhs, right_bits), (operands.grad, bits.grads))
        seed = self.seed(path, any(q is not None and b is not None and q.stochastic for q, b in used))
        lhs_params, rhs_params = params()
        traced = Traced(bits.acts, right_bits, bits.grads, seed, lhs_params, rhs_params)
        assert trace.contract is not None
        with jax.named_scope(marker.encode(op_bits(path, rule, self.op))):
            return trace.contract(op, operands, lhs, rhs, traced)

    @contextlib.contextmanager
    def at(self, scope: Any, path: str) -> Iterator[None]:
        """What quantizers keep is that of another place."""
        before, (self.scope, self.path) = (self.scope, self.path), (scope, path)
        try:
            yield
        finally:
            self.scope, self.path = before

    def promote_with_bias(self, promote: Callable[..., Any]) -> Callable[..., Any]:
        """`promote` followed by the quantization of the bias, which is added outside the contraction."""

        def promoted(inputs: Array, kernel: Array, bias: Array | None, **kwargs: Any) -> tuple[Any, ...]:
            inputs, kernel, bias = promote(inputs, kernel, bias, **kwargs)
            return inputs, kernel, None if bias is None else self.bias(bias)

        return promoted

    def bias(self, bias: Array) -> Array:
        """The bias, quantized as the rule says."""
        rule = self.rule
        if rule is None or rule.bias_quantizer is None:
            return bias
        quantizer: Quantizer = rule.bias_quantizer
        bits = effective_bits(rule, self.trace.precision(self.path)).weights
        params = self.trace.learned.parameters(self.scope, self.path, "bias", quantizer, bias, bits)
        if bits is None or self.trace.bits is None:
            return bias
        return quantizer(bias, bits, params, key=self.seed(f"{self.path}/bias", quantizer.stochastic))

    def seed(self, name: str, needed: bool) -> Array | None:
        """The key of stochastic rounding for a name; None where there is none and none is needed."""
        if self.trace.seed is not None:
            return noise.fold(self.trace.seed, name)
        if needed:
            raise UsageError(
                f"layer {self.path!r} rounds stochastically and has no key: pass rngs={{'quant': key}} to apply"
            )
        return None

    def keeps(
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


def unreachable_statistics(path: str) -> str:
    """The message for a layer whose running ranges cannot be kept."""
    return (
        f"layer {path!r} keeps running ranges (statistics=), but collection {STATISTICS!r} does not reach it: "
        f"initialise with qmodel.init; inside nn.scan or nn.vmap add variable_axes={{{STATISTICS!r}: 0}}, or use "
        "statistics=None"
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
