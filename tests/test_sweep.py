"""Sweeps: points, runs in one program against runs of their own, failures, stopping, emitted commands."""

import json
import os
import shlex
import signal
import subprocess

import jax
import numpy as np
import pytest
from absl import flags
from program import MLP, final_state, finished, rows, start, summary
from sweep_program import POINTS, points_of, run, write

from qtrain import main, overrides, sweep, workdir
from qtrain.errors import UsageError
from qtrain.sweep import emit
from qtrain.sweep.command import _about_the_config
from qtrain.sweep.expand import selected
from qtrain.sweep.sharing import differing
from qtrain.train import Run, train
from qtrain.workdir import ERRORS, SWEEP

OWN = {"optimizer.quant.learning_rate": 0.2}
LAYERS = {"train__steps": 8, "eval__every_steps": 4, "checkpoint__every_steps": 4}
LEARNED = {**LAYERS, "quant__weights": "lsq", "train__log_every_steps": 4}


# --- points


@pytest.mark.parametrize(
    ("made", "expected"),
    [
        (sweep.product({"a": (1, 2), "b": (5,)}, [{"c": 3}]), [{"a": 1, "b": 5, "c": 3}, {"a": 2, "b": 5, "c": 3}]),
        (sweep.product(), [{}]),
        (sweep.product({"a": ()}, {"b": (1,)}), []),
        (sweep.zip({"a": (1, 2)}, [{"b": 3}, {"b": 4}]), [{"a": 1, "b": 3}, {"a": 2, "b": 4}]),
        (sweep.zip(), []),
        (sweep.chain([{"a": 1}], {"a": (2, 3)}, sweep.product({"b": (4,)})), [{"a": 1}, {"a": 2}, {"a": 3}, {"b": 4}]),
    ],
)  # fmt: skip
def test_points(made, expected):
    assert list(made) == expected


@pytest.mark.parametrize(
    ("make", "pattern"),
    [
        (lambda: sweep.product({"a": (1,)}, [{"a": 2}]), "product: 'a' comes from both sides"),
        (lambda: sweep.zip({"a": (1, 2), "b": (3,)}), r"zip of different lengths \(a: 2, b: 1\)"),
        (lambda: sweep.product({"a": "CR"}), r"a='CR': give a list of values, such as \['CR'\]"),
        (lambda: sweep.chain({"a": 3}), "a=3: give a list"),
        (lambda: sweep.product([("a", 1)]), "is no point"),
    ],
)
def test_points_that_cannot_be_made(make, pattern):
    with pytest.raises(UsageError, match=pattern):
        list(make())


@pytest.mark.parametrize(
    ("points", "arguments", "pattern"),
    [
        ([{"schedule.nam": "CR"}], (), r"point 0: schedule\.nam: no such key.*Did you mean 'schedule\.name'"),
        ([{"seed": 1}, {"sead": 2}], (), "point 1: sead: no such key; the config has .*Did you mean 'seed'"),
        ([{"seed.x": 1}], (), r"point 0: seed\.x: seed is 0 and has no keys"),
        ([{"train.steps": "many"}], (), r"point 0: train\.steps='many': must be a whole number"),
        ([{"train.steps": True}], (), r"train\.steps=True: must be a whole number"),
        ([{"schedule": {"name": "CR"}}], (), r"schedule is a section; set its keys"),
        ([{"seed": 1}, {"seed": 2}, {"seed": 1}], (), "points 0 and 2 are the same"),
        ([{"seed": 0}, {}], (), "points 0 and 1 are the same"),
        ([], (), "yields no point"),
        ([3], (), "point 0 is 3; yield mappings"),
        ([{"seed": 1}], ("--config.seed=3",), r"--config\.seed: the sweep sets this key itself"),
    ],
)
def test_mistakes_are_found_before_anything_runs(points, arguments, pattern, tmp_path, capsys):
    source = write(tmp_path, points)
    with pytest.raises(UsageError, match=pattern):
        points_of(source, *arguments)
    assert run(source, tmp_path / "sweep", *arguments) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and not (tmp_path / "sweep").exists()


