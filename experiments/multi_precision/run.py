"""One network at 8, 6, 4 and 2 bits: trained jointly or apart, ALRS read four ways, HASB and search, two shifts.

    python experiments/multi_precision/run.py                  # everything that is missing; MNIST from $TFDS_DATA_DIR
    python experiments/multi_precision/run.py --only digits    # some groups

A row is appended to ``results.jsonl`` for each run, with the command that does the same; what is there is not run
again. Each run is one of ``qtrain train``, in this process, so its seconds include compilation.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import json
import os
import tempfile
import time
from pathlib import Path
from typing import Any

import arms as study
import jax
import numpy as np
from absl import flags
from arms import Arm

from qtrain import data, export, overrides
from qtrain.export.command import export_run
from qtrain.quantizers.double_rounding import bare_shift
from qtrain.search.run import search_run
from qtrain.train import train

HERE = Path(__file__).parent
ROOT = HERE.parents[1]


def run(arm: Arm, seed: int) -> dict[str, Any]:
    """One run, and what is measured of its model."""
    arguments = arm.arguments(seed)
    path = [str(ROOT / each) if each == arm.config else each for each in arguments]
    config = overrides.parse("train", flags.FlagValues(), [*path, "--config.eval.every_percent=0"])
    with tempfile.TemporaryDirectory() as folder:
        start, busy = time.perf_counter(), time.process_time()
        summary = train(config, folder, quiet=True)
        seconds, busy = time.perf_counter() - start, time.process_time() - busy
        row = {
            "group": arm.group,
            "name": arm.name,
            "task": arm.task,
            "widths": arm.widths,
            "seed": seed,
            "accuracy": {str(width): summary[f"test_accuracy_{width}bit"] for width in arm.widths},
            "train_loss": summary["train_loss"],
            "compilations": summary["compilations"],
            "seconds": round(seconds, 1),
            "cpu_seconds": round(busy, 1),
        }
        if arm.widths == study.WIDTHS:
            row |= stored(folder, config, arm)
    return {**row, **provenance(arguments, arm)}


def stored(folder: str, config: Any, arm: Arm) -> dict[str, Any]:
    """What the one file takes, whether it gives evaluation's accuracy, what a bare shift gives; mixed widths."""
    out = Path(folder) / "model.safetensors"
    report = export_run(folder, out)
    exported = export.load(out)
    dataset = data.load(config.data)
    found = {
        "file_bytes": report.bytes,
        "float_bytes": report.float_bytes,
        "rounded_shift": {str(width): accuracy(exported.at(width), dataset) for width in arm.widths},
        "bare_shift": {str(width): accuracy(barely(exported, width), dataset) for width in arm.widths},
    }
    if arm.task == "digits_resnet":
        found["mixed"] = mixed(folder)
    return found


def barely(exported: Any, width: int) -> Any:
    """The model at `width` with codes that are shifted and not rounded."""
    narrow = exported.at(width)
    stored = {}
    for name, kept in narrow.stored.items():
        wide = exported.stored[name]
        by = wide.bits - kept.bits
        stored[name] = dataclasses.replace(kept, codes=bare_shift(wide.codes, by, wide.bits)) if by else kept
    return dataclasses.replace(narrow, stored=stored)


def accuracy(exported: Any, dataset: Any) -> float:
    """On the test set."""
    correct = count = 0.0
    for rows in data.eval_batches(dataset, "test", 1000):
        predicted = np.argmax(np.asarray(exported.logits(rows["image"])), -1)
        correct += float(np.sum((predicted == rows["label"]) * rows["mask"]))
        count += float(np.sum(rows["mask"]))
    return correct / count


def provenance(arguments: list[str], arm: Arm) -> dict[str, Any]:
    """Command, date and machine of a row."""
    quoted = [f'"{argument}"' if "(" in argument else argument for argument in arguments]
    folder = " --config.data.dir=$TFDS_DATA_DIR" if arm.task == "mnist_cnn" else ""
    return {
        "command": f"qtrain train {' '.join(quoted)}{folder} --workdir WORKDIR",
        "date": datetime.date.today().isoformat(),
        "hardware": f"{os.cpu_count()} CPU cores (shared)",
        "jax": jax.__version__,
    }


def mixed(folder: str) -> list[dict[str, Any]]:
    """Assignments by `qtrain search` at average widths that a uniform one has, and between; without retraining."""
    rows = []
    for bits in (6, 5, 4, 3, 2.5):
        found = search_run(folder, "bits", bits)
        rows.append({"budget": bits, **found["result"], "assignment": found["assignment"]})
    return rows


def main() -> None:
    """Run what is missing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", default=list(study.GROUPS), choices=list(study.GROUPS))
    parser.add_argument("--seeds", nargs="*", type=int, default=list(study.SEEDS))
    parser.add_argument("--out", type=Path, default=HERE / "results.jsonl")
    arguments = parser.parse_args()
    rows = [json.loads(line) for line in arguments.out.read_text().splitlines()] if arguments.out.exists() else []
    done = {(row["group"], row["name"], row["task"], row["seed"]) for row in rows}
    for seed in arguments.seeds:
        for arm in (arm for name in arguments.only for arm in study.GROUPS[name]()):
            if (arm.group, arm.name, arm.task, seed) in done:
                continue
            row = run(arm, seed)
            jax.clear_caches()
            with arguments.out.open("a") as file:
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
            shown = " ".join(f"{width}: {100 * value:.2f}" for width, value in row["accuracy"].items())
            print(arm.task, arm.group, arm.name, seed, shown, f"{row['seconds']} s", flush=True)


if __name__ == "__main__":
    main()
