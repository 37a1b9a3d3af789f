"""A run that has been trained: its experiment, and the variables of its newest checkpoint."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, NamedTuple

import jax
from ml_collections import ConfigDict

from qtrain import workdir as workdirs
from qtrain.build import build
from qtrain.checkpoint import restore
from qtrain.errors import UsageError
from qtrain.experiment import Experiment
from qtrain.manifest import folders
from qtrain.precision import Precision


class Trained(NamedTuple):
    """What a run's folder holds.

    Attributes:
      experiment: as the run was started: its layers are carried out as then.
      variables: ``params``, ``quant`` and the other collections.
      step: of the checkpoint.
      last: the precision of the run's last step; where a controller decides, of the checkpoint's.
    """

    experiment: Experiment
    variables: dict[str, Any]
    step: int
    last: Precision


def experiment_of(workdir: str | os.PathLike[str], command: str) -> Experiment:
    """The experiment of a run, finished or not, that has a checkpoint; `command` is who asks, for the error.

    Raises:
      UsageError: no run is there, or none with a finished checkpoint.
    """
    config = ConfigDict(workdirs.read_config(workdir))
    if not folders(Path(workdir, "checkpoints")):
        raise UsageError(f"{command}: the run in {os.fspath(workdir)!r} has no finished checkpoint yet; train it first")
    experiment = build(config)
    choices = workdirs.recorded(workdir).get("execution")
    return experiment if choices is None or not experiment.plan.choices else experiment.with_choices(choices)


def restored(workdir: str | os.PathLike[str], experiment: Experiment) -> Trained:
    """The variables of the newest finished checkpoint of a run, whose `experiment` is that of `experiment_of`."""
    abstract = jax.eval_shape(experiment.initial_state)
    steered = experiment.controller is not None
    names = ("params", "quant", "collections", *["previous"] * steered)
    found = restore(Path(workdir, "checkpoints"), {name: getattr(abstract, name) for name in names}, partial=True)
    state = found.state
    variables = {"params": state["params"], "quant": state["quant"], **state["collections"]}
    reached = found.step if steered else experiment.total_steps
    return Trained(experiment, variables, found.step, experiment.precision_after(reached, state.get("previous")))


def check_promise(experiment: Experiment, what: str, bits: int) -> None:
    """Refuse weights of more bits than those of training where the programs on codes were compiled for these.

    Raises:
      UsageError: naming `what` asks for them.
    """
    widest = experiment.qmodel.widest.weights
    if experiment.plan.choices and widest is not None and bits > widest:
        raise UsageError(
            f"{what}: {bits} bits are more than the {widest:g} of the run, which quant.execution="
            f"{experiment.config.quant.execution!r} relies on; give at most {widest:g}"
        )
