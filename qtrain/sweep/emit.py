"""A sweep for other hands: a command line for each point, or a Slurm array."""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from absl import flags

from qtrain import overrides as config_files
from qtrain.errors import UsageError
from qtrain.sweep.expand import Point


def commands(points: Sequence[Point], workdir: str, arguments: Sequence[str]) -> str:
    """``qtrain train`` for each point, a line each, with the workdir that the sweep would give it.

    A point with a value that no flag can say (None, a mapping) is ``qtrain sweep --points``.
    """
    lines = []
    for point in points:
        own = [f"--config.{key}={_text(value)}" for key, value in point.overrides.items()]
        line = ["qtrain", "train", *arguments, "--workdir", str(Path(workdir, point.name)), *own]
        if not _says(point, [*arguments, *own]):
            line = ["qtrain", "sweep", *arguments, "--workdir", workdir, "--points", str(point.index)]
        lines.append(shlex.join(line))
    return "\n".join(lines)


def slurm(points: Sequence[Point], workdir: str, arguments: Sequence[str]) -> str:
    """An sbatch script: an array with a task for each point, begun again, where it was, when it is stopped.

    Slurm sends SIGTERM before it takes the node or the time is up; the run saves, and exit code 75 asks for one more.
    """
    name = re.sub(r"[^\w.-]+", "-", Path(workdir).name) or "sweep"
    command = shlex.join(["qtrain", "sweep", *arguments, "--workdir", workdir, "--quiet", "--points"])
    logs = str(Path(workdir, "logs"))
    return f"""#!/bin/bash
# One task for each of {len(points)} points. Submit from this folder, once there is a folder for what they print:
#   mkdir -p {shlex.quote(logs)}
#SBATCH --job-name={name}
#SBATCH --array={_ranges([point.index for point in points])}
#SBATCH --output={shlex.quote(logs)}/slurm-%A_%a.txt
#SBATCH --open-mode=append
#SBATCH --requeue
#SBATCH --signal=TERM@120
# Add what your cluster asks for: --time, --partition, --gres=gpu:1.
srun {command} "$SLURM_ARRAY_TASK_ID"
code=$?
if [ "$code" -eq 75 ]; then  # stopped and saved: the next turn goes on from there
  scontrol requeue "${{SLURM_ARRAY_JOB_ID}}_${{SLURM_ARRAY_TASK_ID}}"
fi
exit "$code"
"""


def _text(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _says(point: Point, arguments: Sequence[str]) -> bool:
    """Whether these flags make the point's config."""
    try:
        config = config_files.parse("train", flags.FlagValues(), arguments)
    except UsageError:
        return False
    return bool(config.to_dict() == point.config.to_dict())


def _ranges(indices: Sequence[int]) -> str:
    """``0-3,7`` for 0, 1, 2, 3, 7."""
    parts: list[list[int]] = []
    for index in indices:
        if parts and index == parts[-1][-1] + 1:
            parts[-1].append(index)
        else:
            parts.append([index])
    return ",".join(str(part[0]) if len(part) == 1 else f"{part[0]}-{part[-1]}" for part in parts)
