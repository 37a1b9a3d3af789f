"""What goes into the file of an exported model: codes, scales, the other variables, and what says how to run them."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict

from qtrain.errors import UsageError
from qtrain.export import coding, file, quantizer_json, switching
from qtrain.export.encode import EVALUATION_KEY, below_float, check_tables, quantize, running_ranges, scale_leaves
from qtrain.export.model import VARIABLES, WEIGHTS, Exported, assembled
from qtrain.export.report import Report, Row
from qtrain.export.separate import bytes_alone, remark, trained_widths
from qtrain.export.switching import Bits
from qtrain.inject import QuantizedModel, Rule, Weight
from qtrain.inject.learned import LEARNED
from qtrain.inject.rules import expanded
from qtrain.inject.trace import STATISTICS, effective_bits
from qtrain.inject.weights import weights as quantized_weights
from qtrain.precision import Precision
from qtrain.quantizers import DoubleRounding, contract

Array = jax.Array


def save(
    path: str | os.PathLike[str],
    qmodel: QuantizedModel,
    variables: Mapping[str, Any],
    bits: Bits,
    inputs: Any,
    *,
    call: Mapping[str, Any] | None = None,
    config: Mapping[str, Any] | None = None,
    num_classes: int | None = None,
) -> Report:
    """Store a quantized model in one safetensors file: codes in as few bits as they need, scales, everything else.

    Each quantized parameter becomes its integer codes at `bits`, packed at ⌈log2(max − min + 1)⌉ bits an element (0 for
    a constant one), or, where that is less, as indices into a table of the codes that occur; and its scales and offsets
    in float32. All other variables are stored as they are. The file has a checksum, and appears only once it is whole.

    Args:
      path: of the file; one that is there is replaced.
      qmodel, variables: the model, and its variables as evaluation takes them.
      bits: a `Precision` of Python numbers, or one for each layer that follows the schedule.
      inputs: a batch, or its shape (``jax.ShapeDtypeStruct``; the check of the logits then draws a batch).
      call: keyword arguments of the model in evaluation; None: ``{"train": False}``.
      config: of the run, as JSON, of which the keys that are None are left out; with it `load` needs no `module`.
      num_classes: likewise, that the module was built for.

    Raises:
      UsageError: for a model of which nothing is quantized, a quantizer that cannot be stored, weights that are not
        finite, or a file that cannot be written.
    """
    prepared = prepare(qmodel, variables, bits, inputs, call=call, config=config, num_classes=num_classes)
    return write(path, prepared)


class Prepared(NamedTuple):
    """What `save` writes, checked: tensors, metadata, the model that they describe, and the report without a file."""

    tensors: dict[str, np.ndarray]
    content: dict[str, Any]
    exported: Exported
    report: Report


def prepare(
    qmodel: QuantizedModel,
    variables: Mapping[str, Any],
    bits: Bits,
    inputs: Any,
    *,
    call: Mapping[str, Any] | None = None,
    config: Mapping[str, Any] | None = None,
    num_classes: int | None = None,
) -> Prepared:
    """All of `save` but the file; arguments and errors are its."""
    call = {"train": False} if call is None else dict(call)
    if qmodel.execute is not contract:
        raise UsageError("export: the model computes with another backend's numerics; use quant.backend='qtrain'")
    unboxed: dict[str, Any] = nn.meta.unbox(dict(variables))
    tensors, content, rows, values = contents(qmodel, unboxed, bits, inputs, call)
    content["config"] = None if config is None else _set(config)
    content["num_classes"] = num_classes
    exported = assembled(tensors, content, qmodel.module)
    _check_exact(exported, values)
    widths = trained_widths(qmodel, exported)
    each = [exported.source.requested(width) for width in widths] or [bits]
    elements = sum(row.elements for row in rows)
    one_row = sum(np.size(value) for value in jax.tree.leaves(exported.source.rest_at(exported.bits)))
    report = Report(
        path="",
        bytes=0,
        weight_bytes=sum(row.bytes for row in rows),
        weight_float_bytes=4 * elements,
        float_bytes=4 * (elements + one_row),
        rows=rows,
        difference=_difference(exported, qmodel, unboxed, each, inputs, num_classes),
        separate={width: bytes_alone(exported, width) for width in widths},
        shared=sum(value.nbytes for value in tensors.values()),
        remark=remark(exported),
    )
    return Prepared(tensors, content, exported, report)


def write(path: str | os.PathLike[str], prepared: Prepared) -> Report:
    """The file of what `prepare` made; returns the report with its name and size.

    Raises:
      UsageError: where it cannot be written.
    """
    size = file.write(path, prepared.tensors, prepared.content)
    return dataclasses.replace(prepared.report, path=os.fspath(path), bytes=size)


def contents(
    qmodel: QuantizedModel, variables: dict[str, Any], bits: Bits, inputs: Any, call: dict[str, Any]
) -> tuple[dict[str, np.ndarray], dict[str, Any], tuple[Row, ...], dict[str, np.ndarray]]:
    """Tensors and metadata of the file, a row for each quantized parameter, and the values that its codes stand for."""
    shape = jax.ShapeDtypeStruct(inputs.shape, inputs.dtype)
    # The rules as resolved for a whole pass: what a quantizer sees is in the dtype that its layer computes in.
    resolved, params = qmodel.initial(None, (shape,), call)
    quantized = quantized_weights(resolved, expanded(qmodel.rules), params)
    check_tables(resolved, expanded(qmodel.rules), bits)
    kept = below_float(quantized, bits)
    if not kept:
        raise UsageError(
            "export: no weight of the model is quantized below 24 bits (a float run); there are no integers to store"
        )
    seen = {weight.name: resolved.records[weight.path].rhs for weight in kept}
    dtypes = {name: operand.dtype for name, operand in seen.items() if operand is not None}
    coded = _encoded(kept, variables, bits, dtypes)

    tensors: dict[str, np.ndarray] = {}
    entries, rows = {}, []
    for weight in kept:
        codes, scale, _ = coded[weight.name]
        leaves = {name: np.asarray(leaf) for name, leaf in scale_leaves(scale).items()}
        dtype = jnp.promote_types(weight.value(variables["params"]).dtype, dtypes[weight.name])
        how, arrays, lowest = coding.to_bytes(codes)
        arrays |= {name: leaf.astype(np.float32) for name, leaf in leaves.items()}
        tensors |= {f"{WEIGHTS}/{weight.name}/{name}": array for name, array in arrays.items()}
        width = int(weight.bits(bits))
        entries[weight.name] = {
            "encoding": how.encoding,
            "width": how.width,
            "minimum": lowest,
            "shape": weight.shape,
            "bits": width,
            "codes": str(codes.dtype),
            "scale": str(leaves["scale"].dtype),
            "dtype": str(dtype),
            "axes": weight.axes,
            "stacked": weight.stacked,
            "quantizer": quantizer_json.to_json(weight.quantizer),
            "layer": weight.path,
        }
        rows.append(Row(weight.name, weight.size, width, how.width, sum(array.nbytes for array in arrays.values())))
    held = qmodel.held(variables, shape, **call)
    widths, norms = qmodel.per_width, {"/".join(name): leaf.follows for name, leaf in held.leaves.items()}
    if not any(_narrows(weight, bits) for weight in kept):  # then one row is all that can ever be used
        variables, widths, norms = switching.select(variables, norms, widths, bits), (), {}
    others, widened = _others(variables, kept)
    tensors |= others
    rules = {path: expanded(qmodel.rules)[index] for path, index in resolved.assigned.items()}
    content = {
        "bits": _bits_to_json(bits),
        "inputs": {"shape": inputs.shape, "dtype": str(inputs.dtype)},
        "call": call,
        "weights": entries,
        "layers": {weight.path: weight.rule.weights for weight in quantized},
        "acts": {path: entry for path, rule in rules.items() if (entry := _act_entry(rule, resolved.records[path].op))},
        "per_width": {"widths": widths, "rows": norms},
        "widened": widened,
    }
    return tensors, content, tuple(rows), {name: values for name, (_, _, values) in coded.items()}


def _encoded(kept: tuple[Weight, ...], variables: Mapping[str, Any], bits: Bits, dtypes: Mapping[str, Any]) -> Any:
    """Name → codes, scale and quantized values, by the arithmetic of a compiled evaluation: its bits are traced."""
    ranges = {weight.name: running_ranges(weight, variables.get(STATISTICS, {})) for weight in kept}

    def encoded(variables: Mapping[str, Any], ranges: Any, bits: Bits) -> dict[str, Any]:
        params, quant = variables["params"], variables.get(LEARNED, {})
        return {
            w.name: quantize(w, params, quant, w.bits(bits), dtype=dtypes[w.name], ranges=ranges[w.name]) for w in kept
        }

    used = {name: variables[name] for name in ("params", LEARNED) if name in variables}
    return jax.device_get(jax.jit(encoded)(used, ranges, jax.tree.map(np.float32, bits)))


def _check_exact(exported: Exported, values: Mapping[str, np.ndarray]) -> None:
    """Refuse codes that do not say what the quantizer's call says: of a NaN, of integers beyond 32 bits."""
    for name, expected in values.items():
        found: Any = exported.variables["params"]
        for key in name.split("/"):
            found = found[key]
        if not np.array_equal(np.asarray(found), expected.astype(found.dtype)):
            reason = "its codes do not fit" if np.isfinite(expected).all() else "it holds values that are not finite"
            raise UsageError(f"export: {name!r} cannot be stored as integers: {reason}")


