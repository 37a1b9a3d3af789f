"""The nnx layers that call jax themselves: they have another class for the time of a call.

What such a layer computes is traced as a function of its parameters and run again with its products quantized, as for
linen. A method that is looked up in a class cannot be replaced in an instance; and a function in the instance that
closes over it would still mean it where a transformation inside the model has made a copy.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import jax
from flax import nnx

from qtrain.inject.injected import Injected
from qtrain.inject.layers import by_sites, join, table
from qtrain.inject.nnx_variables import Kept, Place

if TYPE_CHECKING:
    from qtrain.inject.trace import Trace

Array = jax.Array

# Layer type → (operation, its methods).
_METHODS: dict[type[nnx.Module], tuple[str, tuple[str, ...]]] = {
    nnx.Einsum: ("einsum", ("__call__",)),
    nnx.ConvTranspose: ("conv_transpose", ("__call__",)),
    nnx.Embed: ("embed", ("__call__", "attend")),
}
STAGED = tuple(_METHODS)
"""Types of these layers."""
FIELD = "_quantized_by"
"""The attribute that has the `sites` of a layer."""
_PLAIN = "_quantized_from"


class Sites:
    """What quantizes a layer: method → parameter → site. It compares by identity, see `InjectedNNX`."""

    def __init__(self, trace: Trace, by_method: Mapping[str, Mapping[str, Injected]]) -> None:
        self.trace, self.by_method = trace, by_method


def sites(trace: Trace, kept: Kept, path: str, module: nnx.Module) -> Sites:
    """The sites of a layer at `path`."""
    op = next(op for kind, (op, _) in _METHODS.items() if isinstance(module, kind))
    kind = type(module).__name__
    place: Any = Place(path, kept)
    if op != "embed":
        site = Injected(trace, place, path, kind, op)
        return Sites(trace, {"__call__": {"kernel": site, "bias": site}})
    at, leaf = join(path, "attend"), join(path, "embedding")
    place_of_part: Any = Place(at, kept)
    looked_up = Injected(trace, place, path, kind, "embed", leaf=leaf)
    attended = Injected(trace, place_of_part, at, kind, "attend", owner=path, leaf=leaf)
    if looked_up.rule and attended.rule and looked_up.rule.weight_quantizer == attended.rule.weight_quantizer:
        attended.weights_at = place, path  # one table, one grid
    return Sites(trace, {"__call__": {"embedding": looked_up}, "attend": {"embedding": attended}})


@functools.cache
def staging(kind: type[nnx.Module]) -> type[nnx.Module]:
    """A subclass of `kind` that computes by the `sites` that its instances have."""
    plain = getattr(kind, _PLAIN, kind)
    methods = next(methods for known, (_, methods) in _METHODS.items() if issubclass(kind, known))
    body = {method: functools.partialmethod(_staged, plain, method) for method in methods}
    return type(plain.__name__, (plain,), {**body, _PLAIN: plain, "__module__": plain.__module__})


def _staged(module: Any, plain: type[nnx.Module], method: str, *args: Any, **kwargs: Any) -> Any:
    quantized: Sites = vars(module)[FIELD]
    by_name = quantized.by_method[method]
    params = {name: value[...] for name in by_name if (value := getattr(module, name)) is not None}

    def with_parameters(values: Mapping[str, Array]) -> Any:
        copy = object.__new__(plain)
        vars(copy).update(vars(module))
        for name, value in values.items():
            object.__setattr__(copy, name, nnx.Param(value))
        return copy

    call: Callable[..., Any] = getattr(plain, method)
    if method == "__call__" and "embedding" in params:
        (promoted,) = module.promote_dtype((params["embedding"],), dtype=module.dtype, inexact=False)
        return call(with_parameters({"embedding": table(by_name["embedding"], promoted)}), *args, **kwargs)

    def pure(values: Mapping[str, Array], inputs: Any) -> Any:
        positional, named = inputs
        return call(with_parameters(values), *positional, **named)

    return by_sites(quantized.trace, by_name, params, pure, (args, kwargs))
