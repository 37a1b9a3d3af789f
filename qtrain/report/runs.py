"""Runs on disk: found below folders, read from config.json, metrics.jsonl and summary.json. Never from checkpoints."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from qtrain.errors import UsageError
from qtrain.workdir import CONFIG, DONE, ERRORS, SUMMARY, SWEEP, leaves
from qtrain.writers import METRICS

BITS = ("bits_weights", "bits_acts", "bits_grads")
ROWS = ".jsonl"
"""How the name of a file of rows ends: runs as `qtrain.report.rows` writes them."""


@dataclasses.dataclass(frozen=True, eq=False)
class Curve:
    """What a run wrote while it trained: step [rows], loss [rows], bits of weights, acts and grads [rows, 3]."""

    steps: np.ndarray
    loss: np.ndarray
    bits: np.ndarray


@dataclasses.dataclass(frozen=True, eq=False)
class Run:
    """One run as far as its files tell.

    name: its folder, as found. config: dotted key → value. values: its numbers by name, from ``summary.json``, or the
    newest of an unfinished run. layers: the newest numbers with a slash in their name (``size/Dense_0/kernel/bits``).
    step: the newest; total: how many there are to be, None where the config has epochs instead. origin: of one that was
    read from rows (`qtrain.report.rows`), where, when and from what it was made.
    """

    name: str
    config: dict[str, Any]
    finished: bool
    step: int
    total: int | None
    values: dict[str, float]
    layers: dict[str, float]
    curve: Curve
    origin: dict[str, Any] | None = None

    @property
    def seed(self) -> tuple[Any, Any]:
        """What makes it a replicate of others: ``seed`` and ``data.seed``."""
        return self.config.get("seed"), self.config.get("data.seed")


def find_runs(paths: Sequence[str | os.PathLike[str]], notes: list[str] | None = None) -> list[Path]:
    """The folders of runs at and below `paths`, in order of their names, each once; files of rows as they are.

    A run is a folder with a ``config.json``; nothing below it is looked at, nor are hidden folders. Folders that cannot
    be listed, and points of sweeps that failed or have not begun, are added to `notes`.

    Raises:
      UsageError: a path that is neither a folder nor a file of rows (`qtrain.report.rows`), or without any run.
    """
    found: dict[str, Path] = {}
    for path in map(Path, paths):
        if not path.exists():
            raise UsageError(f"{str(path)!r} does not exist; give the folder of a run, or one that has runs below it")
        if not path.is_dir():
            if path.suffix != ROWS:
                raise UsageError(
                    f"{str(path)!r} is a file; give the folder of a run, one that has runs below it, or a file of rows "
                    f"(*{ROWS}, from qtrain report --rows)"
                )
            found.setdefault(os.path.realpath(path), path)
            continue
        mine = list(_below(path, [] if notes is None else notes))
        if not mine:
            what = "holds no run" if any(path.iterdir()) else "is empty"
            raise UsageError(
                f"{str(path)!r} {what}: no {CONFIG} in it or below it; give the folder of a run or a sweep"
            )
        for folder in mine:
            found.setdefault(os.path.realpath(folder), folder)
    return list(found.values())


def _below(path: Path, notes: list[str]) -> Iterator[Path]:
    def unlisted(error: OSError) -> None:
        notes.append(f"{error.filename}: left out: it cannot be listed ({error.strerror})")

    for folder, names, files in os.walk(path, onerror=unlisted):
        if SWEEP in files:
            notes += _missing(Path(folder))
        if CONFIG in files:
            names.clear()
            yield Path(folder)
        names[:] = sorted(name for name in names if not name.startswith("."))


def _missing(folder: Path) -> Iterator[str]:
    """What a sweep has no numbers of: points that failed, and points that have not begun."""
    try:
        points = [point["name"] for point in _json(folder / SWEEP)["points"]]
        errors = _json(folder / ERRORS) if (folder / ERRORS).exists() else {}
        failed = [f"{folder / name}: this point failed ({e['kind']}): {e['error']}" for name, e in errors.items()]
    except (UsageError, KeyError, TypeError, AttributeError):
        yield f"{folder}: {SWEEP} or {ERRORS} is damaged: points that failed are not known"
        return
    yield from failed
    absent = [name for name in points if name not in errors and not (folder / name / CONFIG).exists()]
    if absent:
        yield f"{folder}: {len(absent)} of {len(points)} points have not begun, the first {absent[0]}"


def read_runs(folders: Iterable[Path], notes: list[str]) -> list[Run]:
    """The runs that can be read; why others are left out, and what is odd about these, is added to `notes`."""
    from qtrain.report.rows import read_rows

    found: list[Run] = []
    for folder in folders:
        if folder.is_file():
            found += read_rows(folder, notes)
            continue
        try:
            found.append(read_run(folder, notes))
        except UsageError as error:
            notes.append(f"{folder}: left out: {error}")
    return found


def read_run(folder: Path, notes: list[str]) -> Run:
    """One run.

    Raises:
      UsageError: files that cannot be read or are no run's; no row yet.
    """
    stored = _json(folder / CONFIG)
    if stored.get("program") != "qtrain" or not isinstance(stored.get("config"), dict):
        raise UsageError(f"its {CONFIG} was not written by qtrain")
    config = dict(leaves(stored["config"]))
    finished = (folder / DONE).exists()
    newest: dict[str, dict[str, Any]] = {"train": {}, "eval": {}}
    steps: list[int] = []
    columns: list[list[float]] = []
    for row in _rows(folder / METRICS, notes):
        kind = row["kind"]
        newest[kind] = row
        if kind == "train":
            steps.append(row["step"])
            columns.append([_number(row.get(name)) for name in ("loss", *BITS)])
    if not finished and not steps and not newest["eval"]:
        raise UsageError("it has written no row yet")
    numbers = np.array(columns, np.float32).reshape(-1, 1 + len(BITS))
    train, evaluated = newest["train"], newest["eval"]
    values = _json(folder / SUMMARY) if finished else {**train, **evaluated}
    if not finished and train.get("effective_bitops") is not None and train["step"] > evaluated.get("step", -1):
        values["effective_bitops"] = train["effective_bitops"]
    steps_asked = config.get("train.steps")
    return Run(
        name=str(folder),
        config=config,
        finished=finished,
        step=max([*steps[-1:], evaluated.get("step", 0), *([values["steps"]] if "steps" in values else [])]),
        total=steps_asked if isinstance(steps_asked, int) and steps_asked > 0 else values.get("steps"),
        values={name: float(value) for name, value in values.items() if _is_number(value) and name != "step"},
        layers={name: float(value) for name, value in train.items() if "/" in name and _is_number(value)},
        curve=Curve(np.array(steps, np.int64), numbers[:, 0], numbers[:, 1:]),
    )


def _rows(path: Path, notes: list[str]) -> Iterator[dict[str, Any]]:
    """The rows of a metrics file; a last line without its end is one that was being written."""
    try:
        lines = path.read_bytes().split(b"\n")
    except FileNotFoundError:
        return
    except OSError as error:
        raise UsageError(f"its {METRICS} cannot be read ({error.strerror or error})") from None
    if lines.pop():
        notes.append(f"{path}: the last line is cut off, and ignored")
    try:
        found = json.loads(b"[" + b",".join(lines) + b"]")  # a third faster than line by line
        if len(found) != len(lines):
            raise ValueError
    except ValueError:
        found = list(map(_parsed, lines))
    damaged = 0
    for row in found:
        if isinstance(row, dict) and isinstance(row.get("step"), int) and isinstance(row.get("kind"), str):
            yield row
        else:
            damaged += 1
    if damaged:
        notes.append(f"{path}: {damaged} of {len(lines)} lines are no rows of metrics, and ignored")


def _parsed(line: bytes) -> Any:
    """None for a line that is not JSON."""
    try:
        return json.loads(line)
    except ValueError:
        return None


def _json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_bytes())
    except OSError as error:
        raise UsageError(f"its {path.name} cannot be read ({error.strerror or error})") from None
    except ValueError:
        raise UsageError(f"its {path.name} is damaged") from None
    if not isinstance(value, dict):
        raise UsageError(f"its {path.name} is damaged")
    return value


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _number(value: Any) -> float:
    """NaN for null, which stands for what is not finite, and for what a run does not have."""
    return float(value) if _is_number(value) else float("nan")
