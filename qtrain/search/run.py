"""A search over the layers of a trained run: traces, errors, costs, the assignment asked for, the front, accuracies."""

from __future__ import annotations

import itertools
import os
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from qtrain import sharding
from qtrain.errors import UsageError
from qtrain.evaluate import Evaluator
from qtrain.experiment import Experiment
from qtrain.search.integer_program import front, solve
from qtrain.search.problem import (
    Problem,
    check_widths,
    curvatures,
    expected_rise,
    layer_costs,
    precisions,
    searched_layers,
    squared_errors,
)
from qtrain.sensitivity import DRAWS, weight_traces
from qtrain.trained import check_promise, experiment_of, restored

VERSION = 1
"""Of the layout of ``search.json``."""
BATCHES, POINTS = 4, 24
ASKED = "assignment"


def search_run(
    workdir: str | os.PathLike[str],
    unit: str,
    budget: float | str,
    widths: Sequence[int] = (),
    *,
    batches: int = BATCHES,
    draws: int = DRAWS,
    points: int = POINTS,
    evaluate_front: bool = False,
) -> dict[str, Any]:
    """Choose a width for each layer of a run's newest checkpoint, under a budget, and evaluate it without retraining.

    Layers whose weights follow the schedule are searched; each layer's activations take the width of its weights where
    weights and activations have one schedule, else the most bits of theirs. Hessian traces are those of the float model
    (`qtrain.sensitivity.weight_traces`) over the run's first training batches. BitOps are those of the forward pass of
    one example.

    Args:
      workdir: of the run, finished or not.
      unit: of the budget: "bits" (average over the weights of the searched layers), "bytes" or "bitops" (of the model).
      budget: at most so much; a number or its decimal digits.
      widths: candidates; empty: those the run was trained at.
      batches: how many batches the traces are averaged over.
      draws: of the traces, at most.
      points: of the front, at most; 0 for all.
      evaluate_front: whether every point of the front is evaluated, too; otherwise only the assignment asked for and
        each width by itself.

    Returns:
      What ``search.json`` holds: plain data.

    Raises:
      UsageError: no run, or none with a checkpoint; no layer to search; widths that its quantizers cannot take; an
        unknown unit; a budget that cannot be met.
    """
    _check_counts(batches=batches, draws=draws)
    experiment = experiment_of(workdir, "search")
    if experiment.fixed is not None:
        raise UsageError("search: quant.backend='aqt' has its bits frozen in its program; search a run of 'qtrain'")
    if not experiment.task.classifies:
        raise UsageError(
            f"search: model.name={experiment.config.model.name!r} finds boxes; assignments are compared by their "
            "accuracy, so search a run of a classifier or a language model"
        )
    searched = searched_layers(experiment.plan, experiment.weights)
    widths = check_widths(_candidates(experiment, widths), searched)
    check_promise(experiment, "widths", max(widths))

    example, graph = experiment.inputs(), experiment.dataset.kind == "graph"
    if not graph:  # which is one example
        example = jax.ShapeDtypeStruct((1, *example.shape[1:]), example.dtype)
    plan = experiment.qmodel.plan(example, train=False)
    scheduled, acts = experiment.q_max, experiment.schedule.acts == experiment.schedule.weights
    costs = layer_costs(plan, searched, widths, scheduled, acts=acts)
    # Before anything is compiled: whether the budget can be met does not depend on the errors.
    solve(Problem(tuple(searched), widths, np.zeros((len(searched), len(widths))), costs), unit, budget)

    mesh = sharding.mesh_for(None if graph else experiment.config.data.batch_size)
    _, variables, step, _ = restored(workdir, experiment)
    variables = jax.device_put(variables, sharding.replicated(mesh))
    leaves = [weight for group in searched.values() for weight in group]
    traces = weight_traces(
        experiment.qmodel,
        leaves,
        variables,
        _batches(experiment, batches, mesh),
        jax.random.key(experiment.config.seed),
        draws,
        task=experiment.task,
    )
    errors = squared_errors(searched, variables["params"], variables["quant"], widths)
    curvature = curvatures(searched, traces.mean)
    problem = Problem(tuple(searched), widths, expected_rise(searched, curvature, errors), costs)

    chosen, trade_off = solve(problem, unit, budget), front(problem, unit, points)
    named = {ASKED: chosen, **{str(width): problem.uniform(width) for width in widths}}
    if evaluate_front:
        named |= {f"front {index}": choice for index, choice in enumerate(trade_off)}
    assigned = {
        name: precisions(plan.followers, problem.assignment(choice), scheduled, acts=acts)
        for name, choice in named.items()
    }
    accuracies = Evaluator(experiment, mesh).at(variables, assigned)

    def described(name: str, choice: np.ndarray) -> dict[str, Any]:
        prices = {unit: cost.of(choice) for unit, cost in costs.items()}
        return {**prices, "omega": problem.rise(choice), **accuracies.get(name, {})}

    return {
        "version": VERSION,
        "step": step,
        "unit": unit,
        "budget": float(budget),
        "widths": list(widths),
        "activations": "of the weights" if acts else scheduled.acts,
        ASKED: problem.assignment(chosen),
        "result": described(ASKED, chosen),
        "uniform": {str(width): described(str(width), problem.uniform(width)) for width in widths},
        "front": [
            {**described(f"front {index}", choice), ASKED: problem.assignment(choice)}
            for index, choice in enumerate(trade_off)
        ],
        "layers": [
            {
                "path": path,
                "elements": sum(weight.size for weight in searched[path]),
                "macs": plan[path].macs,
                "omega": dict(zip(map(str, widths), problem.omega[row].tolist(), strict=True)),
                "parameters": {
                    weight.name: {
                        "trace": traces.mean[weight.name],
                        "standard_error": _number(traces.standard_error[weight.name]),
                        "curvature": curvature[weight.name],
                        "squared_error": dict(zip(map(str, widths), errors[weight.name].tolist(), strict=True)),
                    }
                    for weight in searched[path]
                },
            }
            for row, path in enumerate(problem.layers)
        ],
        "fixed": [
            {"path": row.path, "weights": _fixed(row.bits.weights), "acts": _fixed(row.bits.acts), "macs": row.macs}
            for row in plan
            if row.path not in searched and row.op
        ],
        "hessian": {"draws": traces.draws, "change": traces.change, "batches": batches},
    }


def _candidates(experiment: Experiment, widths: Sequence[int]) -> Sequence[int]:
    if widths:
        return widths
    if not experiment.trained_widths:
        raise UsageError("search: the run was not trained at several widths; name the candidates, --widths 8,4,2")
    return experiment.trained_widths


def _batches(experiment: Experiment, count: int, mesh: Any) -> list[Mapping[str, Any]]:
    with experiment.train_batches() as rows:
        return [sharding.shard_batch(batch, mesh) for batch in itertools.islice(rows, count)]


def _check_counts(**counts: int) -> None:
    for name, value in counts.items():
        if value < 1:
            raise UsageError(f"--{name} {value}: give at least 1")


def _number(value: float) -> float | None:
    """JSON has no nan: the error of a single draw is not known."""
    return value if np.isfinite(value) else None


def _fixed(bits: Any) -> Any:
    return "float" if bits is None else bits
