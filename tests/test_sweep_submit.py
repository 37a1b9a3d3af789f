"""Points of a sweep as jobs, by submitit's executor of this machine; Slurm's differs in how a job is queued again."""

import json
import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
import time

import pytest
from program import rows
from sweep_program import POINTS, points_of, run, write

from qtrain.sweep import submit
from qtrain.sweep.folder import LOGS
from qtrain.train import train

LONG = {"train__steps": 6000, "train__log_every_steps": 500, "checkpoint__every_steps": 500}


@pytest.fixture
def jobs(monkeypatch):
    """What the command submits, once it has returned; the jobs find this checkout and the tests' modules."""
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
    submitted = []
    inner = submit.submit
    monkeypatch.setattr(submit, "submit", lambda *arguments: submitted.extend(inner(*arguments)))
    yield submitted
    for job in submitted:
        if not job.done():
            job.cancel()
        job._process.wait()


def test_a_job_that_fails_says_why(jobs, tmp_path, capsys):
    source, folder = write(tmp_path, [{"optimizer.learning_rate": 1e38}]), tmp_path / "runs"
    assert run(source, folder, "--submit", "local") == 0
    assert "1 jobs submitted; they log in" in capsys.readouterr().out
    with pytest.raises(Exception, match="Refused: loss is nan"):
        jobs[0].result()
    (recorded,) = json.loads((folder / "errors.json").read_text()).values()
    assert recorded["kind"] == "Diverged" and recorded["error"].startswith("loss is nan")


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("pgrep") is None, reason="no pgrep, which finds the processes of a job")
def test_a_job_that_is_preempted_saves_and_goes_on(jobs, tmp_path, capsys):
    source, folder = write(tmp_path, POINTS[:1], **LONG), tmp_path / "runs"
    assert run(source, folder, "--submit", "local", "--submit_options", "timeout_min=60,mem_gb=1") == 0
    _wait(lambda: any(path.read_text().count("kind") > 1 for path in folder.glob("*/metrics.jsonl")), jobs[0])
    (task,) = subprocess.check_output(["pgrep", "-P", jobs[0].job_id], text=True).split()
    os.kill(int(task), signal.SIGUSR2)
    assert jobs[0].result()["train_loss"] > 0  # of its second turn, which submitit began
    assert "Requeued job" in jobs[0].stdout()
    (point,) = points_of(source)
    stopped = re.search(r"stopped by SIGTERM at step (\d+) of 6000", (folder / LOGS / f"{point.name}.txt").read_text())
    assert stopped and int(stopped[1]) % 500  # saved when told to, not only when due
    train(point.config, str(tmp_path / "straight"), quiet=True)
    assert rows(folder / point.name, "train") == rows(tmp_path / "straight", "train")
    assert run(source, folder, "--submit", "local") == 0
    assert "0 jobs submitted, 1 were finished" in capsys.readouterr().out
    assert len(jobs) == 1


def test_slurm_gets_one_array_with_the_options(tmp_path, monkeypatch, capsys):
    commands = tmp_path / "bin"
    commands.mkdir()
    for name, text in {"srun": "", "sbatch": f'cp "$1" {tmp_path}/script; echo Submitted batch job 12'}.items():
        (commands / name).write_text(f"#!/bin/sh\n{text}\n")
        (commands / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{commands}{os.pathsep}{os.environ['PATH']}")
    options = "timeout_min=90,gpus_per_node=1,slurm_partition=gpu,slurm_array_parallelism=2"
    assert run(write(tmp_path, POINTS), tmp_path / "runs", "--submit", "slurm", "--submit_options", options) == 0
    script = (tmp_path / "script").read_text()
    for line in ("array=0-2%2", "time=90", "gpus-per-node=1", "partition=gpu", "job-name=qtrain", "signal=USR2@90"):
        assert f"#SBATCH --{line}\n" in script, script
    jobs = sorted((tmp_path / "runs" / LOGS).glob("12_*_submitted.pkl"))
    assert [pickle.loads(job.read_bytes()).function.index for job in jobs] == [0, 1, 2]


def _wait(reached, job, seconds=60):
    until = time.monotonic() + seconds
    while not reached():
        assert time.monotonic() < until and not job.done(), job.stderr()
        time.sleep(0.05)


@pytest.mark.parametrize(
    ("arguments", "pattern"),
    [
        (("--submit", "slurm"), r"--submit slurm: .*srun.*; run it where jobs are submitted, or use --emit commands"),
        (("--submit", "local", "--vectorized"), "each point a job of its own; leave out --vectorized, or --submit"),
        (("--submit", "local", "--processes", "2"), "leave out --processes, or --submit"),
        (("--submit_options", "timeout_min=3"), "--submit_options: only of --submit"),
        (("--submit", "local", "--submit_options", "timeout_min"), "'timeout_min': give KEY=VALUE"),
        (("--submit", "local", "--submit_options", "timeout_min=long"), '"timeout_min" expected type'),
        (("--submit", "local", "--submit_options", "local_gpu=1"), "Unknown argument 'gpu'"),
    ],
)
def test_mistakes(arguments, pattern, tmp_path, capsys):
    assert run(write(tmp_path, POINTS), tmp_path / "runs", *arguments) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert re.search(pattern, error), error
