"""Evaluation of a state at the highest precision, at the current one, and in float."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from qtrain import data
from qtrain.experiment import Experiment
from qtrain.precision import Precision
from qtrain.state import TrainState, make_eval_step


class Evaluator:
    """Loss and accuracy of a split, each precision by the same compiled program as far as bits can be data.

    Args:
      experiment: what is evaluated.
      devices: how many share a batch, whose size is rounded up to a multiple of it.
    """

    def __init__(self, experiment: Experiment, devices: int = 1):
        self._experiment = experiment
        self._batch_size = -(-experiment.config.eval.batch_size // devices) * devices
        self._step = jax.jit(make_eval_step(experiment.qmodel))
        # A backend whose bits are frozen at compile time closes over them.
        self._fixed = jax.jit(lambda variables, batch: make_eval_step(experiment.qmodel)(variables, batch, experiment.fixed))

    def __call__(self, state: TrainState, split: str = "test") -> dict[str, float]:
        """``{split}_loss`` and ``{split}_accuracy`` at q_max, with ``_scheduled`` (bits of the last step), ``_float``."""
        experiment = self._experiment
        last = jnp.maximum(state.step - 1, 0)
        precisions = {"": experiment.q_max, "_scheduled": experiment.precision(last), "_float": None}
        totals = {suffix: {"loss": 0.0, "correct": 0.0, "count": 0.0} for suffix in precisions}
        for batch in data.eval_batches(experiment.dataset, split, self._batch_size):
            sums = {suffix: self._sums(state, batch, precision) for suffix, precision in precisions.items()}
            for suffix, values in jax.device_get(sums).items():
                for name, value in values.items():
                    totals[suffix][name] += float(value)
        results = {}
        for suffix, total in totals.items():
            results[f"{split}_loss{suffix}"] = total["loss"] / total["count"]
            results[f"{split}_accuracy{suffix}"] = total["correct"] / total["count"]
        return results

    def _sums(self, state: TrainState, batch: Any, precision: Precision | None) -> dict[str, jax.Array]:
        if precision is not None and self._experiment.fixed is not None:
            return self._fixed(state.variables, batch)
        return self._step(state.variables, batch, jax.tree.map(jnp.float32, precision))
