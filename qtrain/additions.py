"""What a method adds to the train step: the seam through which methods differ, so that none needs a loop of its own."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax

from qtrain.precision import Precision

Array = jax.Array
Bits = Precision | Mapping[str, Precision]


def _no_state() -> dict[str, Any]:
    return {}


def _no_arguments(precision: Precision) -> dict[str, Any]:
    return {}


def _same_quant(step: Array, quant: Any) -> Any:
    return quant


def _same_price(params: Any, quant: Any, precision: Precision) -> Bits:
    return precision


@dataclasses.dataclass(frozen=True)
class Additions:
    """Functions that the train step calls; each does nothing by default. All are pure, and may be traced.

    Attributes:
      penalty: ``(step, params, quant, precision, controller) -> (added to the loss, new controller)``; None: nothing.
      controller: the initial state of what `penalty` steers by (a multiplier, say): a pytree of arrays.
      update_arguments: precision → further keyword arguments of ``optimizer.update``, besides ``quant``.
      scheduled: ``(step, quant) -> quant``: what of the quantizers' parameters follows a schedule, as of this step.
      priced: ``(params, quant, precision) -> bits`` that the step is charged for, where quantizers choose their width.
    """

    penalty: Callable[[Array, Any, Any, Precision, Any], tuple[Array, Any]] | None = None
    controller: Callable[[], Any] = _no_state
    update_arguments: Callable[[Precision], dict[str, Any]] = _no_arguments
    scheduled: Callable[[Array, Any], Any] = _same_quant
    priced: Callable[[Any, Any, Precision], Bits] = _same_price
