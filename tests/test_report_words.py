"""``qtrain report``: what it refuses, and its words for metrics, schedules, points and numbers."""

import re
from pathlib import Path

import pytest
from report_runs import STATIC, write_run

from qtrain import main
from qtrain.data.registry import DATASETS, _is_text
from qtrain.report import find_runs, make_report, read_runs
from qtrain.report.labels import PROFILES, describe_schedules, label_points
from qtrain.report.points import make_families, natural
from qtrain.report.quality import TEXT, Metric
from qtrain.report.tables import si
from qtrain.schedules import SUITE


@pytest.mark.parametrize(
    ("name", "less"),
    [
        ("test_accuracy", False),
        ("saving", False),
        ("test_accuracy_4bit", False),
        ("test_loss_float", True),
        ("test_error", True),
        ("stored_bytes", True),
        ("effective_bitops", True),
        ("wall_seconds", True),
    ],
)
def test_whether_less_is_better(name, less):
    assert Metric(name).direction == ("less is better" if less else "more is better")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "required: RUN_OR_SWEEP"),
        (["absent"], "does not exist"),
        (["empty"], "'empty' is empty: no config.json"),
        (["other"], "'other' holds no run"),
        (["run/DONE"], "is a file"),
        (["run/metrics.jsonl"], "no file of runs"),
        (["run", "--rows", "runs.json"], "must end in .jsonl"),
        (["run", "--rows", "absent/runs.jsonl"], "in a folder that is there"),
        (["broken"], "no run can be reported on: broken: left out: its config.json is damaged"),
        (["strange"], "its config.json was not written by qtrain"),
        (
            ["run", "--compare", "schedule.nme"],
            "no run has such a key; these differ: none. Did you mean 'schedule.name'?",
        ),
        (["run", "--compare", "model.name"], "it is mlp in every run"),
        (["run", "--compare", "model.name=mlp"], "two different values"),
        (["three", "--compare", "schedule.bits"], "it has 3 values, 3, 4, 5; name two, schedule.bits=A,B"),
        (["three", "--compare", "schedule.bits=3,7"], "no run has '7'; there are 3, 4, 5"),
        (["run", "--metric", "test_acuracy"], "Did you mean 'test_accuracy'?"),
        (["run", "--draws", "10"], "at least 100"),
        (["run", "--level", "95"], "from 0.5 to below 1"),
        (["run", "--outt", "x"], "Did you mean '--out'?"),
        (["run", "--out", "other"], "holds something else"),
        (["run", "--out", "run/metrics.jsonl"], "is a file"),
        (["run", "--out", "run/DONE/report"], "cannot be written"),
    ],
)
def test_refusals(arguments, words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write_run("run", {**STATIC, "schedule.bits": 4})
    for bits in (3, 4, 5):
        write_run(f"three/{bits}", {**STATIC, "schedule.bits": bits})
    for name in ("empty", "other/inner", "broken", "strange"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "other" / "notes.txt").write_text("a file")
    (tmp_path / "broken" / "config.json").write_text("{")
    (tmp_path / "strange" / "config.json").write_text("{}")
    assert main.main(["report", *arguments]) == main.USAGE_ERROR
    said = capsys.readouterr()
    assert words in said.err and said.err.count("\n") == 1 and said.out == ""
    assert not (tmp_path / "report").exists()


def test_schedules_have_their_usual_names():
    for name, fields in SUITE.items():
        written = {"schedule.name": "cyclic", "schedule.low": 3, "schedule.high": 8, "schedule.weights.low": 4}
        written |= {f"schedule.{key}": value for key, value in fields.items()}
        assert describe_schedules(written, grads=False) == f"w {name} 4–8, a {name} 3–8"
    assert set(PROFILES) == {fields["profile"] for fields in SUITE.values()}
    written = {"schedule.name": "window", "schedule.low": 3, "schedule.high": 8, "schedule.start_percent": 20.0}
    written |= {"schedule.length_steps": 500, "schedule.grads.name": "float"}
    assert describe_schedules(written) == "3 bits at 20 % for step 500, else 8 bits, g float"


def test_labels_tell_points_apart_and_no_more():
    keys = ["schedule.name", "schedule.bits", "schedule.cycles", "quant.weights", "optimizer.learning_rate"]
    values = [
        ("constant", 4, 8, "symmetric/channel", 0.1),
        ("constant", 8, 8, "symmetric/channel", 0.1),
        ("constant", 8, 8, "nested/row", 0.1),
        ("constant", 8, 8, "nested/row", 0.2),
        ("constant", 8, 4, "nested/row", 0.2),
    ]
    configs = [dict(zip(keys, each, strict=True)) for each in values]
    assert label_points(configs, keys) == [
        "4 bits",
        "8 bits, quant.weights=symmetric/channel",
        "8 bits, quant.weights=nested/row, learning_rate=0.1",
        "8 bits, quant.weights=nested/row, learning_rate=0.2, cycles=8",
        "8 bits, quant.weights=nested/row, learning_rate=0.2, cycles=4",
    ]


def test_text_is_judged_by_its_loss():
    assert {name for name in DATASETS if _is_text(name)} == set(TEXT)


def test_order_and_numbers():
    assert sorted(["10 bits", "9 bits", "1.5", "x", ""], key=natural) == ["", "1.5", "9 bits", "10 bits", "x"]
    assert [si(value) for value in (999.96, 1234567, 1e9, 9.9999e5, 0.5)] == [
        "1.000 k",
        "1.235 M",
        "1.000 G",
        "1.000 M",
        "0.5",
    ]


def test_the_code_of_the_documentation_runs():
    text = (Path(__file__).parents[1] / "docs" / "report.md").read_text()
    names: dict = {}
    for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL):
        exec(block, names)
    assert names["front"].tolist() == [0, 1]


def test_families_without_a_finished_run(tmp_path):
    runs = read_runs(find_runs([write_run(tmp_path / "run", STATIC, finished=False)]), [])
    (family,) = make_families(runs, [])
    assert [point.number for point in family.points] == [0]
    assert "courses_digits_test_accuracy.png" in make_report(runs).files
