"""Two processes that train one run, through the command line: as one process with two devices, stopped and resumed."""

import itertools
import json
import socket

import jax
import numpy as np
import pytest
from program import final_state, finished, rows, start, summary

from qtrain import overrides, processes
from qtrain.errors import UsageError

# Learned quantizers, dropout, stochastic rounding and crops: what depends on a row's place in the batch, and what is
# made before the first step. Half of the state is with each device.
CONFIG = """
from program import small_config

def get_config():
    return small_config(
        quant__weights="lsq/signed",
        quant__acts="lsq/unsigned",
        model__dropout=0.1,
        data__augment=("crop",),
        data__crop_padding=1,
        data__batch_size=BATCH,
        train__steps=24,
        train__log_every_steps=1,
        eval__every_steps=8,
        checkpoint__every_steps=6,
        mesh__fsdp=2,
        mesh__fsdp_min_size=16,
    )
"""
# The program; given a number, SIGTERM comes when the batch of that number is taken.
PROGRAM = """
import os, signal, sys
from qtrain import main
from qtrain.train import Run

number, *arguments = sys.argv[1:]
real, taken = Run._next, [0]
def take(*args):
    taken[0] += 1
    if taken[0] == int(number):
        os.kill(os.getpid(), signal.SIGTERM)
    return real(*args)
Run._next = take
sys.exit(main.main(arguments))
"""


class Run:
    def __init__(self, folder):
        self.folder, self.workdir = folder, folder / "run"
        self.config(32)

    def config(self, batch, name="config.py"):
        path = self.folder / name
        path.write_text(CONFIG.replace("BATCH", str(batch)))
        return path

    def start(self, workdir, flags=(), signal=0, devices=1, config="config.py"):
        arguments = ["train", "--config", self.folder / config, "--workdir", workdir, "--quiet", *flags]
        flags_of_xla = f"--xla_force_host_platform_device_count={devices} --xla_backend_optimization_level=0"
        environment = {"XLA_FLAGS": flags_of_xla}  # what takes long is compiling
        return start([signal, *arguments], code=PROGRAM, environment=environment, cwd=self.folder)

    def two(self, workdir, signals=(0, 0), configs=("config.py", "config.py")):
        """Exit code, stdout and stderr of each."""
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            address = f"127.0.0.1:{free.getsockname()[1]}"
        together = ["--coordinator", address, "--processes", "2", "--process"]
        started = [self.start(workdir, [*together, i], signals[i], config=configs[i]) for i in range(2)]
        return [finished(process, timeout=600) for process in started]


def close(value):
    return pytest.approx(value, rel=1e-5) if isinstance(value, int | float) else value


@pytest.mark.slow
def test_two_processes_train_as_one_with_two_devices(tmp_path):
    run = Run(tmp_path)
    code, _, error = finished(run.start(tmp_path / "alone", devices=2), timeout=600)
    assert code == 0, error

    # SIGTERM to the second alone: both stop at the step at which both know of it.
    for code, _, error in run.two(run.workdir, signals=(0, 6)):
        assert code == 75, error
        assert "stopped by SIGTERM at step 7 of 24" in error
    assert {path.name for path in (run.workdir / "checkpoints").iterdir()} == {"6", "7"}
    (first, out, error), (second, silent, other) = run.two(run.workdir)
    assert (first, second) == (0, 0), error + other
    assert "test_accuracy" in out and "test_accuracy" not in silent

    assert json.loads((run.workdir / "config.json").read_text())["processes"] == 2
    assert summary(run.workdir)["steps"] == 24 and summary(run.workdir)["compilations"] == 1
    written, expected = rows(run.workdir), rows(tmp_path / "alone")
    assert [row["step"] for row in written] == [row["step"] for row in expected]
    for row, wanted in zip(written, expected, strict=True):
        assert row == {name: close(value) for name, value in wanted.items()}
    config = overrides.load(str(run.folder / "config.py"))
    states = [final_state(config, folder) for folder in (run.workdir, tmp_path / "alone")]
    for (path, x), y in zip(jax.tree_util.tree_leaves_with_path(states[0]), jax.tree.leaves(states[1]), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-6, err_msg=jax.tree_util.keystr(path))


@pytest.mark.slow
def test_a_mistake_that_one_process_finds_ends_both(tmp_path):
    run = Run(tmp_path)
    run.config(64, "other.py")
    for code, _, error in run.two(run.workdir, configs=("config.py", "other.py")):
        assert code == 2, error
        assert "qtrain: process 1 was given another config than process 0; start all with the same arg" in error
    run.workdir.mkdir()
    (run.workdir / "letter.txt").touch()  # only the first process looks
    for code, _, error in run.two(run.workdir):
        assert code == 2, error
        assert "is not a qtrain run: it holds 'letter.txt'" in error


MISTAKES = [
    (("h:1", None, None), "--processes is missing; give --coordinator, --processes, --process together"),
    ((None, 2, 0), "--coordinator is missing; "),
    (("localhost", 2, 0), r"--coordinator 'localhost': give HOST:PORT"),
    (("h:1", 0, 0), "--processes 0: give a number of processes, at least 1"),
    (("h:1", 2, 2), "--process 2: give this process's index"),
    (("h:1", 2, -1), "--process -1: give this process's index"),
]


@pytest.mark.parametrize(("arguments", "message"), MISTAKES)
def test_flags_that_are_refused(arguments, message, monkeypatch):
    monkeypatch.setattr(jax.distributed, "initialize", lambda *_: pytest.fail("it was started"))
    with pytest.raises(UsageError, match=message):
        processes.initialize(*arguments)


def test_a_port_that_is_in_use_is_one_line(monkeypatch):
    monkeypatch.setattr(jax.distributed, "initialize", lambda *_: pytest.fail("it was started"))
    with socket.socket() as other:
        other.bind(("", 0))
        other.listen()
        port = other.getsockname()[1]
        with pytest.raises(
            UsageError, match=f"--coordinator localhost:{port}: port {port} cannot be had .*; give another"
        ):
            processes.initialize(f"localhost:{port}", 2, 0)


def test_a_cluster_that_jax_does_not_know_is_one_line(monkeypatch):
    def undetected(*_):
        raise ValueError("coordinator_address should be defined.")

    monkeypatch.setattr(jax.distributed, "initialize", undetected)
    monkeypatch.setattr(jax.config, "update", lambda *_: None)
    with pytest.raises(UsageError, match=r"--distributed: JAX detects no cluster here \(coord.* defined\); give --coo"):
        processes.initialize(detect=True)


def test_one_process_needs_no_others():
    calls = itertools.count()
    processes.initialize()
    processes.check_same({"a": 1})
    assert processes.first()
    assert processes.together(lambda: next(calls)) == 0 and processes.on_first(lambda: (next(calls),)) == (1,)
