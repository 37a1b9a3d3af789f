"""The study of critical periods: its sweeps are well formed and share programs, its reader reads what runs write."""

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from absl import flags

from qtrain import overrides
from qtrain.errors import UsageError
from qtrain.sweep.expand import expand
from qtrain.sweep.sharing import groups

STUDY = Path(__file__).parents[1] / "experiments" / "critical_periods"
SOURCE = str(STUDY / "sweep.py")


DOCS = (Path(__file__).parents[1] / "docs" / "critical_periods.md").read_text()


def points_of(argument):
    source = f"{SOURCE}:{argument}"
    return expand(overrides.load(source), overrides.sweep(source))


@pytest.mark.parametrize(
    ("argument", "count", "lengths"),
    [
        ("mnist_mlp-removal", 84, [400, 500, 600, 800]),
        ("digits_gcn-window", 186, [200]),
        ("digits_cnn-patterns", 18, [400]),
        ("mnist_mlp-fisher", 24, [400, 400]),  # exact and sampled
        ("digits_cnn-calibration", 27, [400]),
        ("sequential_digits_s5-window-smoke", 62, [40]),
        ("digits_cnn-patterns-smoke", 6, [40]),
    ],
)
def test_points_of_one_length_share_a_program(argument, count, lengths):
    points = points_of(argument)
    assert len(points) == count
    assert [group[0].config.train.steps for group in groups(points)] == lengths


def test_a_removal_has_its_controls():
    for point in points_of("mnist_mlp-removal"):
        removal = point.config.train.steps - 400
        windows = [point.config.schedule[kind].length_steps for kind in ("weights", "acts")]
        assert set(windows) <= {None, removal} and point.config.deficit.length_steps in (0, removal)
        assert point.config.optimizer.hold_steps in (0, removal) and point.config.optimizer.restart_steps in (
            0,
            removal,
        )


def test_what_is_no_part():
    with pytest.raises(UsageError, match=r"part 'windows'.*Did you mean 'window'"):
        overrides.load(f"{SOURCE}:mnist_mlp-windows")


def test_results(tmp_path):
    """Accuracies that are known give sensitivities that are known."""
    argument = "digits_gcn-window"
    points, folder = points_of(argument), tmp_path / "runs" / argument
    folder.mkdir(parents=True)
    listed = [{"index": p.index, "name": p.name, "overrides": json.loads(json.dumps(p.overrides))} for p in points]
    (folder / "sweep.json").write_text(json.dumps({"source": f"{SOURCE}:{argument}", "points": listed}))
    numbers = dict.fromkeys(("test_loss", "train_loss", "effective_bitops", "compilations", "wall_seconds"), 1.0)
    for point in points:
        run = folder / point.name
        run.mkdir()
        schedule = point.config.schedule
        lost = 0.01 * (schedule.weights.length_steps is not None) + 0.02 * (schedule.acts.start_steps == 60)
        accuracy = 0.9 + 0.001 * point.config.seed - lost  # a seed's own share cancels
        (run / "summary.json").write_text(json.dumps({**numbers, "steps": 200, "test_accuracy": accuracy}))
        (run / "config.json").write_text(json.dumps({"versions": {}, "backend": "cpu", "device": "cpu", "cores": 2}))
        (run / "DONE").write_text("")
    command = [sys.executable, str(STUDY / "analyse.py"), str(tmp_path / "runs"), "--out", str(tmp_path)]
    found = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert found.returncode == 0, found.stderr
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in found.stdout.splitlines() if "|" in line]
    assert rows[0] == ["deficit, rate \\ onset, step", "0", "30", "60", "90", "120", "150"]
    none, one, two, three = (f"{value:.2f} [{value:.2f}, {value:.2f}]" for value in (0, 1, 2, 3))
    rates = ("decayed", "constant", "held")
    lost = {row[0]: row[1:] for row in rows[2:11]}
    assert lost == {
        **{f"weights, {rate}": [one] * 6 for rate in rates},
        **{f"acts, {rate}": [none, none, two, none, none, none] for rate in rates},
        **{f"both, {rate}": [one, one, three, one, one, one] for rate in rates},
    }
    assert rows[11] == rows[0] and {cell for row in rows[13:22] for cell in row[1:]} == {none}  # losses are the same
    early = {row[1]: row[2:] for row in rows[24:]}  # the first three onsets less the next two
    third = f"{2 / 3:.2f} [{2 / 3:.2f}, {2 / 3:.2f}]"
    assert early == {
        **{f"weights, {rate}": [none, "0.00", none, "0.00"] for rate in rates},
        **{f"{kind}, {rate}": [third, "0.00", none, "0.00"] for kind in ("acts", "both") for rate in rates},
    }
    assert (tmp_path / "window.png").stat().st_size > 10_000
    lines = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert len(lines) == len(points) and lines[-1]["command"].startswith("qtrain sweep --config")


def test_the_docs(monkeypatch):
    monkeypatch.chdir(Path(__file__).parents[1])
    blocks = re.findall(r"```\n(.*?)```", DOCS, re.DOTALL)
    commands = [shlex.split(line) for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    assert len(commands) == 6
    for command in commands:
        values = flags.FlagValues()
        flags.DEFINE_string("workdir", None, "", flag_values=values)
        assert command[:2] == ["qtrain", "train"] and overrides.parse("train", values, command[2:]).train.steps
        assert values.workdir
    (example,) = re.findall(r"```python\n(.*?)```", DOCS, re.DOTALL)
    names: dict = {}
    exec(compile(example, "docs", "exec"), names)
    assert float(names["sampled"].total) == pytest.approx(float(names["exact"].total), rel=0.2)
