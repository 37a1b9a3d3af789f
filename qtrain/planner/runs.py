"""Runs to fit laws to: from their folders, or from a table somebody made."""

from __future__ import annotations

import csv
import dataclasses
import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from qtrain.errors import UsageError, did_you_mean

FLOAT_BITS = 24
"""From here on bits stand for float, as everywhere in qtrain."""
METRIC = "test_loss_scheduled"
"""The loss at the bits of the last step, which is that of the network as it is stored."""
TEXT_MODELS = ("transformer", "lstm")
"""Models whose examples are ``data.length`` tokens; of the others an example counts as one."""
NEEDED = ("params", "tokens", "bits", "loss")
COLUMNS = (*NEEDED, "fraction", "seed")
TABLES = (".csv", ".jsonl")


@dataclasses.dataclass(frozen=True)
class Row:
    """One run.

    params: N. tokens: D, of the whole training. bits: of the weights when quantized; 24 and more: float throughout.
    loss: above 0, at those bits. fraction: of the steps that were quantized, the last ones. seed: what tells replicates
    apart. name: for messages.
    """

    params: float
    tokens: float
    bits: int
    loss: float
    fraction: float = 1.0
    seed: str = "0"
    name: str = ""


def read_runs(
    paths: Sequence[str | os.PathLike[str]], *, metric: str = METRIC, tokens_per_step: float | None = None
) -> tuple[list[Row], list[str]]:
    """The rows of tables (CSV or JSON lines) and of run folders, and why some runs are left out.

    A table has the columns params, tokens, bits, loss and may have fraction (1 unless given, 0 for float) and seed. Of
    a run the parameters and the loss are those of its summary, tokens ``steps × batch × length`` (length 1 unless
    text), bits and fraction those of its schedule of weights, which has to be float first and one width after.

    Args:
      paths: tables, runs, and folders with runs below them.
      metric: the number of a run's summary that is its loss.
      tokens_per_step: of a run; None: from its config.

    Raises:
      UsageError: a path that does not exist, a table that lacks a column or has a value that is no number; no row.
    """
    rows: list[Row] = []
    notes: list[str] = []
    for path in map(Path, paths):
        if path.suffix in TABLES:
            rows += _table(path)
        elif path.is_file():
            raise UsageError(f"{str(path)!r}: give a folder of runs, or a table that ends with {' or '.join(TABLES)}")
        else:
            rows += _folders(path, metric, tokens_per_step, notes)
    if not rows:
        raise UsageError(
            f"no run to fit to: {notes[0]}" if notes else "no run to fit to: give folders or tables of runs"
        )
    return rows, notes


def _table(path: Path) -> Iterator[Row]:
    try:
        with open(path, newline="", encoding="utf-8") as file:
            if path.suffix == ".csv":
                lines: list[Any] = list(csv.DictReader(file))
            else:
                lines = [json.loads(line) for line in file if line.strip()]
    except OSError as error:
        raise UsageError(f"{str(path)!r} cannot be read: {(error.strerror or str(error)).lower()}") from None
    except (ValueError, csv.Error) as error:
        raise UsageError(f"{str(path)!r} is damaged: {error}") from None
    for number, line in enumerate(lines, start=1):
        where = f"{str(path)!r}, run {number}"
        if not isinstance(line, dict):
            raise UsageError(f"{where}: give a mapping with {', '.join(NEEDED)}")
        for column in NEEDED:
            if line.get(column) in (None, ""):
                near = did_you_mean(column, [str(key) for key in line])
                raise UsageError(f"{where}: {column!r} is missing; a run has {', '.join(COLUMNS)}.{near}")
        yield _row(line, where)


def _row(line: Mapping[str, Any], where: str) -> Row:
    numbers = {}
    for column in (*NEEDED, "fraction"):
        given = line.get(column)
        if given in (None, ""):
            continue
        try:
            numbers[column] = float(given)
        except (TypeError, ValueError):
            numbers[column] = math.nan
        fits = 0 <= numbers[column] <= 1 if column == "fraction" else 0 < numbers[column] < math.inf
        if not fits or (column == "bits" and numbers[column] % 1):
            allowed = {"fraction": "a number from 0 to 1", "bits": "a whole number above 0"}.get(
                column, "a number above 0"
            )
            raise UsageError(f"{where}: {column}={given!r}: give {allowed}")
    bits = int(numbers["bits"])
    return Row(
        params=numbers["params"],
        tokens=numbers["tokens"],
        bits=bits,
        loss=numbers["loss"],
        fraction=0.0 if bits >= FLOAT_BITS else numbers.get("fraction", 1.0),
        seed=str(line.get("seed") or 0),
        name=where,
    )


def _folders(path: Path, metric: str, tokens_per_step: float | None, notes: list[str]) -> Iterator[Row]:
    from qtrain.report.runs import find_runs

    for folder in find_runs([path], notes):
        try:
            yield _run(folder, metric, tokens_per_step)
        except UsageError as error:
            notes.append(f"{folder}: left out: {error}")


def _run(folder: Path, metric: str, tokens_per_step: float | None) -> Row:
    from qtrain.workdir import read_config, read_summary

    config, summary = read_config(folder), read_summary(folder)
    loss = summary.get(metric)
    if not isinstance(loss, int | float) or isinstance(loss, bool) or not 0 < loss < math.inf:
        found = [name for name, value in summary.items() if "loss" in name and isinstance(value, int | float)]
        raise UsageError(f"--metric {metric}: its summary has no such number above 0; there are {', '.join(found)}")
    bits, fraction = _quantized(config, int(summary["steps"]))
    per_step = tokens_per_step
    if per_step is None:
        length = config["data"]["length"] if config["model"]["name"] in TEXT_MODELS else 1
        per_step = config["data"]["batch_size"] * length
    return Row(
        params=float(summary["parameters"]),
        tokens=float(summary["steps"] * per_step),
        bits=bits,
        loss=float(loss),
        fraction=fraction,
        seed=f"{config['seed']}/{config['data']['seed']}",
        name=str(folder),
    )


def _quantized(config: Mapping[str, Any], steps: int) -> tuple[int, float]:
    """Bits of the weights and the share of the steps that have them, which are the last."""
    import numpy as np

    from qtrain.schedules import evaluate, precisions_from_config

    schedule = precisions_from_config(config["schedule"], steps).weights
    bits = np.full(steps, 32.0) if schedule is None else np.asarray(evaluate(schedule, steps))
    quantized = bits < FLOAT_BITS
    widths = np.unique(bits[quantized])
    if not len(widths):
        return 32, 0.0
    if len(widths) > 1 or not quantized[int(np.argmax(quantized)) :].all():
        raise UsageError("its weights are not float first and at one width after; a law of widths says nothing of it")
    return int(widths[0]), float(quantized.mean())
