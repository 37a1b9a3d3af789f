"""A run that was stopped, however and whenever, ends bit for bit as one that was not. Real processes, real signals."""

import json
import os
import signal
import time

import jax
import numpy as np
import pytest
from program import final_state, finished, rows, snapshot, start, summary

from qtrain import overrides

STEPS = 24

# Everything that has a state: running ranges, momenta, accumulated gradients, averages across a checkpoint, dropout,
# stochastic rounding, random crops. Checkpoints at 6, 12, 18 and 24, rows at 4, 8, …, evaluation at 8, 16, 24.
CONFIG = f"""
from program import small_config

def get_config():
    return small_config(
        quant__recipe="cpt",
        model__dropout=0.1,
        data__augment=("crop",),
        data__crop_padding=1,
        optimizer__accumulate_steps=2,
        optimizer__clip_norm=1.0,
        train__steps={STEPS},
        train__log_every_steps=4,
        train__compilation_cache="CACHE",
        eval__every_steps=8,
        checkpoint__every_steps=6,
    )
"""

# The program with one thing changed: at the moment named by the first argument it gets a signal.
PROGRAM = """
import os, signal, sys, time
import qtrain.train
from qtrain import main, manifest, workdir
from qtrain.checkpoint import Checkpoints
from qtrain.train import Run

def send(name):
    os.kill(os.getpid(), getattr(signal, name))
    if name == "SIGKILL":
        time.sleep(60)

def patch(owner, name, when, signals, after=False):
    real, calls = getattr(owner, name), [0]
    def patched(*args, **kwargs):
        calls[0] += 1
        hit = calls[0] == when if isinstance(when, int) else when(*args)
        if hit and not after:
            for one in signals:
                send(one)
        result = real(*args, **kwargs)
        if hit and after:
            for one in signals:
                send(one)
        return result
    setattr(owner, name, patched)

moment, *arguments = sys.argv[1:]
what, _, rest = moment.partition(" ")
if what == "batch":  # batch N SIGNAL...: when the Nth batch of this process is taken
    number, *signals = rest.split()
    patch(Run, "_next", int(number), signals)
elif what == "initial":
    patch(Run, "_initial_state", 1, [rest])
elif what == "unsealed":  # a checkpoint's arrays are written, its manifest is not
    patch(manifest, "seal", int(rest), ["SIGKILL"])
elif what == "published":
    patch(Checkpoints, "_finish", int(rest), ["SIGKILL"], after=True)
elif what == "saving":  # SIGTERM, and again while its checkpoint is saved
    patch(Run, "_next", int(rest), ["SIGTERM"])
    patch(Checkpoints, "save", lambda self, step, *_: step == int(rest), ["SIGTERM", "SIGTERM"])
elif what == "evaluating":
    patch(Run, "_evaluate", int(rest.split()[0]), rest.split()[1:])
elif what == "unfinished":
    patch(workdir, "finish", 1, ["SIGKILL"])
elif what == "summarized":
    patch(workdir, "write_json", lambda path, _: path.name == "summary.json", ["SIGKILL"], after=True)
elif what == "slow":
    real = Run._next
    def slowly(*args):
        time.sleep(0.1)
        return real(*args)
    Run._next = slowly
else:
    assert what == "never", what
sys.exit(main.main(arguments))
"""


class Program:
    def __init__(self, folder):
        self.folder = folder
        self.config = folder / "config.py"
        self.config.write_text(CONFIG.replace("CACHE", str(folder / "cache")))

    def start(self, workdir, moment):
        arguments = [moment, "train", "--config", self.config, "--workdir", workdir, "--quiet"]
        return start(arguments, code=PROGRAM, cwd=self.folder)

    def __call__(self, workdir, moment="never"):
        return finished(self.start(workdir, moment))

    def result(self, workdir):
        """All that a run leaves and that must not depend on its interruptions."""
        leaves = jax.tree_util.tree_leaves_with_path(final_state(overrides.load(str(self.config)), workdir))
        state = {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in leaves}
        return state, rows(workdir), summary(workdir)


def assert_same(left, right):
    (state, left_rows, left_summary), (other, right_rows, right_summary) = left, right
    assert state.keys() == other.keys()
    differing = [name for name in state if state[name].tobytes() != other[name].tobytes()]
    assert not differing
    assert left_rows == right_rows
    assert left_summary == right_summary


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    return Program(tmp_path_factory.mktemp("resume"))


@pytest.fixture(scope="module")
def uninterrupted(program):
    """What the run leaves when nothing happens to it."""
    workdir = program.folder / "uninterrupted"
    code, out, error = program(workdir)
    assert code == 0, error
    assert "test_accuracy" in out
    state, written, found = program.result(workdir)
    assert found["steps"] == STEPS and found["compilations"] == 1
    assert [row["step"] for row in written] == [4, 8, 8, 12, 16, 16, 20, 24, 24]
    assert any("quant_stats" in name for name in state) and any("acc_grads" in name for name in state)
    assert os.listdir(program.folder / "cache"), "the compilation cache is used"
    return state, written, found


def steps_on_disk(workdir):
    folder = workdir / "checkpoints"
    return sorted(int(path.name) for path in folder.iterdir() if path.name.isdigit()) if folder.exists() else []


KILLED, STOPPED = -signal.SIGKILL, 75


slow = pytest.mark.slow


