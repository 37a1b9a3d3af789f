"""`qtrain fit`: known laws recovered from made-up runs, what runs cannot say, tables and folders, the file."""

import dataclasses
import itertools
import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
from report_runs import write_run

from qtrain import main
from qtrain.errors import UsageError
from qtrain.planner import (
    LAWS,
    Row,
    fit,
    load,
    optimal_fraction,
    plan_budget,
    read_runs,
    save,
    tokens_per_parameter_byte,
)
from qtrain.planner.fit_fraction import vertex
from qtrain.planner.fit_loss import best_fractions

TRUE = {"A": 420.0, "alpha": 0.35, "B": 300.0, "beta": 0.3, "E": 1.7}
WORTH = {2: 0.25, 4: 0.7, 32: 1.0}
SIZES, LENGTHS = (1e6, 3e6, 1e7, 3e7), (2e7, 1e8, 5e8, 2e9)
FRACTIONS = (0.0, 0.05, 0.1, 0.2, 0.4, 0.6, 0.8, 1.0)
DRAWS = 24


def true_loss(params, tokens, bits):
    return TRUE["A"] / (params * WORTH[bits]) ** TRUE["alpha"] + TRUE["B"] / tokens ** TRUE["beta"] + TRUE["E"]


def made(sizes=SIZES, lengths=LENGTHS, widths=WORTH, seeds=2, noise=0.002):
    """Runs of the law above, their losses off by some tenths of a percent."""
    random = np.random.default_rng(3)
    return [
        Row(params, tokens, bits, true_loss(params, tokens, bits) * math.exp(random.normal(0, noise)), seed=str(seed))
        for params, tokens, bits, seed in itertools.product(sizes, lengths, widths, range(seeds))
    ]


def swept(lengths=(1e8, 2e9, 2e10), widths=(2, 4), constant=5.0, seeds=3, noise=0.001):
    """Sweeps over the fraction around the optimum of a fraction law."""
    random = np.random.default_rng(4)
    rows = []
    for tokens, bits in itertools.product(lengths, widths):
        best = optimal_fraction(tokens_per_parameter_byte(1e6, tokens, bits), constant)
        for fraction, seed in itertools.product(FRACTIONS, range(seeds)):
            loss = 3 + 0.3 * (fraction - best) ** 2 + random.normal(0, noise)
            rows.append(Row(1e6, tokens, bits, loss, fraction, str(seed)))
    return rows


@pytest.fixture(scope="module")
def recovered():
    return fit(made(), draws=DRAWS)


def test_the_loss_law_is_recovered(recovered):
    loss = recovered.loss
    for name, value in TRUE.items():
        found = loss.constants[name]
        assert found.identified and found.low <= found.value <= found.high
        assert found.value == pytest.approx(value, rel=0.06), name
        assert math.log(found.high / found.low) < 0.5
    for bits, value in WORTH.items():
        assert loss.efficiency[bits].value == pytest.approx(value, rel=0.03)
    assert loss.reference == 32 and loss.efficiency[32].low == loss.efficiency[32].high == 1
    # Far from the runs too, which no table of them could say.
    law = recovered.loss_law()
    for bits in WORTH:
        assert loss.predict(1e9, 1e11, bits) == pytest.approx(true_loss(1e9, 1e11, bits), rel=0.02)
    assert law.ranges == {"params": (1e6, 3e7), "tokens": (2e7, 2e9)} and law.widths == (2, 4, 32)


def test_residuals(recovered):
    cells = recovered.loss.residuals
    assert len(cells) == len(SIZES) * len(LENGTHS) * len(WORTH) and {cell.n for cell in cells} == {2}
    for cell in cells:
        assert cell.predicted == pytest.approx(true_loss(cell.params, cell.tokens, cell.bits), rel=0.005)
        assert cell.error == pytest.approx(cell.loss / cell.predicted - 1)
    assert 0 < np.std([cell.error for cell in cells]) < 0.004


