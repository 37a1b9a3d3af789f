"""A schedule's controller in the train step: its state beside the method's, and the gradients it is shown."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax

from qtrain.inject import Weight
from qtrain.precision import Precision
from qtrain.schedules import Controller, Signals

Array = jax.Array
KEY = "schedule"
"""Where the controller's state is in ``TrainState.controller``."""


@dataclasses.dataclass(frozen=True)
class Steering:
    """What the train step asks of a controller.

    Attributes:
      controller: that decides.
      weights: those that follow the schedule, whose gradients it is shown.
    """

    controller: Controller
    weights: tuple[Weight, ...]

    def begun(self, params: Any) -> dict[str, Any]:
        """What goes into ``TrainState.controller`` at step 0."""
        return {KEY: self.controller.init({weight.name: _array(weight.value(params)) for weight in self.weights})}

    def precision(self, scheduled: Precision, state: Mapping[str, Any]) -> Precision:
        """The bits of a step: the controller's, and those of `scheduled` for the kinds that it leaves."""
        decided = self.controller.bits(state[KEY])
        pairs = {kind: (value, getattr(scheduled, kind)) for kind, value in vars(decided).items()}
        return Precision(**{kind: own if own is not None else other for kind, (own, other) in pairs.items()})

    def updated(self, state: Mapping[str, Any], grads: Any, **signals: Any) -> dict[str, Any]:
        """``TrainState.controller`` after a step; `grads`: of the parameters, `signals`: the rest of `Signals`."""
        shown = {weight.name: _array(weight.value(grads)) for weight in self.weights}
        return {**state, KEY: self.controller.update(state[KEY], Signals(grads=shown, **signals))}


def _array(leaf: Any) -> Any:
    """A parameter without the box that has the names of its axes."""
    return getattr(leaf, "value", leaf)
