"""An nnx model with quantizers injected: the same module, its state where it was, bits as an argument."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from qtrain.cost.count import count
from qtrain.errors import UsageError
from qtrain.inject.checks import Bits, limits
from qtrain.inject.execution import Choice
from qtrain.inject.learned import LEARNED, Learned
from qtrain.inject.nnx_pass import Call, Method, Settings, collections, created, quantized, resolved_for
from qtrain.inject.nnx_variables import Kept, Quant, QuantStat, QuantVariables, values_of, variables_of
from qtrain.inject.plan import Plan
from qtrain.inject.resolve import abstract, is_array, split_static
from qtrain.inject.rows import rows
from qtrain.inject.rules import Rule, default_rules
from qtrain.inject.trace import STATISTICS, Contract
from qtrain.inject.weights import Weight, weights
from qtrain.precision import Precision
from qtrain.quantizers import Quantizer, contract

Array = jax.Array

__all__ = ["Quant", "QuantStat", "QuantizedModule", "quantize"]


def quantize(
    module: nnx.Module,
    rules: Rule | Sequence[Rule] | None = None,
    *,
    execute: Contract = contract,
    widest: Precision | int | None = None,
    narrowest: Precision | int | None = None,
    per_width: Sequence[int] = (),
) -> QuantizedModule:
    """Inject quantizers into a Flax nnx module, whoever wrote it, without changing it.

    Args:
      module: any nnx module. It is held, not copied: a call through the result updates its batch statistics and random
        streams as its own call does.
      rules, execute, widest, narrowest: as for a linen model. Paths are those of ``nnx.iter_modules`` joined by ``/``,
        an element of a list being a number: ``blocks/0/attention/query``. A module that is found at several paths has
        the first one, attributes being taken in alphabetical order.
      per_width: for linen models alone; leave it ().

    Returns:
      A `QuantizedModule`: an nnx module itself, to be called, differentiated, split and trained as any other.

    Raises:
      UsageError: when `module` is no nnx module, a rule is none, or `per_width` is given. What depends on the shapes
        (a rule that matches nothing) is raised by `plan`, `init` and the call.

    >>> import jax.numpy as jnp
    >>> from flax import nnx
    >>> rngs = nnx.Rngs(0)
    >>> model = nnx.Sequential(nnx.Linear(4, 16, rngs=rngs), nnx.relu, nnx.Linear(16, 2, rngs=rngs))
    >>> qmodel = quantize(model, Rule())
    >>> nnx.jit(lambda m, x, bits: m(x, bits=bits))(qmodel, jnp.ones((1, 4)), Precision(weights=4, acts=4)).shape
    (1, 2)
    """
    if not isinstance(module, nnx.Module):
        raise UsageError(f"quantize: {type(module).__name__} is not a flax.nnx.Module instance")
    rules = default_rules() if rules is None else (rules,) if isinstance(rules, Rule) else tuple(rules)
    for rule in rules:
        if not isinstance(rule, Rule):
            raise UsageError(f"quantize: rules hold {rule!r}; give qtrain.Rule objects")
    if per_width:
        raise UsageError(f"quantize: per_width={per_width!r} is for linen models; leave it () for a flax.nnx.Module")
    return QuantizedModule(module, Settings(rules, execute, limits("widest", widest), limits("narrowest", narrowest)))


class QuantizedModule(nnx.Module):
    """An nnx module with quantizers injected into its layers; made by `quantize`.

    Learned quantizer parameters are variables of type `Quant`, running ranges of type `QuantStat`; neither is a
    ``Param`` of the model, and neither exists before `init` or `calibrate`. To train the former with the model::

        wrt = nnx.Any(nnx.Param, Quant)
        optimizer = nnx.Optimizer(qmodel, tx, wrt=wrt)
        grads = nnx.grad(loss, argnums=nnx.DiffState(0, wrt))(qmodel, ...)

    ``train()`` and ``eval()`` also say whether running ranges are updated, as they do for ``nnx.BatchNorm``.

    Attributes:
      module: the model as it was.
      quant: learned parameters: module path → "weights", "acts" or "bias" → name.
      quant_stats: running ranges, laid out alike.
      use_running_average: quantize by the running ranges and leave them as they are.
      settings: the rules, and how they are carried out.
    """

    def __init__(self, module: nnx.Module, settings: Settings) -> None:
        self.module = module
        self.settings = nnx.static(settings)
        self.quant = QuantVariables()
        self.quant_stats = QuantVariables()
        self.use_running_average = False

    @property
    def rules(self) -> tuple[Rule, ...]:
        """The rules, in order; the first that matches a layer's path wins."""
        return self.settings.rules

    def set_view(self, use_running_average: bool | None = None) -> None:
        """What ``nnx.view`` calls: `use_running_average` as for ``nnx.BatchNorm``."""
        if use_running_average is not None:
            self.use_running_average = use_running_average

    def __call__(
        self, *args: Any, bits: Bits | None = None, key: Array | None = None, method: Method = None, **kwargs: Any
    ) -> Any:
        """The model's output, quantized to `bits`; the plain float model without them.

        For the time of the call the layers have other contractions; they get their own back, also when it fails. Two
        threads must therefore not call the same live module at once (inside ``nnx.jit`` each trace has its own).

        Args:
          *args: the model's own arguments, as are further keywords.
          bits: a `Precision` for every layer that follows the schedule, or ``{path: Precision}`` with one for each of
            them. May be traced: one compilation serves all widths.
          key: of stochastic rounding, needed only if a rule asks for it: ``rngs.quant()``, or one folded with the step.
            Each layer folds it with its path.
          method: the name of another method of the model, or a function that takes it.

        Raises:
          UsageError: for bits that are no width, a path without bits, rules that do nothing, a missing key, quantizers
            that keep something and were not initialised, and ``execution="native"`` where it cannot run.
        """
        call = Call(args, kwargs, method)
        if bits is None:
            return call(self.module)
        kept = Kept(self.quant_stats, frozen=self.use_running_average)
        learned = Learned(values_of(self.quant))
        return quantized(self.settings, self.module, call, bits, learned, kept, key, self.settings.paths)

    def init(self, *args: Any, bits: Bits | None = None, method: Method = None, **kwargs: Any) -> None:
        """Creates what quantizers keep, from the weights and from one batch as it passes through the float model.

        The model itself is left as it is. Running ranges start empty (count 0).

        Args:
          *args: the model's arguments, as are further keywords.
          bits: the precision for which learned parameters begin; None: 8 bits.
          method: as for a call.

        Raises:
          UsageError: for a rule that does nothing, or running ranges that cannot be kept.
        """
        learned, call = Learned(create=True), Call(args, kwargs, method)
        graphdef, state = nnx.split(self.module)
        tree = (state, bits, call.tree)
        _, rebuild = split_static(tree)

        def create(arrays: list[Any]) -> Any:
            inner_state, inner_bits, inner = rebuild(arrays)
            return created(self.settings, nnx.merge(graphdef, inner_state), call.of(inner), inner_bits, learned)

        own, statistics = jax.jit(create)(_arrays(tree))
        self.quant = variables_of(learned.merged(own), Quant)
        self.quant_stats = variables_of(statistics, QuantStat)

    def calibrate(self, *args: Any, bits: Bits, key: Array | None = None, method: Method = None, **kwargs: Any) -> None:
        """Makes the learned parameters anew, from the weights and from one batch, quantized to `bits` on its way.

        For weights loaded from a float checkpoint, and for activations once real data is at hand. Nothing else is
        changed. Not inside ``jit``: it compiles a program of its own. A layer in a scan gets one set of parameters,
        the average over iterations.

        Args:
          *args, **kwargs, key, method: as for a call.
          bits: the precision that training begins with.
        """
        learned, call = Learned(create=True, observe=True), Call(args, kwargs, method)
        graphdef, state = nnx.split(self.module)
        tree = (state, values_of(self.quant_stats), bits, key, call.tree)
        _, rebuild = split_static(tree)

        def forward(arrays: list[Any]) -> Any:
            inner_state, statistics, inner_bits, inner_key, inner = rebuild(arrays)
            kept = Kept(variables_of(statistics, QuantStat), self.use_running_average, frozenset({LEARNED}))
            module = nnx.merge(graphdef, inner_state)
            # The output is asked for, so that the callbacks of what is inside a scan are not dropped with the scan.
            out = quantized(
                self.settings, module, call.of(inner), inner_bits, learned, kept, inner_key, self.settings.paths
            )
            return kept.created[LEARNED], _arrays(out)

        own, _ = jax.jit(forward)(_arrays(tree))
        jax.effects_barrier()
        if len(learned.seen.keys() ^ learned.shared.keys()) or any(not seen for seen in learned.seen.values()):
            raise UsageError("calibrate: call it outside jit; the model has layers inside a scan or vmap")
        self.quant = variables_of(learned.merged(own), Quant)

    def with_choices(self, choices: Mapping[str, Choice | Mapping[str, Any]]) -> QuantizedModule:
        """The same live module and variables, with execution chosen once and for all; as for a linen model.

        Raises:
          UsageError: for a mapping that is no choice. `plan` refuses the path of a layer that is not quantized.
        """
        known = {path: c if isinstance(c, Choice) else Choice.from_json(path, c) for path, c in choices.items()}
        other = QuantizedModule(self.module, dataclasses.replace(self.settings, choices=known))
        other.quant, other.quant_stats = self.quant, self.quant_stats
        other.use_running_average = self.use_running_average
        return other

    def plan(self, *args: Any, method: Method = None, **kwargs: Any) -> Plan:
        """What is quantized, how, and its share of the multiplications, for arguments of these shapes.

        Nothing is computed: arguments may be ``jax.ShapeDtypeStruct``.

        Raises:
          UsageError: for a rule that matches nothing, or none of whose matches can be quantized; for a layer that
            cannot run on codes and whose rule has ``execution="native"``.
        """
        settings, learned, call = self.settings, Learned(create=True), _shapes(args, kwargs, method)
        graphdef, state = nnx.split(self.module)
        dynamic, rebuild = split_static((state, call.tree))

        def create(arrays: list[Any]) -> Any:
            inner_state, inner = rebuild(arrays)
            return created(settings, nnx.merge(graphdef, inner_state), call.of(inner), None, learned)

        own, statistics = jax.eval_shape(create, dynamic)
        variables, restore = collections(state)
        variables |= {LEARNED: learned.merged(own), STATISTICS: statistics}

        def forward(variables: Any, *args: Any, **kwargs: Any) -> Any:
            # Any: the marker, not the value, says what is quantized. Traced, since some quantizers know no 8 bits, but
            # for a backend of another library, which may know no traced ones.
            eight = jnp.full((), 8.0) if settings.execute is contract else 8
            bits = Precision(weights=eight, acts=eight, grads=eight)
            kept = Kept(variables_of(variables[STATISTICS], QuantStat), frozen=True)
            module, known = nnx.merge(graphdef, restore(variables)), Learned(variables[LEARNED])
            # Products in float whatever the rules say: the count describes the model, not the formulation.
            inner = Call(args, kwargs, method)
            return _arrays(quantized(settings, module, inner, bits, known, kept, jax.random.key(0), None))

        resolved = resolved_for(settings, self.module, call)
        choices = settings.chosen(resolved)
        ops = count(forward, jax.tree.map(abstract, variables), *call.args, **call.kwargs)
        used = {index % len(self.rules) for index in resolved.assigned.values()}
        unused = [rule.path for index, rule in enumerate(self.rules) if index not in used]
        shared = {path for path, _ in learned.shared}
        return Plan(rows(resolved, settings.expanded, ops, shared), ops, tuple(unused)).with_choices(choices)

    def weights(self, *args: Any, method: Method = None, **kwargs: Any) -> tuple[Weight, ...]:
        """The parameters that are quantized, an entry each, in order of execution; arguments as for `plan`."""
        resolved = resolved_for(self.settings, self.module, _shapes(args, kwargs, method))
        params = collections(nnx.state(self.module))[0]["params"]
        return weights(resolved, self.settings.expanded, jax.tree.map(abstract, params))

    def quantizers(self, *args: Any, method: Method = None, **kwargs: Any) -> dict[tuple[str, str], Quantizer]:
        """(layer path, "weights" | "acts" | "bias" | "grads") → quantizer; arguments as for `plan`.

        A product of two activations also has "acts_rhs".
        """
        resolved = resolved_for(self.settings, self.module, _shapes(args, kwargs, method))
        return resolved.quantizers(self.settings.expanded)


def _shapes(args: Any, kwargs: Any, method: Method) -> Call:
    """A call with the shapes of arguments that may be arrays."""
    return Call(jax.tree.map(abstract, args), jax.tree.map(abstract, kwargs), method)


def _arrays(tree: Any) -> list[Any]:
    """The leaves that are arrays."""
    return [leaf for leaf in jax.tree.leaves(tree) if is_array(leaf)]
