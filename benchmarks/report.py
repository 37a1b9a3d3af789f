"""What `qtrain report` takes on a large sweep: made-up runs in the files of real ones, reported by the command.

A sweep of static widths of weights × activations, cyclic schedules and learning rates, each point with several seeds;
every run has its config.json, its rows of training and evaluation in metrics.jsonl and its summary.json. Writing them
is not measured. The command runs as a process of its own, whose wall time (with loading Python and matplotlib) and
largest memory are taken.

    python benchmarks/report.py --runs 1000 --rows 500 --out benchmarks/report.jsonl
"""

from __future__ import annotations

import argparse
import copy
import datetime
import itertools
import json
import math
import os
import random
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

LAYERS = ("Dense_0/kernel", "Dense_1/kernel", "Dense_2/kernel")


def points() -> Iterator[dict[str, Any]]:
    """Overrides of the config by dotted key, one mapping a point, without end."""
    for rate in itertools.count(1):
        common = {"optimizer.learning_rate": 0.001 * rate}
        for weights, acts in itertools.product(range(2, 9), repeat=2):
            widths = {"schedule.weights.bits": weights, "schedule.acts.bits": acts}
            yield {**common, "schedule.name": "constant", "schedule.bits": 8, **widths}
        for name, low in itertools.product(("CR", "CT", "LR", "LT", "ER", "ETV", "ETH", "RR", "RTV", "RTH"), (3, 4)):
            yield {**common, "schedule.name": name, "schedule.low": low, "schedule.high": 8, "schedule.cycles": 8}


def write_run(folder: Path, base: dict[str, Any], overrides: dict[str, Any], seed: int, rows: int) -> None:
    """A finished run: `rows` lines of metrics, every tenth an evaluation."""
    config = copy.deepcopy(base)
    for key, value in {**overrides, "seed": seed, "data.seed": seed, "train.steps": 10 * rows}.items():
        *sections, name = key.split(".")
        section = config
        for part in sections:
            section = section[part]
        section[name] = value
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({"program": "qtrain", "config": config, "choices": {}}, indent=2))
    rng = random.Random(repr((overrides, seed)))
    static = "schedule.weights.bits" in overrides
    weights, acts = overrides.get("schedule.weights.bits", 6), overrides.get("schedule.acts.bits", 6)
    cost = 1e9 * rows * (weights * acts + 8 * weights + 8 * acts) / 192 * (1 if static else rng.uniform(0.9, 1.1))
    best = 0.97 - 0.4 * math.exp(-weights) - 0.5 * math.exp(-acts) + rng.gauss(0, 0.003)
    lines = []
    for row in range(1, rows + 1):
        step, loss = 10 * row, 2.3 * math.exp(-5 * row / rows) + 0.05 + rng.uniform(0, 0.02)
        spent = cost * row / rows
        if row % 10 == 0:
            evaluated = {f"test_{what}{at}": value for at in ("", "_scheduled", "_float") for what, value in (
                ("loss", loss), ("accuracy", best * row / rows))}  # fmt: skip
            lines.append({"step": step, "kind": "eval", **evaluated, "effective_bitops": spent})
            continue
        bits = (weights, acts) if static else (3 + row % 6, 3 + row % 6)
        lines.append(
            {
                "step": step,
                "kind": "train",
                "loss": loss,
                "accuracy": best * row / rows,
                **{name: rng.random() for name in ("grad_norm", "update_norm", "grad_norm_ratio_on_change")},
                "update_norm_ratio_on_change": None,
                "bits_changes": 0.1,
                **{f"size/{layer}/bits": rng.uniform(2, 8) for layer in LAYERS},
                "size/bytes": 1000.0 * weights,
                "effective_bitops": spent,
                "learning_rate": 0.001,
                **dict(zip(("bits_weights", "bits_acts", "bits_grads"), map(float, (*bits, 8)), strict=True)),
                "steps_per_second": 100 * rng.random(),
            }
        )
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    summary = {"steps": 10 * rows, "train_loss": loss, "test_loss": loss, "test_accuracy": best, "wall_seconds": 10.0}
    summary |= {"effective_bitops": cost, "saving": 0.1, "stored_bytes": 1000 * weights, "parameters": 8000}
    (folder / "summary.json").write_text(json.dumps(summary, indent=2))
    (folder / "DONE").touch()


def main() -> None:
    """Write, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=1000)
    parser.add_argument("--rows", type=int, default=500, help="lines of metrics a run")
    parser.add_argument("--seeds", type=int, default=3, help="runs a point")
    parser.add_argument("--out", help="file to append the JSON line to")
    arguments = parser.parse_args()
    from qtrain.config import base_config

    base = base_config("digits_mlp").to_dict()
    with tempfile.TemporaryDirectory(prefix="qtrain-report-") as scratch:
        sweep, report = Path(scratch, "sweep"), Path(scratch, "report")
        for index, (overrides, seed) in enumerate(
            itertools.islice(
                itertools.product(_some(arguments.runs, arguments.seeds), range(arguments.seeds)), arguments.runs
            )
        ):
            write_run(sweep / f"{index:05}", base, overrides, seed, arguments.rows)
        size = sum(path.stat().st_size for path in sweep.rglob("metrics.jsonl"))
        command = [sys.executable, "-m", "qtrain.main", "report", str(sweep), "--out", str(report)]
        start = time.perf_counter()
        printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        wall = time.perf_counter() - start
        used = resource.getrusage(resource.RUSAGE_CHILDREN)
        files = list(report.iterdir())
        row = {
            "what": "report",
            "runs": arguments.runs,
            "rows": arguments.rows,
            "seeds": arguments.seeds,
            "metrics_bytes": size,
            "wall_seconds": round(wall, 2),
            "cpu_seconds": round(used.ru_utime + used.ru_stime, 2),
            "peak_bytes": used.ru_maxrss * (1 if sys.platform == "darwin" else 1024),
            "files": len(files),
            "page_bytes": (report / "index.html").stat().st_size,
            "command": f"python benchmarks/report.py --runs {arguments.runs} --rows {arguments.rows}",
            "date": datetime.date.today().isoformat(),
            "hardware": f"{os.cpu_count()} CPU cores (shared), load {os.getloadavg()[0]:.1f}",
        }
    print(printed, file=sys.stderr, end="")
    print(json.dumps(row))
    if arguments.out:
        with open(arguments.out, "a") as file:
            file.write(json.dumps(row) + "\n")


def _some(runs: int, seeds: int) -> list[dict[str, Any]]:
    return list(itertools.islice(points(), -(-runs // seeds)))


if __name__ == "__main__":
    main()
