"""What mixed widths make of a trained model, without training it further."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from qtrain import data, sharding
from qtrain.experiment import Experiment
from qtrain.precision import Precision
from qtrain.reestimate import STATISTICS, make_reestimate_step, reestimate
from qtrain.state import make_eval_step

Assigned = Mapping[str, Precision]


def evaluate(
    experiment: Experiment, variables: Mapping[str, Any], assignments: Mapping[str, Assigned], split: str = "test"
) -> dict[str, dict[str, float]]:
    """Loss and accuracy of a split under each of `assignments`: ``{name: {"loss", "accuracy"}}``.

    One compiled program serves them all: bits are data, layer by layer. Numbers are those of an evaluation in training
    at the same bits; where the config re-estimates norm statistics before an evaluation, they are re-estimated here for
    each assignment.

    Args:
      experiment: of the run.
      variables: ``params``, ``quant`` and the other collections.
      assignments: name → path → `Precision`, of every layer that follows the schedule.
      split: of the data.
    """
    mesh = sharding.make_mesh()
    batch_size = -(-experiment.config.eval.batch_size // mesh.size) * mesh.size
    processes = jax.process_index(), jax.process_count()
    step = jax.jit(make_eval_step(experiment.qmodel))
    bits = {name: jax.tree.map(np.float32, dict(assigned)) for name, assigned in assignments.items()}
    given = jax.device_put(dict(variables), sharding.replicated(mesh))
    adapted = {name: _with_statistics(experiment, given, own, mesh) for name, own in bits.items()}
    totals = {name: {"loss": 0.0, "correct": 0.0, "count": 0.0} for name in bits}
    for rows in data.eval_batches(experiment.dataset, split, batch_size, *processes):
        batch = sharding.shard_batch(rows, mesh)
        sums = {name: step(adapted[name], batch, own) for name, own in bits.items()}
        for name, values in jax.device_get(sums).items():
            for kind, value in values.items():
                totals[name][kind] += float(value)
    return {
        name: {"loss": total["loss"] / total["count"], "accuracy": total["correct"] / total["count"]}
        for name, total in totals.items()
    }


def _with_statistics(experiment: Experiment, variables: dict[str, Any], bits: Any, mesh: Any) -> dict[str, Any]:
    config = experiment.config
    count = config.eval.reestimate_batches
    if not count:
        return variables
    step = jax.jit(make_reestimate_step(experiment.qmodel), out_shardings=sharding.replicated(mesh))
    with training_batches(experiment) as rows:
        batches = (sharding.shard_batch(batch, mesh) for batch in rows)
        found = reestimate(step, variables, batches, count, bits)
    return {**variables, STATISTICS: found}


def training_batches(experiment: Experiment) -> data.TrainIterator:
    """The run's training batches from its first on, each once; to be closed."""
    config = experiment.config.data
    processes = jax.process_index(), jax.process_count()
    return data.train_iterator(experiment.dataset, config.batch_size, config.seed, *processes)
