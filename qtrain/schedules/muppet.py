"""MuPPET: more bits when the gradients of successive epochs come to agree (Rajagopal et al. 2020, arXiv 2006.09049)."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from qtrain.errors import UsageError
from qtrain.precision import Precision
from qtrain.schedules.controller import Array, Controller, Signals, State, levels_of, number, shown_levels, whole
from qtrain.schedules.schedule import FLOAT_BITS, whole_number

VALUES = (8, 12, 14, 16, FLOAT_BITS)
"""The paper's widths."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Muppet(Controller):
    """See `muppet`; all fields but the window, which the state's shape depends on, are data."""

    name: ClassVar[str] = "muppet"
    levels: Precision
    interval: Any
    violations: Any
    margin: Any
    margin_decay: Any
    window: int = dataclasses.field(default=3, metadata={"static": True})

    def init(self, grads: Mapping[str, Any]) -> State:
        """Level 0, and no gradient seen."""
        held = jnp.zeros((self.window - 1, sum(leaf.size for leaf in grads.values())))
        return {
            "level": jnp.zeros((), jnp.int32),
            "epochs": jnp.zeros((), jnp.int32),
            "violations": jnp.zeros((), jnp.int32),
            "diversity": jnp.zeros(()),
            "highest": jnp.zeros(()),
            "gradients": held,
        }

    def update(self, state: State, signals: Signals) -> State:
        """The next level at the end of the epoch in which the diversity has fallen too far once too often."""
        ends = (signals.step + 1) % self.interval == 0
        return self.where_ends(ends, Muppet._after_epoch, state, signals.grads)

    def _after_epoch(self, state: State, grads: Mapping[str, Array]) -> State:
        grad = jnp.concatenate([jnp.ravel(leaf) for leaf in grads.values()]).astype(jnp.float32)
        ends = np.cumsum([leaf.size for leaf in grads.values()])
        parts = zip(jnp.split(state["gradients"], ends[:-1], axis=1), jnp.split(grad, ends[:-1]), strict=True)
        diversity = jnp.mean(jnp.stack([_diversity(held, new) for held, new in parts]))
        epochs = state["epochs"] + 1
        full = epochs >= self.window
        diversity = jnp.where(full, diversity, 0.0)
        highest = jnp.maximum(state["highest"], diversity)
        allowed = 1 + self.margin * jnp.exp(-self.margin_decay * state["epochs"])
        violations = state["violations"] + (full & (highest > allowed * diversity))
        rises = (violations >= self.violations) & (state["level"] < self.count - 1)
        oldest = state["epochs"] % (self.window - 1)
        return {
            "level": state["level"] + rises,
            "epochs": epochs,
            "violations": jnp.where(rises, 0, violations),
            "diversity": diversity,
            "highest": jnp.where(rises, 0.0, highest),
            "gradients": state["gradients"].at[oldest].set(grad),
        }

    def metrics(self, state: State) -> dict[str, Array]:
        """``level``, ``diversity`` of the last epoch and ``violations`` since the last switch."""
        return {name: state[name] for name in ("level", "diversity", "violations")}

    def describe(self) -> str:
        """Its parameters, in a line."""
        return (
            f"muppet: {shown_levels(self.levels)}; an epoch is {self.interval} steps; diversity over {self.window} "
            f"epochs, {self.violations} violations of 1 + {self.margin:g}·exp(−{self.margin_decay:g}·e)"
        )


def _diversity(held: Array, grad: Array) -> Array:
    """Σ‖g_k‖² / ‖Σ g_k‖² over those held [r − 1, n] and this one [n]; of zeros 1/r, as of any r equal gradients."""
    squares = jnp.sum(held * held) + jnp.sum(grad * grad)
    of_sum = jnp.sum((jnp.sum(held, axis=0) + grad) ** 2)
    return jnp.where(squares > 0, squares / jnp.maximum(of_sum, jnp.finfo(jnp.float32).tiny), 1 / (len(held) + 1))


def muppet(
    levels: Precision,
    interval: int,
    window: int = 3,
    violations: int = 2,
    margin: float = 1.5,
    margin_decay: float = 0.1,
) -> Muppet:
    """More bits, a level at a time, when the gradients of the last epochs have come to agree far more than they did.

    At the end of epoch e = 0, 1, …, with g_k the gradient of the last step of epoch k, over a window of r epochs::

        Δs_e = mean over layers of  Σ_{k=e−r+1…e} ‖g_k‖² / ‖Σ_{k=e−r+1…e} g_k‖²          from epoch r − 1 on
        violation    if  max(Δs_i, i since the last switch) / Δs_e > 1 + margin·exp(−margin_decay·e)
        next level   at the second (`violations`) of them since the last switch, which starts both counts anew

    A layer is a weight tensor that follows the schedule. e counts the epochs of the run, and the maximum is taken since
    the last switch: our reading of what is left open. Under gradient accumulation g_k is the gradient of the epoch's
    last batch.

    The state holds r − 1 gradients, for r = 3 twice the weights in float32: the least that is exact, since ‖Σ g_k‖² of
    a sliding window needs the inner product of a new gradient with each older one. They are touched once an epoch.

    Args:
      levels: bits of each level, for each kind that is decided; the paper's are `VALUES`, the last of them float.
      interval: steps of an epoch, at least 1.
      window: r, at least 2 epochs.
      violations: that switch, at least 1.
      margin, margin_decay: of the threshold, at least 0.

    Raises:
      UsageError: for levels of different lengths, or a number out of range.
    """
    if isinstance(window, bool):
        raise UsageError(f"window={window}: must be a whole number of at least 2")
    return Muppet(
        levels=levels_of(levels),
        interval=whole("interval", interval, 1),
        violations=whole("violations", violations, 1),
        margin=number("margin", margin, 0.0, 1e9),
        margin_decay=number("margin_decay", margin_decay, 0.0, 1e9),
        window=whole_number("window", window, 2, 64),
    )
