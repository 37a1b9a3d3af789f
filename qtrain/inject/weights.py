"""The parameters a model quantizes, one entry each: what counts, stores or regularises quantized weights goes by it."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from qtrain.inject.learned import Learned
from qtrain.inject.resolve import Resolved
from qtrain.inject.rules import Rule
from qtrain.inject.trace import effective_bits
from qtrain.precision import Precision
from qtrain.quantizers import Quantizer, distance_to_transition

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class Weight:
    """A quantized parameter.

    Attributes:
      path: path of its layer.
      kind: "weights" (the kernel) or "bias".
      leaf: keys of the parameter in ``params``.
      shape: of the parameter.
      quantizer: of the parameter.
      axes: the axes of the layer's own tensor that are contracted; None for a bias.
      stacked: leading axes that a scan or vmap added to the layer's tensor.
      rule: the layer's.
    """

    path: str
    kind: str
    leaf: tuple[str, ...]
    shape: tuple[int, ...]
    quantizer: Quantizer
    axes: tuple[int, ...] | None
    stacked: int
    rule: Rule

    @property
    def name(self) -> str:
        """``Dense_0/kernel``."""
        return "/".join(self.leaf)

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    def value(self, params: Any) -> Array:
        """The parameter in `params`."""
        for key in self.leaf:
            params = params[key]
        return params

    def learned(self, quant: Mapping[str, Any]) -> Any:
        """What its quantizer has learned, or None."""
        return Learned(quant).at(self.path).get(self.kind) if self.quantizer.learns else None

    def bits(self, precision: Precision | Mapping[str, Precision]) -> Any:
        """Its bits: fixed by its rule, else those of `precision`; None where it is left in float."""
        if isinstance(precision, Mapping):
            precision = precision.get(self.path, Precision())
        return effective_bits(self.rule, precision).weights

    def apply(self, method: str, params: Any, quant: Mapping[str, Any], bits: Any, **options: Any) -> Any:
        """``quantizer.method(value, bits, learned, axes=axes)`` of the parameter, a stack's layers each by itself.

        `method`: "encode", "position", "scale", "width" or "__call__"; `options`: its further arguments.
        """

        def function(own: Any, x: Array) -> Any:
            return getattr(self.quantizer, method)(x, bits, own, axes=self.axes, **options)

        return self.over_stack(function, quant, self.value(params))

    def distance_to_transition(self, params: Any, quant: Mapping[str, Any], bits: Any) -> Array:
        """Mean distance of the parameter's elements to where their codes change; see `qtrain.quantizers`."""

        def function(own: Any, x: Array) -> Any:
            return distance_to_transition(self.quantizer, x, bits, own, axes=self.axes)

        return jnp.mean(self.over_stack(function, quant, self.value(params)))

    def decode(self, codes: Array, params: Any, quant: Mapping[str, Any], bits: Any) -> Array:
        """The values that `codes` of the parameter stand for, on the grid that the parameter has at `bits`."""

        def function(own: Any, x: Array, codes: Array) -> Any:
            quantizer: Any = self.quantizer
            return quantizer.decode(codes, quantizer.encode(x, bits, own, axes=self.axes)[1], axes=self.axes)

        return self.over_stack(function, quant, self.value(params), codes)

    def over_stack(self, function: Callable[..., Any], quant: Mapping[str, Any], *arrays: Array) -> Any:
        """``function(learned, *arrays)`` for each layer of a stack; `arrays` have its leading axes."""
        learned = self.learned(quant)
        for level in range(self.stacked):
            # One set of parameters for a whole stack, unless the collection is stacked, too.
            own = learned is not None and _depth(self, learned) > self.stacked - 1 - level
            function = jax.vmap(function, in_axes=(0 if own else None, *(0 for _ in arrays)))
        return function(learned, *arrays)


def weights(resolved: Resolved, rules: Sequence[Rule], params: Any) -> tuple[Weight, ...]:
    """The quantized parameters of a model, in order of execution.

    Args:
      resolved: the rules resolved.
      rules: in order.
      params: the parameters, or their shapes.
    """
    found: list[Weight] = []
    for path, index in resolved.assigned.items():
        rule, record = rules[index], resolved.records[path]
        if not record.leaf or record.rhs is None or tuple(record.leaf.split("/")) in {weight.leaf for weight in found}:
            continue  # a product of activations; or a table that is looked up and attended to, which is one parameter
        keys = tuple(record.leaf.split("/"))
        module: Any = params
        for key in keys[:-1]:
            module = module.get(key, {}) if isinstance(module, Mapping) else {}
        # Some are boxed, with the names of their axes.
        leaves = {name: getattr(leaf, "value", leaf) for name, leaf in module.items() if name in (keys[-1], "bias")}
        if keys[-1] not in leaves:
            continue
        # A bias is stacked as its kernel is: its own rank does not tell, where a DenseGeneral has several features.
        stacked = len(leaves[keys[-1]].shape) - len(record.rhs.shape)
        for kind, name, quantizer, axes in (
            ("weights", keys[-1], rule.weight_quantizer, record.contracted[1]),
            ("bias", "bias", rule.bias_quantizer, None),
        ):
            if quantizer is not None and name in leaves:
                leaf = (*keys[:-1], name)
                found.append(Weight(path, kind, leaf, leaves[name].shape, quantizer, axes, stacked, rule))
    return tuple(found)


def _depth(weight: Weight, learned: Mapping[str, Array]) -> int:
    """How many of the leading axes of a stack its learned parameters have, too."""
    own = jax.eval_shape(
        lambda x: weight.quantizer.init(x, axes=weight.axes),
        jax.ShapeDtypeStruct(weight.shape[weight.stacked :], "float32"),
    )
    return max(value.ndim - own[name].ndim for name, value in learned.items())
