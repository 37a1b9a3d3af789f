"""How coarsely may weights be stored? Nested quantization layers, loss terms and learned widths, against their size.

    python experiments/learned_scales/run.py                  # everything that is missing; MNIST from $TFDS_DATA_DIR
    python experiments/learned_scales/run.py --only range     # some groups

A row is appended to ``results.jsonl`` for each run, with the command that does the same; what is there is not run
again. The steps are those of ``qtrain train``, in a loop that keeps the compiled program of arms that differ in seed or
λ alone. Sizes are of what ``qtrain export`` writes; where a row has ``file_bytes``, the file was written, measured and
found to give the logits of the model bit for bit.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import functools
import itertools
import json
import os
import tempfile
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import arms as study
import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from arms import Arm

from qtrain import data, export, overrides, sharding
from qtrain.build import build
from qtrain.evaluate import Evaluator
from qtrain.size import size_summary
from qtrain.state import create, make_train_step, several_steps

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
STEPS_PER_DISPATCH = 39  # of the perceptron; a convolution inside a scan is slow on a CPU


def arguments_of(arm: Arm, seed: int) -> list[str]:
    """The command line of a run, but for its folders. Of a key that is given twice the last value holds."""
    given = [*arm.overrides, f"--config.seed={seed}", f"--config.data.seed={seed}"]
    return ["--config", arm.config, *{argument.split("=")[0]: argument for argument in given}.values()]


def config_of(arm: Arm, seed: int) -> Any:
    """As the command line makes it, but for when it evaluates and saves."""
    path = [str(ROOT / each) if each == arm.config else each for each in arguments_of(arm, seed)]
    return overrides.parse("train", flags.FlagValues(), [*path, "--config.eval.batch_size=1000"])


class Program:
    """Arms that differ in seed and λ alone, compiled once."""

    def __init__(self, config: Any):
        self.experiment = experiment = build(config)
        self.mesh = sharding.make_mesh()
        self.evaluator = Evaluator(experiment, self.mesh)
        self.per_dispatch = STEPS_PER_DISPATCH if config.model.name == "mlp" else 1
        step = make_train_step(
            experiment.qmodel,
            experiment.optimizer,
            experiment.precision,
            experiment.plan.ops,
            experiment.total_steps,
            experiment.additions,
        )
        self.step = jax.jit(step if self.per_dispatch == 1 else several_steps(step), donate_argnums=0)
        self.bits = jax.tree.map(np.float32, experiment.precision_at(0))
        self.initial = jax.jit(self._initial)

    def __call__(self, config: Any, batches: Iterable[Any], threshold: float | None) -> tuple[Any, float]:
        """The final state, and the training loss of the last tenth."""
        key = jax.random.key(config.seed)
        batches = iter(batches)
        stack = next(batches)
        first = {name: value[0] if self.per_dispatch > 1 else value for name, value in stack.items()}
        state = self.initial(np.int32(config.seed), first, key)
        if threshold is not None:
            state = dataclasses.replace(
                state,
                quant=jax.tree_util.tree_map_with_path(
                    lambda path, leaf: jnp.full_like(leaf, threshold) if path[-1].key == "threshold" else leaf,
                    state.quant,
                ),
            )
        seen = []
        for batch in itertools.chain((stack,), batches):
            state, out = self.step(state, sharding.shard_batch(batch, self.mesh, axis=int(self.per_dispatch > 1)), key)
            seen.append(out["loss"])
        found = np.concatenate([np.atleast_1d(np.asarray(each)) for each in seen])
        return state, float(found[-len(found) // 10 :].mean())

    def _initial(self, seed: Any, batch: Any, key: Any) -> Any:
        """As a run of ``qtrain train`` begins: quantizers made for the parameters and the first batch."""
        experiment = self.experiment
        shape = experiment.inputs()
        zeros = jnp.zeros(shape.shape, shape.dtype)
        state = create(experiment.qmodel, experiment.optimizer, seed, zeros, experiment.additions)
        if experiment.learns:
            dropout, quant = jax.random.split(key)
            variables = experiment.qmodel.calibrate(
                state.variables,
                experiment.task.inputs(batch),
                bits=self.bits,
                rngs={"dropout": dropout, "quant": quant},
                train=True,
            )
            state = dataclasses.replace(state, quant=variables["quant"])
        trained = {"params": state.params, "quant": state.quant}
        return dataclasses.replace(state, opt_state=experiment.optimizer.init(trained))


def stream(path: str, seed: int, steps: int, together: int) -> Iterator[Any]:
    """The training batches of a seed, some stacked for each dispatch."""
    arm = next(arm for arm in study.reference() if arm.config == path)
    config = config_of(arm, seed)
    experiment = build(config)
    with data.train_iterator(experiment.dataset, config.data.batch_size, config.data.seed) as iterator:
        for _ in range(steps // together):
            rows = [next(iterator) for _ in range(together)]
            yield {name: np.stack([row[name] for row in rows]) for name in rows[0]} if together > 1 else rows[0]


@functools.lru_cache(maxsize=3)
def kept(*arguments: Any) -> list[Any]:
    """The batches of a short run, which every arm sees."""
    return list(stream(*arguments))


def run(program: Program, arm: Arm, seed: int) -> dict[str, Any]:
    """One run: its row."""
    config = config_of(arm, seed)
    experiment = program.experiment
    start = time.perf_counter()
    batches = (kept if experiment.total_steps <= 1500 else stream)(
        arm.config, seed, experiment.total_steps, program.per_dispatch
    )
    state, loss = program(config, batches, arm.threshold)
    precision = experiment.precision_at(experiment.total_steps - 1)
    found = program.evaluator(state)
    size = size_summary(experiment.weights, state.params, state.quant, precision)
    row = {
        "group": arm.group,
        "name": arm.name,
        **arm.facts,
        "seed": seed,
        "train_loss": loss,
        "test_accuracy": found["test_accuracy"],
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(state.params)),
        **size,
    }
    widths = experiment.widths
    if size and widths is not None and arm.facts["method"] == "learned_width":
        row["average_bits"] = float(widths.average_bits(state.params, state.quant, precision))
    if arm.export:
        row |= exported(config, state, precision)
    row["seconds"] = round(time.perf_counter() - start, 1)
    return {**row, **provenance(arguments_of(arm, seed))}


def exported(config: Any, state: Any, precision: Any) -> dict[str, Any]:
    """Bytes on disk of what ``qtrain export`` writes, and whether its logits are the model's bit for bit."""
    experiment = build(config)
    shape = experiment.inputs()
    with tempfile.TemporaryDirectory() as folder:
        report = export.save(
            Path(folder) / "model.safetensors",
            experiment.qmodel,
            state.variables,
            precision,
            jax.ShapeDtypeStruct((32, *shape.shape[1:]), shape.dtype),
            config=config.to_dict(),
            num_classes=experiment.dataset.num_classes,
        )
    return {
        "file_bytes": report.bytes,
        "file_compression": report.float_bytes / report.bytes,
        "identical_logits": report.difference == 0,
        "widths": {each.name: each.width for each in report.rows},
    }


