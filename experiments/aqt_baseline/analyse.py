"""From the runs of this study alone: results.jsonl, a figure for each family, tables.

python experiments/aqt_baseline/analyse.py runs/aqt_baseline    # reads the runs, writes results.jsonl and the PNGs
python experiments/aqt_baseline/analyse.py --table              # the tables, from results.jsonl and compare.jsonl
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from arms import STATIC

from qtrain.report.runs import find_runs, read_run
from qtrain.statistics import bootstrap_interval
from qtrain.workdir import CONFIG, DONE

HERE = Path(__file__).parent
RESULTS, COMPARED = HERE / "results.jsonl", HERE / "compare.jsonl"
AT = (1, 2, 10, 30, 100, 300, 1000)
"""Steps whose losses are compared."""
COMMAND = (
    "qtrain sweep --config experiments/aqt_baseline/{family}.py --workdir runs/aqt_baseline/{family} --vectorized "
    "--separate"
)


def main() -> None:
    """Read the runs, or the lines there are; print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="?", help="the folder with a sweep for each family below it")
    parser.add_argument("--table", action="store_true", help="from results.jsonl alone")
    arguments = parser.parse_args()
    if arguments.runs:
        lines, curves = read(Path(arguments.runs))
        RESULTS.write_text("".join(json.dumps(line) + "\n" for line in lines))
        draw(lines, curves)
    elif arguments.table:
        lines = [json.loads(line) for line in RESULTS.read_text().splitlines()]
    else:
        parser.error("give the folder of the runs, or --table")
    print(tables(lines))


def read(root: Path) -> tuple[list[dict[str, Any]], dict[str, np.ndarray]]:
    """A line for each finished run, and the loss of each of its steps."""
    lines, curves = [], {}
    for family in sorted(path.name for path in root.iterdir() if path.is_dir()):
        for folder in find_runs([root / family]):
            if not (folder / DONE).exists():
                print(f"{folder} has not finished: left out")
                continue
            notes: list[str] = []
            run = read_run(folder, notes)
            print(*notes, sep="\n", end="\n" if notes else "")
            environment = json.loads((folder / CONFIG).read_text())
            name, bits = run.config["schedule.name"], run.config["schedule.bits"]
            backend = run.config["quant.backend"]
            arm = {"float": "float32", "CR": "qtrain CR"}.get(name, f"{backend} {bits}")
            line = {
                "family": family,
                "run": folder.name,
                "command": COMMAND.format(family=family),
                "arm": arm,
                "seed": run.config["seed"],
                **{key: value for key, value in run.values.items() if key.startswith("test_")},
                "effective_bitops": run.values.get("effective_bitops"),
                "steps": run.step,
                "loss_at": {str(step): float(run.curve.loss[step - 1]) for step in AT if step <= run.step},
                "versions": environment["versions"],
                "hardware": f"{environment['device']}, {environment.get('cores')} cores, {platform.machine()}",
                "date": datetime.datetime.fromtimestamp((folder / DONE).stat().st_mtime).date().isoformat(),
            }
            lines.append(line)
            curves[f"{family}/{folder.name}"] = run.curve.loss
    return lines, curves


def by_seed(lines: Sequence[dict[str, Any]], family: str, arm: str) -> dict[int, dict[str, Any]]:
    """The lines of an arm."""
    return {line["seed"]: line for line in lines if line["family"] == family and line["arm"] == arm}


def families(lines: Iterable[dict[str, Any]]) -> list[str]:
    """In order of their names."""
    return sorted({line["family"] for line in lines})


