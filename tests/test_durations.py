"""Durations: steps, epochs or percent, exactly one of them."""

import pytest

from qtrain.durations import duration
from qtrain.errors import UsageError

UNITS = {"steps_per_epoch": 22, "total_steps": 300}


@pytest.mark.parametrize(
    ("section", "steps"),
    [
        ({"every_steps": 7}, 7),
        ({"every_steps": 7.0}, 7),
        ({"every_steps": 7, "every_epochs": 0.0, "every_percent": None}, 7),
        ({"every_epochs": 2}, 44),
        ({"every_epochs": 0.5}, 11),
        ({"every_percent": 10}, 30),
        ({"every_percent": 0.5}, 2),  # 1.5, to even
        ({"every_percent": 0.1}, 0),
        ({"every_percent": 100}, 300),
        ({}, 5),
        ({"every_steps": 0, "every_epochs": 0.0, "every_percent": 0.0}, 5),
    ],
)
def test_what_each_stands_for(section, steps):
    assert duration(section, "every", "eval", **UNITS, default=5) == steps


def test_a_set_duration_is_rounded_up_but_an_unset_one_stays_unset():
    assert duration({"every_percent": 0.1}, "every", "eval", **UNITS, default=0, at_least=1) == 1
    assert duration({"every_epochs": 0.001}, "every", "eval", **UNITS, default=0, at_least=1) == 1
    assert duration({"every_percent": 0.0}, "every", "eval", **UNITS, default=0, at_least=1) == 0


def test_bare_units_have_no_percent():
    assert duration({"steps": 0, "epochs": 3.0, "percent": 5}, "", "train", steps_per_epoch=22) == 66


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({}, r"^eval: give exactly one of \['every_steps', 'every_epochs', 'every_percent'\]$"),
        ({"every_steps": 7, "every_percent": 3}, "eval.every_steps=7, eval.every_percent=3: give exactly one"),
        ({"every_steps": -1}, "eval.every_steps=-1: give a number of at least 0"),
        ({"every_steps": 1.5}, "eval.every_steps=1.5: give a whole number"),
        ({"every_steps": True}, "eval.every_steps=True: give a number"),
        ({"every_steps": "ten"}, "eval.every_steps='ten': give a number"),
        ({"every_epochs": float("nan")}, "eval.every_epochs=nan: give a number"),
        ({"every_epochs": float("inf")}, "eval.every_epochs=inf: give a number"),
        ({"every_percent": 101}, "eval.every_percent=101: give at most 100"),
    ],
)
def test_mistakes(section, message):
    with pytest.raises(UsageError, match=message) as caught:
        duration(section, "every", "eval", **UNITS)
    assert "\n" not in str(caught.value)
