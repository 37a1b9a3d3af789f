"""What a module returns, quantized by a rule for "output": the stream of a residual network, say."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from qtrain.inject.injected import Injected, PartScope
from qtrain.inject.layers import join
from qtrain.inject.record import Record, effective_bits, shape_of
from qtrain.quantizers.contraction import quantize_cotangent

if TYPE_CHECKING:
    from qtrain.inject.trace import Trace


def output(trace: Trace, module: nn.Module, path: str, out: Any) -> Any:
    """What a module returns, where a rule for "output" says so each of its floating-point arrays quantized."""
    at = join(path, "output")
    rule = trace.rule(at)
    if rule is None and not (trace.recording and any(rule.covers(at, "output") for rule in trace.rules)):
        return out
    treedef: Any
    leaves, treedef = jax.tree.flatten(out)
    floating = [isinstance(x, jax.Array) and jnp.issubdtype(x.dtype, jnp.floating) for x in leaves]
    if not any(floating):
        return out
    first = shape_of(leaves[floating.index(True)])
    axes = tuple(range(1, len(first.shape)))
    kind = type(module).__name__
    trace.records.setdefault(at, Record(at, kind, "output", first, None, None, (axes, None), owner=path))
    if rule is None or not trace.active:
        return out
    bits = effective_bits(rule, trace.precision(at))
    for index, x in enumerate(leaves):
        if not floating[index]:
            continue
        # Several outputs have parameters of their own each.
        name = "output" if index == floating.index(True) else f"output_{index}"
        site = Injected(trace, PartScope(module.scope, name), join(path, name), kind, "output", owner=path, leaf="")
        axes = tuple(range(1, x.ndim))
        params = site.keeps("acts", rule.act_quantizer, x, bits.acts, axes)
        if trace.bits is None:
            continue
        quantizers = ((rule.act_quantizer, bits.acts), (rule.grad_quantizer, bits.grads))
        used = [q is not None and b is not None and q.stochastic for q, b in quantizers]
        if rule.act_quantizer is not None and bits.acts is not None:
            x = rule.act_quantizer(x, bits.acts, params, key=site.seed(site.path, used[0]), axes=axes)
        if rule.grad_quantizer is not None and bits.grads is not None:
            x = quantize_cotangent(rule.grad_quantizer, x, bits.grads, site.seed(f"{site.path}/grads", used[1]))
        leaves[index] = x
    return treedef.unflatten(leaves)
