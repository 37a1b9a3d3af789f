"""A schedule's controller in the train step: its state beside the method's, and the gradients it is shown."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax

from qtrain.inject import Weight
from qtrain.packing import pack, unpack
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

    def begun(self) -> dict[str, Any]:
        """What goes into ``TrainState.controller`` at step 0."""
        return {KEY: pack(self.controller.init(self._shapes()))}

    def state(self, state: Mapping[str, Any]) -> dict[str, Any]:
        """The controller's own state, of what is in ``TrainState.controller``."""
        state_of: dict[str, Any] = unpack(state[KEY], jax.eval_shape(self.controller.init, self._shapes()))
        return state_of

    def precision(self, scheduled: Precision, state: Mapping[str, Any]) -> Precision:
        """The bits of a step: the controller's, and those of `scheduled` for the kinds that it leaves."""
        decided = self.controller.bits(self.state(state))
        pairs = {kind: (value, getattr(scheduled, kind)) for kind, value in vars(decided).items()}
        return Precision(**{kind: own if own is not None else other for kind, (own, other) in pairs.items()})

    def updated(self, state: Mapping[str, Any], grads: Any, **signals: Any) -> dict[str, Any]:
        """``TrainState.controller`` after a step; `grads`: of the parameters, `signals`: the rest of `Signals`."""
        shown = {weight.name: _array(weight.value(grads)) for weight in self.weights}
        return {**state, KEY: pack(self.controller.update(self.state(state), Signals(grads=shown, **signals)))}

    def metrics(self, state: Mapping[str, Any]) -> dict[str, Array]:
        """What the controller shows of its state."""
        return self.controller.metrics(self.state(state))

    def _shapes(self) -> dict[str, Any]:
        return {weight.name: jax.ShapeDtypeStruct(weight.shape, "float32") for weight in self.weights}


def _array(leaf: Any) -> Any:
    """A parameter without the box that has the names of its axes."""
    return getattr(leaf, "value", leaf)
