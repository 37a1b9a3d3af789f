"""The layers of an nnx model, another contraction for the time of a call, and what their quantizers keep."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
from flax import nnx
from jax import lax

from qtrain.errors import UsageError
from qtrain.inject.attention import attention
from qtrain.inject.injected import Injected
from qtrain.inject.layers import join
from qtrain.inject.nnx_staged import FIELD, STAGED, sites, staging
from qtrain.inject.nnx_variables import Kept, Place
from qtrain.inject.trace import Trace

Array = jax.Array

# Layer type → (operation, field that takes its function, what the field holds when nobody set it).
_LAYERS: dict[type[nnx.Module], tuple[str, str, Any]] = {
    nnx.Linear: ("dot", "dot_general", lax.dot_general),
    nnx.LinearGeneral: ("dot", "dot_general", None),
    nnx.Conv: ("conv", "conv_general_dilated", lax.conv_general_dilated),
}
_NOT_REACHED = (nnx.LoRA,)
_ABSENT = object()


@dataclasses.dataclass(frozen=True)
class Layer:
    """A module whose contraction can be replaced: its path, the operation, and the field that takes the function."""

    path: str
    module: nnx.Module
    op: str
    field: str


@dataclasses.dataclass(frozen=True)
class Survey:
    """What an nnx model is made of.

    Attributes:
      layers: those whose contraction is a field. A module that is found at several paths has the first, attributes
        being taken in alphabetical order, as in ``nnx.iter_modules``.
      modules: path → type, of every module.
      notes: path → why a layer cannot be quantized.
      attentions: path → module, where two activations are multiplied by a function that is a field.
      staged: path → module, of those that call jax themselves; see `qtrain.inject.nnx_staged`.
    """

    layers: tuple[Layer, ...]
    modules: Mapping[str, str]
    notes: Mapping[str, str]
    attentions: Mapping[str, nnx.MultiHeadAttention]
    staged: Mapping[str, nnx.Module]

    @property
    def owners(self) -> frozenset[str]:
        """Paths of the layers that own a kernel."""
        own = (path for path, module in self.staged.items() if not isinstance(module, nnx.Embed))
        return frozenset([layer.path for layer in self.layers]).union(own)


def survey(model: nnx.Module) -> Survey:
    """The modules of a model."""
    layers: list[Layer] = []
    notes: dict[str, str] = {}
    attentions: dict[str, nnx.MultiHeadAttention] = {}
    staged: dict[str, nnx.Module] = {}
    found = {"/".join(map(str, parts)): module for parts, module in nnx.iter_modules(model)}
    first = {id(module): path for path, module in found.items()}
    modules = {path: type(module).__name__ for path, module in found.items()}
    for path, module in found.items():
        for name, child in vars(module).items():
            alias = f"{path}/{name}" if path else name
            known = first.get(id(child)) if isinstance(child, nnx.Module) else None
            # A reference to a module that this one is inside of is another matter: it does not run it again.
            if known is not None and known != alias and not f"{alias}/".startswith(f"{known}/"):
                modules[alias] = type(child).__name__
                notes[alias] = f"the module of {known!r}, whose rules it follows"
        spec = next((spec for kind, spec in _LAYERS.items() if isinstance(module, kind)), None)
        if spec is None:
            if isinstance(module, _NOT_REACHED):
                notes[path] = f"{type(module).__name__} is not reached by the injection"
            if isinstance(module, nnx.MultiHeadAttention):
                attentions[path] = module
            if isinstance(module, STAGED):
                staged[path] = module
            continue
        op, field, default = spec
        own = getattr(module, field)
        # Inside an outer model's pass the layers of an inner one have the outer's function, which then gives way.
        if (own is not default and not isinstance(own, InjectedNNX)) or getattr(
            module, f"{field}_cls", None
        ) is not None:
            notes[path] = f"sets a {field} of its own"
        else:
            layers.append(Layer(path, module, op, field))
    return Survey(tuple(layers), modules, notes, attentions, staged)


class InjectedNNX(Injected):
    """The function an nnx layer calls in place of ``lax.dot_general`` or ``lax.conv_general_dilated``.

    It compares by identity, so that a transformation inside the model, which caches by the fields of the modules it is
    given, never replays the trace of another call.
    """

    def __call__(self, lhs: Array, rhs: Array, *args: Any, **kwargs: Any) -> Array:
        """In place of the layer's own contraction."""
        if self.op == "conv" and kwargs.pop("out_sharding", None) is not None:
            raise UsageError(f"layer {self.path!r}: a quantized convolution takes no out_sharding; leave it None")
        return super().__call__(lhs, rhs, *args, **kwargs)

    def promote_operands(self, promote: Callable[..., Any]) -> Callable[..., Any]:
        """`promote_with_bias` for nnx, which passes the three operands as a tuple."""
        function = self.promote_with_bias(lambda *operands, **kwargs: promote(operands, **kwargs))
        return lambda operands, **kwargs: function(*operands, **kwargs)


@contextlib.contextmanager
def injected(model: nnx.Module, found: Survey, trace: Trace, kept: Kept) -> Iterator[None]:
    """`model` with the contractions of `trace` in its layers, until the end of the block.

    Attributes are set past nnx's own checks: nothing of the model's state changes, and it is as it was afterwards.
    """
    before: list[tuple[nnx.Module, str, Any]] = []

    def replace(module: nnx.Module, field: str, value: Any) -> None:
        known = type(module) if field == "__class__" else vars(module).get(field, _ABSENT)
        before.append((module, field, known))
        object.__setattr__(module, field, value)

    try:
        for path, attends in found.attentions.items():
            own = attends.attention_fn
            if trace.recording or path in trace.inside:
                own = attention(own, _parts(trace, kept, path, type(attends).__name__))
            replace(attends, "attention_fn", _scoped(path, own))
        for path, module in found.staged.items():
            if trace.recording or path in trace.inside:
                replace(module, FIELD, sites(trace, kept, path, module))
                replace(module, "__class__", staging(type(module)))
        for layer in found.layers:
            place: Any = Place(layer.path, kept)
            function = InjectedNNX(trace, place, layer.path, type(layer.module).__name__, layer.op)
            replace(layer.module, layer.field, function)
            rule = function.rule
            if trace.active and rule is not None and rule.bias_quantizer is not None:
                own = layer.module.promote_dtype  # type: ignore[attr-defined]
                replace(layer.module, "promote_dtype", function.promote_operands(own))
        with jax.named_scope(type(model).__name__):  # as linen names its root; paths are counted from there
            yield
    finally:
        for module, field, value in reversed(before):
            if value is _ABSENT:
                object.__delattr__(module, field)
            else:
                object.__setattr__(module, field, value)


def _parts(trace: Trace, kept: Kept, path: str, kind: str) -> Callable[[str], Injected]:
    """The sites of an attention's products."""

    def site(name: str) -> Injected:
        at = join(path, name)
        place: Any = Place(at, kept)
        return Injected(trace, place, at, kind, "attention", owner=path, leaf="")

    return site


def _scoped(path: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """`function`, its products named by the module's path: nnx names none."""

    def within(*args: Any, **kwargs: Any) -> Any:
        with contextlib.ExitStack() as stack:
            for name in path.split("/") if path else ():
                stack.enter_context(jax.named_scope(name))
            return function(*args, **kwargs)

    return within
