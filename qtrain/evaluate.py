"""Evaluation of a state at the highest precision, at the current one, at each of its widths, and in float."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from qtrain import data, sharding
from qtrain.additions import Bits
from qtrain.experiment import Experiment
from qtrain.precision import Precision
from qtrain.reestimate import STATISTICS, make_reestimate_step, reestimate
from qtrain.state import TrainState, make_eval_step


class Evaluator:
    """Loss and quality of a split, each precision by the same compiled program as far as bits can be data.

    Args:
      experiment: what is evaluated.
      mesh: the devices that share a batch, whose size is rounded up to a multiple of their number.
    """

    def __init__(self, experiment: Experiment, mesh: Mesh):
        self._experiment, self._mesh = experiment, mesh
        self._batch_size = -(-experiment.config.eval.batch_size // mesh.size) * mesh.size
        everywhere, whole = sharding.replicated(mesh), sharding.gather(mesh, experiment.config.mesh.fsdp_min_size)
        evaluate = make_eval_step(experiment.qmodel, experiment.task)

        def eval_step(variables: Mapping[str, Any], batch: Any, bits: Any) -> dict[str, jax.Array]:
            return evaluate(whole(variables), batch, bits)

        self._step = jax.jit(eval_step, out_shardings=everywhere)
        # A backend whose bits are frozen at compile time closes over them.
        fixed = experiment.fixed
        self._fixed = jax.jit(lambda variables, batch: eval_step(variables, batch, fixed), out_shardings=everywhere)
        self._reestimated = experiment.config.eval.reestimate_batches
        measure = make_reestimate_step(experiment.qmodel, experiment.task)

        def reestimate_step(average: Any, index: Any, variables: Any, batch: Any, bits: Any) -> dict[str, Any]:
            bits = bits if bits is None or fixed is None else fixed
            return measure(average, index, whole(variables), batch, bits)

        self._reestimate = jax.jit(reestimate_step, out_shardings=everywhere)

    def of(self, experiment: Experiment) -> Evaluator:
        """The same programs for a run that differs in its schedules or its seed alone."""
        other = copy.copy(self)
        other._experiment = experiment
        return other

    def __call__(self, state: TrainState) -> dict[str, float]:
        """``{split}_loss`` and ``{split}_accuracy`` at q_max, ``…_scheduled`` at the last step's bits, ``…_float``.

        Of each of ``eval.splits``. Tasks other than classification have other names than ``accuracy``, see
        `Task.summary`. Of a run that trains several widths also ``…_8bit`` and so on, weights and activations at each.
        """
        experiment = self._experiment
        scheduled = experiment.precision_after(int(state.step), state.previous)
        asked: dict[str, Precision | None] = {"": experiment.q_max, "_scheduled": scheduled, "_float": None}
        for width in experiment.trained_widths:
            asked[f"_{width}bit"] = dataclasses.replace(experiment.q_max, weights=width, acts=width)
        # The first name of each precision: q_max and the scheduled bits are among the widths, and others may be equal.
        first = {suffix: next(name for name in asked if asked[name] == bits) for suffix, bits in asked.items()}
        different = {suffix: asked[suffix] for suffix in dict.fromkeys(first.values())}
        found = {split: self.at(state.variables, different, split) for split in experiment.config.eval.splits}
        return {
            f"{split}_{kind}{suffix}": value
            for split, summaries in found.items()
            for suffix, name in first.items()
            for kind, value in summaries[name].items()
        }

    def at(
        self, variables: Mapping[str, Any], asked: Mapping[str, Bits | None], split: str = "test"
    ) -> dict[str, dict[str, float]]:
        """``{name: {"loss", "accuracy"}}``, `Task.summary`, at each of `asked`: bits, by layer too; None: float."""
        experiment = self._experiment
        parts: dict[str, list[Any]] = {name: [] for name in asked}
        adapted = {name: self._variables(variables, bits) for name, bits in asked.items()}
        processes = jax.process_index(), jax.process_count()
        for rows in data.eval_batches(experiment.dataset, split, self._batch_size, *processes):
            batch = sharding.shard_batch(rows, self._mesh)
            sums = {name: self._sums(adapted[name], batch, bits) for name, bits in asked.items()}
            for name, values in jax.device_get(sums).items():
                parts[name].append(values)
        return {name: experiment.task.summary(found) for name, found in parts.items()}

    def _variables(self, variables: Mapping[str, Any], bits: Bits | None) -> Mapping[str, Any]:
        """What to evaluate with: norm statistics are those of training, or made anew for these bits."""
        if not self._reestimated:
            return variables
        with self._experiment.train_batches() as rows:
            batches = (sharding.shard_batch(batch, self._mesh) for batch in rows)
            traced = jax.tree.map(np.float32, bits)
            found = reestimate(self._reestimate, variables, batches, self._reestimated, traced)
        return {**variables, STATISTICS: found}

    def _sums(self, variables: Mapping[str, Any], batch: Any, bits: Bits | None) -> dict[str, jax.Array]:
        if bits is not None and self._experiment.fixed is not None:
            return self._fixed(variables, batch)
        return self._step(variables, batch, jax.tree.map(np.float32, bits))
