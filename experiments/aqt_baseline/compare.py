"""Equal numbers: AQT's loss and gradients beside qtrain's at one and the same state, step after step.

    python experiments/aqt_baseline/compare.py [--only digits_mlp] [--steps 100]

At each step of a qtrain run both compute the loss and the gradients from the run's parameters and batch: what differs
then is numerics alone. A second qtrain run starts with every parameter moved to the next float32, up or down: what two
runs of one program come to differ by. Writes compare.jsonl, a line for each family and width.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import importlib
import json
import os
import platform
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from arms import FAMILIES, STATIC

from qtrain import sharding
from qtrain.build import build
from qtrain.experiment import Experiment
from qtrain.programs import Programs
from qtrain.workdir import package_versions

WRITTEN = Path(__file__).parent / "compare.jsonl"


def main() -> None:
    """Every family and width that is asked for; lines of others are kept."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", default=list(FAMILIES), choices=FAMILIES)
    parser.add_argument("--steps", type=int, default=100)
    arguments = parser.parse_args()
    kept = [json.loads(line) for line in WRITTEN.read_text().splitlines()] if WRITTEN.exists() else []
    kept = [line for line in kept if line["family"] not in arguments.only]
    for family in arguments.only:
        for bits in STATIC:
            line = compare(family, bits, arguments.steps)
            print(json.dumps({key: line[key] for key in line if key not in ("versions", "command")}), flush=True)
            kept.append(line)
            WRITTEN.write_text("".join(json.dumps(line) + "\n" for line in kept))


def compare(family: str, bits: int, steps: int) -> dict[str, Any]:
    """A line: largest and median relative differences over the steps."""
    ours, theirs = experiment_of(family, "qtrain", bits), experiment_of(family, "aqt", bits)
    programs = Programs(ours, sharding.make_mesh(ours.config.mesh))
    tables, key = programs.placed(ours.tables()), programs.key(ours.config.seed)
    step = jax.jit(programs.train_step)
    first, second = (programs.initial_state(ours.config.seed, tables) for _ in range(2))
    states = [first, nudged(second)]
    evaluate = [jax.jit(loss_and_gradients(experiment, bits)) for experiment in (ours, theirs)]
    same_loss, same_gradients, apart = [], [], []
    with ours.train_batches() as rows:
        for _, batch in zip(range(steps), rows, strict=False):
            placed = sharding.shard_batch(batch, programs.mesh)
            (loss, gradients), (other_loss, other_gradients) = (f(states[0].variables, placed) for f in evaluate)
            same_loss.append(relative(other_loss, loss))
            same_gradients.append(relative(other_gradients, gradients))
            losses = []
            for i in range(2):
                states[i], out = step(states[i], placed, key, tables)
                losses.append(float(programs.left(out)["loss"]))
            apart.append(abs(losses[1] - losses[0]) / abs(losses[0]))
    return {
        "family": family,
        "bits": bits,
        "steps": steps,
        "same_state_loss": {"largest": max(same_loss), "median": float(np.median(same_loss))},
        "same_state_gradients": {"largest": max(same_gradients), "median": float(np.median(same_gradients))},
        "moved_by_one_ulp_loss": {str(step): apart[step - 1] for step in (2, 10, 30, 100) if step <= steps},
        "command": f"python experiments/aqt_baseline/compare.py --only {family} --steps {steps}",
        "versions": package_versions(("qtrain", "jax", "jaxlib", "flax", "aqtp", "numpy")),
        "hardware": f"{jax.devices()[0].device_kind}, {os.cpu_count()} cores, {platform.machine()}",
        "date": datetime.date.today().isoformat(),
    }


def experiment_of(family: str, backend: str, bits: int) -> Experiment:
    """The study's config of a family at static bits, seed 0."""
    config = importlib.import_module(family).get_config()
    with config.unlocked():
        config.quant.backend = backend
        config.schedule.update(name="constant", bits=bits)
    return build(config)


def loss_and_gradients(experiment: Experiment, bits: int) -> Any:
    """``(variables, batch) -> (loss, gradients)``, at the fixed bits of AQT or the same as data."""
    precision = experiment.fixed if experiment.fixed is not None else experiment.q_max

    def loss(params: Any, variables: Any, batch: Any) -> jax.Array:
        rngs = {"dropout": jax.random.key(0), "quant": jax.random.key(0)}
        statistics = [name for name in variables if name not in ("params", "quant")]  # of norms: made and dropped
        outputs, _ = experiment.qmodel.apply(
            {**variables, "params": params},
            experiment.task.inputs(batch),
            train=True,
            bits=precision,
            rngs=rngs,
            mutable=statistics,
        )
        return experiment.task.loss(outputs, batch)

    return lambda variables, batch: jax.value_and_grad(loss)(variables["params"], variables, batch)


def relative(found: Any, expected: Any) -> float:
    """‖found − expected‖/‖expected‖ over all leaves."""
    square = [0.0, 0.0]
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        square[0] += float(np.sum((np.asarray(a, np.float64) - np.asarray(b, np.float64)) ** 2))
        square[1] += float(np.sum(np.asarray(b, np.float64) ** 2))
    return float(np.sqrt(square[0] / square[1]))


def nudged(state: Any) -> Any:
    """Every parameter moved to the next float32, up or down by chance: by as much as one rounding of a sum."""
    random = np.random.default_rng(0)

    def moved(leaf: Any) -> jax.Array:
        return jnp.nextafter(leaf, jnp.asarray(random.choice([-jnp.inf, jnp.inf], leaf.shape), leaf.dtype))

    return dataclasses.replace(state, params=jax.tree.map(moved, state.params))


if __name__ == "__main__":
    main()
