"""What a run starts with: its experiment, devices and parameters, all mistakes found before a file is written."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from qtrain import manifest, processes, sharding, workdir
from qtrain.build import build
from qtrain.errors import UsageError
from qtrain.experiment import Experiment
from qtrain.init_from import load_float
from qtrain.reestimate import check_reestimation


def prepared(config: ConfigDict, folder: str) -> tuple[Experiment, Mesh, dict[str, Any] | None]:
    """What `config` stands for, the devices, and what it starts from; no file of the run is written, nothing compiled.

    Raises:
      UsageError: for a mistake in the config, or a folder or checkpoint that it names.
    """
    mesh = sharding.make_mesh(config.mesh)
    experiment = build(config)
    if experiment.dataset.kind != "graph":
        sharding.check_batch_size(config.data.batch_size, mesh, "data.batch_size")
    if config.train.compilation_cache:
        _keep_compilations(config.train.compilation_cache)
    if config.eval.reestimate_batches:
        variables = jax.eval_shape(experiment.initial_state).variables
        check_reestimation(experiment.qmodel, variables, experiment.inputs(), config.eval.reestimate_batches)
    return experiment, mesh, loaded(experiment, folder, mesh)


def loaded(experiment: Experiment, folder: str, mesh: Mesh) -> dict[str, Any] | None:
    """What `init_from` names, before anything is written; None where the run goes on from a checkpoint of its own."""
    path = experiment.config.init_from
    if not path or manifest.folders(Path(folder) / "checkpoints"):
        return None
    variables = jax.eval_shape(experiment.initial_state).variables
    per_width, min_size = experiment.qmodel.held(variables).leaves, experiment.config.mesh.fsdp_min_size
    return load_float(
        path, variables, per_width=per_width, sharding=lambda shape: sharding.placed(mesh, shape, min_size)
    )


def as_started(experiment: Experiment, folder: str) -> Experiment:
    """The experiment with its layers carried out as when the run was started; that is written down the first time.

    What is faster may look otherwise to another version or machine, and a resumed run is to do the same arithmetic.
    """
    if not experiment.plan.choices:
        return experiment

    own = {path: choice.to_json() for path, choice in experiment.plan.choices.items()}

    def chosen() -> dict[str, Any]:
        recorded = workdir.recorded(folder).get("execution")
        if recorded is None:
            workdir.record(folder, "execution", own)
        return {"fresh": recorded is None, "choices": own if recorded is None else recorded}

    found = processes.on_first(chosen)
    if found["fresh"] and found["choices"] == own:
        return experiment
    return experiment.with_choices(found["choices"])


def _keep_compilations(folder: str) -> None:
    try:
        os.makedirs(folder, exist_ok=True)
    except OSError as error:  # JAX would warn at each compilation and go on without
        reason = (error.strerror or str(error)).lower()
        raise UsageError(f"train.compilation_cache={folder!r} cannot be created: {reason}; give a folder") from None
    jax.config.update("jax_compilation_cache_dir", folder)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
