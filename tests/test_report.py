"""``qtrain report``: what it says of runs, and what it leaves out and says so."""

import csv
import io
import json
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image
from report_runs import CYCLIC, STATIC, write_run, write_sweep

from qtrain import main
from qtrain.report import courses, find_runs, make_report, read_runs, scatter
from qtrain.report import rows_of as written


def rows_of(report, name):
    """A CSV as mappings."""
    return list(csv.DictReader(io.StringIO(report.files[name].decode())))


@pytest.fixture
def undrawn(monkeypatch):
    """Figures are made and not rendered, which takes most of a report's time."""
    for module in (scatter, courses):
        monkeypatch.setattr(module, "png", lambda figure: b"")


def reported(*folders, **options):
    notes = []
    return make_report(read_runs(find_runs(folders, notes), notes), notes, **options)


@pytest.fixture(scope="module")
def sweep(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sweep")
    return folder, write_sweep(folder)


@pytest.fixture(scope="module")
def report(sweep):
    return reported(sweep[0])


def test_points_are_means_over_seeds(sweep, report):
    rows = rows_of(report, "points_digits_test_accuracy.csv")
    assert [int(row["#"]) for row in rows] == [1, 2, 3, 4, 5, 6]
    assert {row["point"] for row in rows} == {"3 bits", "4 bits", "6 bits", "8 bits", "CR 3–8", "RR 3–8"}
    for row in rows:
        values = [100 * value for (name, _), value in sweep[1].items() if name == row["point"]]
        assert len(values) == int(row["seeds"]) == 3
        mean, low, high = (float(row[f"test accuracy, %{end}"]) for end in ("", " low", " high"))
        assert mean == pytest.approx(np.mean(values))
        assert min(values) <= low <= mean <= high <= max(values)
        assert row["group"] == ("static" if row["point"].endswith("bits") else "scheduled")
    means = [float(row["test accuracy, %"]) for row in rows]
    assert means == sorted(means, reverse=True)
    for cost in ("BitOps", "bytes"):
        for row in rows:
            better = [
                other
                for other in rows
                if float(other[cost]) <= float(row[cost])
                and float(other["test accuracy, %"]) >= float(row["test accuracy, %"])
                and other is not row
            ]
            assert (row[f"front, {cost}"] == "") == bool(better)


def test_comparison_of_groups(sweep, report, undrawn):
    row = rows_of(report, "comparison.csv")[0]
    assert (row["A"], row["B"], row["cost"], row["points of A, B"]) == ("scheduled", "static", "BitOps", "2, 4")

    def mean(name):
        return 100 * np.mean([value for (each, _), value in sweep[1].items() if each == name])

    # Both cover 4.6 to 6.4 G: RR there, then CR; against static 4 bits up to 6 G, then 6 bits.
    edges = np.log10([4.6e9, 6e9, 6.4e9])
    gains = [mean("RR 3–8") - mean("4 bits"), mean("RR 3–8") - mean("6 bits")]
    area = float(np.diff(edges) @ gains)
    assert float(row["area"]) == pytest.approx(area)
    assert float(row["A above B"]) == pytest.approx(area / (edges[-1] - edges[0]))
    assert float(row["from"]) == pytest.approx(4.6e9) and float(row["to"]) == pytest.approx(6.4e9)
    assert float(row["A above B low"]) < float(row["A above B high"])
    assert any("scheduled against static" in line for line in report.said)
    swapped = rows_of(reported(sweep[0], compare_by="schedule", groups=("static", "scheduled")), "comparison.csv")[0]
    assert float(swapped["A above B"]) == pytest.approx(-float(row["A above B"]))


def test_gains_over_the_best_within_the_cost(sweep, report):
    rows = rows_of(report, "gains_BitOps_digits_test_accuracy.csv")
    assert [row["point"] for row in rows] == ["RR 3–8", "CR 3–8"]
    name = "above the best static"
    rivals = {"RR 3–8": ("3 bits", "4 bits"), "CR 3–8": ("3 bits", "4 bits", "6 bits")}
    for row in rows:
        mine = [100 * sweep[1][row["point"], seed] for seed in range(3)]
        best = max(np.mean([100 * sweep[1][rival, seed] for seed in range(3)]) for rival in rivals[row["point"]])
        assert float(row[name]) == pytest.approx(np.mean(mine) - best)
        assert float(row[f"{name} low"]) < float(row[f"{name} high"])


def test_rows_make_the_same_report(sweep, report, tmp_path, undrawn):
    notes = []
    runs = read_runs(find_runs([sweep[0]]), notes)
    (tmp_path / "runs.jsonl").write_text(text := written(runs))
    again = read_runs(find_runs([tmp_path / "runs.jsonl"]), notes)
    assert not notes and [run.values for run in again] == [run.values for run in runs]
    assert [run.config for run in again] == [run.config for run in runs]
    assert written(again) == text
    for name in ("points", "gains_BitOps"):
        table = f"{name}_digits_test_accuracy.csv"
        assert make_report(again).files[table] == report.files[table]
    (tmp_path / "runs.jsonl").write_text(text + '{"no": "run"}\n' + text.splitlines()[1][:40])
    assert len(read_runs(find_runs([tmp_path / "runs.jsonl"]), notes)) == len(runs)
    assert [note.partition(": ")[2] for note in notes] == [
        "the last line is cut off, and ignored",
        f"line {len(runs) + 2} is no row of a run, and ignored",
    ]


def test_rows_of_several_sweeps_keep_their_runs_apart(tmp_path, undrawn):
    """The points of two sweeps are called alike, and each belongs to its own data."""
    for folder, name, accuracy in (("a", "digits", 0.5), ("b", "mnist", 0.75)):
        write_run(tmp_path / folder / "000_seed-0", {"data.name": name}, accuracy=accuracy)
    text = written(read_runs(find_runs([tmp_path / "a", tmp_path / "b"]), []))
    (tmp_path / "runs.jsonl").write_text(text)
    runs = read_runs(find_runs([tmp_path / "runs.jsonl"]), [])
    assert written(runs) == text and len({run.name for run in runs}) == 2
    found = {row["data"]: row for row in rows_of(make_report(runs), "runs.csv")}
    assert {name: float(row["quality"]) for name, row in found.items()} == {"digits": 50.0, "mnist": 75.0}


def test_failed_points_of_a_sweep_are_named(tmp_path, undrawn):
    folder = tmp_path / "sweep"
    write_run(folder / "000_a", STATIC)
    points = [{"index": i, "name": name, "overrides": {}} for i, name in enumerate(("000_a", "001_b", "002_c"))]
    (folder / "sweep.json").write_text(json.dumps({"program": "qtrain sweep", "points": points}))
    (folder / "errors.json").write_text(json.dumps({"001_b": {"kind": "Diverged", "error": "loss is nan at step 3"}}))
    assert reported(tmp_path).notes == (
        f"{folder / '001_b'}: this point failed (Diverged): loss is nan at step 3",
        f"{folder}: 1 of 3 points have not begun, the first 002_c",
    )
    for damaged in ('{"001_b": {}}', '{"001_b": null}', '{"001_b"', "[]"):
        (folder / "errors.json").write_text(damaged)
        said = f"{folder}: sweep.json or errors.json is damaged: points that failed are not known"
        assert reported(tmp_path).notes == (said,)


def test_frontiers_and_sensitivity(report):
    rows = {(row["cost"], row["group"]): row for row in rows_of(report, "frontiers.csv")}
    assert len(rows) == 6
    volumes = {key: float(row["hypervolume"]) for key, row in rows.items()}
    for cost in ("BitOps", "bytes"):
        assert volumes[cost, "all points"] >= max(volumes[cost, "static"], volumes[cost, "scheduled"]) > 0
    assert rows["BitOps", "static"]["rank correlation"] == "1.0"
    assert rows["BitOps", "static"]["rank correlation low"] == ""  # four points: no interval
    curve = rows_of(report, "sensitivity_digits_test_accuracy.csv")
    assert [(row["key"], float(row["bits"])) for row in curve] == [("schedule.bits", float(b)) for b in (3, 4, 6, 8)]
    quality = [float(row["quality"]) for row in curve]
    assert quality == sorted(quality)


def test_figures(report):
    pngs = {name: content for name, content in report.files.items() if name.endswith(".png")}
    assert {name.split("_digits")[0] for name in pngs} == {
        *("pareto_BitOps", "pareto_bytes", "compare_BitOps", "compare_bytes", "courses", "sensitivity_schedule_bits")
    }
    for content in pngs.values():
        image = Image.open(io.BytesIO(content))
        assert min(image.size) > 400
        assert len(image.convert("RGB").getcolors(1 << 24)) > 20


def test_markdown_has_what_the_csv_has(report):
    lines = report.files["points_digits_test_accuracy.md"].decode().splitlines()
    table = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")]
    rows = rows_of(report, "points_digits_test_accuracy.csv")
    assert [row[1] for row in table[2:]] == [row["point"] for row in rows]
    assert table[2][4].startswith(f"{float(rows[0]['test accuracy, %']):.2f} [")
    assert not report.notes


def test_the_command_needs_neither_jax_nor_checkpoints(sweep, tmp_path):
    (sweep[0] / "CR" / "0" / "checkpoints").mkdir(exist_ok=True)
    (sweep[0] / "CR" / "0" / "checkpoints" / "config.json").write_text("not one of a run")
    out = tmp_path / "new" / "report"
    arguments = ["report", str(sweep[0]), "--out", str(out), "--title", "<Suite> & more"]
    code = (
        f"import sys; from qtrain import main; r = main.main({arguments!r}); print('jax' in sys.modules); sys.exit(r)"
    )
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=True)
    *said, last, loaded = done.stdout.splitlines()
    assert loaded == "False" and done.stderr == ""
    assert said[0].startswith("digits: test accuracy: scheduled against static at equal BitOps") and "18 runs" in last
    assert "&lt;Suite&gt; &amp; more" in (out / "index.html").read_text()
    names = {path.name for path in out.iterdir()}
    assert names == {*json.loads((out / ".report.json").read_text())["files"], ".report.json"}
    # The next report into the folder replaces this one, and leaves what is not its own.
    (out / "mine.txt").write_text("kept")
    assert main.main(["report", str(sweep[0] / "static3"), "--out", str(out)]) == 0
    after = {path.name for path in out.iterdir()}
    assert "mine.txt" in after and "comparison.csv" not in after and "index.html" in after


