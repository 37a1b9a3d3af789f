"""Widths that quantizers choose: what a step is charged for them, and what they cost as a differentiable number."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from qtrain import cost
from qtrain.additions import Bits
from qtrain.cost import Ops
from qtrain.inject import Plan, Weight
from qtrain.inject.learned import Learned
from qtrain.inject.trace import effective_bits
from qtrain.precision import Precision
from qtrain.quantizers import Quantizer

Array = jax.Array


class Widths:
    """The widths of a model's tensors, some of them chosen by their quantizers.

    Args:
      plan: of the model.
      weights, quantizers: as `QuantizedModel.weights` and `QuantizedModel.quantizers` give them.
    """

    def __init__(self, plan: Plan, weights: Sequence[Weight], quantizers: Mapping[tuple[str, str], Quantizer]):
        self.plan, self.weights = plan, tuple(weights)
        self._kernels = {weight.path: weight for weight in weights if weight.kind == "weights"}
        self._acts = {path: q for (path, kind), q in quantizers.items() if kind == "acts" and q.chooses_width}
        self.choosing = tuple(weight for weight in weights if weight.quantizer.chooses_width)

    @property
    def chosen(self) -> bool:
        """Whether any quantizer chooses."""
        return bool(self.choosing or self._acts)

    def weight(self, weight: Weight, params: Any, quant: Any, precision: Bits, *, rounded: bool = True) -> Any:
        """Bits that an element of a parameter takes, on average; None where it stays in float.

        ``rounded=False``: a learned width before it is rounded, here and below.
        """
        bits = weight.bits(precision)
        if bits is None or not weight.quantizer.chooses_width:
            return bits
        return jnp.mean(weight.apply("width", params, quant, bits, rounded=rounded))

    def priced(self, params: Any, quant: Any, precision: Precision, *, rounded: bool = True) -> Bits:
        """The bits to charge: `precision`, or where quantizers choose, a `Precision` for each layer; differentiable."""
        if not self.chosen:
            return precision
        found = {}
        for path in self.plan.followers:
            kernel = self._kernels.get(path)
            weights, acts = precision.weights, precision.acts
            if kernel is not None:
                weights = self.weight(kernel, params, quant, precision, rounded=rounded)
                acts = effective_bits(kernel.rule, precision).acts
            if path in self._acts:
                acts = self._acts[path].width(None, acts, Learned(quant).at(path).get("acts"), rounded=rounded)
            found[path] = Precision(weights=weights, acts=acts, grads=precision.grads)
        return found

    def average_bits(self, params: Any, quant: Any, precision: Precision, *, rounded: bool = True) -> Array:
        """Bits of a quantized weight or bias, on average over them; float32, differentiable to what is learned."""
        return self._stored_bits(params, quant, precision, rounded) / max(
            sum(weight.size for weight in self.weights), 1
        )

    def bytes(self, params: Any, quant: Any, precision: Precision, *, rounded: bool = True) -> Array:
        """Bytes of the quantized weights and biases, packed, and of their scales (4 each); float32, differentiable."""
        return self._stored_bits(params, quant, precision, rounded) / 8 + 4.0 * sum(self.plan.weight_scales.values())

    def bitops(self, ops: Ops, params: Any, quant: Any, precision: Precision, *, rounded: bool = True) -> Array:
        """BitOps of a step; float32, differentiable."""
        return jnp.asarray(cost.bitops(ops, self.priced(params, quant, precision, rounded=rounded)), jnp.float32)

    def _stored_bits(self, params: Any, quant: Any, precision: Precision, rounded: bool) -> Array:
        total = jnp.zeros(())
        for weight in self.weights:
            bits = self.weight(weight, params, quant, precision, rounded=rounded)
            total += weight.size * jnp.asarray(32 if bits is None else bits, jnp.float32)
        return total