def _others(variables: Mapping[str, Any], kept: tuple[Weight, ...]) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """All variables but the quantized parameters and what their quantizers keep; and the dtypes NumPy has not."""
    left_out = {("params", *weight.leaf) for weight in kept}
    owned = {(*weight.path.split("/"), weight.kind) if weight.path else (weight.kind,) for weight in kept}
    tensors, widened = {}, {}
    for keys, leaf in flatten_dict(variables).items():
        of_quantizer = keys[0] in (LEARNED, STATISTICS) and any(keys[1 : 1 + len(path)] == path for path in owned)
        if keys in left_out or of_quantizer:
            continue
        if not hasattr(leaf, "dtype") or any("/" in key for key in keys):
            raise UsageError(f"export: variable {'/'.join(keys)!r} is no array under names without a slash")
        name, value = "/".join((VARIABLES, *keys)), np.asarray(jax.device_get(leaf))
        if value.dtype.kind == "V" or str(value.dtype).startswith(("bfloat", "float8")):
            widened[name], value = str(value.dtype), value.astype(np.float32)
        tensors[name] = value
    return tensors, widened


def _set(config: Mapping[str, Any]) -> dict[str, Any]:
    """`config` without what is unset: in a small model's file that would be most of the bytes."""
    plain = {name: _set(value) if isinstance(value, Mapping) else value for name, value in config.items()}
    return {name: value for name, value in plain.items() if value is not None and value != {}}