def tables(lines: Sequence[dict[str, Any]]) -> str:
    """Numerics at one state; the losses of runs of AQT and qtrain, step by step; the results of the arms."""
    parts = []
    if COMPARED.exists():
        rows = ["| family | bits | loss: largest | gradients: largest | median | moved by 1 ulp, step 100 |"]
        rows.append("|---|---|---|---|---|---|")
        for line in map(json.loads, COMPARED.read_text().splitlines()):
            gradients, apart = line["same_state_gradients"], line["moved_by_one_ulp_loss"]
            numbers = (line["same_state_loss"]["largest"], gradients["largest"], gradients["median"], apart.get("100"))
            shown = " | ".join("–" if number is None else f"{number:.1e}" for number in numbers)
            rows.append(f"| {line['family']} | {line['bits']} | {shown} |")
        parts.append("\n".join(rows))
    rows = [f"| family | bits | {' | '.join(f'step {step}' for step in AT)} |", "|---" * (2 + len(AT)) + "|"]
    for family in families(lines):
        for bits in STATIC:
            pairs = paired(lines, family, f"aqt {bits}", f"qtrain {bits}")
            if pairs:
                rows.append(f"| {family} | {bits} | {' | '.join(_apart(pairs, step) for step in AT)} |")
    parts.append("\n".join(rows))
    rows = ["| family | arm | n | test accuracy, % | test loss | loss − AQT's at 8 bits [95 %] | BitOps |"]
    rows.append("|---" * 7 + "|")
    for family in families(lines):
        for arm in ("float32", "aqt 8", "qtrain 8", "aqt 4", "qtrain 4", "qtrain CR"):
            mine = by_seed(lines, family, arm)
            if not mine:
                continue
            accuracy = 100 * np.mean([line["test_accuracy"] for line in mine.values()])
            loss = np.mean([line["test_loss"] for line in mine.values()])
            pairs = paired(lines, family, "aqt 8", arm)
            differences = [after["test_loss"] - before["test_loss"] for before, after in pairs]
            shown = "–"
            if differences and arm != "aqt 8":
                found = bootstrap_interval(differences)
                shown = f"{found.estimate:+.4f}" + (f" [{found.low:+.4f}, {found.high:+.4f}]" if found else "")
            bitops = [line["effective_bitops"] for line in mine.values()]
            cost = "–" if None in bitops else f"{np.mean(bitops):.3e}"
            rows.append(f"| {family} | {arm} | {len(mine)} | {accuracy:.2f} | {loss:.4f} | {shown} | {cost} |")
    parts.append("\n".join(rows))
    return "\n\n".join(parts)


def paired(lines: Sequence[dict[str, Any]], family: str, one: str, other: str) -> list[tuple[Any, Any]]:
    """The lines of two arms at the seeds that both have."""
    left, right = by_seed(lines, family, one), by_seed(lines, family, other)
    return [(left[seed], right[seed]) for seed in sorted(left.keys() & right.keys())]


def _apart(pairs: Sequence[tuple[Any, Any]], step: int) -> str:
    """The largest relative difference of the losses of a step over the seeds."""
    found = [abs(b["loss_at"][str(step)] / a["loss_at"][str(step)] - 1) for a, b in pairs if str(step) in a["loss_at"]]
    return f"{max(found):.1e}" if found else "–"


def draw(lines: Sequence[dict[str, Any]], curves: dict[str, np.ndarray]) -> None:
    """The losses of AQT and of qtrain over the steps, and how far they are apart."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    for family in families(lines):
        figure, (above, below) = plt.subplots(2, len(STATIC), figsize=(8, 5), sharex=True, squeeze=False)
        for column, bits in enumerate(STATIC):
            for one, other in paired(lines, family, f"aqt {bits}", f"qtrain {bits}"):
                a, b = (curves[f"{family}/{line['run']}"] for line in (one, other))
                steps = np.arange(1, len(a) + 1)
                label = one["seed"] == 0
                above[column].plot(steps, a, color="tab:orange", lw=1.6, label="AQT" if label else None)
                above[column].plot(steps, b, color="tab:blue", lw=0.6, label="qtrain" if label else None)
                below[column].plot(steps, np.abs(a - b) / np.abs(a), ".", ms=2, label=f"seed {one['seed']}")
            above[column].set_title(f"{family}, static {bits} bits", fontsize=9)
            above[column].set_yscale("log")
            below[column].set_yscale("log")
            below[column].set_xlabel("step")
        above[0].set_ylabel("training loss")
        below[0].set_ylabel("relative difference")
        above[0].legend(fontsize=7)
        below[0].legend(fontsize=7)
        figure.tight_layout()
        figure.savefig(HERE / f"{family}.png", dpi=130)
        plt.close(figure)


if __name__ == "__main__":
    main()
