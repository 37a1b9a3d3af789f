"""What storing quantized weights takes: levels, bits and entropy of a parameter, bytes, compression against float32."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from qtrain.export.coding import distinct, level_storage, storage
from qtrain.export.encode import below_float, encode, quantized_at, scale_leaves
from qtrain.inject import Weight
from qtrain.precision import Precision
from qtrain.quantizers import FLOAT_BITS
from qtrain.sharding import to_host

Array = jax.Array

_SCALE_BYTES = 4  # scales and offsets are stored in float32


class TensorSize(NamedTuple):
    """The size of one quantized tensor.

    Attributes:
      levels: number of distinct codes.
      span: max − min + 1 of the codes; of codes that are not whole numbers (small floats) `levels`.
      bits: width at which an element is stored: ⌈log2 span⌉, or ⌈log2 levels⌉ where the codes leave so many gaps that
        with the table of levels this is less in all.
      entropy_bits: −Σ p·log2 p over the distinct codes, p being their shares of the tensor: what an ideal entropy coder
        would take for each element, its model not counted.
      code_bytes: packed codes, and the table if there is one.
      scale_bytes: scales and offsets, 4 bytes each.
    """

    levels: Any
    span: Any
    bits: Any
    entropy_bits: Any
    code_bytes: Any
    scale_bytes: Any

    @property
    def bytes(self) -> Any:
        """Codes, table, scales and offsets."""
        return self.code_bytes + self.scale_bytes


def measure(codes: np.ndarray, scale_bytes: int = 0) -> TensorSize:
    """The size of a tensor with such `codes` (NumPy, exact); `scale_bytes`: of its scales.

    >>> measure(np.array([0, 0, 3, 3]), scale_bytes=4)._asdict()
    {'levels': 2, 'span': 4, 'bits': 2, 'entropy_bits': 1.0, 'code_bytes': 1, 'scale_bytes': 4}
    """
    values, counts = distinct(codes)
    share = counts / max(codes.size, 1)
    entropy = float(-np.sum(share * np.log2(share))) + 0.0
    if not np.issubdtype(codes.dtype, np.integer):
        found = level_storage(codes.size, values.size, 4)
        return TensorSize(values.size, values.size, found.width, entropy, found.bytes, scale_bytes)
    lowest, highest = (int(values[0]), int(values[-1])) if codes.size else (0, 0)
    found = storage(codes.size, lowest, highest, values.size)
    return TensorSize(values.size, highest - lowest + 1, found.width, entropy, found.bytes, scale_bytes)


def traced_size(codes: Array, scale_bytes: int = 0) -> TensorSize:
    """`measure` with traced arithmetic, float32 scalars: for metrics, in a compiled program.

    By one sort of the codes, since those of a learned scale are not bounded: O(n log n), about a second for ten million
    on two cores. Entropy is Σ over runs of equal codes of (c/n)·log2(n/c) for a run of c.
    """
    count = codes.size
    whole = jnp.issubdtype(codes.dtype, jnp.integer)
    ordered = jnp.sort(codes.reshape(-1).astype(jnp.int32 if whole else jnp.float32))
    index = jnp.arange(count, dtype=jnp.int32)
    differs = ordered[1:] != ordered[:-1]
    first = jnp.concatenate([jnp.ones((min(count, 1),), bool), differs])
    last = jnp.concatenate([differs, jnp.ones((min(count, 1),), bool)])
    start = jax.lax.cummax(jnp.where(first, index, 0))
    run = (index - start + 1).astype(jnp.float32)
    entropy = jnp.sum(jnp.where(last, run / max(count, 1) * jnp.log2(count / run), 0.0))
    levels = jnp.sum(first, dtype=jnp.int32)
    by_level, span, width = _bits_for(levels), levels, _bits_for(levels)
    code_bytes = _packed(count, by_level) + levels * 4
    if whole:
        lowest, highest = (ordered[0], ordered[-1]) if count else (jnp.int32(0), jnp.int32(0))
        span = highest - lowest + 1
        plain, by_span = _packed(count, _bits_for(span)), _bits_for(span)
        entry = jnp.where((lowest >= -128) & (highest <= 127), 1, jnp.where(_fits_16(lowest, highest), 2, 4))
        table = _packed(count, by_level) + levels * entry
        width = jnp.where(plain <= table, by_span, by_level)
        code_bytes = jnp.minimum(plain, table)
    found = TensorSize(levels, span, width, entropy, code_bytes, jnp.asarray(scale_bytes))
    return TensorSize(*(number.astype(jnp.float32) for number in found))


def size_metrics(
    weights: Sequence[Weight], params: Any, quant: Mapping[str, Any], precision: Precision | Mapping[str, Precision]
) -> dict[str, Array]:
    """The size of a model's quantized weights at `precision`, which may be traced: name → float32 scalar.

    ``size/<param>/levels``, ``…/bits`` and ``…/entropy_bits`` of each (see `TensorSize`), and over all of them

    =========================  =====================================================================================
    ``size/bits``              mean width of an element, without scales
    ``size/entropy_bits``      mean entropy of an element
    ``size/bytes``             what `qtrain.export` stores for them: packed codes, tables, scales and offsets
    ``size/compression``       4 bytes · their elements / ``size/bytes``
    ``size/compression_model`` 4 bytes · all of `params` / (``size/bytes`` + 4 bytes · the rest of `params`)
    =========================  =====================================================================================

    Elements that the bits leave in float (24 and above) take 32 bits, and no scale. Empty where no weight is quantized.
    """
    found: dict[str, Array] = {}
    sizes: list[tuple[Weight, TensorSize]] = []
    for weight in quantized_at(weights, precision):
        bits = weight.bits(precision)
        codes, scale = encode(weight, params, quant, jnp.minimum(bits, FLOAT_BITS - 1))
        size = traced_size(codes, stored_scale_bytes(scale))
        values = jnp.asarray(bits, jnp.float32) >= FLOAT_BITS
        as_float = _as_float(weight)._replace(levels=size.levels, span=size.span)
        size = TensorSize(*(jnp.where(values, jnp.float32(a), b) for a, b in zip(as_float, size, strict=True)))
        sizes.append((weight, size))
        for name in ("levels", "bits", "entropy_bits"):
            found[f"size/{weight.name}/{name}"] = getattr(size, name)
    if not sizes:
        return {}
    total = sum(weight.size for weight, _ in sizes)
    stored: Any = sum(size.bytes for _, size in sizes)
    rest = _parameters(params) - total
    for name in ("bits", "entropy_bits"):
        found[f"size/{name}"] = sum(getattr(size, name) * (weight.size / total) for weight, size in sizes)
    found["size/bytes"] = stored
    found["size/compression"] = 4.0 * total / stored
    found["size/compression_model"] = 4.0 * (total + rest) / (stored + 4.0 * rest)
    return found


def size_summary(
    weights: Sequence[Weight], params: Any, quant: Mapping[str, Any], precision: Precision | Mapping[str, Precision]
) -> dict[str, float]:
    """The same over all weights at the end of a run, exactly (NumPy): for ``summary.json``.

    ``weight_bits``, ``weight_entropy_bits``, ``stored_bytes``, ``compression`` and ``compression_model`` are the
    ``size/…`` of `size_metrics` without a parameter's name, elements left in float among them; empty where no weight is
    quantized.

    Args:
      weights, params, quant: of the model.
      precision: Python numbers.
    """
    weights = quantized_at(weights, precision)
    if not weights:
        return {}
    kept = below_float(weights, precision)
    encoded = _encoded(kept, params, quant, [np.float32(weight.bits(precision)) for weight in kept])
    sizes = {weight.name: _as_float(weight) for weight in weights}
    for name, (codes, scale) in encoded.items():
        sizes[name] = measure(np.asarray(to_host(codes)), stored_scale_bytes(scale))
    total = sum(weight.size for weight in weights)
    rest = _parameters(params) - total
    stored = sum(size.bytes for size in sizes.values())
    return {
        "weight_bits": sum(sizes[w.name].bits * w.size for w in weights) / total,
        "weight_entropy_bits": sum(sizes[w.name].entropy_bits * w.size for w in weights) / total,
        "stored_bytes": stored,
        "compression": 4 * total / stored,
        "compression_model": 4 * (total + rest) / (stored + 4 * rest),
    }


@functools.partial(jax.jit, static_argnums=0)
def _encoded(
    weights: tuple[Weight, ...], params: Any, quant: Mapping[str, Any], bits: Sequence[Any]
) -> dict[str, tuple[Array, Any]]:
    """Codes and scales by name; bits are traced, so that the runs of a sweep share the program."""
    return {weight.name: encode(weight, params, quant, own) for weight, own in zip(weights, bits, strict=True)}


def _as_float(weight: Weight) -> TensorSize:
    """Of a weight that is left in float: 32 bits an element; its levels are not counted."""
    return TensorSize(0, 0, 32, 32.0, 4 * weight.size, 0)


def stored_scale_bytes(scale: Any) -> int:
    """Bytes of the scales and offsets, 4 each."""
    return _SCALE_BYTES * sum(math.prod(leaf.shape) for leaf in scale_leaves(scale).values())


def _parameters(params: Any) -> int:
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params))


def _fits_16(lowest: Array, highest: Array) -> Array:
    return (lowest >= -(1 << 15)) & (highest < 1 << 15)


def _bits_for(values: Array) -> Array:
    """⌈log2 values⌉, exactly, as int32."""
    return 32 - jax.lax.clz(jnp.maximum(values - 1, 0))


def _packed(count: int, width: Array) -> Array:
    """`packed_size`, in int32 for as long as the answer fits it."""
    return count // 8 * width + (count % 8 * width + 7) // 8