def _act_entry(rule: Rule, op: str) -> dict[str, Any] | None:
    if rule.act_quantizer is None:
        return None
    fixed = effective_bits(rule, Precision()).acts
    return {"bits": fixed, "quantizer": quantizer_json.to_json(rule.act_quantizer), "op": op}


def _bits_to_json(bits: Bits) -> dict[str, Any]:
    def plain(precision: Precision) -> dict[str, int | None]:
        kinds = {"weights": precision.weights, "acts": precision.acts}
        return {kind: None if value is None else int(value) for kind, value in kinds.items()}

    return {"layers": {path: plain(each) for path, each in bits.items()}} if isinstance(bits, Mapping) else plain(bits)


def _narrows(weight: Weight, bits: Bits) -> bool:
    quantizer = weight.quantizer
    follows = weight.rule.weights is None
    return follows and isinstance(quantizer, DoubleRounding) and weight.bits(bits) == quantizer.high


def _difference(
    exported: Exported,
    qmodel: QuantizedModel,
    variables: Mapping[str, Any],
    each: Sequence[Bits],
    inputs: Any,
    num_classes: int | None,
) -> float:
    """The largest absolute difference of logits, exported against original, on a batch, at `each` of some bits."""
    if isinstance(inputs, jax.ShapeDtypeStruct):
        random = np.random.default_rng(0)
        whole = jnp.issubdtype(inputs.dtype, jnp.integer)
        drawn = random.integers(0, num_classes or 2, inputs.shape) if whole else random.normal(size=inputs.shape)
        inputs = jnp.asarray(drawn, inputs.dtype)

    @jax.jit
    def original(variables: Any, inputs: Any, bits: Bits) -> Array:
        rngs = {"quant": jax.random.key(EVALUATION_KEY)}
        return qmodel.apply(variables, inputs, bits=bits, rngs=rngs, **exported.call)

    worst = 0.0
    for bits in each:
        expected = original(dict(variables), inputs, jax.tree.map(np.float32, bits))
        found = (exported.at(bits) if len(each) > 1 else exported).logits(inputs)
        apart = np.abs(np.asarray(found, np.float64) - np.asarray(expected, np.float64))
        worst = max(worst, float(np.max(apart, initial=0.0)))
    return worst
