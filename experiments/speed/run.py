"""Measures the suites of ``qtrain bench`` and keeps their rows, one JSON line each, with the command that made them.

    python experiments/speed/run.py [--only block resnet] [--rounds 20]
    python experiments/speed/run.py --table    # the lines as Markdown tables
    python experiments/speed/plot.py           # ... as a picture

Each suite is a process of its own. Its lines replace those that the same command left before. Run it on an idle
machine: the ratios stand a busy one, compile times and milliseconds do not.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from qtrain.bench.rows import table

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
RESULTS = HERE / "results.jsonl"
HUGE_PAGES = {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}
"""Temporaries are mapped afresh in every step; in huge pages that costs little."""

RUNS: list[tuple[str, dict[str, str]]] = [
    ("matmul", {}),
    ("block", {}),
    ("resnet", {}),
    ("lm", {}),
    ("schedule", {}),
    ("resnet", HUGE_PAGES),
]


def main() -> None:
    """Measure what is asked for, or print it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", default=sorted({suite for suite, _ in RUNS}))
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--table", action="store_true")
    arguments = parser.parse_args()
    rows = [json.loads(line) for line in RESULTS.read_text().splitlines()] if RESULTS.exists() else []
    if arguments.table:
        for command in dict.fromkeys(row["command"] for row in rows):
            print(f"`{command}`\n\n{table([row for row in rows if row['command'] == command], markdown=True)}\n")
        return
    for suite, environment in RUNS:
        if suite in arguments.only:
            measured = measure(suite, environment, arguments.rounds)
            commands = {row["command"] for row in measured}
            rows = [row for row in rows if row["command"] not in commands] + measured
            RESULTS.write_text("".join(json.dumps(row) + "\n" for row in rows))


def measure(suite: str, environment: dict[str, str], rounds: int) -> list[dict[str, Any]]:
    """The rows of one suite, each with its command."""
    flags = ["bench", "--suite", suite, "--rounds", str(rounds)]
    settings = " ".join(f"{name}={value}" for name, value in environment.items())
    command = f"{settings} qtrain {' '.join(flags)} --out bench.json".strip()
    print(f"+ {command}", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder, "bench.json")
        line = [sys.executable, "-m", "qtrain.main", *flags, "--out", str(out)]
        subprocess.run(line, cwd=ROOT, check=True, env={**os.environ, **environment})
        return [{**row, "command": command} for row in json.loads(out.read_text())]


if __name__ == "__main__":
    main()