def provenance(arguments: list[str]) -> dict[str, Any]:
    """Command, date and machine of a row."""
    quoted = [f'"{argument}"' if " " in argument or "(" in argument else argument for argument in arguments]
    folder = " --config.data.dir=$TFDS_DATA_DIR" if study.DENSE in arguments else ""
    return {
        "command": f"qtrain train {' '.join(quoted)}{folder} --workdir WORKDIR",
        "date": datetime.date.today().isoformat(),
        "hardware": f"{os.cpu_count()} CPU cores (shared)",
        "jax": jax.__version__,
    }


def planned(groups: list[str]) -> Iterator[Arm]:
    """The arms of some groups."""
    for name in groups:
        yield from study.GROUPS[name]()


def main() -> None:
    """Run what is missing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", default=list(study.GROUPS), choices=list(study.GROUPS))
    parser.add_argument("--out", type=Path, default=HERE / "results.jsonl")
    parser.add_argument("--cache", help="folder for compiled programs, which several processes may share")
    arguments = parser.parse_args()
    if arguments.cache:
        jax.config.update("jax_compilation_cache_dir", arguments.cache)
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    rows = [json.loads(line) for line in arguments.out.read_text().splitlines()] if arguments.out.exists() else []
    done = {(row["group"], row["name"], row["seed"]): row["command"] for row in rows}
    programs: dict[Any, Program] = {}
    for arm in planned(arguments.only):
        for seed in arm.seeds:
            known = done.get((arm.group, arm.name, seed))
            if known is not None:
                if known != provenance(arguments_of(arm, seed))["command"]:
                    raise SystemExit(f"{arguments.out}: {arm.name!r}, seed {seed}, had other settings; remove its line")
                continue
            same = arm.config, tuple(text.replace(f"'threshold': {arm.threshold!r}", "λ") for text in arm.overrides)
            if same not in programs:
                programs.clear()  # one at a time
                programs[same] = Program(config_of(arm, seed))
            row = run(programs[same], arm, seed)
            with arguments.out.open("a") as file:
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
            size = f"{row.get('compression_model', 1):.2f}× {row.get('file_compression', 0):.2f}× file"
            print(arm.group, arm.name, seed, f"{100 * row['test_accuracy']:.2f} {size} {row['seconds']} s", flush=True)


if __name__ == "__main__":
    main()
