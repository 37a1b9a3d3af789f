"""The precision range test: its law, the run through the widths, the command."""

import json

import numpy as np
import pytest
from program import MLP, rows, small_config

from qtrain import main, schedules
from qtrain.build import build
from qtrain.errors import UsageError
from qtrain.range_test.command import table
from qtrain.range_test.run import range_test, staircase
from qtrain.schedules import lowest_that_trains


@pytest.mark.parametrize(
    ("accuracies", "threshold", "low"),
    [
        ((0.1, 0.11, 0.12, 0.5, 0.9), 0.05, 4),
        ((0.1, 0.4, 0.5, 0.6, 0.7), 0.05, 2),
        ((0.1, 0.12, 0.14, 0.16, 0.18), 0.05, None),
        ((0.5, 0.55, 0.4, 0.45, 0.9), 0.05 + 1e-9, 5),  # a gain that equals the threshold, or makes up a loss, is none
    ],
)
def test_law(accuracies, threshold, low):
    found = lowest_that_trains((2, 3, 4, 5), accuracies, threshold)
    assert found.low == low
    np.testing.assert_allclose(found.gains, np.diff(accuracies))


def test_the_staircase():
    config = small_config(optimizer__schedule="cosine", optimizer__warmup_steps=3, schedule__low=3)
    tested = staircase(config, (2, 3, 4), 6, 3, 8)
    experiment = build(tested)
    assert experiment.total_steps == 18
    np.testing.assert_array_equal(schedules.evaluate(experiment.schedule.weights, 18), np.repeat([2, 3, 4], 6))
    np.testing.assert_array_equal(schedules.evaluate(experiment.schedule.acts, 18), np.repeat([2, 3, 4], 6))
    assert experiment.schedule.q_max.grads == 8
    rates = [float(experiment.learning_rate(t)) for t in (0, 17)]
    assert rates[0] == rates[1] == pytest.approx(config.optimizer.learning_rate)
    assert config.schedule.name == "cyclic", "the caller's config is as it was"


def test_the_command(tmp_path, capsys):
    arguments = ["--first", "2", "--last", "4", "--steps", "4", "--average", "2", "--threshold", "0", "--quiet"]
    command = ["range-test", "--config", f"{MLP}:smoke", "--workdir", str(tmp_path / "run"), *arguments]
    assert main.main(command) == 0
    shown = capsys.readouterr().out
    found = json.loads((tmp_path / "run" / "range_test.json").read_text())
    assert found["widths"] == [2, 3, 4] and found["high"] == 4 and found["compilations"] == 1
    written = {row["step"]: row for row in rows(tmp_path / "run", "train")}
    assert found["accuracy"] == [written[step]["accuracy"] for step in (2, 4, 8, 12)]
    assert [written[step]["bits_weights"] for step in (4, 8, 12)] == [2, 3, 4]
    assert (tmp_path / "run" / "range_test.png").read_bytes()[:4] == b"\x89PNG"
    assert "training accuracy" in shown and table(found) in shown
    with_low = table({**found, "low": 3})
    assert "--config.schedule.low=3 --config.schedule.high=4" in with_low
    assert "no width gains more than" in table({**found, "low": None})
    # Again: what is there is read back.
    assert main.main(command) == 0 and capsys.readouterr().out == shown


@pytest.mark.parametrize(
    ("changes", "flags", "pattern"),
    [
        ({}, {"average": 3}, "--average 3: give a divisor of --steps 100"),
        ({}, {"first": 8}, "--first 8, --last 8: give the widths to test"),
        ({}, {"threshold": 1.0}, "--threshold 1"),
        ({}, {"steps": 0}, "--steps=0"),
        ({"schedule__name": "float"}, {}, "up to float; give --last"),
        ({"quant__backend": "aqt"}, {}, "quant.backend='aqt'"),
    ],
)
def test_mistakes(changes, flags, pattern, tmp_path):
    with pytest.raises(UsageError, match=pattern) as caught:
        range_test(small_config(**changes), str(tmp_path / "run"), **flags)
    assert "\n" not in str(caught.value) and not (tmp_path / "run").exists()
