"""One pass through a linen model with the quantizers injected, or with the layers merely written down."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import flax.core
import flax.linen as nn
import jax
import jax.numpy as jnp

from qtrain.inject import layers
from qtrain.inject.injected import STATISTICS, Injected
from qtrain.inject.learned import Learned
from qtrain.inject.outputs import output
from qtrain.inject.record import Record, check_statistics, effective_bits, op_bits
from qtrain.inject.rules import Rule
from qtrain.precision import Precision
from qtrain.quantizers import Contraction, Operands, Traced
from qtrain.quantizers.native import Paths

__all__ = ["STATISTICS", "Contract", "Record", "Trace", "check_statistics", "effective_bits", "never_replay", "op_bits"]

Array = jax.Array
Contract = Callable[[Contraction, Operands, Array, Array, Traced], Array]

# Layer type → (operation, field that takes its function).
_LAYERS: dict[type, tuple[str, str]] = {
    nn.Dense: ("dot", "dot_general"),
    nn.DenseGeneral: ("dot", "dot_general"),
    nn.Conv: ("conv", "conv_general_dilated"),
}
_NOT_REACHED = (nn.ConvLocal,)


class _Unrepeated:
    """A value that hashes anew each time.

    ``nn.jit`` inside a model replays the trace of any module of equal fields, whatever its path, and with it the bits
    and rules that were closed over. It compares hashes of the module's fields and of its scope's flags: with this among
    them, no two are equal.
    """

    _count = itertools.count()

    def __hash__(self) -> int:
        return next(self._count)


_FLAG = "quant_trace"
_PHANTOM = ("setup", "<lambda>")  # linen also calls these on a clone that checks a setup, whose path is not the model's


@dataclasses.dataclass
class Trace:
    """The state of one pass: what it is to do, and what it has seen.

    Attributes:
      rules, assigned: path → index of the rule; None while the layers are only being written down.
      bits: the step's `Precision`, one for every layer or one a path; None to inject nothing.
      seed: noise seed, for rules that round stochastically.
      create_statistics: whether running ranges are being created (initialisation).
      learned: what quantizers have learned, or create.
      initial_bits: with `create_statistics`, the bits for which learned parameters are created.
      contract: carries out a quantized contraction.
      choose: how its products are computed, from the rule, what was seen, and the bits; None: in float.
      records, modules, notes: what was seen: the layers in order of execution, the type of every module, and why a
        layer cannot be quantized; all by path.
      inside: paths of the modules inside which something is quantized.
      raw: name → what was seen of the parameters that a rule for "param" may mean.
      types, reached: by path, the classes of the modules there (several where these share a scope), and how many layers
        had been executed when the first was called.
    """

    rules: tuple[Rule, ...] = ()
    assigned: Mapping[str, int] | None = None
    bits: Precision | Mapping[str, Precision] | None = None
    seed: Array | None = None
    create_statistics: bool = False
    learned: Learned = dataclasses.field(default_factory=Learned)
    initial_bits: Precision | Mapping[str, Precision] | None = None
    contract: Contract | None = None
    choose: Callable[[Rule, Record, Precision], Paths] | None = None
    records: dict[str, Record] = dataclasses.field(default_factory=dict)
    modules: dict[str, str] = dataclasses.field(default_factory=dict)
    notes: dict[str, str] = dataclasses.field(default_factory=dict)
    types: dict[str, set[type]] = dataclasses.field(default_factory=dict)
    reached: dict[str, int] = dataclasses.field(default_factory=dict)
    inside: frozenset[str] = frozenset()
    raw: dict[str, Record] = dataclasses.field(default_factory=dict)
    _staging: bool = False
    _calls: list[str] = dataclasses.field(default_factory=list)

    def intercept(self, call: Callable[..., Any], args: Any, kwargs: Any, context: nn.module.InterceptorContext) -> Any:
        """The linen interceptor: for the time of its call, a supported layer has another contraction."""
        module, scope = context.module, context.module.scope
        if scope is None or self._staging:
            return call(*args, **kwargs)
        if not scope.has_flag(_FLAG):
            never_replay(module)
        if context.method_name in _PHANTOM:
            return call(*args, **kwargs)
        path = "/".join(module.path)
        self.modules.setdefault(path, type(module).__name__)
        self.types.setdefault(path, set()).add(type(module))
        self.reached.setdefault(path, len(self.records))
        if context.method_name != "__call__":
            return self._layer(call, args, kwargs, path, context)
        self._calls.append(path)
        try:
            out = self._layer(call, args, kwargs, path, context)
        finally:
            self._calls.pop()
        self._see_raw(module, path)
        # Once for a module that shares its scope with its only child, and for a subclass that calls its parent.
        return out if path in self._calls else output(self, module, path, out)

    def _layer(
        self, call: Callable[..., Any], args: Any, kwargs: Any, path: str, context: nn.module.InterceptorContext
    ) -> Any:
        """What a method returns, its contractions carried out as the rules say."""
        module, method = context.module, context.method_name
        scope: Any = module.scope
        special = next((spec for kind, spec in layers.LAYERS.items() if isinstance(module, kind)), None)
        if special is not None and (self.recording or path in self.inside):
            called = getattr(context.orig_method, "func", None)  # it is bound to the module
            return special(self, module, path, method, called, call, args, kwargs)
        found = next((spec for kind, spec in _LAYERS.items() if isinstance(module, kind)), None)
        if method != "__call__" or found is None:
            if isinstance(module, _NOT_REACHED):
                self.notes[path] = f"{type(module).__name__} is not reached by the injection"
            return call(*args, **kwargs)
        op, field = found
        own = getattr(module, field), getattr(module, f"{field}_cls")
        injected = next((function for function in own if isinstance(function, Injected)), None)
        if injected is not None:
            # A subclass's super().__call__, perhaps inside a transformation, where the scope is another.
            with injected.within(scope):
                return call(*args, **kwargs)
        if any(function is not None for function in own):
            self.notes[path] = f"sets a {field} of its own"
            return call(*args, **kwargs)
        injected = Injected(self, scope, path, type(module).__name__, op)
        fields: dict[str, Any] = {field: injected}
        rule = injected.rule
        if self.active and rule is not None and rule.bias_quantizer is not None:
            fields["promote_dtype"] = injected.promote_with_bias(module.promote_dtype)
        with layers.replaced(module, fields):
            return call(*args, **kwargs)

    def _see_raw(self, module: nn.Module, path: str) -> None:
        """Write down the parameters of a module's own, as it sees them: under a scan without the axis of layers."""
        if not self.recording or not any("param" in rule.ops for rule in self.rules):
            return
        for name, leaf in nn.unbox(dict(module.variables.get("params", {}))).items():
            if isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jnp.floating):
                at = f"{path}/{name}" if path else name
                seen = jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)
                kind = type(module).__name__
                self.raw.setdefault(at, Record(at, kind, "param", None, seen, None, ((), None), owner=path, leaf=at))

    def raw_parameters(self, rules: Sequence[Rule]) -> dict[str, Record]:
        """Of the parameters seen those that a rule for "param" matches, unless they are a layer's kernel or bias."""
        layered = {record.leaf.rpartition("/")[0] for record in self.records.values() if record.leaf}
        return {
            name: record
            for name, record in self.raw.items()
            if record.owner not in layered and any(rule.covers(name, "param") for rule in rules)
        }

    @property
    def recording(self) -> bool:
        """Whether the layers are only being written down."""
        return self.assigned is None

    @contextlib.contextmanager
    def staging(self) -> Iterator[None]:
        """Methods called inside, of copies of a module, are none of the model's."""
        before, self._staging = self._staging, True
        try:
            yield
        finally:
            self._staging = before

    @property
    def active(self) -> bool:
        """Whether the pass quantizes, or creates what quantizers keep."""
        return self.bits is not None or self.create_statistics

    def rule(self, path: str) -> Rule | None:
        """The rule of a path, or None."""
        return None if self.assigned is None or path not in self.assigned else self.rules[self.assigned[path]]

    def precision(self, path: str) -> Precision:
        """The step's bits for a path."""
        bits = self.initial_bits if self.create_statistics else self.bits
        if isinstance(bits, Mapping):
            return bits.get(path, Precision())
        return bits if bits is not None else Precision()


def never_replay(module: nn.Module) -> None:
    """Makes ``nn.jit`` trace what lies below `module` for each call: submodules inherit the flags of its scope.

    Those that it was given as fields have their scopes already.
    """
    for found in _modules(module):
        if isinstance(found.scope, flax.core.Scope) and not found.scope.has_flag(_FLAG):
            found.scope.flags = flax.core.freeze({**found.scope.flags, _FLAG: _Unrepeated()})


def _modules(value: Any) -> Iterator[nn.Module]:
    """The modules in a value, and in the fields of those."""
    if isinstance(value, nn.Module):
        yield value
        value = [getattr(value, field.name, None) for field in dataclasses.fields(value) if field.name != "parent"]
    if isinstance(value, Mapping | list | tuple):
        for item in value.values() if isinstance(value, Mapping) else value:
            yield from _modules(item)
