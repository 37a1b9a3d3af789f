"""What a train step reads as data, step by step: bits, learning rate, rates of the loss terms, a deficit's window."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from qtrain import schedules
from qtrain.deficits import Deficit
from qtrain.losses import Penalty
from qtrain.packing import Packed, pack
from qtrain.precision import Precision
from qtrain.schedules import Controller, PrecisionSchedule
from qtrain.schedules.precisions import KINDS

Array = jax.Array


class Tables(NamedTuple):
    """A run's schedules as arrays, which its compiled step takes as an argument: runs that differ in them share it.

    Attributes:
      bits: of each kind at every step, float32 [steps]; None where it is not quantized, where bits are no data, or
        where a controller decides them.
      learning_rate: of every update, float32 [updates].
      losses: name of a loss term → its rate at every step, float32 [steps].
      deficit: 1 at the steps whose images lack something, float32 [steps]; None: those of no step do.
      controller: the numbers of the one that decides bits, see `qtrain.packing`; None: the schedule has them all.
    """

    bits: Precision
    learning_rate: Any
    losses: dict[str, Any]
    deficit: Any = None
    controller: Packed | None = None

    def precision(self, step: Array) -> Precision:
        """The bits of a step."""
        return jax.tree.map(lambda bits: jnp.asarray(bits)[step], self.bits)

    def rate(self, update: Array) -> Array:
        """The learning rate of an update; beyond the last that of the last."""
        return jnp.asarray(self.learning_rate).at[update].get(mode="clip")


def tabulate(
    schedule: PrecisionSchedule | None,
    learning_rate: optax.Schedule,
    losses: Penalty | None,
    total_steps: int,
    steps_per_update: int = 1,
    deficit: Deficit | None = None,
    controller: Controller | None = None,
) -> Tables:
    """The tables of a run of `total_steps`, NumPy arrays; 4 bytes a step for each of at most a handful of schedules.

    Args:
      schedule: None where bits are fixed at compile time.
      learning_rate: a function of the update.
      losses: the penalty, or None.
      total_steps, steps_per_update: of the run.
      deficit: of the images, or None.
      controller: of the run, whose numbers are data as they are.
    """
    bits = Precision()
    if schedule is not None:
        schedule = schedules.without_decided(schedule)
        kinds = {kind: getattr(schedule, kind) for kind in KINDS}
        of_kind = {kind: None if one is None else schedules.evaluate(one, total_steps) for kind, one in kinds.items()}
        bits = Precision(**of_kind)

    def rate(update: Array) -> Array:
        return jnp.asarray(learning_rate(update), jnp.float32)

    updates = np.arange(-(-total_steps // steps_per_update), dtype=np.int32)
    rates = np.asarray(jax.jit(jax.vmap(rate))(updates))
    numbers = None if controller is None else pack(controller)
    window = None if deficit is None else deficit.table()
    return Tables(bits, rates, {} if losses is None else losses.table(), window, numbers)
