"""``qtrain search``: what it writes of a run, and what it refuses."""

import json
import os

import jax
import numpy as np
import pytest
from program import final_state, small_config, snapshot

from qtrain import Precision, cost, main
from qtrain.build import build
from qtrain.config import base_config, finish
from qtrain.errors import UsageError
from qtrain.evaluate import Evaluator
from qtrain.search.run import search_run
from qtrain.sharding import make_mesh
from qtrain.train import train

SHORT = ["--widths", "8,4,2", "--batches", "2", "--draws", "3", "--front", "5"]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A finished run of a CNN: the first and the last layer at 8 bits, two layers between them to search."""
    folder = tmp_path_factory.mktemp("run")
    config = small_config("digits_cnn", "constant", train__steps=30, schedule__bits=8)
    train(config, str(folder), quiet=True)
    return folder, config


@pytest.fixture(scope="module")
def written(run, tmp_path_factory):
    """What the command wrote, its folder, and what it left of the run's."""
    folder, out = run[0], tmp_path_factory.mktemp("out") / "new" / "folder"
    before = snapshot(folder)
    arguments = ["--workdir", str(folder), "--budget", "bits=3.9", "--out", str(out), *SHORT]
    assert main.main(["search", *arguments, "--evaluate-front"]) == 0
    assert snapshot(folder) == before
    return json.loads((out / "search.json").read_text()), out


def test_what_is_written_adds_up(run, written):
    found, out = written
    assert sorted(os.listdir(out)) == ["search.json", "search.png"]
    assert (out / "search.png").read_bytes().startswith(b"\x89PNG")
    experiment = build(run[1])
    example = jax.ShapeDtypeStruct((1, 8, 8, 1), "float32")
    plan = experiment.qmodel.plan(example, train=False)
    assert list(found["assignment"]) == ["Conv_1", "Dense_0"] == [layer["path"] for layer in found["layers"]]
    assert [row["path"] for row in found["fixed"]] == ["Conv_0", "logits"]
    assert found["result"]["bits"] <= 3.9 and found["widths"] == [8, 4, 2] and found["step"] == 30
    rows = [(found["assignment"], found["result"])]
    rows += [(dict.fromkeys(found["assignment"], int(width)), row) for width, row in found["uniform"].items()]
    rows += [(row["assignment"], row) for row in found["front"]]
    sizes = {layer["path"]: layer["elements"] for layer in found["layers"]}
    for assignment, row in rows:
        bits = {path: Precision(8, 8, 8) for path in plan.followers}  # the first and the last layer's gradients do
        bits |= {path: Precision(weights=width, acts=width) for path, width in assignment.items()}
        assert row["bitops"] == cost.bitops(plan.ops, bits, ("forward",))
        assert row["bytes"] == cost.weight_bytes(plan.ops, bits, plan.weight_scales)
        assert row["bits"] == sum(sizes[path] * width for path, width in assignment.items()) / sum(sizes.values())
        omega = [layer["omega"][str(assignment[layer["path"]])] for layer in found["layers"]]
        assert row["omega"] == pytest.approx(sum(omega))
        assert 0 <= row["accuracy"] <= 1 and row["loss"] > 0
    costs, omegas = ([row[name] for row in found["front"]] for name in ("bits", "omega"))
    assert costs == sorted(costs) and omegas == sorted(omegas, reverse=True) and len(costs) > 2
    best = min((row for row in found["front"] if row["bits"] <= 3.9), key=lambda row: row["omega"])
    assert found["result"]["omega"] <= best["omega"]


def test_accuracies_are_those_of_an_evaluation(run, written):
    folder, config = run
    found, _ = written
    experiment = build(config)
    assert experiment.q_max == Precision(8, 8, 8)
    expected = Evaluator(experiment, make_mesh())(final_state(config, folder))
    assert found["uniform"]["8"]["accuracy"] == expected["test_accuracy"]
    assert found["uniform"]["8"]["loss"] == pytest.approx(expected["test_loss"], rel=1e-6)
    by_bits = {row["bits"]: row for row in found["front"]}
    for width in ("4", "2"):  # two roads to the same assignment, where the front has it
        row = by_bits.get(float(width))
        if row and set(row["assignment"].values()) == {int(width)}:
            assert row["accuracy"] == found["uniform"][width]["accuracy"]
    assert set(by_bits[2.0]["assignment"].values()) == {2}


