"""A sweep in one program against its runs one after another as processes: the same points, in turn, as a ratio.

Each round runs both, in an order that alternates, with loading Python and compiling on each side as a user pays for
them, and no cache of compiled programs: ``qtrain sweep --vectorized``, and ``qtrain sweep --processes N`` (N processes
at a time, by default 1: one after another). Prints a JSON line a case: seconds of each, their middle ratio,
how the points shared the step, how often it was compiled, and whether all finished.

    python benchmarks/sweep.py --cases digits_cnn digits_mlp digits_vit --rounds 3 --out benchmarks/sweep.jsonl
    python benchmarks/sweep.py --cases digits_mlp --steps 20 --schedules 2 --seeds 1 --rounds 1    # does it work?
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
import time
from pathlib import Path
from typing import Any

CASES = ("digits_cnn", "digits_mlp", "digits_vit", "tiny_shakespeare_transformer", "cifar10_resnet20")
CONFIG = '''"""A sweep of the suite over the task of a case."""

from qtrain import sweep as points
from qtrain.config import base_config, finish
from qtrain.schedules import SUITE


def get_config(argument=""):
    config = base_config({task!r})
    config.schedule.update(name="CR", low=3, high=8, cycles=8)
    config.schedule.grads.update(name="constant", bits=8)
    if {steps}:
        config.train.update(steps={steps}, epochs=0.0)
    config = finish(config, argument)
    return config


def sweep():
    return points.product({{"schedule.name": list(SUITE)[:{schedules}], "seed": range({seeds})}})
'''


def measure(case: str, arguments: argparse.Namespace, scratch: Path) -> dict[str, Any]:
    """The row of a case."""
    config = scratch / f"{case}.py"
    config.write_text(
        CONFIG.format(task=case, steps=arguments.steps, schedules=arguments.schedules, seeds=arguments.seeds)
    )
    ways = {
        "one_program": ["--vectorized", "--share", arguments.share],
        "processes": ["--processes", str(arguments.processes)],
    }
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    said = ""
    for turn in range(arguments.rounds):
        for way in list(ways) if turn % 2 else list(ways)[::-1]:
            folder = scratch / f"{case}-{turn}-{way}"
            source = f"{config}:smoke" if arguments.smoke else str(config)
            command = ["sweep", "--config", source, "--workdir", str(folder), *ways[way]]
            start = time.perf_counter()
            done = subprocess.run(
                [sys.executable, "-m", "qtrain.main", *command], check=True, capture_output=True, text=True
            )
            seconds[way].append(time.perf_counter() - start)
            print(done.stdout, file=sys.stderr, end="")
            if way == "one_program":
                said = next(line for line in done.stdout.splitlines() if "share one train step" in line)
                compiled = next(line for line in done.stdout.splitlines() if "compiled train step" in line)
    ratios = [alone / together for together, alone in zip(seconds["one_program"], seconds["processes"], strict=True)]
    return {
        "what": "sweep",
        "case": case,
        "points": arguments.schedules * arguments.seeds,
        "steps": arguments.steps or "the task's",
        "processes_at_a_time": arguments.processes,
        **{f"{way}_seconds": [round(value, 2) for value in values] for way, values in seconds.items()},
        "ratio": round(statistics.median(ratios), 3),
        "shared": said,
        "compiled": compiled,
        "command": "python benchmarks/sweep.py " + " ".join(sys.argv[1:]),
        "date": datetime.date.today().isoformat(),
        "hardware": f"{os.cpu_count()} CPU cores, load {os.getloadavg()[0]:.1f}",
    }


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="*", default=["digits_cnn", "digits_mlp", "digits_vit"], choices=CASES)
    parser.add_argument("--schedules", type=int, default=10, help="of the suite's ten")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=0, help="of a run; 0: the task's own")
    parser.add_argument("--processes", type=int, default=1, help="at a time, on the other side")
    parser.add_argument("--share", default="auto", choices=("auto", "vmap", "interleave"))
    parser.add_argument("--smoke", action="store_true", help="the small form, on generated data")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", help="file to append the JSON lines to")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="qtrain-sweep-") as scratch:
        for case in arguments.cases:
            row = measure(case, arguments, Path(scratch))
            print(json.dumps(row), flush=True)
            if arguments.out:
                with open(arguments.out, "a") as file:
                    file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
