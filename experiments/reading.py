"""Rows of studies read back, for ``python -m experiments.STUDY.analyse`` from the root of a checkout."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from qtrain.report import Run, read_rows
from qtrain.report.frontiers import Means, means
from qtrain.report.points import Family, make_families
from qtrain.report.quality import COSTS, Cost, Metric, metric_of
from qtrain.statistics import DRAWS, Interval

BITOPS, BYTES = COSTS
LINEAR = Cost("linear_cost", "linear cost of training (MACs × 4, 8, 16 or 32)", "linear")
TITLES = {
    "mlp": "MLP, MNIST",
    "cnn": "CNN, MNIST",
    "resnet": "ResNet-8, digits",
    "mobilenet": "MobileNetV2, digits",
    "transformer": "transformer, Shakespeare",
    "s5": "S5, sequential digits",
    "gcn": "GCN, Cora",
}


def by_family(path: Path) -> dict[str, list[Run]]:
    """The runs of a file of rows by what follows the colon of their config."""
    notes: list[str] = []
    found: dict[str, list[Run]] = {}
    for run in read_rows(path, notes):
        assert run.origin is not None
        found.setdefault(run.origin["source"].rpartition(":")[2], []).append(run)
    for note in notes:
        print(note, file=sys.stderr)
    return {name: found[name] for name in TITLES if name in found}


def family_of(runs: Sequence[Run], compare: str | None = "schedule", suffix: str = "") -> Family:
    """The one family that runs are; `suffix`: of their metric, such as ``_float``."""
    notes: list[str] = []
    metric = metric_of(runs[0])
    assert metric is not None
    (family,) = make_families(runs, notes, Metric(metric.name + suffix), compare)
    assert not notes, notes
    return family


def means_of(family: Family, cost: Cost) -> Means:
    """Means over seeds, resampled."""
    found = means(family, cost, draws=DRAWS, level=0.95)
    assert found is not None
    return found


def show(interval: Interval, digits: int = 2, sign: str = "") -> str:
    """An interval for a table."""
    numbers = [f"{value:{sign}.{digits}f}" for value in interval[:3]]
    return f"{numbers[0]} [{numbers[1]}, {numbers[2]}]" if interval else numbers[0]


def provenance(runs: Sequence[Run]) -> str:
    """Versions, device and dates in a line."""
    first = runs[0].origin or {}
    dates = sorted({(run.origin or {}).get("date", "") for run in runs})
    versions = {
        key.partition(".")[2]: value for key, value in first["environment"].items() if key.startswith("versions.")
    }
    seeds = sorted({str(run.config["seed"]) for run in runs})
    return (
        f"{len(runs)} runs, seeds {', '.join(seeds)}; {first['environment']['device']}, jax {versions['jax']}, "
        f"flax {versions['flax']}; {' to '.join(dict.fromkeys((dates[0], dates[-1])))}"
    )
