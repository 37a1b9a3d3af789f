"""Controllers in the program: resume, one compilation, dispatches of several steps, sweeps in one program, plans."""

import json

import jax
import numpy as np
import pytest
from program import final_state, rows, small_config, summary

from qtrain import Precision, main
from qtrain.build import build
from qtrain.cost import bitops
from qtrain.drive import Preempted
from qtrain.errors import UsageError
from qtrain.experiment import describe
from qtrain.report.labels import describe_schedules
from qtrain.train import Run, train
from qtrain.trained import experiment_of, restored

SMALL = {"train__steps": 12, "train__log_every_steps": 1, "checkpoint__every_steps": 6}
KEEPER = {"schedule__name": "budget_keeper", "schedule__budget_of": "CR", "schedule__interval_steps": 2.0}
# Narrow enough in their criteria to switch in a few steps.
CASES = {
    "fractrain": {
        "schedule__name": "fractrain",
        "schedule__values": (3, 5, 8),
        "schedule__interval_steps": 1.0,
        "schedule__epsilon": 10.0,
        "schedule__profile": None,
        "schedule__pattern": None,
    },
    "muppet": {
        "schedule__name": "muppet",
        "schedule__interval_steps": 1.0,
        "schedule__violations": 1,
        "schedule__margin": 0.0,
    },
    "budget_keeper": KEEPER,
}


def config_of(name, **more):
    return small_config(**{**SMALL, **CASES.get(name, {}), **more})


def stopping_at(step, monkeypatch):
    """A SIGTERM before `step`."""
    before = Run.before

    def stopped(run, at, stop):
        if at == step:
            monkeypatch.setattr(Run, "before", before)
            before(run, at, True)
            raise Preempted("stopped")
        before(run, at, stop)

    monkeypatch.setattr(Run, "before", stopped)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] if name == "fractrain" else []) for name in CASES]
)
def test_a_resumed_run_is_bit_identical(name, tmp_path, monkeypatch):
    config = config_of(name)
    whole = train(config, str(tmp_path / "whole"), quiet=True)
    stopping_at(7, monkeypatch)
    with pytest.raises(Preempted):
        train(config, str(tmp_path / "parts"), quiet=True)
    train(config, str(tmp_path / "parts"), quiet=True)
    assert summary(tmp_path / "parts") == summary(tmp_path / "whole")
    assert rows(tmp_path / "parts") == rows(tmp_path / "whole")
    states = [final_state(config, tmp_path / part / "checkpoints") for part in ("whole", "parts")]
    jax.tree.map(np.testing.assert_array_equal, *jax.device_get(states))
    assert whole["compilations"] == 1

    written = rows(tmp_path / "whole", "train")
    bits = [row["bits_weights"] for row in written]
    assert len(set(bits)) > 1, "bits change"
    assert whole["bits_final"]["weights"] == bits[-1] and written[-1]["bits_grads"] == 8
    # What exports a run takes the bits of its last step from the checkpoint.
    folder = tmp_path / "parts"
    assert restored(folder, experiment_of(folder, "export")).last.weights == bits[-1]
    # Bits of the metrics are those that the steps were charged for.
    experiment = build(config)
    spent = np.diff([0, *(row["effective_bitops"] for row in written)])
    for row, cost in zip(written, spent, strict=True):
        found = bitops(experiment.plan.ops, Precision(row["bits_weights"], row["bits_acts"], row["bits_grads"]))
        assert cost == pytest.approx(found, rel=1e-5)
    assert all(row["controller/level"] >= 0 for row in written)
    if name == "budget_keeper":
        assert 0.9 < whole["budget_spent"] <= 1 + 1e-6  # a run of twelve steps


@pytest.mark.slow
def test_several_steps_a_dispatch_and_accumulated_gradients(tmp_path):
    found = {}
    for several in (1, 2):
        lengths = {"train__steps_per_dispatch": several, "train__log_every_steps": 2}
        config = config_of("muppet", **lengths, optimizer__accumulate_steps=2)
        folder = tmp_path / str(several)
        train(config, str(folder), quiet=True)
        found[several] = [(row["bits_weights"], row["loss"]) for row in rows(folder, "train")]
    np.testing.assert_allclose(found[1], found[2], rtol=1e-5)
    assert len({bits for bits, _ in found[1]}) > 1


FILE = """
from program import small_config

def get_config(argument=""):
    return small_config({arguments})

def sweep():
    return {points}
"""


