"""What a schedule and each controller add to a train step, as a ratio to the step at constant bits.

The arms are the program of `qtrain train`, of one model and batch, compiled once each and timed in turn in one process:
the ratio of a round is that of neighbouring measurements, which a busy machine disturbs alike, and the order within a
round is drawn anew. Prints, per model, the median ratio of wall time and of processor time (which preemption by other
work does not count to), each with its quartiles and a bootstrap interval of the median.

    python benchmarks/controllers.py --rounds 60 --out benchmarks/controllers.jsonl
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

STEPS = 2000
# Epochs of 20 steps: every round has decisions in it, more often than in training.
ARMS: dict[str, dict[str, Any]] = {
    "constant": {"name": "constant", "bits": 8},
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


def measure(task: str, rounds: int, steps: int) -> list[dict[str, Any]]:
    """The rows of one model."""
    arms = {name: Arm(TASKS[task], schedule) for name, schedule in ARMS.items()}
    experiment = arms["constant"].experiment
    with data.train_iterator(experiment.dataset, experiment.config.data.batch_size, 0) as stream:
        batches = [jax.device_put(next(stream)) for _ in range(steps)]
    rng = np.random.default_rng(0)
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in arms}
    for _ in range(rounds + 2):
        for name in rng.permutation(list(arms)):
            times[name].append(arms[name].seconds(batches))
    rows = []
    for name, arm in arms.items():
        ratios = np.array(times[name][2:]) / np.array(times["constant"][2:])  # [rounds, wall and processor time]
        drawn = np.median(ratios[rng.integers(0, rounds, (2000, rounds))], axis=1)
        found = {}
        for side, what in enumerate(("wall", "processor")):
            found[f"{what}_ratio_to_constant"] = _rounded(np.median(ratios[:, side]))
            found[f"{what}_interval_95"] = _rounded(np.percentile(drawn[:, side], (2.5, 97.5)))
            found[f"{what}_quartiles"] = _rounded(np.percentile(ratios[:, side], (25, 75)))
        rows.append(
            {
                "model": task,
                "arm": name,
                **found,
                "step_ms": _rounded(1e3 * np.median(times[name][2:], axis=0)[0]),
                "programs": arm.programs.compilations(),
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
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--steps", type=int, default=40, help="a round, of each arm")
    parser.add_argument("--models", nargs="*", choices=TASKS, default=["mlp", "cnn"])
    parser.add_argument("--out")
    arguments = parser.parse_args()
    rows = []
    for model in arguments.models:
        found = measure(model, arguments.rounds, arguments.steps)
        for row in found:
            print(json.dumps(row), flush=True)
        rows += found
    if arguments.out:
        with open(arguments.out, "w") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)


if __name__ == "__main__":
    main()