def test_metrics_cut_mid_line(tmp_path, undrawn):
    run = write_run(tmp_path / "run", STATIC, finished=False, bitops=1e9)
    whole = reported(run)
    lines = (run / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    (run / "metrics.jsonl").write_bytes(b"".join(lines) + lines[3][:40])
    cut = reported(run)
    assert cut.notes == (f"{run / 'metrics.jsonl'}: the last line is cut off, and ignored",)
    assert cut.files["runs.csv"] == whole.files["runs.csv"]
    (run / "metrics.jsonl").write_bytes(b"".join([lines[0], b'{"step": 1, \n', b"[3]\n", *lines[1:]]))
    damaged = reported(run)
    assert damaged.notes == (f"{run / 'metrics.jsonl'}: 2 of 13 lines are no rows of metrics, and ignored",)
    assert damaged.files["runs.csv"] == whole.files["runs.csv"]


def test_unfinished_runs_are_marked_and_in_no_mean(tmp_path, undrawn):
    for seed, accuracy in ((0, 0.8), (1, 0.9)):
        write_run(tmp_path / f"{seed}", {**STATIC, "schedule.bits": 4, "seed": seed}, accuracy=accuracy)
    write_run(tmp_path / "2", {**STATIC, "schedule.bits": 4, "seed": 2}, accuracy=0.1, finished=False, rows=4)
    write_run(tmp_path / "3", {**STATIC, "schedule.bits": 8}, accuracy=0.2, finished=False, rows=5)
    write_run(tmp_path / "4", {**STATIC, "schedule.bits": 6}, finished=False)
    (tmp_path / "4" / "metrics.jsonl").unlink()
    found = reported(tmp_path)
    first, second = rows_of(found, "points_digits_test_accuracy.csv")
    assert (first["point"], first["seeds"], first["unfinished"]) == ("4 bits", "2", "1")
    assert float(first["test accuracy, %"]) == pytest.approx(85)
    assert (second["point"], second["seeds"], second["#"], second["test accuracy, %"]) == ("8 bits", "0", "", "")
    runs = {row["run"]: row for row in rows_of(found, "runs.csv")}
    assert len(runs) == 4
    assert runs[str(tmp_path / "2")]["state"] == "unfinished: step 40 of 100"
    assert float(runs[str(tmp_path / "2")]["BitOps"]) == 4e8 and runs[str(tmp_path / "0")]["state"] == "finished"
    assert [note for note in found.notes if "no row yet" in note] == [
        f"{tmp_path / '4'}: left out: it has written no row yet"
    ]


def test_runs_with_different_metrics(tmp_path, undrawn):
    for seed in (0, 1):
        write_run(tmp_path / f"lm{seed}", {"data.name": "text", "seed": seed, **STATIC, "schedule.bits": 4})
        write_run(tmp_path / f"cnn{seed}", {"seed": seed, **STATIC, "schedule.bits": 4})
    write_run(tmp_path / "boxes", STATIC, accuracy=None, test_map50=0.4, test_loss=None)
    write_run(tmp_path / "none", STATIC, accuracy=0.5, test_loss=None, test_accuracy=None, stored=None)
    found = reported(tmp_path)
    assert {name for name in found.files if name.startswith("points_") and name.endswith(".csv")} == {
        f"points_{each}.csv" for each in ("digits_test_accuracy", "digits_test_map50", "text_test_loss")
    }
    assert any(note.startswith("runs with different metrics: digits by test_accuracy") for note in found.notes)
    assert f"{tmp_path / 'none'}: no quality metric; it is in the table of runs alone" in found.notes
    assert len(rows_of(found, "runs.csv")) == 6
    # One metric for all: those that have none of it are named.
    found = reported(tmp_path, metric="test_map50")
    assert sum("no test_map50" in note for note in found.notes) == 5
    assert rows_of(found, "points_digits_test_map50.csv")[0]["test map50, %"] == "40.0"


def test_runs_without_a_size_are_named(tmp_path, undrawn):
    write_run(tmp_path / "a", {**STATIC, "schedule.bits": 4}, stored=None)
    write_run(tmp_path / "b", {**STATIC, "schedule.bits": 6}, stored=500)
    found = reported(tmp_path)
    assert "digits: no bytes recorded by 4 bits: not in the plots against bytes" in found.notes
    assert [row["points"] for row in rows_of(found, "frontiers.csv")] == ["2", "1"]


def test_bytes_go_with_the_quality_at_the_stored_widths(tmp_path, undrawn):
    """A schedule that ends low is stored low, and `test_accuracy` is that of its highest bits."""
    write_run(tmp_path / "a", {"schedule.name": "RR", **CYCLIC}, accuracy=0.9, test_accuracy_scheduled=0.6, stored=100)
    write_run(tmp_path / "b", {**STATIC, "schedule.bits": 8}, accuracy=0.8, stored=200)
    several = {"test_accuracy_8bit": 0.7, "test_accuracy_2bit": 0.5, "test_accuracy_scheduled": 0.5}
    write_run(tmp_path / "c", {"schedule.name": "rounds", "quant.recipe": "multi_precision"}, accuracy=0.7, **several)
    found = reported(tmp_path)
    fronts = {row["cost"]: row["frontier"] for row in rows_of(found, "frontiers.csv") if row["group"] == "all points"}
    assert fronts == {"BitOps": "1", "bytes": "1, 2"}
    points = {row["point"][:2]: row for row in rows_of(found, "points_digits_test_accuracy.csv")}
    assert points["RR"]["test accuracy at the stored widths, %"] == "60.0"
    assert points["8 "]["test accuracy at the stored widths, %"] == ""
    # Of several widths the widest is stored; each is a point of a sensitivity curve.
    assert points["ro"]["test accuracy at the stored widths, %"] == ""
    curve = rows_of(found, "sensitivity_digits_test_accuracy.csv")
    assert [(row["bits"], row["quality"]) for row in curve] == [("2.0", "50.0"), ("8.0", "70.0")]


def test_layers(tmp_path, undrawn):
    for seed, bits in ((0, 4.0), (1, 5.0)):
        layers = {
            "size/Dense_0/kernel/bits": bits,
            "size/bytes": 10.0,
            "width/Dense_0/kernel": bits,
            "width/average": 3,
        }
        write_run(tmp_path / f"{seed}", {**STATIC, "seed": seed}, layers=layers)
    found = reported(tmp_path)
    sizes = rows_of(found, "layers_size_digits_test_accuracy.csv")
    assert [(row["layer"], row["bits"], row["bytes"]) for row in sizes] == [
        ("Dense_0/kernel", "4.5", ""),
        ("(all)", "", "10.0"),
    ]
    widths = rows_of(found, "layers_width_digits_test_accuracy.csv")
    assert [(row["layer"], row["bits"]) for row in widths] == [("Dense_0/kernel", "4.5"), ("(all)", "3.0")]


def test_what_makes_a_point(tmp_path, undrawn):
    """Seeds, folders and how often something is written make no other point; the same run twice is one replicate."""
    base = {**STATIC, "schedule.bits": 4}
    write_run(tmp_path / "a", base)
    write_run(
        tmp_path / "b", {**base, "seed": 1, "data.dir": "elsewhere", "train.log_every_steps": 5, "checkpoint.keep": 9}
    )
    write_run(tmp_path / "c", base)  # the same as a
    write_run(tmp_path / "d", {**base, "seed": 0, "data.seed": 5})
    write_run(tmp_path / "e", {**base, "optimizer.learning_rate": 0.1})
    found = reported(tmp_path)
    points = {row["point"]: row for row in rows_of(found, "points_digits_test_accuracy.csv")}
    assert {name: row["seeds"] for name, row in points.items()} == {
        "learning_rate=0.002": "3",
        "learning_rate=0.1": "1",
    }
    assert f"{tmp_path / 'c'}: the same config and seeds as {tmp_path / 'a'}; the latter counts" in found.notes
    assert points["learning_rate=0.1"]["optimizer.learning_rate"] == "0.1"


def test_each_seed_may_begin_with_a_run_of_its_own(tmp_path, undrawn):
    for seed in (0, 1):
        write_run(tmp_path / f"{seed}", {**STATIC, "seed": seed, "init_from": f"runs/float{seed}"})
    write_run(tmp_path / "scratch", STATIC)
    assert sorted(row["seeds"] for row in rows_of(reported(tmp_path), "points_digits_test_accuracy.csv")) == ["1", "2"]
    write_run(tmp_path / "other", {**STATIC, "init_from": "runs/longer"})  # here it is what differs
    assert len(rows_of(reported(tmp_path), "points_digits_test_accuracy.csv")) == 4


def test_a_damaged_run_does_not_stop_the_others(tmp_path, undrawn):
    write_run(tmp_path / "good", STATIC)
    write_run(tmp_path / "bad", STATIC)
    (tmp_path / "bad" / "summary.json").write_text("{")
    found = reported(tmp_path)
    assert found.notes == (f"{tmp_path / 'bad'}: left out: its summary.json is damaged",)
    assert len(rows_of(found, "runs.csv")) == 1
