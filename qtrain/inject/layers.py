"""The layers that no field can be given another contraction, and attention.

What such a layer computes is traced as a function of its parameters and inputs and run again with its products
quantized (`qtrain.inject.staged`).
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import flax.linen as nn
import jax

from qtrain.inject.attention import attention
from qtrain.inject.injected import Injected, PartScope
from qtrain.inject.record import Record, effective_bits, shape_of
from qtrain.inject.staged import replay
from qtrain.quantizers import Contraction

if TYPE_CHECKING:
    from qtrain.inject.trace import Trace

Array = jax.Array
Call = Callable[..., Any]

_GATES = tuple(f"{side}{gate}" for side in "ih" for gate in "ifgo")


def join(path: str, name: str) -> str:
    """The path of `name` in the module of `path`."""
    return f"{path}/{name}" if path else name


def _own(kind: type, method: str, function: Any) -> bool:
    """Whether `function`, which is being called, is the method as `kind` has it.

    It is not where a subclass has a method of its own, or flax one around it (``nn.remat(nn.Einsum)``). Should that
    call the method of `kind`, it is seen then, in the scope that it is to have.
    """
    return function is inspect.unwrap(getattr(kind, method))


def _einsum(trace: Trace, module: Any, path: str, method: str, called: Any, call: Call, args: Any, kwargs: Any) -> Any:
    """An `nn.Einsum` or `nn.ConvTranspose`."""
    kind, op = (nn.Einsum, "einsum") if isinstance(module, nn.Einsum) else (nn.ConvTranspose, "conv_transpose")
    if method != "__call__" or not _own(kind, method, called):
        return call(*args, **kwargs)
    site = Injected(trace, module.scope, path, type(module).__name__, op)
    return _staged(trace, module, kind.__call__, call, args, kwargs, {"kernel": site, "bias": site})


def _cell(trace: Trace, module: Any, path: str, method: str, called: Any, call: Call, args: Any, kwargs: Any) -> Any:
    """An `nn.OptimizedLSTMCell`: each gate's product is a layer, whose path is that of the same gate in an LSTMCell."""
    if method != "__call__" or not _own(nn.OptimizedLSTMCell, method, called):
        return call(*args, **kwargs)
    sites: dict[str, Injected] = {}
    for gate in _GATES:
        at = join(path, gate)
        trace.modules.setdefault(at, "DenseParams")
        site = Injected(trace, PartScope(module.scope, gate), at, "DenseParams", "recurrent", owner=path)
        sites |= {f"{gate}/kernel": site, f"{gate}/bias": site}
    return _staged(trace, module, nn.OptimizedLSTMCell.__call__, call, args, kwargs, sites)


def _embed(trace: Trace, module: Any, path: str, method: str, called: Any, call: Call, args: Any, kwargs: Any) -> Any:
    """An `nn.Embed`: the table that is looked up, and ``attend``, a product with it."""
    if method not in ("__call__", "attend") or not _own(nn.Embed, method, called):
        return call(*args, **kwargs)
    leaf = join(path, "embedding")
    looked_up = Injected(trace, module.scope, path, type(module).__name__, "embed", leaf=leaf)
    if method == "attend":
        at = join(path, "attend")
        site = Injected(
            trace, PartScope(module.scope, "attend"), at, type(module).__name__, "attend", owner=path, leaf=leaf
        )
        if looked_up.rule and site.rule and looked_up.rule.weight_quantizer == site.rule.weight_quantizer:
            site.weights_at = module.scope, path  # one table, one grid
        return _staged(trace, module, nn.Embed.attend, call, args, kwargs, {"embedding": site})
    promote = module.promote_dtype

    def promoted(embedding: Array, **options: Any) -> tuple[Array]:
        (embedding,) = promote(embedding, **options)
        return (table(looked_up, embedding),)

    with replaced(module, {"promote_dtype": promoted}):
        return call(*args, **kwargs)