@pytest.mark.parametrize("share", ["interleave", "vmap"])
def test_points_share_a_program(share, tmp_path, capsys):
    points = [
        {"schedule.gain": 1.0, "seed": 1},
        {"schedule.budget_of": "static", "schedule.budget_share": 0.9, "schedule.signal": "noise"},
    ]
    given = {**SMALL, **KEEPER}
    source = tmp_path / "config.py"
    source.write_text(FILE.format(points=points, arguments=", ".join(f"{k}={v!r}" for k, v in given.items())))
    folder = tmp_path / "sweep"
    command = ["sweep", "--config", str(source), "--workdir", str(folder), "--quiet", "--vectorized", "--share", share]
    assert main.main(command) == 0
    assert "2 points, 2 finished" in capsys.readouterr().out
    for point, path in zip(points, sorted(path for path in folder.iterdir() if path.is_dir()), strict=False):
        config = small_config(**given | {key.replace(".", "__"): value for key, value in point.items()})
        alone = train(config, str(tmp_path / path.name), quiet=True)
        found = json.loads((path / "summary.json").read_text())
        assert found["compilations"] == 1
        assert found["budget_bitops"] == alone["budget_bitops"] and 0.9 < found["budget_spent"] <= 1 + 1e-6
        if share == "interleave":
            assert summary(path) == summary(tmp_path / path.name)
            assert rows(path) == rows(tmp_path / path.name)


def test_points_that_need_another_program(tmp_path, capsys):
    points = [{"schedule.name": "budget_keeper", "schedule.budget_share": 0.9}, {"schedule.name": "CR"}]
    source = tmp_path / "config.py"
    given = SMALL
    source.write_text(FILE.format(points=points, arguments=", ".join(f"{k}={v!r}" for k, v in given.items())))
    command = ["sweep", "--config", str(source), "--workdir", str(tmp_path / "sweep"), "--quiet", "--vectorized"]
    assert main.main(command) == 2
    assert "point 1 has bits that no controller decides" in capsys.readouterr().err


def test_what_is_known_before(tmp_path):
    text = describe(build(config_of("fractrain")))
    assert "what fractrain spends the training decides: " in text
    assert "fractrain: weights, acts 3 5 8; an epoch is 1 steps" in text
    experiment = build(config_of("budget_keeper"))
    reference = build(small_config(**SMALL, schedule__name="CR"))
    assert experiment.controller.bitops == pytest.approx(reference.cost_summary()["effective_bitops"], rel=1e-12)
    costs = experiment.cost_summary()
    assert costs["effective_bitops"] < experiment.controller.bitops < costs["highest_bitops"] == costs["static_bitops"]
    assert "budget_keeper spends " in describe(experiment)
    known = {"schedule.name": "budget_keeper", "schedule.low": 3, "schedule.high": 8, "schedule.budget_of": "CR"}
    assert describe_schedules(known, grads=False) == "budget_keeper 3–8 at 1 of CR"


def test_the_parts_of_a_model_that_do_not_ask_for_it_have_none():
    experiment = build(small_config(**SMALL))
    assert experiment.controller is None and experiment.additions.steering is None
    assert jax.eval_shape(experiment.initial_state).controller == {}
    assert experiment.tables().controller is None


@pytest.mark.parametrize(
    ("overrides", "pattern"),
    [
        ({"schedule__name": "fractrain"}, "schedule: name='fractrain' needs values"),
        ({"schedule__name": "fractran", "schedule__values": (3, 4)}, "Did you mean 'fractrain'"),
        ({**CASES["fractrain"], "schedule__gain": 0.5}, "schedule.gain: not used by schedule.name='fractrain'"),
        ({**CASES["fractrain"], "schedule__values": (3,)}, r"schedule: values=\(3,\).*two at least"),
        ({**CASES["fractrain"], "schedule__grads__name": "fractrain", "schedule__grads__values": (6, 8)}, "as many"),
        ({**CASES["fractrain"], "schedule__acts__epsilon": 0.1}, "weights and acts have different ones"),
        ({**CASES["fractrain"], "schedule__interval_epochs": 1.0}, "give exactly one of"),
        ({**CASES["fractrain"], "quant__backend": "aqt"}, "quant.backend='aqt' freezes widths"),
        ({"schedule__name": "budget_keeper"}, "budget_share=None: give the share"),
        (
            {"schedule__name": "budget_keeper", "schedule__budget_share": 0.1},
            "can spend from 0.8.* to 1 of",
        ),
        ({**KEEPER, "schedule__budget_of": "CC"}, "budget_of='CC'.*Did you mean"),
        ({**KEEPER, "schedule__low": 8}, "high must be above low"),
        ({**KEEPER, "schedule__grads__name": "CR"}, "grads change by themselves"),
        ({**KEEPER, "quant__weights": "learned_width/signed/channel"}, "some quantizers learn their width"),
        (
            {"schedule__name": "window", "schedule__start_percent": 10.0, "schedule__length_percent": 10.0}
            | {"schedule__weights__name": "budget_keeper"},
            "budget_share",
        ),
    ],
)
def test_mistakes(overrides, pattern):
    with pytest.raises(UsageError, match=pattern) as caught:
        build(small_config(**SMALL, **overrides))
    assert "\n" not in str(caught.value)