def test_an_outlier_moves_little(recovered):
    rows = made()
    rows[0] = dataclasses.replace(rows[0], loss=3 * rows[0].loss)
    found = fit(rows, draws=1).loss
    for name in ("alpha", "beta", "E"):
        assert found.value(name) == pytest.approx(recovered.loss.value(name), rel=0.03)


@pytest.mark.parametrize(
    ("rows", "loss", "pattern"),
    [
        (made(sizes=(1e6,)), False, r"no loss law: all 24 runs have 1e\+06 parameters.*add runs of another size"),
        (made(lengths=(1e8,)), True, r"B and beta not identified: all runs have 1e\+08 tokens.*another length"),
        (made(widths=(4,)), True, "eff not identified: all runs have 4 bits"),
        (made(sizes=(1e6, 3e6), lengths=(1e8,), widths=(4,)), False, "2 different sizes, lengths and widths for 3"),
        (made(sizes=(1e6, 1.01e6), noise=0.02), True, r"(A|alpha) not identified: .*, interval .*"),
    ],
)
def test_what_runs_cannot_say(rows, loss, pattern):
    fitted = fit(rows, draws=6)
    assert (fitted.loss is not None) == loss
    assert any(re.search(pattern, note) for note in fitted.notes), fitted.notes
    assert fitted.fraction is None and any("three fractions" in note for note in fitted.notes)


def test_what_is_not_identified_is_warned_of_by_every_plan():
    fitted = fit(swept((2e9,), (4,), noise=0.1), draws=DRAWS)
    assert fitted.fraction is not None and not fitted.fraction.constant.identified
    law = fitted.fraction_law()
    plan = plan_budget(params=1e6, tokens=2e9, bits=4, fraction_law=law)
    warned = [line for line in plan.warnings if "do not identify its constant" in line]
    assert len(warned) == 1 and f"{law.constant:.4g} [" in warned[0]
    assert "95 % interval of the constant [" in plan.as_json()["fraction_law"]["source"]
    loss = dataclasses.replace(LAWS["quest"], doubts=("the runs of the loss law (fitted) do not identify alpha: 1",))
    assert "do not identify alpha" in plan_budget(params=1e6, tokens=2e9, bits=4, loss_law=loss).warnings[-2:][0]


def test_plans_have_the_best_fraction():
    rows = [Row(1e6, 1e8, 4, loss, fraction) for fraction, loss in ((0.1, 3.2), (0.4, 3.0), (0.4, 3.1), (1.0, 3.3))]
    assert [row.loss for row in best_fractions(rows)] == [3.0, 3.1]


def test_the_fraction_law_is_recovered():
    fitted = fit(swept(), draws=DRAWS)
    found = fitted.fraction
    assert found.constant.identified and found.constant.value == pytest.approx(5.0, rel=0.04)
    assert found.constant.low <= found.constant.value <= found.constant.high < 1.3 * found.constant.low
    for cell in found.cells:
        assert cell.used and not cell.edge and cell.optimum == pytest.approx(cell.law, abs=0.05)
        assert cell.low <= cell.optimum <= cell.high
    law = fitted.fraction_law()
    assert (law.low, law.high, law.widths) == (200.0, 8e4, (2, 4))
    assert law.warnings(1e5, 1e6, 4) and not law.warnings(1e3, 1e6, 4)
    assert fitted.loss is None  # one size


def test_sweeps_that_say_nothing():
    at_the_edge = [Row(1e6, 1e8, 4, 3 + fraction, fraction) for fraction in FRACTIONS]
    fitted = fit(at_the_edge, draws=2)
    assert fitted.fraction is None and any("at the lowest fraction, 0: not used" in note for note in fitted.notes)
    short = [Row(1e6, 4e5, 8, 3 + (fraction - 0.3) ** 2, fraction) for fraction in FRACTIONS]
    assert any("S = 0.4, where the fraction law has no value" in note for note in fit(short, draws=2).notes)
    alone = fit([Row(1e6, 1e8, 8, 3 + (fraction - 0.3) ** 2, fraction) for fraction in FRACTIONS], draws=2)
    assert alone.fraction.cells[0].optimum == pytest.approx(0.3)
    assert alone.fraction.constant.value == pytest.approx(-math.log(0.3) * math.log(100), rel=1e-3)
    assert not alone.fraction.constant.identified
    assert any("one S (100) alone" in note for note in alone.notes)