@pytest.mark.parametrize(
    ("arguments", "pattern"),
    [
        ((), "--workdir is missing"),
        (("--workdir", "x", "--processes", "0"), "--processes 0: give at least 1"),
        (("--workdir", "x", "--vectorized", "--processes", "2"), "--vectorized is one process"),
        (("--workdir", "x", "--share", "vmap"), "--share: only of --vectorized"),
        (("--workdir", "x", "--points", "7"), "--points 7: '7' is none of the points 0-2"),
        (("--workdir", "x", "--emit", "slurmm"), "slurm"),
        (("--workdir", "x", "--emit", "slurm", "--vectorized"), "--emit trains nothing; leave out --vectorized"),
        (("--workdir", "x", "--emit", "slurm", "--submit", "slurm"), "leave out --emit, or --submit"),
        (("--workdir", "x", "--vectorized", "--share", "vmap", "--config.mesh.fsdp=2"), "--share vmap: mesh.fsdp"),
    ],
)
def test_flags_that_do_not_go(arguments, pattern, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main.main(["sweep", "--config", write(tmp_path, POINTS), *arguments]) == 2
    assert pattern in capsys.readouterr().err and not (tmp_path / "x").exists()


def test_a_config_without_sweep(capsys, tmp_path):
    assert run(MLP, tmp_path / "sweep") == 2
    assert "defines no function sweep()" in capsys.readouterr().err


def test_names_and_selection(tmp_path):
    points = points_of(write(tmp_path, POINTS))
    assert [point.name for point in points] == [
        "000_name-CR_seed-0",
        "001_name-constant_bits-6_seed-1_learning_rate-0.01",
        "002_name-RTH_seed-2_schedule-linear_warmup_percent-20",
    ]
    two = points_of(write(tmp_path, [{"schedule.weights.bits": 3, "schedule.acts.bits": 4}]))
    assert two[0].name == "000_weights.bits-3_acts.bits-4"
    assert [point.index for point in selected(points, "0,2-2")] == [0, 2]


def test_the_suite():
    source = f"{os.path.dirname(MLP)}/digits_cnn_suite.py"
    points = points_of(source)
    assert len(points) == 30 and not differing(points)
    assert len({point.config.schedule.name for point in points}) == 10
    assert len(points_of(f"{source}:smoke")) == 30


# --- emitted


def test_emitted_commands_make_the_points(tmp_path, capsys):
    source = write(tmp_path, [*POINTS, {"schedule.name": "rounds", "schedule.values": (8, 4)}, {"schedule.low": None}])
    arguments = ["--config", source, "--config.train.steps", "9", "--workdir", str(tmp_path / "a b")]
    assert main.main(["sweep", *arguments, "--emit", "commands"]) == 0
    lines = [shlex.split(line) for line in capsys.readouterr().out.splitlines()]
    points = points_of(source, "--config.train.steps=9")
    for line, point in zip(lines[:-1], points, strict=False):
        values = flags.FlagValues()
        flags.DEFINE_string("workdir", None, "", flag_values=values)
        assert line[:2] == ["qtrain", "train"]
        assert overrides.parse("train", values, line[2:]).to_dict() == point.config.to_dict()
        assert values.workdir == str(tmp_path / "a b" / point.name)
    assert lines[-1][:2] == ["qtrain", "sweep"] and lines[-1][-2:] == ["--points", "4"]
    assert not (tmp_path / "a b").exists()


def test_a_slurm_array(tmp_path):
    source = write(tmp_path, POINTS)
    base = overrides.load(source)
    rest = _about_the_config(["--config", source, "--vectorized", "--config.seed", "1", "--quiet"], base)
    assert rest == [f"--config={source}", "--config.seed=1"]
    points = points_of(source)
    script = emit.slurm([points[0], points[2]], "runs/suite", rest)
    assert "#SBATCH --array=0,2\n" in script and "#SBATCH --requeue" in script
    command = next(line for line in script.splitlines() if line.startswith("srun "))
    assert shlex.split(command)[1:] == [
        *("qtrain", "sweep", *rest, "--workdir", "runs/suite", "--quiet", "--points", "$SLURM_ARRAY_TASK_ID")
    ]


@pytest.mark.parametrize("code", [0, 1, main.PREEMPTED])
def test_a_stopped_task_of_a_slurm_array_is_queued_again(code, tmp_path):
    """The script, run with stand-ins of Slurm's commands that write down how they are called."""
    source = write(tmp_path, POINTS)
    (tmp_path / "task.sh").write_text(emit.slurm(points_of(source), "runs/suite", [f"--config={source}"]))
    for name, ends in (("srun", code), ("scontrol", 0)):
        (tmp_path / name).write_text(f'#!/bin/sh\necho "{name} $*" >> calls\nexit {ends}\n')
        (tmp_path / name).chmod(0o755)
    variables = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_ARRAY_JOB_ID": "12", "SLURM_ARRAY_TASK_ID": "2"}
    ended = subprocess.run(["bash", "task.sh"], cwd=tmp_path, env=os.environ | variables, check=False)
    assert ended.returncode == code
    first, *others = (tmp_path / "calls").read_text().splitlines()
    assert first == f"srun qtrain sweep --config={source} --workdir runs/suite --quiet --points 2"
    assert others == ["scontrol requeue 12_2"] * (code == main.PREEMPTED)


# --- trained


@pytest.fixture(scope="module")
def separate(tmp_path_factory):
    """The points' runs, by ``train``: config file, folder, points."""
    folder = tmp_path_factory.mktemp("separate")
    source = write(folder, POINTS, **LEARNED)
    points = points_of(source)
    for point in points:
        train(point.config, str(folder / point.name), quiet=True)
    return source, folder, points


def assert_same(separate, folder, tolerance=0.0):
    _, alone, points = separate
    for point in points:
        mine, theirs = ({"rows": rows(one / point.name), **summary(one / point.name)} for one in (folder, alone))
        if not tolerance:
            assert mine == theirs
            states = (final_state(point.config, one / point.name) for one in (folder, alone))
            jax.tree.map(np.testing.assert_array_equal, *states)
            continue
        for row, other in zip(mine["rows"], theirs["rows"], strict=True):
            assert list(row) == list(other)
            for name in row:
                if isinstance(row[name], float) and "ratio" not in name:
                    np.testing.assert_allclose(row[name], other[name], rtol=tolerance, atol=tolerance, err_msg=name)


SHARES = pytest.mark.parametrize(("share", "tolerance"), [("interleave", 0.0), ("vmap", 2e-2)])


@SHARES
def test_points_in_one_program_equal_runs_of_their_own(share, tolerance, separate, tmp_path, capsys):
    source, _, points = separate
    arguments = ["sweep", "--config", source, "--workdir", str(tmp_path), "--vectorized", "--share", share]
    assert main.main(arguments) == 0
    out = capsys.readouterr().out
    assert f"3 points share one train step by {share}" in out and "3 points, 1 compiled train step\n" in out
    assert_same(separate, tmp_path, tolerance)
    for point in points:
        found = summary(tmp_path / point.name)
        assert found["compilations"] == 1
        quality = {row["step"]: row["test_accuracy"] for row in rows(tmp_path / point.name, "eval")}
        assert list(quality) == [4, 8] and found["best_checkpoint"] == max(quality, key=quality.get)
    stored = json.loads((tmp_path / SWEEP).read_text())
    assert [point["name"] for point in stored["points"]] == [point.name for point in points]
    assert next(iter(stored["choices"].values())) == share
    assert main.main(arguments) == 0
    assert "3 of 3 points are finished" in capsys.readouterr().out
    assert run(source, tmp_path, "--config.train.steps=9") == 2
    assert "holds another sweep" in capsys.readouterr().err


@pytest.mark.skipif(jax.device_count() != 1, reason="compares with one device")
def test_points_over_several_devices(separate, tmp_path):
    """Under vmap they are split over as many of the devices as divide them: here four of eight, a point each."""
    source = write(tmp_path, [*POINTS, {"seed": 3}], **LEARNED)
    arguments = ["sweep", "--config", source, "--workdir", tmp_path / "eight", "--vectorized", "--share", "vmap"]
    environment = {"XLA_FLAGS": "--xla_force_host_platform_device_count=8"}
    code, out, error = finished(start(arguments, environment=environment), timeout=300)
    assert code == 0, error
    assert "4 points share one train step by vmap on 4 devices" in out and "4 points, 1 compiled train step\n" in out
    assert_same(separate, tmp_path / "eight", tolerance=2e-2)


def stopped_at(number, monkeypatch):
    """SIGTERM when that batch is taken, for once."""
    real, taken = Run._next, [0]

    def take(*args):
        taken[0] += 1
        if taken[0] == number:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(*args)

    monkeypatch.setattr(Run, "_next", take)


@SHARES
def test_a_stopped_sweep_continues(share, tolerance, separate, tmp_path, monkeypatch, capsys):
    source, _, points = separate
    stopped_at(3, monkeypatch)
    assert run(source, tmp_path, "--points", "1") == main.PREEMPTED  # this one is ahead of the others
    stopped_at(6, monkeypatch)
    how = "--vectorized", "--share", share
    assert run(source, tmp_path, *how) == main.PREEMPTED
    assert "stopped by SIGTERM at step 6 of 8" in capsys.readouterr().err
    assert not any((tmp_path / point.name / workdir.DONE).exists() for point in points)
    assert run(source, tmp_path, *how) == 0
    assert_same(separate, tmp_path, tolerance)


@SHARES
def test_a_point_that_fails_does_not_stop_the_others(share, tolerance, tmp_path, capsys):
    points = [{"seed": 0}, {"optimizer.learning_rate": 1e38}, {"schedule.low": 99}]
    source = write(tmp_path, points, **LAYERS)
    folder = tmp_path / "sweep"
    assert run(source, folder, "--vectorized", "--share", share) == 1
    error = capsys.readouterr().err
    assert "001_learning_rate-1e+38 failed: " in error and "002_low-99 failed: schedule" in error
    errors = json.loads((folder / ERRORS).read_text())
    assert {name: entry["kind"] for name, entry in errors.items()} == {
        "001_learning_rate-1e+38": "Diverged",
        "002_low-99": "UsageError",
    }
    assert errors["001_learning_rate-1e+38"]["overrides"] == {"optimizer.learning_rate": 1e38}
    assert (folder / "000_seed-0" / workdir.DONE).exists()
    alone = points_of(source)[0]
    train(alone.config, str(tmp_path / "alone" / alone.name), quiet=True)
    assert_same((source, tmp_path / "alone", [alone]), folder, tolerance)
    assert run(source, folder, "--points", "0,2") == 1
    assert json.loads((folder / ERRORS).read_text()).keys() == errors.keys()


@pytest.mark.parametrize(
    ("points", "names"),
    [
        ([{"seed": 1}, {"model.features": (8,)}], "model.features"),
        ([{"quant.ends": 6, "data.seed": 1}, {"seed": 1}], "data.seed, quant.ends"),
        ([{"losses.dampening.rate": 0.1}, {"seed": 1}], "losses.dampening.rate"),
        ([{"optimizer.learning_rate": 0.1, **OWN}, OWN], "optimizer.learning_rate"),
    ],
)  # fmt: skip
def test_points_that_share_no_program(points, names, tmp_path, capsys):
    assert run(write(tmp_path, points), tmp_path / "sweep", "--vectorized") == 2
    error = capsys.readouterr().err
    assert f"the points differ in {names}, which no step takes as data" in error and "add --separate" in error
    assert not (tmp_path / "sweep").exists()


def test_groups_that_share_programs(tmp_path, capsys):
    points = [{"seed": 1}, {"model.features": (8,)}, {"seed": 2}]
    source = write(tmp_path, points, train__steps=2)
    arguments = ["sweep", "--config", source, "--workdir", str(tmp_path / "sweep"), "--vectorized"]
    assert main.main([*arguments, "--separate"]) == 0
    out = capsys.readouterr().out
    assert "2 points share one train step" in out and "measured, a step of all: vmap" in out
    assert "1 points share one train step by interleave" in out


@pytest.mark.slow
def test_processes_side_by_side(separate, tmp_path, capsys):
    source, folder = separate[0], tmp_path / "sweep"
    arguments = ["sweep", "--config", source, "--workdir", folder, "--processes", "2"]
    code, out, error = finished(start(arguments), timeout=300)
    assert code == 0, error
    assert "3 points, 3 finished" in out
    assert_same(separate, folder)
