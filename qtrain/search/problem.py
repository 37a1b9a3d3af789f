"""What a width costs each layer, in error and in bits, bytes or BitOps."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qtrain import cost
from qtrain.errors import UsageError, did_you_mean
from qtrain.inject import Plan, Weight
from qtrain.precision import Precision
from qtrain.quantizers import FLOAT_BITS

UNITS = {"bits": "average bits of a weight", "bytes": "bytes of the weights", "bitops": "BitOps of one example"}
"""What a budget may be in, in words. Bits are of the layers that are searched, bytes and BitOps of the whole model."""


@dataclasses.dataclass(frozen=True)
class Costs:
    """What each layer costs at each width, in whole numbers: a choice costs (fixed + Σ_l table[l, i_l])/divisor.

    Attributes:
      table: [layers, widths], int64.
      fixed: what the rest of the model costs.
      divisor: of the sum, to the unit of the budget: the number of weights for average bits, 8 for bytes, 1 for BitOps.
    """

    table: np.ndarray
    fixed: int
    divisor: int

    def total(self, choice: Sequence[int] | np.ndarray) -> int:
        """fixed + Σ_l table[l, i_l]."""
        return self.fixed + sum(int(row[index]) for row, index in zip(self.table, choice, strict=True))

    def of(self, choice: Sequence[int] | np.ndarray) -> float:
        """The cost of a choice in the unit of the budget."""
        return self.total(choice) / self.divisor


@dataclasses.dataclass(frozen=True)
class Problem:
    """Layers, the widths each may take, and what those cost.

    Attributes:
      layers: paths, in order of execution.
      widths: bits, the widest first.
      omega: Ω_l(b), [layers, widths], float64, at least 0: twice the rise of the loss that a quadratic model expects.
      costs: unit → `Costs`; units as in `UNITS`.
    """

    layers: tuple[str, ...]
    widths: tuple[int, ...]
    omega: np.ndarray
    costs: Mapping[str, Costs]

    def assignment(self, choice: Sequence[int] | np.ndarray) -> dict[str, int]:
        """path → bits of a choice: of the index of a width for each layer."""
        return {path: self.widths[int(index)] for path, index in zip(self.layers, choice, strict=True)}

    def rise(self, choice: Sequence[int] | np.ndarray) -> float:
        """Σ_l Ω_l of a choice."""
        return float(self.omega[np.arange(len(self.layers)), np.asarray(choice)].sum())

    def uniform(self, width: int) -> np.ndarray:
        """The choice of one width for all layers."""
        return np.full(len(self.layers), self.widths.index(width))

    def unit(self, name: str) -> Costs:
        """The costs in a unit.

        Raises:
          UsageError: an unknown one.
        """
        if name not in self.costs:
            known = tuple(self.costs)
            raise UsageError(f"budget {name!r}: give one of {', '.join(known)}.{did_you_mean(name, known)}")
        return self.costs[name]


def searched_layers(plan: Plan, weights: Sequence[Weight]) -> dict[str, tuple[Weight, ...]]:
    """path → the quantized parameters (kernel; bias, if its rule quantizes it) of each layer that follows the schedule.

    A layer inside a scan is one layer: its iterations share one width.

    Raises:
      UsageError: there is none, or its quantizer takes no width that it is given.
    """
    found: dict[str, list[Weight]] = {}
    for weight in weights:
        if weight.rule.weights is None:
            found.setdefault(weight.path, []).append(weight)
    if not found:
        raise UsageError("search: no layer's weights follow the schedule, so there are no widths to choose")
    for path, leaves in found.items():
        for weight in leaves:
            if weight.quantizer.chooses_width:
                raise UsageError(
                    f"search: the weights of {path!r} choose their own width ({weight.quantizer.describe()}); search a "
                    "run whose quantizers take the width they are given"
                )
    order = [path for path in plan.followers if path in found]
    return {path: tuple(found[path]) for path in order}


def check_widths(widths: Sequence[int], searched: Mapping[str, Sequence[Weight]]) -> tuple[int, ...]:
    """`widths`, the widest first, each once.

    Raises:
      UsageError: fewer than two of them, or one that a quantizer cannot take.
    """
    for width in widths:
        if isinstance(width, bool) or not isinstance(width, int) or not 1 <= width < FLOAT_BITS:
            raise UsageError(f"widths: {width!r} is none; give whole numbers of bits from 1 to {FLOAT_BITS - 1}")
    ordered = tuple(sorted(set(widths), reverse=True))
    if len(ordered) < 2:
        raise UsageError(f"widths={tuple(widths)}: nothing to choose between; give at least two, such as 8,4,2")
    for path, leaves in searched.items():
        for weight in leaves:
            tensor = jax.ShapeDtypeStruct(weight.shape[weight.stacked :], "float32")
            for width in ordered:
                try:
                    _quantized_shape(weight, tensor, width)
                except UsageError as error:
                    raise UsageError(f"widths: {width} bits for the weights of {path!r}: {error}") from None
    return ordered


def _quantized_shape(weight: Weight, tensor: jax.ShapeDtypeStruct, width: int) -> Any:
    """Traces the quantizer at a width that is a number, of which it refuses what it cannot take."""

    def quantized(x: Any) -> Any:
        own = weight.quantizer.init(x, axes=weight.axes) if weight.quantizer.learns else None
        return weight.quantizer(x, width, own, axes=weight.axes, **_key(weight))

    return jax.eval_shape(quantized, tensor)


def _key(weight: Weight) -> dict[str, Any]:
    return {"key": jax.random.key(0)} if weight.quantizer.stochastic else {}


def precisions(
    followers: Sequence[str], assignment: Mapping[str, Any], scheduled: Precision, *, acts: bool = True
) -> dict[str, Precision]:
    """``{path: Precision}`` for each layer that follows the schedule: what an assignment means for the model.

    Args:
      followers: their paths, ``plan.followers``.
      assignment: path → bits of the weights. Layers that are not in it keep `scheduled`.
      scheduled: the bits of everything else.
      acts: whether the activations of a layer take the width of its weights, where the schedule says theirs at all;
        bits that a rule fixes stay fixed either way.
    """

    def of(path: str) -> Precision:
        if path not in assignment:
            return scheduled
        bits = assignment[path]
        own_acts = bits if acts and scheduled.acts is not None else scheduled.acts
        return dataclasses.replace(scheduled, weights=bits, acts=own_acts)

    return {path: of(path) for path in followers}


def layer_costs(
    plan: Plan,
    searched: Mapping[str, Sequence[Weight]],
    widths: Sequence[int],
    scheduled: Precision,
    *,
    acts: bool = True,
) -> dict[str, Costs]:
    """Unit → `Costs`; those of a choice equal what `qtrain.cost` says of its assignment, exactly.

    * ``bits``: Σ elements·b over the quantized parameters of the searched layers, per element.
    * ``bytes``: `qtrain.cost.weight_bytes` with the plan's numbers of scales: all weights that enter a product.
    * ``bitops``: `qtrain.cost.bitops` of the forward pass that `plan` was made for (one of a single example, say).

    Args:
      plan: of the model.
      searched: from `searched_layers`.
      widths: the candidates.
      scheduled, acts: see `precisions`.

    Raises:
      UsageError: a layer that is searched shares its weights with another, which leaves it no cost of its own.
    """
    groups = plan.ops.by_path()
    _check_apart(groups, searched)
    followers = set(plan.followers)

    def priced(path: str, assignment: Mapping[str, int]) -> tuple[int, int]:
        bits = precisions([path] if path in followers else [], assignment, scheduled, acts=acts)
        stored = 8 * cost.weight_bytes(groups[path], bits, plan.weight_scales)
        assert float(stored).is_integer()
        return int(stored), cost.bitops(groups[path], bits, ("forward",))

    rest = [priced(path, {}) for path in groups if path not in searched]
    table = np.array([[priced(path, {path: width}) for width in widths] for path in searched], np.int64)
    elements = {path: sum(weight.size for weight in leaves) for path, leaves in searched.items()}
    bits = np.array([[elements[path] * width for width in widths] for path in searched], np.int64)
    return {
        "bits": Costs(bits, 0, sum(elements.values())),
        "bytes": Costs(table[:, :, 0], sum(stored for stored, _ in rest), 8),
        "bitops": Costs(table[:, :, 1], sum(operations for _, operations in rest), 1),
    }


def _check_apart(groups: Mapping[str, Any], searched: Mapping[str, Any]) -> None:
    owners: dict[str, str] = {}
    for path, ops in groups.items():
        for name in {operand.parameter for op in ops for operand in (op.lhs, op.rhs) if operand.kind == "weight"}:
            other = owners.setdefault(name, path)
            if other != path and (path in searched or other in searched):
                raise UsageError(
                    f"search: {other!r} and {path!r} share the weights {name!r}, which are stored at one width; "
                    "fix the bits of both by a rule"
                )


def squared_errors(
    searched: Mapping[str, Sequence[Weight]], params: Any, quant: Mapping[str, Any], widths: Sequence[int]
) -> dict[str, np.ndarray]:
    """‖W − Q_b(W)‖² of each quantized parameter at each of `widths`: ``{weight.name: float64 [widths]}``."""
    leaves = [weight for group in searched.values() for weight in group]

    @jax.jit
    def errors(params: Any, quant: Any, bits: Any) -> Any:
        def error(weight: Weight) -> Any:
            away = weight.apply("__call__", params, quant, bits, **_key(weight)) - weight.value(params)
            return jnp.sum(jnp.square(away.astype(jnp.float32)))

        return [error(weight) for weight in leaves]

    found = [jax.device_get(errors(params, quant, np.float32(width))) for width in widths]
    return {weight.name: np.array([row[i] for row in found], np.float64) for i, weight in enumerate(leaves)}


def curvatures(searched: Mapping[str, Sequence[Weight]], traces: Mapping[str, float]) -> dict[str, float]:
    """t/n of each quantized parameter: the mean second derivative of the loss along one of its elements.

    A trace that is estimated at or below zero says that the loss is no bowl around these weights, not that errors in
    them are free: it is replaced by the smallest positive t/n among all.

    Raises:
      UsageError: when no trace is positive.
    """
    leaves = [weight for group in searched.values() for weight in group]
    means = {weight.name: traces[weight.name] / weight.size for weight in leaves}
    positive = [mean for mean in means.values() if mean > 0]
    if not positive:
        raise UsageError(
            "search: no layer's Hessian trace is above zero, so errors cannot be weighed; the run has not come "
            "near a minimum: train it longer, or estimate from more --batches"
        )
    return {name: mean if mean > 0 else min(positive) for name, mean in means.items()}


def expected_rise(
    searched: Mapping[str, Sequence[Weight]], curvature: Mapping[str, float], errors: Mapping[str, np.ndarray]
) -> np.ndarray:
    """Ω_l(b) = Σ (t/n)·‖W − Q_b(W)‖² over the quantized parameters of layer l: [layers, widths], float64.

    HAWQ-V2's objective (arXiv 1911.03852, equation 8, there for one kernel a layer), which is to be *minimized*; that
    printed in Double Rounding (arXiv 2502.01199) has the opposite sense. It knows of errors in weights alone: those of
    activations, whose bits may change with them, and products of the errors of two layers, are not in it.
    """
    rows = [
        np.sum([curvature[weight.name] * errors[weight.name] for weight in leaves], axis=0)
        for leaves in searched.values()
    ]
    return np.stack(rows)
