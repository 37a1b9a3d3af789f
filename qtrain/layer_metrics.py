"""What is measured layer by layer at the steps that are written: read from the state, by a program of its own."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax

from qtrain.experiment import Experiment
from qtrain.groups import latent_weights
from qtrain.optim import named_rows, oscillation_metrics, transition_metrics
from qtrain.optim.build import TRANSITION
from qtrain.optim.transition_metrics import with_overall
from qtrain.precision import Precision
from qtrain.size import size_metrics
from qtrain.state import TrainState

Array = jax.Array
Measure = Callable[[TrainState, Precision], dict[str, Array]]


def make_layer_metrics(experiment: Experiment) -> Callable[[TrainState], dict[str, Array]] | None:
    """``state -> {name: scalar}``, at the precision of its last step; None where a run has nothing of the kind.

    * Under a transition rate ``transition/<parameter>/…``, over all of them ``transition/…``: see
      `qtrain.optim.transition_metrics`, and the mean ``distance`` to where a code changes. Where oscillations are
      tracked, `qtrain.optim.oscillation_metrics` beside them.
    * Where quantizers choose their widths ``width/<parameter>`` and the average over all quantized parameters
      ``width/average``, in bits, and what storing them takes, `qtrain.size.size_metrics`; with a budget
      ``budget/spent``, ``budget/target`` and ``budget/multiplier``.
    """
    optimizer = experiment.config.optimizer
    parts: list[Measure] = []
    if optimizer.name in TRANSITION or optimizer.oscillation.track or optimizer.oscillation.freeze:
        parts.append(lambda state, precision: _transitions(experiment, state, precision))
    if experiment.widths is not None and experiment.widths.choosing:
        parts.append(lambda state, precision: _widths(experiment, state, precision))
    if experiment.config.budget.unit != "none":
        parts.append(lambda state, precision: {f"budget/{name}": value for name, value in state.controller.items()})
    if not parts:
        return None

    def measure(state: TrainState) -> dict[str, Array]:
        precision = experiment.precision(state.step - 1)
        return {name: value for part in parts for name, value in part(state, precision).items()}

    return measure


def _transitions(experiment: Experiment, state: TrainState, precision: Precision) -> dict[str, Array]:
    weights = latent_weights(experiment.weights, experiment.q_max)
    distances = {
        weight.name: {"distance": weight.distance_to_transition(state.params, state.quant, weight.bits(precision))}
        for weight in weights
    }
    found = with_overall(distances, {weight.name: weight.size for weight in weights})
    for metrics in (transition_metrics(state.opt_state), oscillation_metrics(state.opt_state)):
        for path, values in _without_prefix(metrics).items():
            found.setdefault(path, {}).update(values)
    return named_rows(found)


def _widths(experiment: Experiment, state: TrainState, precision: Precision) -> dict[str, Array]:
    widths = experiment.widths
    assert widths is not None
    arguments = state.params, state.quant, precision
    found = {f"width/{weight.name}": widths.weight(weight, *arguments) for weight in widths.choosing}
    return {"width/average": widths.average_bits(*arguments), **found, **size_metrics(widths.weights, *arguments)}


def _without_prefix(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """The optimizer sees ``{"params": …, "quant": …}``; only parameters have codes."""
    return {path.removeprefix("params/"): values for path, values in metrics.items()}
