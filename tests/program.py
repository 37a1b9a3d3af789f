"""What the tests of the whole program share: small configs, the command line, a folder's content."""

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np

from qtrain import data
from qtrain.build import build
from qtrain.checkpoint import restore
from qtrain.config import base_config, finish
from qtrain.packing import unpack
from qtrain.state import averages, make_train_step

ROOT = Path(__file__).parent.parent
CONFIGS = ROOT / "configs"
MLP = str(CONFIGS / "digits_mlp_cpt.py")
SCHEDULES = {
    "constant": {"name": "constant", "bits": 6},
    "cyclic": {"name": "cyclic", "profile": "cosine", "low": 3, "high": 8, "cycles": 2, "pattern": "repeated"},
    "window": {"name": "window", "low": 3, "high": 8, "start_percent": 20.0, "length_percent": 40.0},
    "delayed": {"name": "delayed", "bits": 4, "start_percent": 50.0},
}


def small_config(task="digits_mlp", schedule="cyclic", grads=8, **overrides):
    """A run of seconds: narrow layers, few steps, constant gradient bits; `overrides` by key, `__` for the dot."""
    config = base_config(task)
    config.model.features = (4, 8) if task == "digits_cnn" else (16, 16)
    config.data.batch_size = 32
    config.train.update(steps=12, log_every_steps=3)
    config.eval.every_percent = 0.0
    config.checkpoint.every_percent = 0.0
    config.schedule.update(**SCHEDULES[schedule])
    config.schedule.grads.update(name="constant", bits=grads)
    for key, value in overrides.items():
        *sections, name = key.split("__")
        section = config
        for part in sections:
            section = section[part]
        section[name] = value
    return finish(config)


def snapshot(folder):
    """Every file and folder below `folder`, with a hash of its content."""
    found = {}
    for path in sorted(Path(folder).rglob("*")):
        found[str(path.relative_to(folder))] = hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else ""
    return found


def start(arguments, *, code=None, environment=None, cwd=ROOT):
    """``qtrain arguments`` as a process of its own; with `code`, that Python program is run with them instead."""
    command = [sys.executable, *(["-c", code] if code else ["-m", "qtrain.main"]), *map(str, arguments)]
    path = os.pathsep.join(filter(None, [os.path.dirname(__file__), os.environ.get("PYTHONPATH")]))
    variables = {**os.environ, "PYTHONPATH": path, "JAX_PLATFORMS": "cpu", **(environment or {})}
    pipe = subprocess.PIPE
    return subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, cwd=cwd, env=variables)


def finished(process, timeout=120):
    """Exit code, stdout and stderr of a process, once it has ended."""
    out, error = process.communicate(timeout=timeout)
    return process.returncode, out, error


def summary(folder):
    """``summary.json`` without the timing."""
    found = json.loads(Path(folder, "summary.json").read_text())
    del found["wall_seconds"]
    return found


def rows(folder, kind=None):
    """The rows of ``metrics.jsonl`` without the timing."""
    found = [json.loads(line) for line in Path(folder, "metrics.jsonl").read_text().splitlines()]
    for row in found:
        row.pop("steps_per_second", None)
    return [row for row in found if kind in (None, row["kind"])]


def initial_state(experiment, seed=0):
    """The train state at step 0."""
    # Compiled whole, as the program does: its operations one by one would be dozens of programs.
    return jax.jit(lambda: experiment.initial_state(seed))()


def final_state(config, folder):
    """The train state in the last checkpoint of a run."""
    experiment = build(config)
    return restore(folder, jax.eval_shape(lambda: initial_state(experiment))).state


def assert_equal(left, right):
    """The same numbers in both trees."""
    jax.tree.map(np.testing.assert_array_equal, left, right)


class Steps:
    """The compiled train step of a config and the state it has reached; batches are those of the run.

    `quick`: compiled in a hurry, for tests that take a step or two and compare no numbers.
    """

    def __init__(self, config, log_every=1, quick=False):
        self.experiment = experiment = build(config)
        self.config, self.key = config, jax.random.key(config.seed)
        self.step = jax.jit(
            make_train_step(
                experiment.qmodel,
                experiment.optimizer,
                experiment.precision,
                experiment.plan.ops,
                log_every,
                experiment.additions,
                experiment.task,
                layer_norms=config.train.layer_norms,
            ),
            compiler_options={"xla_backend_optimization_level": 0} if quick else None,
        )
        self.state = initial_state(experiment, config.seed)

    def __call__(self, batch):
        self.state, out = self.step(self.state, batch, self.key)
        Averages = averages(self.experiment.task, self.state.params, self.config.train.layer_norms)
        metrics = unpack(out["metrics"], jax.eval_shape(Averages.empty))
        return {name: float(value) for name, value in metrics.compute().items()}

    def batches(self):
        return data.train_iterator(self.experiment.dataset, self.config.data.batch_size, self.config.data.seed)