def table(site: Injected, embedding: Array) -> Array:
    """The table, each row a channel of its own."""
    trace, rule, axes = site.trace, site.rule, (1,)
    record = Record(
        site.path, site.module, "embed", None, shape_of(embedding), None, ((), axes), owner=site.path, leaf=site.leaf
    )
    trace.records.setdefault(site.path, record)
    if rule is None or rule.weight_quantizer is None or not trace.active:
        return embedding
    quantizer, bits = rule.weight_quantizer, effective_bits(rule, trace.precision(site.path)).weights
    params = site.keeps("weights", quantizer, embedding, bits, axes)
    if trace.bits is None or bits is None:
        return embedding
    return quantizer(embedding, bits, params, key=site.seed(site.path, quantizer.stochastic), axes=axes)


def _attention(
    trace: Trace, module: Any, path: str, method: str, called: Any, call: Call, args: Any, kwargs: Any
) -> Any:
    """An `nn.MultiHeadDotProductAttention`, whatever its ``attention_fn``: its products are ``qk`` and ``pv``."""
    own = [name for name in ("qk_attn_weights_einsum_cls", "attn_weights_value_einsum_cls") if getattr(module, name)]
    if own:
        trace.notes[path] = f"sets {' and '.join(own)} of its own"
    function = module.attention_fn
    if method != "__call__" or own or not _own(nn.MultiHeadDotProductAttention, method, called):
        return call(*args, **kwargs)

    def site(name: str) -> Injected:
        scope, at = PartScope(module.scope, name), join(path, name)
        return Injected(trace, scope, at, type(module).__name__, "attention", owner=path, leaf="")

    with replaced(module, {"attention_fn": attention(function, site)}):
        return call(*args, **kwargs)


LAYERS: dict[type, Callable[..., Any]] = {
    nn.ConvTranspose: _einsum,
    nn.Einsum: _einsum,
    nn.OptimizedLSTMCell: _cell,
    nn.Embed: _embed,
    nn.MultiHeadDotProductAttention: _attention,
}
"""Layer type → what a method of it returns under a pass."""


def _staged(
    trace: Trace, module: nn.Module, method: Call, call: Call, args: Any, kwargs: Any, sites: Mapping[str, Injected]
) -> Any:
    """What `method`, of the layer's class, returns, each product with a parameter by the site of its name."""
    creating = module.is_mutable_collection("params")  # what makes parameters is not pure
    out = call(*args, **kwargs) if creating else None
    params = {name: value for name in sites if (value := _parameter(module, name)) is not None}

    def pure(params: Mapping[str, Array], inputs: Any) -> Any:
        tree: dict[str, Any] = {}
        for name, value in params.items():
            *outer, last = name.split("/")
            place = tree
            for key in outer:
                place = place.setdefault(key, {})
            place[last] = value
        positional, named = inputs
        copy = module.clone(parent=None, name=None)
        with trace.staging():
            return copy.apply({"params": tree}, *positional, method=method, **named)

    replayed = by_sites(trace, sites, params, pure, (args, kwargs))
    return out if creating and trace.bits is None else replayed


def by_sites(
    trace: Trace, sites: Mapping[str, Injected], params: Mapping[str, Array], pure: Callable[..., Any], inputs: Any
) -> Any:
    """``pure(params, inputs)``, each product with a parameter by the site of its name, which quantizes its bias too."""
    params = {
        name: sites[name].bias(value) if name.endswith("bias") and trace.active else value
        for name, value in params.items()
    }

    def product(op: Contraction, lhs: Array, rhs: Array, leaf: str | None) -> Array:
        if leaf is None:
            return op(lhs, rhs)
        site = sites[leaf]
        if rhs.shape != params[leaf].shape:
            site.leaf = ""  # not the parameter itself, but something made of it
        return site.product(op, lhs, rhs)

    return replay(pure, params, inputs, product)


def _parameter(module: nn.Module, name: str) -> Array | None:
    outer, _, inner = name.partition("/")
    if not module.has_variable("params", outer):
        return None
    value: Any = nn.unbox(module.get_variable("params", outer))
    return value.get(inner) if inner else value


@contextlib.contextmanager
def replaced(module: nn.Module, fields: Mapping[str, Any]) -> Iterator[None]:
    """`module` with other fields; it is ours, since linen binds a clone of what the user made.

    Not a clone of our own: that would run a subclass's ``setup`` twice, and capture its intermediates twice.
    """
    before = {name: getattr(module, name) for name in fields}
    try:
        for name, value in fields.items():
            object.__setattr__(module, name, value)
        yield
    finally:
        for name, value in before.items():
            object.__setattr__(module, name, value)