@pytest.mark.parametrize(
    ("moment", "code", "checkpoints"),
    [
        ("batch 3 SIGKILL", KILLED, []),  # before the first checkpoint
        pytest.param("initial SIGKILL", KILLED, [], marks=slow),
        pytest.param("unsealed 1", KILLED, [], marks=slow),  # the only one half-written
        ("unsealed 2", KILLED, [6]),
        pytest.param("published 2", KILLED, [6, 12], marks=slow),  # right after one
        pytest.param("evaluating 2 SIGKILL", KILLED, [6, 12], marks=slow),
        ("unfinished", KILLED, [18, 24]),  # between the last checkpoint and the summary
        pytest.param("summarized", KILLED, [18, 24], marks=slow),  # between the summary and DONE
        ("initial SIGTERM", STOPPED, [0]),
        pytest.param("batch 9 SIGTERM", STOPPED, [6, 9], marks=slow),
        ("saving 9", STOPPED, [6, 9]),  # SIGTERM, and twice more while that is saved
        pytest.param("batch 12 SIGTERM", STOPPED, [6, 12], marks=slow),  # a checkpoint is due there too
        ("batch 9 SIGINT", 130, [6]),
    ],
)
def test_resumed_equals_uninterrupted(moment, code, checkpoints, program, uninterrupted, tmp_path):
    workdir = tmp_path / "run"
    found, out, error = program(workdir, moment)
    assert found == code, error
    # A kill during the evaluation at 16 may come before checkpoint 12, written in the background, is whole.
    assert steps_on_disk(workdir) == checkpoints or (moment.startswith("evaluating") and steps_on_disk(workdir) == [6])
    assert not (workdir / "DONE").exists() and "test_accuracy" not in out
    if code == KILLED:
        assert error == ""
    elif code == STOPPED:
        assert error == f"qtrain: stopped by SIGTERM at step {checkpoints[-1]} of {STEPS}; start again to resume\n"
    else:
        assert error == "qtrain: train interrupted\n"
    code, out, error = program(workdir)
    assert code == 0, error
    if not moment.startswith("evaluating"):
        half_written = moment.startswith("unsealed")
        assert ("half-written" in error) == half_written and error.count("\n") == half_written, error
    assert_same(program.result(workdir), uninterrupted)


@slow
def test_many_interruptions_of_one_run(program, uninterrupted, tmp_path):
    workdir = tmp_path / "run"
    for moment, code in (
        ("batch 8 SIGTERM", STOPPED),  # at step 8
        ("batch 1 SIGKILL", KILLED),  # no further
        ("batch 1 SIGTERM", STOPPED),  # one step
        ("published 1", KILLED),
    ):
        assert program(workdir, moment)[0] == code
    assert program(workdir)[0] == 0
    assert_same(program.result(workdir), uninterrupted)


def test_signals_near_the_end_do_not_keep_a_run_from_ending(program, uninterrupted, tmp_path):
    workdir = tmp_path / "run"
    code, _, error = program(workdir, "evaluating 3 SIGTERM")
    assert code == 0, error
    assert (workdir / "DONE").exists()
    assert_same(program.result(workdir), uninterrupted)


def test_a_damaged_checkpoint_is_passed_over(program, uninterrupted, tmp_path):
    workdir = tmp_path / "run"
    assert program(workdir, "published 2")[0] == KILLED
    assert steps_on_disk(workdir) == [6, 12]
    files = [path for path in (workdir / "checkpoints" / "12").rglob("*") if path.is_file()]
    largest = max(files, key=lambda path: path.stat().st_size)
    content = bytearray(largest.read_bytes())
    content[len(content) // 2] ^= 1
    largest.write_bytes(content)
    code, _, error = program(workdir)
    assert code == 0, error
    assert error.count("\n") == 1 and "12" in error and "damaged" in error and "6" in error
    assert_same(program.result(workdir), uninterrupted)


def test_only_damaged_checkpoints_are_an_error_that_changes_nothing(program, uninterrupted, tmp_path):
    workdir = tmp_path / "run"
    assert program(workdir, "published 1")[0] == KILLED
    for path in (workdir / "checkpoints" / "6").rglob("*"):
        if path.is_file():
            path.write_bytes(path.read_bytes()[:-1])
    before = snapshot(workdir)
    code, _, error = program(workdir)
    assert code == 2 and error.count("\n") == 1 and "damaged" in error, error
    assert snapshot(workdir) == before


@pytest.mark.parametrize(
    ("sent", "code"), [pytest.param(signal.SIGKILL, KILLED, marks=slow), (signal.SIGTERM, STOPPED)]
)
def test_from_outside(sent, code, program, uninterrupted, tmp_path):
    workdir = tmp_path / "run"
    process = program.start(workdir, "slow")
    deadline = time.monotonic() + 60
    while not (workdir / "checkpoints" / "6").exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(sent)
    assert finished(process)[0] == code
    assert 6 in steps_on_disk(workdir) and STEPS not in steps_on_disk(workdir)
    assert program(workdir)[0] == 0
    assert_same(program.result(workdir), uninterrupted)


def test_the_cache_spares_compilations_and_changes_nothing(program, uninterrupted, tmp_path):
    entries = set(os.listdir(program.folder / "cache"))
    code, _, error = program(tmp_path / "run")
    assert code == 0, error
    new = {name for name in set(os.listdir(program.folder / "cache")) - entries if not name.endswith("-atime")}
    assert not new
    assert_same(program.result(tmp_path / "run"), uninterrupted)
    stored = json.loads((tmp_path / "run" / "config.json").read_text())
    assert stored["config"]["train"]["compilation_cache"] == str(program.folder / "cache")
