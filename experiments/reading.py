"""Rows of studies read back, for ``python -m experiments.STUDY.analyse`` from the root of a checkout."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from qtrain.report import Run, read_rows
from qtrain.report.frontiers import Means, means
from qtrain.report.labels import is_static
from qtrain.report.points import Family, make_families
from qtrain.report.quality import COSTS, Cost, Metric, metric_of
from qtrain.statistics import DRAWS, Interval, percentiles

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


def by_family(path: Path, titles: Mapping[str, str] = TITLES) -> dict[str, list[Run]]:
    """The runs of a file of rows by what follows the colon of their config, in the order of `titles`."""
    notes: list[str] = []
    found: dict[str, list[Run]] = {}
    for run in read_rows(path, notes):
        assert run.origin is not None
        found.setdefault(run.origin["source"].rpartition(":")[2], []).append(run)
    for note in notes:
        print(note, file=sys.stderr)
    return {name: found[name] for name in titles if name in found}


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


def above_line(means: Means, index: int) -> Interval:
    """What a point gains over the line between the static widths next to it in cost."""
    static = [i for i, point in enumerate(means.points) if is_static(point.config)]
    order = sorted(static, key=lambda i: means.cost[i])
    sign = 1 if means.family.metric.maximize else -1

    def above(quality: np.ndarray) -> float:
        return float(sign * (quality[index] - np.interp(means.cost[index], means.cost[order], quality[order])))

    drawn = np.array([above(quality) for quality in means.drawn_quality])
    return Interval(above(means.quality), *percentiles(drawn), int(means.seeds.min()))


def difference(means: Means, a: Sequence[int], b: Sequence[int]) -> Interval:
    """How much better the points `a` are than `b`, on average over them; for a loss, lower. Paired by seed."""
    sign = 1 if means.family.metric.maximize else -1
    drawn = sign * (means.drawn_quality[:, a].mean(1) - means.drawn_quality[:, b].mean(1))
    estimate = float(sign * (means.quality[a].mean() - means.quality[b].mean()))
    return Interval(estimate, *percentiles(drawn), int(min(means.seeds[a].min(), means.seeds[b].min())))


def unit(means: Means) -> tuple[int, str]:
    """How many digits of the quality to show, and what it is."""
    return (2, "test accuracy, %") if means.family.metric.maximize else (3, "test loss, nats a byte")


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