def test_other_budgets_and_the_table(run, written, tmp_path, capsys):
    folder, _ = run
    middle = written[0]["uniform"]["4"]
    arguments = ["--workdir", str(folder), "--budget", f"bitops={middle['bitops']:.0f}", "--out", str(tmp_path), *SHORT]
    assert main.main(["search", *arguments]) == 0
    found = json.loads((tmp_path / "search.json").read_text())
    assert found["unit"] == "bitops" and found["result"]["bitops"] <= middle["bitops"]
    assert found["result"]["omega"] <= middle["omega"]
    assert found["layers"] == written[0]["layers"]  # traces depend on the run alone
    assert "accuracy" not in found["front"][0] and "accuracy" in found["result"]
    shown = capsys.readouterr().out
    lines = shown.splitlines()
    for layer in found["layers"]:
        (line,) = [line for line in lines if line.startswith(layer["path"])]
        assert line.split()[-1] == str(found["assignment"][layer["path"]])
    assert "Conv_0 (8 bits), logits (8 bits)" in shown and "nothing was retrained" in shown
    assert len([line for line in lines if line.startswith(("8 bits", "4 bits", "2 bits", "chosen"))]) == 4


@pytest.mark.slow
def test_activations_that_have_their_own_schedule_keep_it(tmp_path):
    config = small_config("digits_mlp", "constant", train__steps=3, schedule__bits=4)
    with config.unlocked():
        config.schedule.acts.update(name="constant", bits=6)
    train(config, str(tmp_path), quiet=True)
    found = search_run(tmp_path, "bytes", 10**6, (4, 2), batches=1, draws=2, points=2)
    assert found["activations"] == 6
    experiment = build(config)
    plan = experiment.qmodel.plan(jax.ShapeDtypeStruct((1, 8, 8, 1), "float32"), train=False)
    for width in (4, 2):
        bits = Precision(weights=width, acts=6)
        assert found["uniform"][str(width)]["bitops"] == cost.bitops(plan.ops, bits, ("forward",))
    expected = Evaluator(experiment, make_mesh())(final_state(config, tmp_path))
    assert found["uniform"]["4"]["accuracy"] == expected["test_accuracy"]


MISTAKES = {
    "unit": (["--budget", "bit=3"], "Did you mean 'bits'"),
    "no number": (["--budget", "bits="], "--budget 'bits='"),
    "two points": (["--budget", "bits=3.3.3"], "'3.3.3' is no number"),
    "zero": (["--budget", "bits=0"], "'0' is no number above 0"),
    "infeasible": (["--budget", "bits=1.9"], "widths 8, 4, 2 the model takes from 2 to 8 bits; give at least 2"),
    "infeasible bytes": (["--budget", "bytes=10"], "the model takes from"),
    "widths": (["--budget", "bits=3", "--widths", "8;4"], "--widths '8;4'"),
    "one width": (["--budget", "bits=3", "--widths", "8"], "nothing to choose"),
    "batches": (["--budget", "bits=3", "--batches", "0"], "--batches 0"),
    "draws": (["--budget", "bits=3", "--draws", "0"], "--draws 0"),
    "front": (["--budget", "bits=3", "--front", "1"], "--front 1"),
    "no budget": ([], "--budget"),
    "flag": (["--budget", "bits=3", "--width", "8"], "Did you mean '--widths'"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes(run, name, tmp_path, capsys):
    arguments, message = MISTAKES[name]
    widths = [] if any(a.startswith("--width") for a in arguments) else ["--widths", "8,4,2"]
    out = tmp_path / "out"
    command = ["search", "--workdir", str(run[0]), "--out", str(out), *widths, *arguments]
    assert main.main(command) == 2
    shown = capsys.readouterr()
    assert message in shown.err and shown.err.count("\n") == 1 and not shown.out and not out.exists()


def test_runs_that_cannot_be_searched(run, tmp_path):
    with pytest.raises(UsageError, match="not trained at several widths"):
        search_run(run[0], "bits", 3)
    with pytest.raises(UsageError, match=r"config\.json"):
        search_run(tmp_path / "nothing", "bits", 3, (8, 4))
    file = tmp_path / "file"
    file.touch()
    assert main.main(["search", "--workdir", str(run[0]), "--budget", "bits=3", "--out", str(file / "x"), *SHORT]) == 2


@pytest.mark.slow
def test_norm_statistics_are_estimated_anew_where_evaluations_do(tmp_path):
    config = base_config("cifar10_resnet20")
    config.schedule.update(name="constant", bits=8)
    config.eval.reestimate_batches = 2
    config = finish(config, "smoke")
    train(config, str(tmp_path), quiet=True)
    found = search_run(tmp_path, "bits", 4, (8, 4), batches=1, draws=2, points=2)
    expected = Evaluator(build(config), make_mesh())(final_state(config, tmp_path))
    np.testing.assert_allclose(found["uniform"]["8"]["loss"], expected["test_loss"], rtol=1e-5)
    config.unlock()
    config.eval.reestimate_batches = 0
    without = Evaluator(build(config), make_mesh())(final_state(config, tmp_path))
    assert abs(without["test_loss"] - expected["test_loss"]) > 1e-3  # so that the line above says something
