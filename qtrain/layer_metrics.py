"""What is measured layer by layer at the steps that are written: read from the state, by a program of its own."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax

from qtrain.groups import latent_weights
from qtrain.optim import named_rows, oscillation_metrics, transition_metrics
from qtrain.optim.build import TRANSITION
from qtrain.optim.transition_metrics import with_overall
from qtrain.state import TrainState

Array = jax.Array


def make_layer_metrics(experiment: Any) -> Callable[[TrainState], dict[str, Array]] | None:
    """``state -> {name: scalar}``, at the precision of its last step; None where a run has nothing of the kind.

    Of weights under a transition rate ``transition/<parameter>/…``, over all of them ``transition/…``: see
    `qtrain.optim.transition_metrics`, and the mean ``distance`` to where a code changes. Where oscillations are
    tracked, `qtrain.optim.oscillation_metrics` beside them.
    """
    optimizer = experiment.config.optimizer
    if optimizer.name not in TRANSITION and not optimizer.oscillation.track and not optimizer.oscillation.freeze:
        return None
    weights = latent_weights(experiment.weights, experiment.q_max)

    def measure(state: TrainState) -> dict[str, Array]:
        precision = experiment.precision(state.step - 1)
        distances = {
            weight.name: {"distance": weight.distance_to_transition(state.params, state.quant, weight.bits(precision))}
            for weight in weights
        }
        found = with_overall(distances, {weight.name: weight.size for weight in weights})
        for metrics in (transition_metrics(state.opt_state), oscillation_metrics(state.opt_state)):
            for path, values in _without_prefix(metrics).items():
                found.setdefault(path, {}).update(values)
        return named_rows(found)

    return measure


def _without_prefix(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """The optimizer sees ``{"params": …, "quant": …}``; only parameters have codes."""
    return {path.removeprefix("params/"): values for path, values in metrics.items()}
