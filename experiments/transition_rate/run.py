"""Does scheduling the transition rate help? Pairs of optimizers on the digits, from one float checkpoint a seed.

    python experiments/transition_rate/run.py                            # everything that is missing
    python experiments/transition_rate/run.py --only main --optimizers adam

A row is appended to ``results.jsonl`` for each run, with the command that does the same; what is there is not run
again. The steps are those of ``qtrain train``, in a loop that keeps the compiled program of an arm for all its seeds;
``--check`` shows that both end with the same parameters, bit for bit.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import functools
import json
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import arms as study
import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from arms import Arm

from qtrain import data, overrides, sharding
from qtrain.build import build
from qtrain.evaluate import Evaluator
from qtrain.experiment import Experiment
from qtrain.init_from import load_float
from qtrain.optim import transition_metrics
from qtrain.state import create, make_train_step
from qtrain.train import train

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
CONFIG = "configs/digits_cnn_trs.py"
WINDOW = 50  # steps that a point of a curve is the average over
LAST = 250  # steps that the training loss is the average over


def arguments_of(own: tuple[str, ...], seed: int) -> list[str]:
    """The command line of a run, but for its folders. Of a key that is given twice the last value holds."""
    given = [*study.NETWORK, *own, f"--config.seed={seed}", f"--config.data.seed={seed}"]
    return ["--config", CONFIG, *{argument.split("=")[0]: argument for argument in given}.values()]


def config_of(arguments: list[str], init_from: str) -> Any:
    """As the command line makes it."""
    path = [str(ROOT / each) if each == CONFIG else each for each in arguments]
    return overrides.parse("train", flags.FlagValues(), [*path, f"--config.init_from={init_from}"])


def float_run(folder: Path, seed: int) -> dict[str, Any]:
    """The float run of a seed, unless it is there; its summary."""
    return train(config_of(arguments_of(study.FLOAT, seed), ""), str(folder / f"float{seed}"), quiet=True)


class Program:
    """An arm, compiled once for all its seeds."""

    def __init__(self, config: Any):
        self.experiment = experiment = build(config)
        self.mesh = sharding.make_mesh()
        self.evaluator = Evaluator(experiment, self.mesh)
        step = make_train_step(
            experiment.qmodel,
            experiment.optimizer,
            experiment.precision,
            experiment.plan.ops,
            config.train.log_every_steps,
            experiment.additions,
        )
        self.step = jax.jit(functools.partial(_observed, step, experiment), donate_argnums=0)
        self.initial = jax.jit(lambda seed: _create(experiment, seed))

    def __call__(self, config: Any, batches: list[Any], every: int) -> tuple[Any, dict[str, list[float]], list[Any]]:
        """The final state; what `_observed` sees at every step; test accuracy every so many steps, 0 for none."""
        experiment = dataclasses.replace(self.experiment, config=config)
        state, key = self._begin(experiment), jax.random.key(config.seed)
        seen, accuracy = [], []
        for number, batch in enumerate(batches, 1):
            state, out = self.step(state, sharding.shard_batch(batch, self.mesh), key)
            seen.append(out)
            if every and number % every == 0:
                accuracy.append((number, self.evaluator(state)["test_accuracy"]))
        seen = jax.device_get(seen)
        return state, {name: [float(out[name]) for out in seen] for name in seen[0]}, accuracy

    def _begin(self, experiment: Experiment) -> Any:
        """As a run of ``qtrain train`` begins: the float parameters, and quantizers made for these and the data."""
        config = experiment.config
        state = self.initial(config.seed)
        loaded = load_float(config.init_from, state.variables, sharding=sharding.replicated(self.mesh))
        params = loaded.pop("params")
        state = dataclasses.replace(state, params=params, collections={**state.collections, **loaded})
        batch = data.train_batches(experiment.dataset, config.data.batch_size, config.data.seed)[0]
        dropout, quant = jax.random.split(jax.random.key(config.seed))
        variables = experiment.qmodel.calibrate(
            state.variables,
            experiment.task.inputs(sharding.shard_batch(batch, self.mesh)),
            bits=jax.tree.map(np.float32, experiment.precision_at(0)),
            rngs={"dropout": dropout, "quant": quant},
            train=True,
        )
        everywhere = sharding.replicated(self.mesh)
        state = dataclasses.replace(state, quant=jax.device_put(variables["quant"], everywhere))
        trained = {"params": state.params, "quant": state.quant}
        return dataclasses.replace(state, opt_state=jax.jit(experiment.optimizer.init)(trained))


def _create(experiment: Experiment, seed: Any) -> Any:
    shape = experiment.inputs()
    zeros = jnp.zeros(shape.shape, shape.dtype)
    return create(experiment.qmodel, experiment.optimizer, seed, zeros, experiment.additions)


def _observed(step: Callable[..., Any], experiment: Experiment, state: Any, batch: Any, key: Any) -> Any:
    """A train step, and the share of codes it changes; under a transition rate also its K, R and U."""

    def codes(state: Any) -> list[Any]:
        precision = experiment.precision(state.step)
        return [w.apply("encode", state.params, state.quant, w.bits(precision))[0] for w in experiment.weights]

    before = codes(state)
    state, out = step(state, batch, key)
    pairs = zip(before, codes(state), strict=True)
    moved = sum(jnp.sum(old != new) for old, new in pairs) / sum(weight.size for weight in experiment.weights)
    rated = transition_metrics(state.opt_state).get("", {})
    return state, {"loss": out["loss"], "k": moved, **{n: rated[n] for n in ("running", "target", "talr") if rated}}


@functools.cache
def batches_of(seed: int, steps: int) -> list[Any]:
    """The training batches of a seed, which every arm sees."""
    config = config_of(arguments_of(study.FLOAT, seed), "")
    experiment = build(config)
    with data.train_iterator(experiment.dataset, config.data.batch_size, config.data.seed) as iterator:
        return [next(iterator) for _ in range(steps)]


def run(program: Program, arm: Arm, seed: int, folder: Path) -> dict[str, Any]:
    """One run: its row."""
    config = config_of(arguments_of(arm.overrides, seed), str(folder / f"float{seed}"))
    steps = program.experiment.total_steps
    state, seen, accuracy = program(config, batches_of(seed, steps), 100 if arm.curves else 0)
    found = program.evaluator(state)
    row = {
        "group": arm.group,
        "name": arm.name,
        **arm.facts,
        "seed": seed,
        "train_loss": float(np.mean(seen["loss"][-LAST:])),
        **{name: found[name] for name in ("test_loss", "test_accuracy", "test_accuracy_float")},
        "transition_rate": [float(np.mean(part)) for part in np.array_split(seen["k"], 4)],
    }
    if arm.curves:
        rate = program.experiment.learning_rate
        seen.setdefault("talr", [float(x) for x in jax.vmap(rate)(jnp.arange(steps))])
        row["curves"] = {
            **{name: _windows(values) for name, values in seen.items() if name != "loss"},
            "accuracy": [round(value, 5) for _, value in accuracy],
        }
    return {**row, **provenance(arguments_of(arm.overrides, seed))}


def provenance(arguments: list[str]) -> dict[str, Any]:
    """Command, date and machine of a row."""
    quoted = [f"'{argument}'" if " " in argument else argument for argument in arguments]
    return {
        "command": f"qtrain train {' '.join(quoted)} --config.init_from=FLOAT --workdir WORKDIR",
        "date": datetime.date.today().isoformat(),
        "hardware": f"{os.cpu_count()} CPU cores (shared)",
        "jax": jax.__version__,
    }


def _windows(values: list[float]) -> list[float]:
    return [float(f"{value:.4g}") for value in np.asarray(values).reshape(-1, WINDOW).mean(1)]


def planned(groups: list[str], optimizers: list[str], rows: Callable[[], list[dict[str, Any]]]) -> Iterator[Arm]:
    """The arms, in an order in which each finds the rows that it goes by."""
    if "tune" in groups:
        yield from study.tuning(optimizers)
        yield from study.tuning_rates(optimizers, rows())
    if "main" in groups:
        yield from study.comparison(optimizers, rows())
    if "lower" in groups:
        yield from study.lower(optimizers, rows())
    if "rules" in groups and "adam" in optimizers:
        yield from study.rules(rows())
    if "sweep" in groups:
        yield from study.sweep([name for name in optimizers if name in study.LEARNING_RATES], rows())
    if "neighbours" in groups and "adam" in optimizers:
        yield from study.neighbours(rows())


def check(folder: Path) -> None:
    """One run both ways.

    Raises:
      SystemExit: the parameters differ.
    """
    own = (*study._rated("adam", 2, 3e-3, 5e-3), "--config.train.steps=300")
    float_run(folder, 0)
    config = config_of(arguments_of(own, 0), str(folder / "float0"))
    ours = Program(config)(config, batches_of(0, 300), 0)[0]
    from qtrain.checkpoint import restore

    with tempfile.TemporaryDirectory() as temporary:
        train(config, temporary, quiet=True)
        theirs = restore(temporary, jax.eval_shape(lambda: ours)).state
    same = jax.tree.leaves(jax.tree.map(np.array_equal, *jax.device_get((ours.params, theirs.params))))
    if not all(same):
        raise SystemExit("not the same parameters as qtrain train's")
    print(f"{len(same)} parameters, bit for bit those of qtrain train after 300 steps")


def main() -> None:
    """Run what is missing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    groups = ["float", "tune", "main", "lower", "rules", "sweep", "neighbours"]
    parser.add_argument("--only", nargs="*", default=groups, choices=groups)
    parser.add_argument("--optimizers", nargs="*", default=list(study.PAIRS), choices=list(study.PAIRS))
    parser.add_argument("--folder", type=Path, default=ROOT / "runs" / "transition_rate", help="of the float runs")
    parser.add_argument("--out", type=Path, default=HERE / "results.jsonl")
    parser.add_argument("--check", action="store_true", help="compare one run with qtrain train's, and stop")
    arguments = parser.parse_args()
    if arguments.check:
        return check(arguments.folder)

    def rows() -> list[dict[str, Any]]:
        return [json.loads(line) for line in arguments.out.read_text().splitlines()] if arguments.out.exists() else []

    def write(row: dict[str, Any]) -> None:
        with arguments.out.open("a") as file:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
        print(row["group"], row["name"], row["seed"], f"{row['train_loss']:.4f} {row['test_accuracy']:.4f}", flush=True)

    done = {(row["group"], row["name"], row["seed"]): row["command"] for row in rows()}
    for seed in (*study.TUNING_SEEDS, *study.SEEDS):
        summary = float_run(arguments.folder, seed)
        if "float" in arguments.only and ("float", "float", seed) not in done:
            kept = {name: summary[name] for name in ("train_loss", "test_loss", "test_accuracy")}
            own = provenance(arguments_of(study.FLOAT, seed))
            own["command"] = own["command"].replace(" --config.init_from=FLOAT", "")
            write({"group": "float", "name": "float", "seed": seed, **kept, **own})
    for arm in planned(arguments.only, arguments.optimizers, rows):
        program = None
        for seed in arm.seeds:
            known = done.get((arm.group, arm.name, seed))
            if known is not None:
                if known != provenance(arguments_of(arm.overrides, seed))["command"]:
                    raise SystemExit(f"{arguments.out}: {arm.name!r}, seed {seed}, had other settings; remove its line")
                continue
            if program is None:
                program = Program(config_of(arguments_of(arm.overrides, seed), str(arguments.folder / f"float{seed}")))
            write(run(program, arm, seed, arguments.folder))


if __name__ == "__main__":
    main()
