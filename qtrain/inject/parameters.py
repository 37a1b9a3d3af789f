"""Parameters that no layer multiplies with, quantized by name before the model is called.

A parameter's gradient is the quantizer's: straight through. Under a scan or vmap, whose layers have theirs stacked on
leading axes, each layer's is quantized by itself.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import flax.linen as nn
import jax

from qtrain.errors import UsageError
from qtrain.inject.record import Record, effective_bits
from qtrain.inject.resolve import Resolved
from qtrain.inject.rules import Rule
from qtrain.quantizers import noise

if TYPE_CHECKING:
    from qtrain.inject.trace import Trace

Array = jax.Array


def create(trace: Trace, resolved: Resolved, params: Mapping[str, Any]) -> None:
    """Write down in ``trace.learned`` how the learned parameters of these quantizers begin."""
    for path, rule, record in _assigned(trace, resolved):
        quantizer = rule.weight_quantizer
        if quantizer is None or not quantizer.learns:
            continue
        bits = effective_bits(rule, trace.precision(path)).weights
        x = nn.unbox(_leaf(params, path))

        def init(x: Array, quantizer: Any = quantizer, bits: Any = 8 if bits is None else bits) -> Any:
            return quantizer.init(jax.lax.stop_gradient(x), bits)

        trace.learned.outside[path, "weights"] = _over_stack(init, x, record)(x)
        trace.learned.shapes[path, "weights"] = jax.eval_shape(init, record.rhs)


def quantized(trace: Trace, resolved: Resolved, variables: Mapping[str, Any]) -> Mapping[str, Any]:
    """`variables` with these parameters on their grids."""
    params = variables.get("params", {})
    if trace.learned.create:  # calibration: as initialisation, for weights as they are
        create(trace, resolved, params)
    for path, rule, record in _assigned(trace, resolved):
        quantizer = rule.weight_quantizer
        bits = effective_bits(rule, trace.precision(path)).weights
        if quantizer is None or bits is None:
            continue
        if quantizer.stochastic and trace.seed is None:
            raise UsageError(
                f"parameter {path!r} is rounded stochastically and has no key: pass rngs={{'quant': key}} to apply"
            )
        key = None if trace.seed is None else noise.fold(trace.seed, path)
        leaf = _leaf(params, path)
        x = nn.unbox(leaf)
        learned = None
        if quantizer.learns:
            learned = trace.learned.outside.get((path, "weights"), trace.learned.at(path).get("weights"))
            if learned is None:
                raise UsageError(
                    f"parameter {path!r} has no learned parameters in collection 'quant'; make them with qmodel.init, "
                    "or from variables that have none with qmodel.calibrate"
                )

        def function(x: Array, learned: Any, quantizer: Any = quantizer, bits: Any = bits, key: Any = key) -> Array:
            return quantizer(x, bits, learned, key=key)

        value = _over_stack(function, x, record)(x, learned)
        boxed = leaf.replace_boxed(value) if isinstance(leaf, nn.meta.AxisMetadata) else value
        params = _with_leaf(params, path.split("/"), boxed)
    return variables if params is variables.get("params", {}) else {**variables, "params": params}


def _assigned(trace: Trace, resolved: Resolved) -> Iterator[tuple[str, Rule, Record]]:
    for path, index in resolved.assigned.items():
        record = resolved.records[path]
        if record.op == "param":
            yield path, trace.rules[index], record


def _over_stack(function: Callable[..., Any], x: Array, record: Record) -> Callable[..., Any]:
    """`function` for each layer of a stack."""
    assert record.rhs is not None
    for _ in range(x.ndim - len(record.rhs.shape)):
        function = jax.vmap(function)
    return function


def _leaf(params: Any, path: str) -> Any:
    for key in path.split("/"):
        params = params[key]
    return params


def _with_leaf(tree: Mapping[str, Any], keys: list[str], leaf: Any) -> dict[str, Any]:
    first, *rest = keys
    return {**tree, first: _with_leaf(tree[first], rest, leaf) if rest else leaf}
