"""A linen model with quantizers injected: same parameters, bits as an argument."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax

from qtrain.errors import UsageError
from qtrain.inject import per_width as per_widths
from qtrain.inject.checks import Bits, limits
from qtrain.inject.learned import LEARNED, Learned
from qtrain.inject.linen_pass import STATE, with_method
from qtrain.inject.linen_plan import Planned
from qtrain.inject.resolve import is_array, split_static
from qtrain.inject.rules import Rule, default_rules
from qtrain.inject.trace import Contract
from qtrain.precision import Precision
from qtrain.quantizers import contract


def quantize(
    model: nn.Module,
    rules: Rule | Sequence[Rule] | None = None,
    *,
    execute: Contract = contract,
    widest: Precision | int | None = None,
    narrowest: Precision | int | None = None,
    per_width: Sequence[int] = (),
) -> QuantizedModel:
    """Inject quantizers into a Flax linen module, whoever wrote it, without touching it.

    Args:
      model: any linen module; an nnx one goes to `qtrain.inject.nnx.quantize`, which see.
      rules: a rule or an ordered sequence of them; None means `default_rules()`: every product of weights and
        activations follows the schedule, the first and the last of them stay at 8 bits.
      execute: what carries out a quantized contraction; the default computes in float on quantized values, or on
        codes where `Rule.execution` asks for it.
      widest: the most bits that traced ones will ever take, for each kind or for all: a promise that nothing can check,
        by which layers that run on codes are compiled without a float program. At up to 8 bits they need none. None, or
        more than 8: such a layer has both and switches between them (``lax.cond``), which is right at any width. Bits
        that are Python numbers speak for themselves.
      narrowest: the fewest bits that traced ones will ever take; above 8 no codes hold them, which `plan` then says.
      per_width: widths, such as (8, 6, 4, 2), for each of which norm layers have variables of their own (switchable
        batch norm, Yu et al., Slimmable Neural Networks, ICLR 2019); () for one set. See `QuantizedModel.per_width`.

    Returns:
      A `QuantizedModel`, whose ``init`` gives the parameters that ``model.init`` gives, bit for bit.

    Raises:
      UsageError: when `model` is not a linen module, a rule is none, or `per_width` holds what is no width. What
        depends on the shapes (a rule that matches nothing) is raised by `plan`, `init` and `apply`.

    >>> import flax.linen as nn, jax, jax.numpy as jnp
    >>> qmodel = quantize(nn.Sequential([nn.Dense(16), nn.relu, nn.Dense(2)]), Rule())
    >>> variables = qmodel.init(jax.random.key(0), jnp.ones((1, 4)))
    >>> qmodel.apply(variables, jnp.ones((1, 4)), bits=Precision(weights=4, acts=4)).shape
    (1, 2)
    """
    if "flax.nnx" in sys.modules and isinstance(model, sys.modules["flax.nnx"].Module):
        from qtrain.inject import nnx  # here: importing nnx takes a while, and most runs have no use for it

        limited: Any = {"widest": widest, "narrowest": narrowest, "per_width": per_width}
        return nnx.quantize(model, rules, execute=execute, **limited)  # type: ignore[return-value]
    if not isinstance(model, nn.Module):
        raise UsageError(f"quantize: {type(model).__name__} is not a flax.linen.Module instance")
    rules = default_rules() if rules is None else (rules,) if isinstance(rules, Rule) else tuple(rules)
    for rule in rules:
        if not isinstance(rule, Rule):
            raise UsageError(f"quantize: rules hold {rule!r}; give qtrain.Rule objects")
    ends = limits("widest", widest), limits("narrowest", narrowest)
    return QuantizedModel(model, rules, execute, *ends, per_width=per_widths.checked(per_width))


@dataclasses.dataclass(frozen=True, eq=False)
class QuantizedModel(Planned):
    """A linen module with quantizers injected into its layers; made by `quantize`.

    Attributes:
      module: the model as it was.
      rules: in order; the first that matches a layer's path wins.
      execute: what carries out a quantized contraction.
      widest, narrowest: per kind, the range of traced bits, Python ints; None where it is not known.
      choices: path → how the layer's products are computed, whatever the shapes of a call; see `with_choices`.
      per_width: descending widths, or (). With n of them the ``params`` and ``batch_stats`` of norm layers (linen's
        BatchNorm, LayerNorm, RMSNorm, GroupNorm and InstanceNorm, and any other module that keeps ``batch_stats``) have
        a leading axis of n rows, of which a call uses one and gives the others back as they are. The row is that of
        the weight bits of the layer before the norm: the last one executed that follows the schedule, else the first
        after it; so that bits for each path mix rows. Bits that are none of the widths take the row of the nearest one
        below, else of the lowest; the float model (``bits=None``), and a model none of whose layers follows the
        schedule, the first row. The row is data: one program serves all widths.
    """

    def init(self, rngs: Any, *args: Any, bits: Bits | None = None, **kwargs: Any) -> dict[str, Any]:
        """The variables of ``module.init``, and the quantizers' own.

        Args:
          rngs, *args, **kwargs: as for ``module.init``.
          bits: the precision for which learned parameters begin; None: 8 bits, for those whose beginning depends on it.

        Returns:
          ``params`` and whatever other collections the model has, equal to the plain model's bit for bit (as is each
          row of what is held `per_width`); ``quant``: learned quantizer parameters (empty when no quantizer learns
          any), those of activations as they should be for the given input: see `calibrate`; ``quant_stats``, only if a
          quantizer keeps running ranges: they start empty (count 0) and no gradient ever reaches them.

        Raises:
          UsageError: for a rule that does nothing, or running ranges that cannot be kept.
        """
        variables, learned = self._init(rngs, args, kwargs, bits)
        self._find_tables(variables[LEARNED], learned, rngs, args, kwargs)
        return per_widths.broadcast(variables, self._memory.held, self.per_width) if self.per_width else variables

    def calibrate(
        self, variables: Mapping[str, Any], *args: Any, bits: Bits, rngs: Any = None, **kwargs: Any
    ) -> dict[str, Any]:
        """`variables` with the learned quantizer parameters made anew: from the weights, and from one batch.

        The batch passes through the model quantized to `bits`, each layer's quantizers beginning from what reaches it,
        as LSQ's authors do in their first step. For weights loaded from a float checkpoint, and for activations once
        real data is at hand. Not inside ``jit``: it compiles a program of its own.

        Args:
          variables: ``params`` and the model's other collections; an older ``quant`` is not looked at.
          *args, **kwargs, rngs: the model's arguments for one batch, as for `apply`.
          bits: the precision that training begins with.

        Returns:
          `variables` with a new ``quant``; nothing else is changed (running ranges, batch statistics). A layer in a
          scan whose ``variable_axes`` do not list ``quant`` gets one set of parameters, the average over iterations.
        """
        given = {name: value for name, value in variables.items() if name != LEARNED}
        learned = Learned(create=True, observe=True)
        _, rebuild = split_static((given, bits, rngs, args, kwargs))
        leaves = [leaf for leaf in jax.tree.leaves((given, bits, rngs, args, kwargs)) if is_array(leaf)]

        def forward(arrays: list[Any]) -> Any:
            inner, inner_bits, inner_rngs, inner_args, inner_kwargs = rebuild(arrays)
            options: dict[str, Any] = {"learned": learned}
            _, state = self._apply(
                inner, inner_args, inner_kwargs, inner_bits, inner_rngs, STATE, None, self._paths, **options
            )
            return state.get(LEARNED, {}), learned.outside

        own, learned.outside = jax.jit(forward)(leaves)
        jax.effects_barrier()
        if len(learned.seen.keys() ^ learned.shared.keys()) or any(not seen for seen in learned.seen.values()):
            raise UsageError("calibrate: call it outside jit; the model has layers inside a scan or vmap")
        return {**variables, LEARNED: learned.merged(own)}

    def apply(
        self,
        variables: Mapping[str, Any],
        *args: Any,
        bits: Bits | None = None,
        rngs: Any = None,
        mutable: Any = False,
        method: Any = None,
        **kwargs: Any,
    ) -> Any:
        """The model's output, quantized to `bits`; the plain float model without them.

        Args:
          variables: as `init` gives them; a float checkpoint's collections will do when no quantizer keeps anything.
          *args: the model's own arguments, as are further keywords.
          bits: a `Precision` for every layer that follows the schedule, or ``{path: Precision}`` with one for each of
            them. May be traced: one compilation serves all widths. ``nn.jit`` inside the model is then traced anew by
            every call, so jit the call itself.
          rngs: as for ``module.apply``; ``rngs["quant"]`` is the key of stochastic rounding, needed only if a rule asks
            for it. Fold it with the step yourself; each layer folds it with its path.
          mutable: as for ``module.apply``. With ``quant_stats`` among them, running ranges are updated and each tensor
            is quantized by its own range; otherwise by the running one.
          method: as for ``module.apply``.

        Raises:
          UsageError: for bits that are no width, a path without bits, rules that do nothing, a missing key, and
            ``execution="native"`` where it cannot run: numbers above 8 as `bits`, say.
        """
        if bits is None:
            held = self.held(variables, *args, rngs=rngs, **with_method(kwargs, method))
            if held.leaves:
                per_widths.without_rows(variables, held, self.per_width)
            rows = per_widths.indices(held, None, self.per_width, {})
            bare = per_widths.selected(variables, rows) if rows else variables
            out = self.module.apply(bare, *args, rngs=rngs, mutable=mutable, method=method, **kwargs)
            return self._scattered(out, variables, rows, mutable)
        return self._apply(variables, args, kwargs, bits, rngs, mutable, method, self._paths)
