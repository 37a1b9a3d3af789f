"""What a method adds to the train step: the seam through which methods differ, so that none needs a loop of its own."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax

from qtrain.precision import Precision
from qtrain.steering import Steering

Array = jax.Array
Bits = Precision | Mapping[str, Precision]


def _no_state() -> dict[str, Any]:
    return {}


def _as_scheduled(key: Array, step: Array, precision: Precision, controller: Any) -> Bits:
    return precision


def _same_batch(step: Array, batch: Any) -> Any:
    return batch


def _no_arguments(precision: Precision, bits: Bits, trained: Any) -> dict[str, Any]:
    return {}


def _same_quant(step: Array, quant: Any) -> Any:
    return quant


def _same_price(params: Any, quant: Any, bits: Any) -> Bits:
    return bits


@dataclasses.dataclass(frozen=True)
class Additions:
    """Functions that the train step calls; each does nothing by default. All are pure, and may be traced.

    Attributes:
      observed: ``(step, batch) -> batch`` as the network gets to see it.
      assigned: ``(key, step, precision, controller) -> bits`` of the step, where its layers differ: what the schedule
        says, or ``{path: Precision}`` for the layers that follow it.
      penalty: ``(step, params, quant, bits, controller) -> (added to the loss, new controller)``; None: nothing.
      output_penalty: ``(precision, logits, controller) -> (added to the loss, new controller)``, after `penalty`; None:
        nothing. `precision` is what the schedule says.
      controller: the initial state of what the others steer by (a multiplier, say): a dict of arrays.
      begin: ``(variables, batches) -> controller`` once, before the first step, from the initial variables and an
        iterator over training batches; None: `controller` is what a run begins with. Not traced.
      update_arguments: ``(precision, bits, {"params", "quant"})`` → further keyword arguments of ``optimizer.update``,
        besides ``quant``.
      scheduled: ``(step, quant) -> quant``: what of the quantizers' parameters follows a schedule, as of this step.
      priced: ``(params, quant, bits) -> bits`` that the step is charged for, where quantizers choose their width.
      steering: of the controller that decides the step's precision, where a schedule has one.
    """

    observed: Callable[[Array, Any], Any] = _same_batch
    assigned: Callable[[Array, Array, Precision, Any], Bits] = _as_scheduled
    penalty: Callable[[Array, Any, Any, Any, Any], tuple[Array, Any]] | None = None
    output_penalty: Callable[[Precision, Array, Any], tuple[Array, Any]] | None = None
    controller: Callable[[], Any] = _no_state
    begin: Callable[[Mapping[str, Any], Iterator[Any]], Any] | None = None
    update_arguments: Callable[[Precision, Bits, Any], dict[str, Any]] = _no_arguments
    scheduled: Callable[[Array, Any], Any] = _same_quant
    priced: Callable[[Any, Any, Any], Bits] = _same_price
    steering: Steering | None = None

    @property
    def assigns(self) -> bool:
        """Whether the bits of a step may be others than the schedule's."""
        return self.assigned is not _as_scheduled or self.steering is not None

    @property
    def penalises(self) -> bool:
        """Whether anything is added to the loss."""
        return self.penalty is not None or self.output_penalty is not None
