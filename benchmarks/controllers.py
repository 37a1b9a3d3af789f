"""What a schedule and each controller add to a train step, as a ratio to the step at constant bits.

The arms are the program of `qtrain train`, of one model and batch, timed in turn in one process: the ratio of a round
is that of neighbouring measurements, which a busy machine disturbs alike, and the order within a round is drawn anew.
Where a program's buffers happen to lie moves its time by a percent or two, so every arm is built and compiled several
times. Prints, per model, the mean over these instances of the median ratio of wall time and of processor time (which
preemption by other work does not count to), each with a bootstrap interval over the instances. "constant again" is the
same program as the one that it is compared with: what the measurement itself is worth.

    python benchmarks/controllers.py --instances 8 --rounds 60 --out benchmarks/controllers.jsonl
"""

from __future__ import annotations

import argparse
import datetime
import json
import time
from typing import Any

import jax
import numpy as np

from qtrain import data
from qtrain.build import build
from qtrain.config import base_config, finish
from qtrain.programs import Programs
from qtrain.sharding import make_mesh
from qtrain.statistics import bootstrap_interval

STEPS = 2000
# Epochs of 20 steps: every round has decisions in it, more often than in training.
ARMS: dict[str, dict[str, Any]] = {
    "constant": {"name": "constant", "bits": 8},
    "constant again": {"name": "constant", "bits": 8},
    "CR": {"name": "CR", "low": 3, "high": 8, "cycles": 8},
    "fractrain": {"name": "fractrain", "values": (3, 4, 6, 8), "interval_steps": 20.0},
    "muppet": {"name": "muppet", "values": (3, 4, 6, 8), "interval_steps": 20.0},
    "budget_keeper": {"name": "budget_keeper", "low": 3, "high": 8, "budget_share": 0.8, "interval_steps": 20.0},
}
TASKS = {"mlp": "digits_mlp", "cnn": "digits_cnn", "resnet": "digits_resnet"}


class Arm:
    """A compiled step and the state it has reached."""

    def __init__(self, task: str, schedule: dict[str, Any]):
        config = base_config(task)
        config.schedule.update(**schedule)
        config.schedule.grads.update(name="constant", bits=8)
        config.train.steps = STEPS
        self.experiment = build(finish(config))
        self.programs = Programs(self.experiment, make_mesh(config.mesh))
        self.tables = self.programs.placed(self.experiment.tables())
        self.state = self.programs.packed(self.programs.initial_state(0, self.tables))
        self.key = self.programs.key(0)

    def seconds(self, batches: list[Any]) -> tuple[float, float]:
        """Of a step, over one of each batch: wall time, processor time."""
        start, busy = time.perf_counter(), time.process_time()
        for batch in batches:
            self.state, out = self.programs.step(self.state, batch, self.key, self.tables)
        jax.block_until_ready((self.state, out))
        return (time.perf_counter() - start) / len(batches), (time.process_time() - busy) / len(batches)


def measure(task: str, instances: int, rounds: int, steps: int) -> list[dict[str, Any]]:
    """The rows of one model."""
    rng = np.random.default_rng(0)
    ratios: dict[str, list[np.ndarray]] = {name: [] for name in ARMS}  # of each instance: wall and processor time
    step_ms: dict[str, list[float]] = {name: [] for name in ARMS}
    for _ in range(instances):
        arms = {name: Arm(TASKS[task], ARMS[name]) for name in rng.permutation(list(ARMS))}
        experiment = arms["constant"].experiment
        with data.train_iterator(experiment.dataset, experiment.config.data.batch_size, 0) as stream:
            batches = [jax.device_put(next(stream)) for _ in range(steps)]
        times: dict[str, list[tuple[float, float]]] = {name: [] for name in arms}
        for _ in range(rounds + 2):
            for name in rng.permutation(list(arms)):
                times[name].append(arms[name].seconds(batches))
        for name in arms:
            ratios[name].append(np.median(np.array(times[name][2:]) / np.array(times["constant"][2:]), axis=0))
            step_ms[name].append(1e3 * np.median(times[name][2:], axis=0)[0])
    programs = {name: arm.programs.compilations() for name, arm in arms.items()}
    rows = []
    for name, of_instances in ratios.items():
        values = np.array(of_instances)  # [instances, wall and processor time]
        found = {}
        for side, what in enumerate(("wall", "processor")):
            interval = bootstrap_interval(values[:, side])
            found[f"{what}_ratio_to_constant"] = _rounded(interval.estimate)
            found[f"{what}_interval_95"] = _rounded([interval.low, interval.high])
            found[f"{what}_of_instances"] = _rounded(values[:, side])
        rows.append(
            {
                "model": task,
                "arm": name,
                **found,
                "step_ms": _rounded(np.mean(step_ms[name])),
                "programs": programs[name],
                "instances": instances,
                "rounds": rounds,
                "steps_per_round": steps,
                "date": datetime.date.today().isoformat(),
                "jax": jax.__version__,
                "backend": jax.default_backend(),
            }
        )
    return rows


def _rounded(values: Any) -> Any:
    return np.round(values, 4).tolist()


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--instances", type=int, default=8, help="of every arm, each compiled anew")
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--steps", type=int, default=40, help="a round, of each arm")
    parser.add_argument("--models", nargs="*", choices=TASKS, default=["mlp", "cnn"])
    parser.add_argument("--out")
    arguments = parser.parse_args()
    rows = []
    for model in arguments.models:
        found = measure(model, arguments.instances, arguments.rounds, arguments.steps)
        for row in found:
            print(json.dumps(row), flush=True)
        rows += found
    if arguments.out:
        with open(arguments.out, "w") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)


if __name__ == "__main__":
    main()
