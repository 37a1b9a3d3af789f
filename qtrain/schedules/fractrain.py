"""FracTrain's progressive precision: more bits when the loss stands still (Fu et al. 2020, arXiv 2012.13113)."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from qtrain.precision import Precision
from qtrain.schedules.controller import Array, Controller, Signals, State, levels_of, number, shown_levels, whole

COMPARED = 4
"""Epochs before the last one that its loss is compared with."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class FracTrain(Controller):
    """See `fractrain`; all fields are data."""

    name: ClassVar[str] = "fractrain"
    levels: Precision
    interval: Any
    epsilon: Any
    alpha: Any
    scale_epochs: Any

    def init(self, grads: Mapping[str, Any]) -> State:
        """Level 0, and no loss seen."""
        return {
            "level": jnp.zeros((), jnp.int32),
            "epochs": jnp.zeros((), jnp.int32),
            "total": jnp.zeros(()),
            "losses": jnp.zeros((COMPARED + 1,)),
            "scale": jnp.zeros(()),
            "epsilon": jnp.asarray(self.epsilon, jnp.float32),
        }

    def update(self, state: State, signals: Signals) -> State:
        """The next level where an epoch ends and its loss is close to those of the four before it."""
        ends = (signals.step + 1) % self.interval == 0
        return self.where_ends(ends, FracTrain._after_epoch, {**state, "total": state["total"] + signals.loss})

    def _after_epoch(self, state: State) -> State:
        mean = state["total"] / self.interval
        epochs = state["epochs"] + 1
        counted = jnp.minimum(epochs, self.scale_epochs)
        scale = jnp.where(
            epochs <= self.scale_epochs, state["scale"] + (mean - state["scale"]) / counted, state["scale"]
        )
        losses = jnp.append(state["losses"][1:], mean)
        still = jnp.all(jnp.abs(losses[:-1] - mean) <= state["epsilon"] * scale) & (epochs > COMPARED)
        rises = still & (state["level"] < self.count - 1)
        return {
            "level": state["level"] + rises,
            "epochs": epochs,
            "total": jnp.zeros(()),
            "losses": losses,
            "scale": scale,
            "epsilon": jnp.where(rises, self.alpha * state["epsilon"], state["epsilon"]),
        }

    def metrics(self, state: State) -> dict[str, Array]:
        """``level`` and ``epsilon``."""
        return {"level": state["level"], "epsilon": state["epsilon"]}

    def describe(self) -> str:
        """Its parameters, in a line."""
        return (
            f"fractrain: {shown_levels(self.levels)}; an epoch is {self.interval} steps; epsilon {self.epsilon:g}, "
            f"alpha {self.alpha:g}, scale of {self.scale_epochs} epochs"
        )


def fractrain(
    levels: Precision, interval: int, epsilon: float = 0.05, alpha: float = 0.3, scale_epochs: int = 10
) -> FracTrain:
    """More bits, a stage at a time, whenever the training loss has stood still for four epochs.

    With L_e the mean training loss of epoch e, at the end of each epoch::

        next stage  if |L_{e−i} − L_e| / scale ≤ ε for i = 1, 2, 3, 4, and there is one;  then ε ← α·ε

    scale is the mean of the first `scale_epochs` epochs' L, of those so far while there are fewer. The stages only go
    up. Differences to note: the loss is the mean over an epoch's batches, each at the precision it was trained at; the
    losses before a switch go on being compared with those after it.

    Args:
      levels: bits of each stage, for each kind that is decided, as many for each.
      interval: steps of an epoch, at least 1.
      epsilon: ε, above 0.
      alpha: what ε is multiplied by at a switch, in (0, 1].
      scale_epochs: epochs that the scale is the mean of.

    The state: eleven numbers. The last `COMPARED` + 1 losses, so that no gradient is held.

    Raises:
      UsageError: for levels of different lengths, or a number out of range.

    >>> controller = fractrain(Precision(weights=(3, 4, 6, 8), acts=(3, 4, 6, 8), grads=(6, 6, 8, 8)), interval=100)
    >>> controller.bits(controller.init({})).grads.item()
    6.0
    """
    return FracTrain(
        levels=levels_of(levels),
        interval=whole("interval", interval, 1),
        epsilon=number("epsilon", epsilon, 0.0, 1e9, open_low=True),
        alpha=number("alpha", alpha, 0.0, 1.0, open_low=True),
        scale_epochs=whole("scale_epochs", scale_epochs, 1),
    )
