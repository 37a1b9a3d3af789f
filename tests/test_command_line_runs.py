"""The command line at work: help, what it imports, schedules and plans, and whole runs as processes."""

import json
import os
import re
import shutil
import subprocess
import sys

import pytest
from program import MLP, finished, snapshot, start

import qtrain
from qtrain import main

# --- the commands themselves


def test_help_and_version(capsys):
    for argument in ("--help", "-h", "help"):
        assert main.main([argument]) == 0
        out, error = capsys.readouterr()
        assert error == "" and all(f"\n  {name} " in out for name in main.COMMANDS)
    assert main.main(["--version"]) == 0
    assert capsys.readouterr().out == f"qtrain {qtrain.__version__}\n"
    assert main.main([]) == 2


@pytest.mark.parametrize("command", ["train", "plan", "schedules"])
def test_help_of_a_command(command, capsys):
    assert main.main([command, "--help"]) == 0
    out = capsys.readouterr().out
    assert f"qtrain {command}" in out and ("--low" if command == "schedules" else "--config") in out


@pytest.mark.parametrize(
    ("arguments", "code"),
    [(["--help"], 0), (["--version"], 0), (["train", "--help"], 0), (["trian"], 2), (["train"], 2)],
)
def test_what_needs_no_arrays_imports_none(arguments, code):
    # JAX, Flax and NumPy take a second and more to import: help, and a mistake in the command, must not wait for them.
    program = (
        "import sys\n"
        "from qtrain.main import main\n"
        f"assert main({arguments!r}) == {code}\n"
        "heavy = {'jax', 'flax', 'numpy', 'grain', 'optax', 'orbax', 'clu', 'matplotlib'} & sys.modules.keys()\n"
        "assert not heavy, heavy\n"
    )
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr


def test_import_is_light():
    program = "import qtrain, sys; assert not {'jax', 'flax', 'numpy', 'absl', 'ml_collections'} & sys.modules.keys()"
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr


def test_the_installed_command():
    executable = shutil.which("qtrain", path=os.path.dirname(sys.executable))
    assert executable, "the package is not installed with its console script"
    ran = subprocess.run([executable, "--version"], capture_output=True, text=True, check=True)
    assert ran.stdout == f"qtrain {qtrain.__version__}\n"


def test_schedules(capsys):
    assert main.main(["schedules", "--low", "3", "--high", "8", "--steps", "400"]) == 0
    out = capsys.readouterr().out
    assert all(name in out for name in ("CR", "ETH", "RTV"))


def test_overrides_reach_the_config(capsys):
    # Not sys.argv: what `main` was given.
    overrides = ["--config.schedule.low=5", "--config.schedule.high", "7", "--config.quant.grads=none"]
    assert main.main(["plan", "--config", MLP, *overrides, "--config.model.features=(8, 9)"]) == 0
    out = capsys.readouterr().out
    assert "low=5, high=7" in out and "Dense_1" in out and "stochastic" not in out
    assert main.main(["plan", *overrides, f"--config={MLP}"]) == 0  # in any order
    assert "low=5, high=7" in capsys.readouterr().out


def test_plan(capsys):
    assert main.main(["plan", "--config", MLP]) == 0
    out, error = capsys.readouterr()
    assert error == ""
    macs = 64 * (64 * 128 + 128 * 128 + 128 * 10)  # batch times weights
    assert f"{macs:,} forward MACs" in out and "Dense_1" in out and "2000 steps" in out
    assert main.main(["plan", "--config", MLP, "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [row["path"] for row in rows] == ["Dense_0", "Dense_1", "logits"]
    assert sum(row["macs"] for row in rows) == macs


# --- real processes


@pytest.mark.parametrize(
    ("arguments", "pattern"),
    [
        (["trian"], "unknown command 'trian'"),
        (["train", "--config", MLP, "--workdir", "RUN", "--config.schedule.low=four"], "must be a whole number"),
        (["train", "--config", MLP, "--workdir", "RUN", "--config.data.batch_size=5000"], "more than the 1437"),
    ],
)
def test_as_a_process(arguments, pattern, tmp_path):
    arguments = [argument.replace("RUN", str(tmp_path / "run")) for argument in arguments]
    code, out, error = finished(start(arguments, cwd=tmp_path))
    assert code == 2 and out == ""
    assert error.count("\n") == 1 and re.search(pattern, error), error
    assert os.listdir(tmp_path) == []


def test_train_as_a_process_from_another_folder(tmp_path):
    arguments = ["train", "--config", os.path.relpath(MLP, tmp_path) + ":smoke", "--workdir", "run", "--profile"]
    code, out, error = finished(start(arguments, cwd=tmp_path))
    assert code == 0, error
    assert re.search(r"^layer +op ", out, re.MULTILINE), "the plan"
    assert re.search(r"^step 6/6  100%  loss .*bits \d/\d/8 .*elapsed", error, re.MULTILINE), "progress"
    found = json.loads((tmp_path / "run" / "summary.json").read_text())
    for key in ("steps", "train_loss", "test_accuracy", "test_accuracy_scheduled", "test_accuracy_float"):
        assert re.search(rf"^{key} ", out, re.MULTILINE), "the summary, printed"
        assert key in found
    assert {"effective_bitops", "static_bitops", "saving", "compilations", "wall_seconds", "bits_final"} <= found.keys()
    assert found["steps"] == 6 and found["compilations"] == 1
    assert (tmp_path / "run" / "DONE").exists()
    assert list((tmp_path / "run" / "profile").rglob("*.xplane.pb")), "a trace"
    assert list((tmp_path / "run" / "tensorboard").glob("events.out.tfevents.*"))
    before = snapshot(tmp_path)
    code, again, error = finished(start(arguments, cwd=tmp_path))
    assert code == 0 and snapshot(tmp_path) == before, "a finished run is left as it is"
    assert again and out.endswith(again), "and its summary is shown"


def test_quiet(tmp_path, capfd):
    assert main.main(["train", "--config", f"{MLP}:smoke", "--workdir", str(tmp_path / "run"), "--quiet"]) == 0
    out, error = capfd.readouterr()
    assert error == "" and out.startswith("steps ")
