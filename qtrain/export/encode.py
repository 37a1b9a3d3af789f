"""Weights to codes as the injected model quantizes them, and back: exact, stacks of layers included."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from qtrain.errors import UsageError
from qtrain.inject import Rule, Weight
from qtrain.inject.record import effective_bits
from qtrain.inject.resolve import Resolved
from qtrain.precision import Precision
from qtrain.quantizers import FLOAT_BITS, AffineScale, Quantizer, noise

Array = jax.Array

EVALUATION_KEY = 0
"""Evaluation rounds stochastically, where a rule asks for that, by this one key."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Stored:
    """A quantized parameter as it is kept: integer codes and the scales that decode them; a pytree of these.

    Attributes:
      codes: int8, int16 or int32 (of small floats their own dtype), the parameter's shape; of numpy or jax.
      scale: what the quantizer's `encode` gave: an array, or an `AffineScale` of two; a leading axis for each axis of a
        stack.
      quantizer, axes, stacked: as `Weight` has them.
      dtype: of the parameter that `decode` makes.
      bits: the width it was quantized to.
      layer: path of its layer.
      fixed: whether a rule gives the bits, whatever those of the schedule.
    """

    codes: Any
    scale: Any
    quantizer: Quantizer = dataclasses.field(metadata={"static": True})
    axes: tuple[int, ...] | None = dataclasses.field(metadata={"static": True})
    stacked: int = dataclasses.field(metadata={"static": True})
    dtype: str = dataclasses.field(metadata={"static": True})
    bits: int = dataclasses.field(metadata={"static": True})
    layer: str = dataclasses.field(metadata={"static": True})
    fixed: bool = dataclasses.field(metadata={"static": True})

    def decode(self) -> Array:
        """The values on the grid, bit for bit those that the quantized forward multiplies with."""

        def function(codes: Array, scale: Any) -> Array:
            quantizer: Any = self.quantizer
            return quantizer.decode(codes, scale, axes=self.axes)

        for _ in range(self.stacked):
            function = jax.vmap(function)
        whole = jnp.issubdtype(self.codes.dtype, jnp.integer)
        return function(self.codes.astype(jnp.int32) if whole else self.codes, self.scale).astype(self.dtype)


def encode(
    weight: Weight, params: Any, quant: Mapping[str, Any], bits: Any, *, dtype: Any = None, ranges: Any = None
) -> tuple[Array, Any]:
    """Codes and scale of a parameter at `bits`: what evaluation multiplies with, see `quantize`."""
    return quantize(weight, params, quant, bits, dtype=dtype, ranges=ranges)[:2]


def quantize(
    weight: Weight, params: Any, quant: Mapping[str, Any], bits: Any, *, dtype: Any = None, ranges: Any = None
) -> tuple[Array, Any, Array]:
    """Codes, scale, and the quantized values themselves.

    Args:
      weight: the parameter.
      params, quant: variables of the model.
      bits: below 24; may be traced.
      dtype: that its layer computes in, in which the quantizer sees it; None: that of the parameter.
      ranges: running statistics to quantize with, for a quantizer that keeps some, with the axes of a stack.

    Raises:
      UsageError: for a quantizer that has no codes.
    """
    quantizer: Any = weight.quantizer
    if not hasattr(quantizer, "encode"):
        raise UsageError(f"export: {weight.name!r} is quantized by {quantizer.describe()!r}, which has no codes")
    options = {"key": _seed(weight)} if quantizer.stochastic else {}

    def function(own: Any, x: Array, ranges: Any) -> tuple[Array, Any, Array]:
        x = x.astype(dtype or x.dtype)
        known = own if ranges is None else ranges
        codes, scale = quantizer.encode(x, bits, known, axes=weight.axes, **options)
        return codes, scale, quantizer(x, bits, known, axes=weight.axes, **options)

    value = weight.value(params)
    return weight.over_stack(function, quant, getattr(value, "value", value), ranges)


def quantized_at(weights: Sequence[Weight], precision: Any) -> tuple[Weight, ...]:
    """Those that `precision` gives bits, whatever their number."""
    return tuple(weight for weight in weights if weight.bits(precision) is not None and weight.size)


def below_float(weights: Sequence[Weight], precision: Any) -> tuple[Weight, ...]:
    """Those that `precision`, of Python numbers, puts on a grid."""
    return tuple(weight for weight in quantized_at(weights, precision) if weight.bits(precision) < FLOAT_BITS)


def check_tables(resolved: Resolved, rules: Sequence[Rule], bits: Any) -> None:
    """Refuse a parameter that two operations see differently, of which a file could hold one form alone.

    Raises:
      UsageError: for a table that is attended to on a grid and looked up in float, or on another grid.
    """
    seen: dict[str, tuple[str, Any]] = {}
    for path, record in resolved.records.items():
        if not record.leaf:
            continue
        index, quantizer, width = resolved.assigned.get(path), None, None
        if index is not None and (quantizer := rules[index].weight_quantizer) is not None:
            precision = bits.get(path, Precision()) if isinstance(bits, Mapping) else bits
            width = effective_bits(rules[index], precision).weights
        form = None if width is None or width >= FLOAT_BITS else (quantizer, width)
        other, known = seen.setdefault(record.leaf, (path, form))
        if known != form:
            raise UsageError(
                f"export: {other!r} and {path!r} share the parameter {record.leaf!r}, of which a file holds one form; "
                "give both the same quantizer and bits (a rule with ops=('embed', 'attend', ...)), or none"
            )


def running_ranges(weight: Weight, statistics: Mapping[str, Any]) -> Any:
    """The running ranges that evaluation quantizes a kernel with, or None: it uses the tensor's own."""
    if weight.quantizer.ema is None or weight.kind == "bias":
        return None
    found: Any = statistics
    for key in weight.path.split("/") if weight.path else ():
        found = found.get(key, {})
    running = found.get(weight.kind)
    if running is None or not bool(jnp.all(running["count"] > 0)):
        return None
    return {name: value for name, value in running.items() if name != "count"}


def scale_leaves(scale: Any) -> dict[str, Any]:
    """The arrays of a scale by name: ``scale``, and where there is one ``offset``."""
    if isinstance(scale, AffineScale):
        return {"scale": scale.scale, "offset": scale.offset}
    return {"scale": scale}


def _seed(weight: Weight) -> Array:
    """The noise that the layer's own quantizer is given in evaluation."""
    seed = noise.seed(jax.random.key(EVALUATION_KEY))
    if weight.kind == "bias":
        return noise.fold(seed, f"{weight.path}/bias")
    return noise.fold(noise.fold(seed, weight.path), 1)
