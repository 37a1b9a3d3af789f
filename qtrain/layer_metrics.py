"""What is measured layer by layer at the steps that are written: read from the state, by a program of its own."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax

from qtrain.experiment import Experiment
from qtrain.groups import latent_weights
from qtrain.losses.budget import initial_controller
from qtrain.optim import named_rows, oscillation_metrics, transition_metrics
from qtrain.optim.build import TRANSITION
from qtrain.optim.transition_metrics import with_overall
from qtrain.precision import Precision
from qtrain.sensitivity import FisherSettings, model_fisher_trace
from qtrain.size import size_metrics
from qtrain.state import TrainState
from qtrain.steering import Steering
from qtrain.trees import leaf_name

Array = jax.Array
Measure = Callable[[TrainState, Precision], dict[str, Array]]
_LABELS = 2**31 - 1  # a number that no step has: the key of a run is folded with its steps


def make_layer_metrics(experiment: Experiment) -> Callable[..., dict[str, Array]] | None:
    """``(state, key, q_max, examples) -> {name: scalar}``, at the precision of its last step; None: there is nothing.

    The run's `key`, `q_max` and `examples` (`Experiment.fisher_examples`) are data, so that runs which differ in them
    share a program.

    * Under a transition rate ``transition/<parameter>/…``, over all of them ``transition/…``: see
      `qtrain.optim.transition_metrics`, and the mean ``distance`` to where a code changes. Where oscillations are
      tracked, `qtrain.optim.oscillation_metrics` beside them.
    * Where quantizers choose their widths ``width/<parameter>`` and the average over all quantized parameters
      ``width/average``, in bits, and what storing them takes, `qtrain.size.size_metrics`; with a budget
      ``budget/spent``, ``budget/target`` and ``budget/multiplier``.
    * With ``fisher.examples`` ``fisher/<parameter>/trace``, of all parameters together ``fisher/trace`` and its
      standard error ``fisher/trace_error``: `qtrain.sensitivity.model_fisher_trace`, at the bits of the last step and
      on images as it took them; ``…_q_max`` and ``…_float`` where ``fisher.at`` asks for them. Labels are drawn anew at
      each row, by the run's key: the same for runs of one seed, others for those of another.
    * Where a controller decides bits, what it shows of its state, ``controller/level`` and others.
    """
    optimizer = experiment.config.optimizer
    parts: list[Measure] = []
    if optimizer.name in TRANSITION or optimizer.oscillation.track or optimizer.oscillation.freeze:
        parts.append(lambda state, precision: _transitions(experiment, state, precision))
    if experiment.widths is not None and experiment.widths.choosing:
        parts.append(lambda state, precision: _widths(experiment, state, precision))
    if experiment.config.budget.unit != "none":
        names = tuple(initial_controller())
        parts.append(lambda state, precision: {f"budget/{name}": state.controller[name] for name in names})
    steering = experiment.additions.steering
    if steering is not None:
        parts.append(lambda state, precision: _decided(steering, state))
    if not parts and experiment.fisher is None:
        return None

    def measure(state: TrainState, key: Array, q_max: Precision, examples: Any) -> dict[str, Array]:
        precision = experiment.last_precision(state)
        found = {name: value for part in parts for name, value in part(state, precision).items()}
        if experiment.fisher is not None:
            found |= _fisher(experiment, experiment.fisher, state, key, precision, q_max, examples)
        return found

    return measure


def _transitions(experiment: Experiment, state: TrainState, precision: Precision) -> dict[str, Array]:
    latent = latent_weights(experiment.weights, experiment.q_max)
    weights = [weight for weight in latent if hasattr(weight.quantizer, "position")]  # small floats have no steps
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


def _fisher(
    experiment: Experiment,
    settings: FisherSettings,
    state: TrainState,
    key: Array,
    precision: Precision,
    q_max: Any,
    examples: Any,
) -> dict[str, Array]:
    labels = jax.random.fold_in(jax.random.fold_in(key, _LABELS), state.step) if settings.samples else None
    taken: dict[str, tuple[Any, Any]] = {
        "step": (precision, experiment.additions.observed(state.step - 1, examples)),
        "q_max": (q_max if experiment.fixed is None else experiment.fixed, examples),
        "float": (None, examples),
    }
    rows: dict[str, dict[str, Array]] = {"": {}}
    for at in settings.at:
        bits, batch = taken[at]
        found = model_fisher_trace(
            experiment.qmodel,
            state.variables,
            batch,
            labels,
            max(settings.samples, 1),
            bits,
            experiment.task,
            settings.examples,
        )
        name = "trace" if at == "step" else f"trace_{at}"
        rows[""] |= {name: found.total, f"{name}_error": found.total_error}
        for path, value in jax.tree_util.tree_flatten_with_path(found.mean)[0]:
            rows.setdefault("/".join(leaf_name(path)), {})[name] = value
    return named_rows(rows, "fisher")


def _decided(steering: Steering, state: TrainState) -> dict[str, Array]:
    return {f"controller/{name}": value for name, value in steering.metrics(state.controller).items()}


def _without_prefix(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """The optimizer sees ``{"params": …, "quant": …}``; only parameters have codes."""
    return {path.removeprefix("params/"): values for path, values in metrics.items()}
