"""What is known of a quantized linen model before it is run: its plan, its weights, its rows."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Self

import jax
import jax.numpy as jnp

from qtrain.cost.count import count
from qtrain.errors import UsageError
from qtrain.inject import per_width as per_widths
from qtrain.inject.checks import Bits
from qtrain.inject.execution import Choice
from qtrain.inject.learned import LEARNED
from qtrain.inject.linen_pass import STATE, Passes
from qtrain.inject.plan import Plan
from qtrain.inject.resolve import Resolved, abstract, split_static
from qtrain.inject.rows import rows
from qtrain.inject.rows_in_use import RowInUse, has_tables, rows_in_use
from qtrain.inject.weights import Weight, weights
from qtrain.precision import Precision
from qtrain.quantizers import Quantizer, contract


@dataclasses.dataclass(frozen=True, eq=False)
class Planned(Passes):
    """What `qtrain.inject.QuantizedModel` says of itself; nothing here computes."""

    def plan(self, *args: Any, rngs: Any = None, **kwargs: Any) -> Plan:
        """What is quantized, how, and its share of the multiplications, for arguments of these shapes.

        Nothing is computed: arguments may be ``jax.ShapeDtypeStruct``.

        Args:
          *args: the model's arguments, as are further keywords.
          rngs: a key or a dict of them for ``module.init``; by default streams params, dropout and quant exist, and
            flax takes the first of these for any other.

        Raises:
          UsageError: for a rule that matches nothing, or none of whose matches can be quantized; for a layer that
            cannot run on codes and whose rule has ``execution="native"``.
        """
        if not isinstance(rngs, Mapping):
            key = jax.random.key(0) if rngs is None else rngs
            rngs = {"params": key, "dropout": key}
        abstract_args, abstract_kwargs = jax.tree.map(abstract, (args, kwargs))
        dynamic, rebuild = split_static((abstract_args, abstract_kwargs))

        shared: set[str] = set()

        def initialise(dynamic: list[Any]) -> dict[str, Any]:
            inner_args, inner_kwargs = rebuild(dynamic)
            variables, learned = self._init(rngs, inner_args, inner_kwargs, None)
            self._find_tables(variables[LEARNED], learned, rngs, inner_args, inner_kwargs)
            shared.update(path for path, _ in learned.shared)
            return variables

        variables = jax.eval_shape(initialise, dynamic)

        rngs = {**rngs, "quant": jax.random.key(0)}

        method = abstract_kwargs.pop("method", None)

        def forward(variables: Any, *args: Any, **kwargs: Any) -> Any:
            # Any: the marker, not the value, says what is quantized. Traced, since some quantizers know no 8 bits, but
            # for a backend of another library, which may know no traced ones.
            eight = jnp.full((), 8.0) if self.execute is contract else 8
            bits = Precision(weights=eight, acts=eight, grads=eight)
            # Products in float whatever the rules say: the count describes the model, not the formulation, which on
            # codes has corrections for zero points, and both branches of a switch.
            return self._run(resolved, variables, args, kwargs, bits, rngs, STATE, method)

        resolved = self._resolve(variables, rngs, abstract_args, abstract_kwargs, STATE, method)
        choices = self._choices(resolved)
        ops = count(forward, variables, *abstract_args, **abstract_kwargs)
        used = {index % len(self.rules) for index in resolved.assigned.values()}
        unused = [rule.path for index, rule in enumerate(self.rules) if index not in used]
        norms = self._memory.held.modules
        plan = Plan(rows(resolved, self.expanded, ops, shared), ops, tuple(unused), {}, self.per_width, norms)
        return plan.with_choices(choices)

    def weights(self, *args: Any, rngs: Any = None, **kwargs: Any) -> tuple[Weight, ...]:
        """The parameters that are quantized, an entry each, in order of execution; arguments as for `plan`."""
        resolved, params = self.initial(rngs, args, kwargs)
        return weights(resolved, self.expanded, params)

    def quantizers(self, *args: Any, rngs: Any = None, **kwargs: Any) -> dict[tuple[str, str], Quantizer]:
        """(layer path, "weights" | "acts" | "bias" | "grads") → quantizer; arguments as for `plan`.

        A product of two activations also has "acts_rhs".
        """
        return self.initial(rngs, args, kwargs)[0].quantizers(self.expanded)

    def initial(self, rngs: Any, args: Any, kwargs: Any) -> tuple[Resolved, Any]:
        """The rules resolved for initialisation, and the shapes of the parameters."""
        keys = rngs if isinstance(rngs, Mapping) else dict.fromkeys(("params", "dropout"), jax.random.key(0))
        dynamic, rebuild = split_static(jax.tree.map(abstract, (args, kwargs)))

        def initialise(dynamic: list[Any]) -> Any:
            inner_args, inner_kwargs = rebuild(dynamic)
            return self.module.init(dict(keys), *inner_args, **inner_kwargs)["params"]

        resolved = self._resolve(None, keys, *rebuild(dynamic))
        return resolved, jax.eval_shape(initialise, dynamic)

    def _choices(self, resolved: Resolved) -> dict[str, Choice]:
        """The choice of each layer whose rule asks for more than float arithmetic."""
        asked = resolved.executed(self.expanded, self.choices)
        return {path: self._choose(rule, resolved.records[path]) for path, rule in asked.items()}

    def with_choices(self, choices: Mapping[str, Choice | Mapping[str, Any]]) -> Self:
        """The same model with execution chosen once and for all.

        A layer that is named here computes its products so at every shape, which keeps evaluation at another batch size
        and a resumed run at the arithmetic of the start; the others choose by the shapes of each call. Only what cannot
        run is left to the call: a product on codes falls back to float, or is refused, as without a choice.

        Args:
          choices: layer path → `Choice` (``plan.choices``), or the mapping that ``Choice.to_json`` made of one.

        Raises:
          UsageError: for a mapping that is no choice. `plan` refuses the path of a layer that is not quantized.
        """
        known = {path: c if isinstance(c, Choice) else Choice.from_json(path, c) for path, c in choices.items()}
        other = dataclasses.replace(self, choices=known)
        object.__setattr__(other, "_memory", self._memory)  # choices take no part in what is resolved
        return other

    def with_scheduled_gradients(self) -> Self:
        """The same model, the bits of whose gradients are those of a call alone, whatever its rules fix."""
        other = dataclasses.replace(self, rules=tuple(dataclasses.replace(rule, grads=None) for rule in self.rules))
        object.__setattr__(other, "_memory", self._memory)  # nor do bits
        return other

    def rows(self, bits: Bits | None, variables: Any) -> dict[tuple[str, ...], RowInUse]:
        """Of the variables that have a row for each width, the rows that a step at `bits` uses.

        Of norm layers those of `per_width`; of quantizers' learned tables (``LSQ(across_bits="table")``) the row of the
        layer's own bits of that kind, which a rule may fix.

        Args:
          bits: as `apply` takes them.
          variables: ``{"params": …, "quant": …}``, arrays or shapes; what else there is has no rows.

        Returns:
          Name, such as ``("params", "BatchNorm_0", "scale")``, → axis (static) and row (int32, data). For
          `qtrain.optim.only_rows_in_use`.

        Raises:
          UsageError: when neither `init` nor `plan` has been called; a mapping of `bits` without a layer that a norm
            follows.
        """
        held, found = self._memory.held, self._memory.tables
        if (self.per_width and not held.known) or (found is None and has_tables(self.rules)):
            raise UsageError("rows: call plan or init before: which variables have rows is not known yet")
        return rows_in_use(bits, variables, held, self.per_width, found or {})

    def with_rows(self, variables: Mapping[str, Any], *args: Any, rngs: Any = None, **kwargs: Any) -> dict[str, Any]:
        """Variables of the plain model, such as a float checkpoint's, with equal rows for each of `per_width`.

        Args:
          variables: by collection, without rows.
          *args, **kwargs: the model's arguments, for their shapes; as for `plan`.

        >>> import flax.linen as nn, jax, jax.numpy as jnp
        >>> model = nn.Sequential([nn.Dense(16), nn.LayerNorm(), nn.Dense(2)])
        >>> variables = model.init(jax.random.key(0), jnp.ones((1, 4)))
        >>> rows = quantize(model, Rule(), per_width=(8, 4, 2)).with_rows(variables, jnp.ones((1, 4)))
        >>> rows["params"]["layers_1"]["scale"].shape
        (3, 16)
        """
        return per_widths.broadcast(variables, self.held(variables, *args, rngs=rngs, **kwargs), self.per_width)
