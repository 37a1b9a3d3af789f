"""Runs the table of this folder's README and writes one JSON line a run: config, overrides, seed, summary.

    python experiments/first_runs/run.py --data-dir FOLDER [--only digits] [--seeds 0 1 2]
    python experiments/first_runs/run.py --table    # the lines as a Markdown table

Each run is a process of its own, as a user starts it. Lines of runs that are already there are kept.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
FLOAT = ("--config.schedule.name=float", "--config.schedule.grads.name=float")
STATIC = {bits: ("--config.schedule.name=constant", f"--config.schedule.bits={bits}") for bits in (3, 4, 8)}

RUNS = {
    "digits": [
        ("digits_cnn_cpt", "CR 3-8", ()),
        ("digits_cnn_cpt", "float32", FLOAT),
        ("digits_cnn_cpt", "static 8", STATIC[8]),
        ("digits_cnn_cpt", "static 4", STATIC[4]),
        ("digits_cnn_cpt", "static 3", STATIC[3]),
        ("digits_cnn_cpt", "AQT static 8", ("--config.quant.backend=aqt",)),
        ("digits_mlp_cpt", "CR 3-8", ()),
        ("digits_mlp_cpt", "float32", FLOAT),
    ],
    "mnist": [
        ("mnist_mlp_cpt", "CR 3-8", ()),
        ("mnist_mlp_cpt", "float32", FLOAT),
        ("mnist_cnn_cpt", "CR 3-8", ()),
        ("mnist_cnn_cpt", "float32", FLOAT),
    ],
}


def main() -> None:
    """Run what is missing."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data-dir", default=os.environ.get("TFDS_DATA_DIR", ""))
    parser.add_argument("--only", nargs="*", default=list(RUNS))
    parser.add_argument("--seeds", nargs="*", type=int, default=[0, 1, 2])
    parser.add_argument("--table", action="store_true")
    arguments = parser.parse_args()
    path = HERE / "results.jsonl"
    done = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    if arguments.table:
        print(table(done))
        return
    for group in arguments.only:
        for config, arm, overrides in RUNS[group]:
            for seed in arguments.seeds:
                if any((row["config"], row["arm"], row["seed"]) == (config, arm, seed) for row in done):
                    continue
                row = run(config, arm, overrides, seed, arguments.data_dir)
                with path.open("a") as file:
                    file.write(json.dumps(row) + "\n")
                print(config, arm, seed, row["summary"]["test_accuracy"], flush=True)


def table(rows: list[dict[str, Any]]) -> str:
    """One line an arm: mean, lowest and highest test accuracy over the seeds, saving, wall time."""
    lines = ["| config | precision | test accuracy, mean (range) | saving | wall time |", "|---|---|---|---|---|"]
    for config, arm in dict.fromkeys((row["config"], row["arm"]) for row in rows):
        summaries = [row["summary"] for row in rows if (row["config"], row["arm"]) == (config, arm)]
        accuracy = [100 * summary["test_accuracy"] for summary in summaries]
        seconds = [summary["wall_seconds"] for summary in summaries]
        saving = 100 * summaries[0]["saving"]
        mean = statistics.mean(accuracy)
        lines.append(
            f"| `{config}` | {arm} | {mean:.2f} % ({min(accuracy):.2f}–{max(accuracy):.2f}, n = {len(accuracy)}) "
            f"| {saving:.1f} % | {min(seconds):.0f}–{max(seconds):.0f} s |"
        )
    return "\n".join(lines)


def run(config: str, arm: str, overrides: tuple[str, ...], seed: int, data_dir: str) -> dict[str, Any]:
    """One run: its row."""
    flags = [f"configs/{config}.py", *overrides, f"--config.seed={seed}", f"--config.data.seed={seed}"]
    with tempfile.TemporaryDirectory() as folder:
        command = [
            sys.executable,
            "-m",
            "qtrain.main",
            "train",
            "--config",
            *flags,
            "--workdir",
            f"{folder}/run",
            "--quiet",
        ]
        command += [f"--config.data.dir={data_dir}"] if data_dir else []
        subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
        summary = json.loads(Path(folder, "run", "summary.json").read_text())
    return {
        "config": config,
        "arm": arm,
        "seed": seed,
        "command": " ".join(["qtrain train --config", *flags, "--workdir WORKDIR"]),
        "date": datetime.date.today().isoformat(),
        "hardware": f"{os.cpu_count()} CPU cores",
        "summary": summary,
    }


if __name__ == "__main__":
    main()
