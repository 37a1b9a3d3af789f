"""Which parameter is optimized how, and what a step tells the optimizer: between the model's plan and the optimizer."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from qtrain.errors import UsageError
from qtrain.inject import Weight
from qtrain.optim import Codes, Groups, codes_per_leaf
from qtrain.optim.codes import by_path, place
from qtrain.precision import Precision
from qtrain.quantizers import FLOAT_BITS, Quantizer

Array = jax.Array


def parameter_groups(
    weights: Sequence[Weight],
    quantizers: Mapping[tuple[str, str], Quantizer],
    schedule: Precision,
    *,
    transition: bool,
) -> Groups:
    """The groups of a model's parameters, and the codes of its quantized weights.

    Under a transition rate a weight's quantizer must have a scale that stands still, or codes would move without an
    update: what it has learned is then "frozen".

    Args:
      weights, quantizers: of the model, as `QuantizedModel.weights` and `QuantizedModel.quantizers` give them.
      schedule: the highest precision of the run, None where a kind is not quantized.
      transition: whether quantized weights move at a transition rate.

    Raises:
      UsageError: for a weight whose scale cannot be frozen, or no quantized weight.
    """
    latent = latent_weights(weights, schedule)
    if transition:
        _check_scales(latent)
    table = {f"params/{weight.name}": weight for weight in latent}
    if not transition and not any(quantizer.learns for quantizer in quantizers.values()):
        return Groups(None, *_coders(table))
    moved = {weight.leaf for weight in latent} if transition else set()
    held = {(weight.path, weight.kind) for weight in latent} if transition else set()

    def label(path: tuple[Any, ...], _: Any) -> str:
        top, *keys = (str(entry.key) for entry in path if isinstance(entry, jax.tree_util.DictKey))
        if top == "params":
            return "latent" if tuple(keys) in moved else "params"
        *module, kind, name = keys
        owner = "/".join(module), kind
        if owner in held or name in quantizers[owner].frozen:
            return "frozen"
        return "width" if name == "width" else "quant"

    return Groups(lambda tree: jax.tree_util.tree_map_with_path(label, tree), *_coders(table))


def _check_scales(latent: Sequence[Weight]) -> None:
    for weight in latent:
        if not weight.quantizer.learns:
            raise UsageError(
                f"optimizer.name: a transition rate needs weight scales that stand still, and {weight.name!r} is "
                f"quantized by {weight.quantizer.describe()!r}, whose scale follows the weights; give "
                "quant.weights='trs' or 'lsq'"
            )
    if not latent:
        raise UsageError("optimizer.name: a transition rate needs quantized weights, and every weight stays in float")


def _coders(table: Mapping[str, Weight]) -> tuple[Codes, Callable[..., Any]] | tuple[None, None]:
    """The functions by which an optimizer sees the codes of weights, by path, and sets a weight to a code."""
    if not table:
        return None, None

    def encode(path: str, value: Array, bits: Any, *, quant: Any = None, **_: Any) -> Array | None:
        weight = table.get(path)
        if weight is None:
            return None
        if quant is None:  # asked for shapes alone
            return jnp.zeros(value.shape, jnp.int32)
        found: Array = weight.apply("encode", _alone(weight, value), quant, jnp.minimum(bits, FLOAT_BITS - 1))[0]
        return found

    def decode(codes: Any, params: Any, bits: Any = None, *, quant: Any = None, **_: Any) -> Any:
        widths = by_path(bits)
        values = {
            path: table[path].decode(code, params["params"], quant, jnp.minimum(widths[path], FLOAT_BITS - 1))
            for path, code in by_path(codes).items()
        }
        return place(params, values)

    return codes_per_leaf(encode), decode


def _alone(weight: Weight, value: Array) -> Any:
    """A tree of parameters that holds this one only."""
    params: Any = value
    for key in reversed(weight.leaf):
        params = {key: params}
    return params


def latent_weights(weights: Sequence[Weight], precision: Precision) -> tuple[Weight, ...]:
    """Those that are quantized at all where `precision` is what the schedule gives at most."""
    bits = [(weight, weight.bits(precision)) for weight in weights]
    return tuple(w for w, b in bits if b is not None and not (isinstance(b, int) and b >= FLOAT_BITS))


def bits_tree(weights: Sequence[Weight], precision: Precision | Mapping[str, Precision]) -> dict[str, Any]:
    """``{"params": {…: bits}}`` with a number for each quantized parameter: what `scale_by_transition_rate` takes."""
    tree: dict[str, Any] = {}
    for weight in weights:
        bits = weight.bits(precision)
        place = tree
        for key in weight.leaf[:-1]:
            place = place.setdefault(key, {})
        place[weight.leaf[-1]] = jnp.asarray(32 if bits is None else bits, jnp.float32)
    return {"params": tree}
