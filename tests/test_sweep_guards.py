"""Sweeps: whose runs a folder holds, what another process says, and what points may share."""

import json
import sys
import threading

import jax
import pytest
from sweep_program import points_of, run, write

from qtrain import main, overrides, workdir
from qtrain.build import build
from qtrain.errors import Preempted, UsageError
from qtrain.sweep import separate, worker
from qtrain.sweep.command import _about_the_config
from qtrain.sweep.folder import LOGS, Folder, as_begun
from qtrain.sweep.sharing import NotTogether, differing, program_key, vary
from qtrain.train import Run
from qtrain.workdir import ERRORS, SWEEP

TWO = [{"seed": 0}, {"seed": 1}]


def opened(source, path):
    """The folder of a sweep, and its points."""
    points = as_begun(points_of(source), str(path))
    return Folder(str(path), source, overrides.load(source), points), points


# --- whose runs


def test_a_finished_run_of_another_config_is_not_taken_for_the_point(tmp_path, capsys):
    source, path = write(tmp_path, TWO), tmp_path / "sweep"
    for point in points_of(source):  # as the lines of --emit commands leave them: no manifest
        workdir.prepare(path / point.name, point.config.to_dict(), {})
        workdir.finish(path / point.name, {"test_accuracy": 0.5, "effective_bitops": 1.0})
    assert run(source, path, "--config.optimizer.learning_rate=0.5") == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "000_seed-0' holds another run" in error and "optimizer.learning_rate" in error
    (path / SWEEP).unlink()
    assert run(source, path) == 0
    assert "2 points, 2 finished" in capsys.readouterr().out


def test_points_that_are_added_rename_none(tmp_path):
    source, path = write(tmp_path, [{"schedule.name": "CR"}, {"schedule.name": "CT"}]), tmp_path / "sweep"
    folder, points = opened(source, path)
    folder.run(points[0]).mkdir()
    more = [{"schedule.name": "CR"}, {"schedule.name": "CT"}, {"schedule.name": "CR", "optimizer.name": "sgd"}]
    source = write(tmp_path, more)
    assert next(iter(points_of(source))).name == "000_schedule.name-CR"
    _, points = opened(source, path)
    assert [point.name for point in points[:2]] == ["000_name-CR", "001_name-CT"]
    assert points[2].name == "002_schedule.name-CR_optimizer.name-sgd"
    assert [entry["name"] for entry in json.loads((path / SWEEP).read_text())["points"]] == [p.name for p in points]
    with pytest.raises(UsageError, match="holds another sweep: its point 000_name-CR"):
        opened(write(tmp_path, [{"schedule.name": "RR"}]), path)


def test_errors_of_another_sweep_that_never_began_are_dropped(tmp_path):
    path = tmp_path / "sweep"
    folder, points = opened(write(tmp_path, [{"schedule.low": 99}, *TWO]), path)
    folder.failed(points[0], ValueError("no"))
    folder.failed(points[1], ValueError("no"))
    opened(write(tmp_path, [{"train.steps": 9}, *TWO]), path)
    assert list(json.loads((path / ERRORS).read_text())) == ["001_seed-0"]


# --- other processes


def test_a_worker_refuses_a_config_that_has_changed(tmp_path, capsys):
    source = write(tmp_path, TWO)
    digest = points_of(source)[1].digest
    assert digest == points_of(source)[1].digest != points_of(source)[0].digest
    changed = ["--config", source, "--config.train.steps=9"]
    assert worker.run(1, digest, str(tmp_path / "run"), changed) == main.DIVERGED
    told = json.loads(capsys.readouterr().err.splitlines()[-1])
    assert told["kind"] == "UsageError" and "has changed since the sweep began" in told["error"]
    assert not (tmp_path / "run").exists()


def trained_by(script, tmp_path, monkeypatch):
    """What becomes of two points whose processes run a shell script, after earlier ones that left an error."""
    folder, points = opened(write(tmp_path, TWO), tmp_path / "sweep")
    (folder.path / LOGS).mkdir()
    for point in points:
        earlier = {"kind": "Diverged", "error": "loss is nan at step 7"}
        (folder.path / LOGS / f"{point.name}.txt").write_text(json.dumps(earlier) + "\n")
    program = tmp_path / "python"
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(program))
    failures = {}
    separate.train_in_processes(
        points, folder, [], 2, threading.Event(), lambda point, error: failures.update({point.name: error}), print
    )
    return failures