@pytest.mark.parametrize("best", [0.07, 0.3, 0.55, 0.9])
def test_vertex(best):
    fractions = np.array(FRACTIONS)
    assert vertex(fractions, 2 + 3 * (fractions - best) ** 2) == pytest.approx(best)
    assert vertex(fractions, fractions) == 0.0 and vertex(fractions, -fractions) == 1.0
    assert vertex(fractions, np.ones(len(fractions))) == 0.0


# --- runs


def test_tables(tmp_path):
    (tmp_path / "runs.csv").write_text("params,tokens,bits,fraction,loss\n1e6,2e7,4,0.25,3.5\n1e6,2e7,32,,3.1\n")
    lines = [{"params": 1e6, "tokens": 2e7, "bits": 4, "loss": 3.4, "seed": 7}]
    (tmp_path / "more.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    rows, notes = read_runs([tmp_path / "runs.csv", tmp_path / "more.jsonl"])
    assert not notes
    assert [(row.bits, row.loss, row.fraction, row.seed) for row in rows] == [
        (4, 3.5, 0.25, "0"),
        (32, 3.1, 0.0, "0"),
        (4, 3.4, 1.0, "7"),
    ]


@pytest.mark.parametrize(
    ("name", "content", "pattern"),
    [
        (
            "a.csv",
            "params,tokens,bits\n1,2,4\n",
            "run 1: 'loss' is missing; a run has params, tokens, bits, loss, frac",
        ),
        ("a.csv", "param,tokens,bits,loss\n1,2,4,3\n", "'params' is missing.*Did you mean 'param'"),
        ("a.csv", "params,tokens,bits,loss\n1,2,4,x\n", "loss='x': give a number above 0"),
        ("a.csv", "params,tokens,bits,loss\n1,2,4,nan\n", "loss='nan': give a number above 0"),
        ("a.csv", "params,tokens,bits,loss\n1,2,2.5,3\n", "bits='2.5': give a whole number"),
        ("a.csv", "params,tokens,bits,loss,fraction\n1,2,2,3,40\n", "fraction='40': give a number from 0 to 1"),
        ("a.csv", "", "no run to fit to"),
        ("a.jsonl", "{", "is damaged"),
        ("a.jsonl", "3\n", "run 1: give a mapping"),
        ("a.txt", "", "give a folder of runs, or a table that ends with .csv or .jsonl"),
        ("a.csv", None, "cannot be read"),
    ],
)
def test_damaged_tables(name, content, pattern, tmp_path, capsys):
    if content is not None:
        (tmp_path / name).write_text(content)
    assert main.main(["fit", str(tmp_path / name)]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and re.search(pattern, error), error


def test_folders(tmp_path):
    data = {"data.batch_size": 16, "data.length": 64}
    switched = {"schedule.name": "delayed", "schedule.start_percent": 75.0, "schedule.bits": 4}
    static = {"schedule.name": "constant", "schedule.bits": 3, "seed": 2}
    plain = {"schedule.name": "float", "schedule.grads.name": "float", "schedule.grads.bits": None}
    cyclic = {"schedule.name": "CR", "schedule.low": 3, "schedule.high": 8, "schedule.cycles": 2}
    for name, overrides in (
        ("a", switched),
        ("b", static | {"model.name": "transformer"}),
        ("c", plain),
        ("d", cyclic),
    ):
        write_run(tmp_path / name, data | overrides, test_loss_scheduled=1.5, parameters=5000)
    write_run(tmp_path / "e", data | static, finished=False)
    rows, notes = read_runs([tmp_path])
    assert [(row.params, row.tokens, row.bits, row.fraction, row.seed) for row in rows] == [
        (5000, 1600, 4, 0.25, "0/0"),
        (5000, 1600 * 64, 3, 1.0, "2/0"),
        (5000, 1600, 32, 0.0, "0/0"),
    ]
    assert len(notes) == 2 and "/d: left out: its weights are not float first" in notes[0]
    assert "/e: left out" in notes[1] and "not finished" in notes[1]
    (row, *_), _ = read_runs([tmp_path / "a"], metric="test_loss", tokens_per_step=7)
    assert (row.loss, row.tokens) == (0.5, 700)
    with pytest.raises(UsageError, match=r"--metric test_los: .*there are train_loss, test_loss, test_loss_scheduled"):
        read_runs([tmp_path / "a"], metric="test_los")


# --- the file, and the command


def test_what_is_saved_is_what_is_read(recovered, tmp_path):
    path = tmp_path / "law.json"
    both = dataclasses.replace(recovered, fraction=fit(swept(), draws=2).fraction)
    save(path, both)
    assert load(path) == both
    for content, pattern in (
        ("{", "no JSON"),
        ("{}", "not written by qtrain fit"),
        ('{"program": "qtrain fit"}', "damaged"),
    ):
        path.write_text(content)
        with pytest.raises(UsageError, match=pattern):
            load(path)
    with pytest.raises(UsageError, match="cannot be written"):
        save(tmp_path / "no" / "folder" / "law.json", recovered)


def test_commands(recovered, tmp_path, capsys):
    table, law = tmp_path / "runs.jsonl", str(tmp_path / "law.json")
    table.write_text("".join(json.dumps(dataclasses.asdict(row)) + "\n" for row in swept()))
    assert main.main(["fit", str(table), "--draws", "4", "--out", law]) == 0
    out = capsys.readouterr()
    assert "f* = exp(-a/ln S)" in out.out and f"qtrain plan-budget --law {law}" in out.out
    assert "warning: no loss law" in out.err
    plan = ["plan-budget", "--params", "1e6", "--tokens", "1e9", "--law", law, "--json"]
    assert main.main([*plan, "--bits", "4"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["fraction_law"]["name"] == "fitted" and found["loss_law"]["name"] == "quest"
    assert found["fraction"] == pytest.approx(optimal_fraction(2000, 5.0), abs=0.02)

    save(law, recovered)
    assert main.main([*plan, "--memory", "1MB"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["loss_law"]["name"] == "fitted" and found["fraction_law"]["name"] == "Dremov"
    assert found["bits"] == 4 and found["loss"] == pytest.approx(true_loss(1e6, 1e9, 4), rel=0.01)
    # Float is a width of a fitted law: nothing is quantized then.
    assert main.main([*plan, "--memory", "4MB"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["bits"] == 32 and found["fraction"] == 0

    table.write_text(json.dumps({"params": 1e6, "tokens": 1e8, "bits": 4, "loss": 3.0}) + "\n")
    assert main.main(["fit", str(table)]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert lines[-1].startswith("qtrain: 1 runs identify no law") and len(lines) == 3
    assert main.main(["fit", str(table), "--draws", "0"]) == 2


def test_the_documentation_runs(tmp_path, monkeypatch, capsys):
    text = (Path(__file__).parents[1] / "docs" / "planning.md").read_text()
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    ran = 0
    for language, block in re.findall(r"```(\w*)\n(.*?)```", text, re.DOTALL):
        if language == "python":
            exec(block, names)
        for line in block.splitlines() if not language else ():
            words = line.split("#")[0].split()
            if words[:1] == ["qtrain"] and words[1] in ("plan-budget", "fit"):
                assert main.main(words[1:]) == 0, line
                ran += 1
    assert ran >= 5 and names["plan"].chosen.bits == 4
