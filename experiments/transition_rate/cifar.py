"""A shortened CIFAR-10 run on a CPU: ResNet-20 at W2A2 from a short float run, SGD and SGDT.

Hundreds of steps, where the paper takes 78,000: it shows that the shipped config trains and how the two differ early
on, and says nothing about what they reach.

    python experiments/transition_rate/cifar.py --data-dir FOLDER      # appends to cifar.jsonl what it lacks
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
from pathlib import Path

import jax
from absl import flags

from qtrain import overrides
from qtrain.train import train

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
CONFIG = "configs/cifar10_resnet20_trs.py"
SHORT = (
    "--config.data.batch_size=64",
    "--config.train.log_every_steps=50",
    "--config.eval.every_percent=0",
    "--config.eval.batch_size=500",
    "--config.checkpoint.every_percent=0",
)
ARMS = {
    "float": ("--config.schedule.bits=32", "--config.optimizer.name=sgd"),
    "sgd": ("--config.optimizer.name=sgd",),
    "sgdt": (),
}


def main() -> None:
    """Run what is missing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", default=os.environ.get("TFDS_DATA_DIR", ""))
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--seeds", type=int, nargs="*", default=[0])
    parser.add_argument("--folder", type=Path, default=ROOT / "runs" / "transition_rate_cifar", help="of the runs")
    arguments = parser.parse_args()
    out = HERE / "cifar.jsonl"
    done = [json.loads(line) for line in out.read_text().splitlines()] if out.exists() else []
    for seed in arguments.seeds:
        for arm, own in ARMS.items():
            command = [*SHORT, f"--config.train.steps={arguments.steps}", *own]
            command += [f"--config.seed={seed}", f"--config.data.seed={seed}"]
            shown = " ".join(["qtrain train --config", CONFIG, *command])
            shown += "" if arm == "float" else " --config.init_from=FLOAT"
            if any(row["command"] == shown for row in done):
                continue
            start = "" if arm == "float" else str(arguments.folder / f"float{seed}")
            places = [f"--config.data.dir={arguments.data_dir}", f"--config.init_from={start}"]
            given = ["--config", str(ROOT / CONFIG), *command, *places]
            folder = arguments.folder / f"{arm}{seed}"
            summary = train(overrides.parse("train", flags.FlagValues(), given), str(folder), quiet=True)
            rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
            names = ("step", "loss", "accuracy", "transition/rate", "transition/target", "transition/talr")
            row = {
                "arm": arm,
                "seed": seed,
                **{name: summary[name] for name in ("train_loss", "test_loss", "test_accuracy", "wall_seconds")},
                "course": [{n: each[n] for n in names if n in each} for each in rows if each["kind"] == "train"],
                "command": shown,
                "date": datetime.date.today().isoformat(),
                "hardware": f"{os.cpu_count()} CPU cores (shared)",
                "jax": jax.__version__,
            }
            with out.open("a") as file:
                file.write(json.dumps(row) + "\n")
            print(arm, seed, summary["train_loss"], summary["test_accuracy"], flush=True)


if __name__ == "__main__":
    main()