def test_a_process_that_is_killed_does_not_repeat_an_earlier_error(tmp_path, monkeypatch):
    failures = trained_by("kill -9 $$", tmp_path, monkeypatch)
    assert {str(error) for error in failures.values()} == {"the process ended with signal 9: it wrote nothing"}
    assert len(failures) == 2


def test_a_long_error_of_a_process_is_read_whole(tmp_path, monkeypatch):
    message = "x" * 9000
    told = json.dumps({"kind": "UsageError", "error": message})
    failures = trained_by(f"echo '{told}'; exit 1", tmp_path, monkeypatch)
    assert {(error.kind, str(error)) for error in failures.values()} == {("UsageError", message)}


def test_a_process_that_is_stopped_alone_is_to_be_begun_again(tmp_path, monkeypatch):
    with pytest.raises(Preempted, match="000_seed-0, 001_seed-1; start again"):
        trained_by(f"exit {main.PREEMPTED}", tmp_path, monkeypatch)


# --- what may share a program


def test_a_transition_target_that_follows_the_decay_is_no_data(tmp_path):
    points = [{"optimizer.decay_percent": 20.0}, {"optimizer.decay_percent": 80.0}]
    given = {"optimizer__schedule": "wsd", "optimizer__transition__schedule": "wsd"}
    assert not differing(points_of(write(tmp_path, points, **given)))
    of_transition = points_of(write(tmp_path, points, optimizer__name="sgdt", **given))
    assert differing(of_transition) == ["optimizer.decay_percent"]


def test_quantizers_begin_with_the_window_of_their_own_point(tmp_path):
    points = [{"deficit.start_steps": 4}, {"deficit.start_steps": 0}]
    given = {"task": "digits_cnn", "quant__weights": "lsq", "deficit__name": "blur", "deficit__length_steps": 4}
    first, second = points_of(write(tmp_path, points, **given))
    base = build(first.config)
    varied, alone = vary(base, second), build(second.config)
    with base.train_batches() as batches:
        batch = next(batches)
    seen = [one.additions.observed(jax.numpy.zeros((), "int32"), batch)["image"] for one in (base, varied, alone)]
    assert (seen[1] == seen[2]).all() and not (seen[0] == seen[1]).all()


def test_what_keeps_controllers_apart_is_named(tmp_path):
    points = [{"schedule.interval_steps": 1.0}, {"schedule.interval_steps": 2.0, "seed": 1}]
    given = {"schedule__name": "budget_keeper", "schedule__budget_share": 0.9, "schedule__low": 3, "schedule__high": 8}
    first, second = points_of(write(tmp_path, points, **given))
    base = build(first.config)
    with pytest.raises(NotTogether, match=r"they differ in schedule\.interval_steps; add --separate"):
        vary(base, second)
    assert program_key(base) != program_key(build(second.config))


# --- what points of one program share


def test_a_failure_of_what_points_share_is_recorded_for_each(tmp_path, monkeypatch, capsys):
    points = [{"seed": 0}, {"model.features": (8,), "seed": 3}, {"seed": 1}]
    source, path = write(tmp_path, points, train__steps=2), tmp_path / "sweep"
    real = Run._next

    def broken(self, batches):
        if self.config.model.features == (16, 16):
            raise OSError("the disk is gone")
        return real(self, batches)

    monkeypatch.setattr(Run, "_next", broken)
    assert run(source, path, "--vectorized", "--separate", "--share", "interleave") == 1
    assert "3 points, 1 finished, 2 failed" in capsys.readouterr().out
    errors = json.loads((path / ERRORS).read_text())
    assert {entry["index"]: entry["error"] for entry in errors.values()} == dict.fromkeys((0, 2), "the disk is gone")
    assert (path / "001_features-8_seed-3" / workdir.DONE).exists()


def test_a_value_that_reads_like_a_flag_is_left_out(tmp_path):
    source = write(tmp_path, TWO)
    arguments = ["--config", source, "--workdir", "config", "--points", "0", "--config.seed", "1"]
    assert _about_the_config(arguments, overrides.load(source)) == [f"--config={source}", "--config.seed=1"]
    assert _about_the_config(["--workdir", "config.d"], overrides.load(source)) == []
