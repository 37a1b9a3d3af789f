"""Runs the tables of this folder's README and writes one JSON line a run: config, overrides, seed, summary.

    python experiments/families/run.py --data-dir FOLDER [--only digits resnet] [--seeds 0 1 2]
    python experiments/families/run.py --table    # the lines as a Markdown table, a line an arm
    python experiments/families/run.py --families # a line a family

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
CYCLIC = ("--config.schedule.low=3",)
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
TEXTS = ("tiny_shakespeare", "python_reference")
ARMS = {"float32": FLOAT, "static 8": STATIC[8], "static 4": STATIC[4], "CR 3-8": CYCLIC}
FAMILIES = {
    "resnet": "digits_resnet_cpt",
    "mobilenet": "digits_mobilenet_cpt",
    "vit": "digits_vit_cpt",
    "transformer": "tiny_shakespeare_transformer_cpt",
    "s5": "sequential_digits_s5_cpt",
    "gcn": "cora_gcn_cpt",
    "lstm": "python_reference_lstm_cpt",
    "detect": "digit_scenes_detect_cpt",
}
SCHEDULED = {"transformer": "CR 4-8"}  # the arm that stands for CR 3-8
RUNS |= {family: [(config, arm, flags) for arm, flags in ARMS.items()] for family, config in FAMILIES.items()}
RUNS["transformer"].append(("tiny_shakespeare_transformer_cpt", "CR 4-8", ()))


def main() -> None:
    """Run what is missing."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data-dir", default=os.environ.get("TFDS_DATA_DIR", ""))
    parser.add_argument("--only", nargs="*", default=list(RUNS))
    parser.add_argument("--seeds", nargs="*", type=int, default=[0, 1, 2])
    parser.add_argument("--table", action="store_true")
    parser.add_argument("--families", action="store_true")
    arguments = parser.parse_args()
    path = HERE / "results.jsonl"
    done = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    if arguments.table:
        print(table(done))
        return
    if arguments.families:
        print(families(done))
        return
    for group in arguments.only:
        for config, arm, overrides in RUNS[group]:
            for seed in arguments.seeds:
                if any((row["config"], row["arm"], row["seed"]) == (config, arm, seed) for row in done):
                    continue
                row = run(config, arm, overrides, seed, arguments.data_dir)
                with path.open("a") as file:
                    file.write(json.dumps(row) + "\n")
                print(config, arm, seed, quality(row), flush=True)


def quality(row: dict[str, Any]) -> float:
    """What a run is judged by, on the test split: the loss in nats a byte, or in % the mAP@.5 or the accuracy."""
    summary = row["summary"]
    if row["config"].startswith(TEXTS):
        return summary["test_loss"]
    return 100 * summary.get("test_map50", summary.get("test_accuracy"))


def measured(rows: list[dict[str, Any]], config: str, arm: str) -> str:
    """Mean, range and number of seeds of an arm."""
    values = [quality(row) for row in rows if (row["config"], row["arm"]) == (config, arm)]
    if not values:
        return ""
    digits = 3 if config.startswith(TEXTS) else 2
    mean = f"{statistics.mean(values):.{digits}f}"
    if len(values) == 1:
        return f"{mean} (n = 1)"
    return f"{mean} ({min(values):.{digits}f}–{max(values):.{digits}f}, n = {len(values)})"


def table(rows: list[dict[str, Any]]) -> str:
    """One line an arm: the measure over the seeds, saving, wall time."""
    lines = ["| config | precision | measure, mean (range) | saving | wall time |", "|---|---|---|---|---|"]
    for config, arm in dict.fromkeys((row["config"], row["arm"]) for row in rows):
        summaries = [row["summary"] for row in rows if (row["config"], row["arm"]) == (config, arm)]
        seconds = [summary["wall_seconds"] for summary in summaries]
        lines.append(
            f"| `{config}` | {arm} | {measured(rows, config, arm)} | {100 * summaries[0]['saving']:.1f} % "
            f"| {min(seconds):.0f}–{max(seconds):.0f} s |"
        )
    return "\n".join(lines)


def families(rows: list[dict[str, Any]]) -> str:
    """One line a family: the measure of each arm; BitOps of a run of CR, what they save of static 8, its time."""
    head = ["family", "config", *ARMS, "BitOps of CR", "time"]
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for family, config in FAMILIES.items():
        scheduled = SCHEDULED.get(family, "CR 3-8")
        cyclic = [row["summary"] for row in rows if (row["config"], row["arm"]) == (config, scheduled)]
        if not cyclic:
            continue
        seconds = [one["wall_seconds"] for one in cyclic]
        cost = f"{cyclic[0]['effective_bitops']:.2e} (−{100 * cyclic[0]['saving']:.0f} %)"
        cells = [measured(rows, config, arm) or "–" for arm in list(ARMS)[:-1]]
        last = measured(rows, config, scheduled) + ("" if scheduled == "CR 3-8" else f", {scheduled}")
        cells = [family, f"`{config}`", *cells, last, cost, f"{statistics.mean(seconds):.0f} s"]
        lines.append(f"| {' | '.join(cells)} |")
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
