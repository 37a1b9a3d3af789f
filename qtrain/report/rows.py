"""Runs as rows of one small file: what a study commits, and what it can be reported from again."""

from __future__ import annotations

import datetime
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from qtrain.errors import UsageError
from qtrain.report.labels import canonical
from qtrain.report.runs import BITS, Curve, Run
from qtrain.workdir import CONFIG, SUMMARY, SWEEP, leaves

WHAT = "qtrain runs"
_ENVIRONMENT = ("versions", "python", "backend", "device", "devices", "cores")


def rows_of(runs: Sequence[Run]) -> str:
    """Runs as JSON lines: what they share, then what each has of its own.

    The first line has ``base``, the dotted keys of the configs with one value in all, and ``environment``, versions and
    device, likewise; a line of a run has its folder's name (``run``), ``config`` and ``environment`` where they differ
    from these, ``finished``, ``step``, ``date``, the numbers of its summary (``values``) and of its layers
    (``layers``), and of a point of a sweep ``source``, the config file. Curves are left out.

    Args:
      runs: as `qtrain.report.read_runs` reads them from folders, which must still be there, or from rows.

    Returns:
      the lines, each with its end.
    """
    configs = [run.config for run in runs]
    origins = [_origin(run) for run in runs]
    base = {key: value for key, value in configs[0].items() if all(_same(config, key, value) for config in configs)}
    environments = [origin.pop("environment") for origin in origins]
    shared = {
        key: value for key, value in environments[0].items() if all(_same(each, key, value) for each in environments)
    }
    lines: list[dict[str, Any]] = [{"what": WHAT, "base": base, "environment": shared}]
    for run, origin, environment in zip(runs, origins, environments, strict=True):
        own = {key: value for key, value in environment.items() if key not in shared}
        lines.append(
            {
                "run": Path(run.name).name,
                "config": {key: value for key, value in run.config.items() if key not in base},
                **({"environment": own} if own else {}),
                "finished": run.finished,
                "step": run.step,
                "total": run.total,
                **origin,
                "values": run.values,
                **({"layers": run.layers} if run.layers else {}),
            }
        )
    return "".join(json.dumps(line) + "\n" for line in lines)


def read_rows(path: Path, notes: list[str]) -> list[Run]:
    """The runs of a file of `rows_of`; a last line that is cut off, and lines that are no row, are added to `notes`.

    Raises:
      UsageError: a file that cannot be read, or is no such file.
    """
    try:
        lines = path.read_text().split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{str(path)!r} cannot be read ({error})") from None
    if lines.pop():
        notes.append(f"{path}: the last line is cut off, and ignored")
    try:
        first = json.loads(lines[0])
        base, environment = first["base"], first["environment"]
    except (IndexError, ValueError, KeyError, TypeError):
        raise UsageError(
            f"{str(path)!r} is no file of runs, as qtrain report --rows makes them; give the folder of a run"
        ) from None
    found, names = [], set[str]()
    for number, line in enumerate(lines[1:], start=2):
        try:
            row = json.loads(line)
            # Of several sweeps in one file the points are called alike; a run's name is its alone.
            where = Path(f"{path}:{number}") if row["run"] in names else path
            found.append(_run(where, row, base, environment))
            names.add(row["run"])
        except (ValueError, KeyError, TypeError, AttributeError):
            notes.append(f"{path}: line {number} is no row of a run, and ignored")
    return found


def _run(path: Path, row: dict[str, Any], base: dict[str, Any], environment: dict[str, Any]) -> Run:
    empty = Curve(np.zeros(0, np.int64), np.zeros(0, np.float32), np.zeros((0, len(BITS)), np.float32))
    origin: dict[str, Any] = {key: row[key] for key in ("date", "source") if key in row}
    return Run(
        name=str(path / row["run"]),
        config={**base, **row["config"]},
        finished=row["finished"],
        step=row["step"],
        total=row["total"],
        values={name: float(value) for name, value in row["values"].items()},
        layers={name: float(value) for name, value in row.get("layers", {}).items()},
        curve=empty,
        origin={**origin, "environment": {**environment, **row.get("environment", {})}},
    )


def _origin(run: Run) -> dict[str, Any]:
    """Where, when and from what a run was made; of one that was read from rows what these say."""
    if run.origin is not None:
        return dict(run.origin)
    folder = Path(run.name)
    stored = json.loads((folder / CONFIG).read_bytes())
    newest = folder / SUMMARY if run.finished else folder / CONFIG
    date = datetime.datetime.fromtimestamp(newest.stat().st_mtime, datetime.UTC).date().isoformat()
    environment = {key: stored[key] for key in _ENVIRONMENT if key in stored}
    found: dict[str, Any] = {"date": date, "environment": dict(leaves(environment))}
    manifest = folder.parent / SWEEP
    if manifest.exists():
        found["source"] = json.loads(manifest.read_bytes()).get("source", "")
    return found


def _same(mapping: dict[str, Any], key: str, value: Any) -> bool:
    return key in mapping and canonical(mapping[key]) == canonical(value)
