"""Runs put together: replicates into points, points of one data set and metric into families, points into groups."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from qtrain.errors import UsageError, did_you_mean
from qtrain.report.labels import canonical, is_static, label_points, shown
from qtrain.report.quality import COSTS, Cost, Metric, metric_of, quality_at
from qtrain.report.runs import Run

SEEDS = ("seed", "data.seed")
WITHOUT_EFFECT = re.compile(
    r"checkpoint\..*|eval\.(every_.*|batch_size)|data\.(dir|workers|prefetch|in_memory)"
    r"|train\.(compilation_cache|log_every_steps)"
)
"""Keys that do not change what is trained: runs that differ in them alone are the same point."""
SCHEDULE = "schedule"
"""What is no key, but may be compared by as if it were one: whether the bits are scheduled."""
_GROUPED_BY = ("model.name", SCHEDULE, "quant.recipe", "quant.backend", "optimizer.name")
_MOST_GROUPS = 8


@dataclasses.dataclass(eq=False)
class Point:
    """Runs that differ in nothing but their seeds.

    number: its place in the family's table, from 1, the best quality first; 0 without a finished run.
    """

    label: str
    group: str
    config: Mapping[str, Any]
    finished: list[Run]
    unfinished: list[Run]
    number: int = 0

    def quality(self, metric: Metric, cost: Cost) -> dict[tuple[Any, Any], float]:
        """Seed → the quality that belongs to a cost (`quality_at`), of the finished runs that have it."""
        found = {run.seed: quality_at(run, metric, cost) for run in self.finished}
        return {seed: value for seed, value in found.items() if math.isfinite(value)}

    def values(self, what: Metric | Cost) -> dict[tuple[Any, Any], float]:
        """Seed → value, of the finished runs that have it."""
        found = {run.seed: what.of(run) for run in self.finished}
        return {seed: value for seed, value in found.items() if math.isfinite(value)}

    def mean(self, what: Metric | Cost) -> float:
        """Over seeds; NaN where no finished run has it."""
        found = list(self.values(what).values())
        return float(np.mean(found)) if found else math.nan


@dataclasses.dataclass(eq=False)
class Family:
    """Points that can be compared: the same data, the same metric.

    keys: in which config keys they differ. grouped_by: the key whose values are the groups, "" with one group.
    slug: for the names of files, no other family's.
    """

    data: str
    metric: Metric
    keys: list[str]
    points: list[Point]
    grouped_by: str
    groups: list[str]
    slug: str = ""

    @property
    def title(self) -> str:
        """For a heading."""
        return f"{self.data}: {self.metric.name.replace('_', ' ')}"

    def with_cost(self, cost: Cost) -> list[Point]:
        """The points that have both a quality and this cost, above 0."""
        return [p for p in self.points if math.isfinite(p.mean(self.metric)) and p.mean(cost) > 0]


def make_families(
    runs: Sequence[Run], notes: list[str], metric: Metric | None = None, compare: str | None = None
) -> list[Family]:
    """Families of points; what is left out, and why, is added to `notes`.

    Args:
      runs: what was read.
      notes: gets a line for each thing a reader must know.
      metric: the quality of all runs; what `metric_of` finds unless given.
      compare: the key to group by; the first of a few usual ones that differs unless given.
    """
    kinds: dict[tuple[str, Metric], list[Run]] = {}
    for run in runs:
        judged = metric or metric_of(run)
        if judged is None or not math.isfinite(judged.of(run)):
            what = f"no {judged.name}" if judged else "no quality metric"
            when = "" if run.finished else " so far"
            notes.append(f"{run.name}: {what}{when}; it is in the table of runs alone")
            continue
        data = str(run.config.get("data.name", "unknown data")) + (" (smoke)" if run.config.get("smoke") else "")
        kinds.setdefault((data, judged), []).append(run)
    ordered = sorted(kinds.items(), key=lambda item: (item[0][0], item[0][1].name))
    families = [_family(data, judged, mine, notes, compare) for (data, judged), mine in ordered]
    taken: set[str] = set()
    for family in families:
        wanted = family.slug = slug(f"{family.data}_{family.metric.name}")
        number = 1
        while family.slug in taken:
            number += 1
            family.slug = f"{wanted}_{number}"
        taken.add(family.slug)
    if len({family.metric for family in families}) > 1:
        each = "; ".join(f"{family.data} by {family.metric.name}" for family in families)
        notes.append(f"runs with different metrics: {each}; each has plots of its own, and is in no other's")
    return families


def _family(data: str, metric: Metric, runs: list[Run], notes: list[str], compare: str | None) -> Family:
    runs = _one_origin(runs)
    keys = differing_keys([run.config for run in runs])
    together: dict[tuple[str, ...], list[Run]] = {}
    for run in runs:
        together.setdefault(tuple(canonical(run.config.get(key)) for key in keys), []).append(run)
    configs = [mine[0].config for mine in together.values()]
    by = compare if compare is not None else _usual_key(configs)
    points = []
    for mine, config, label in zip(together.values(), configs, label_points(configs, keys), strict=True):
        finished, unfinished = _replicates(mine, notes)
        points.append(Point(label, group_value(config, by) if by else "all runs", config, finished, unfinished))
    for cost in COSTS:
        without = [p.label for p in points if p.finished and not p.mean(cost) > 0]
        if without:
            few = "; ".join(without[:4]) + (f" and {len(without) - 4} more" if len(without) > 4 else "")
            notes.append(f"{data}: no {cost.short} recorded by {few}: not in the plots against {cost.short}")
    ranked = [p for p in points if math.isfinite(p.mean(metric))]
    ranked.sort(key=lambda p: (-p.mean(metric) if metric.maximize else p.mean(metric), p.mean(COSTS[0]), p.label))
    for number, point in enumerate(ranked, start=1):
        point.number = number
    rest = sorted((p for p in points if not p.number), key=lambda p: p.label)
    ordered = ranked + rest
    groups = sorted({point.group for point in ordered}, key=natural)
    return Family(data, metric, keys, ordered, by or "", groups)


def differing_keys(configs: Sequence[Mapping[str, Any]]) -> list[str]:
    """The keys whose values differ, but for seeds and what has no effect; an absent key is one that is unset."""
    every = dict.fromkeys(key for config in configs for key in config)
    first = configs[0]
    return [
        key
        for key in every
        if key not in SEEDS
        and not WITHOUT_EFFECT.fullmatch(key)
        and any(config.get(key) != first.get(key) for config in configs)
        and len({canonical(config.get(key)) for config in configs}) > 1
    ]


def group_value(config: Mapping[str, Any], key: str) -> str:
    """What a config has for a key, for people; of the pseudo-key ``schedule``: "static" or "scheduled"."""
    if key == SCHEDULE:
        return "static" if is_static(config) else "scheduled"
    return shown(config.get(key))


def check_key(key: str, families: Sequence[Family]) -> None:
    """Refuse to compare by a key that no run has, or that has one value everywhere.

    Raises:
      UsageError: naming the key and those that differ.
    """
    differing = list(dict.fromkeys(each for family in families for each in family.keys))
    configs = [point.config for family in families for point in family.points]
    if key != SCHEDULE and not any(key in config for config in configs):
        near = did_you_mean(key, [SCHEDULE, *differing, *configs[0]])
        raise UsageError(f"--compare {key}: no run has such a key; these differ: {_listed(differing)}.{near}")
    if not any(len(family.groups) > 1 for family in families):
        value = families[0].groups[0]
        raise UsageError(f"--compare {key}: it is {value} in every run; these differ: {_listed(differing)}")


def slug(text: str) -> str:
    """A text as part of a file's name.

    >>> slug("tfds:cifar10 (smoke)")
    'tfds_cifar10_smoke'
    """
    return re.sub(r"[^A-Za-z0-9]+", "_", text).strip("_")


def natural(text: str) -> list[Any]:
    """A key to sort by in which 10 comes after 9."""
    return [(0, float(part), "") if i % 2 else (1, 0.0, part) for i, part in enumerate(re.split(r"(\d+\.?\d*)", text))]


def _usual_key(configs: Sequence[Mapping[str, Any]]) -> str:
    for key in _GROUPED_BY:
        if 1 < len({group_value(config, key) for config in configs}) <= _MOST_GROUPS:
            return key
    return ""


def _one_origin(runs: list[Run]) -> list[Run]:
    """Runs whose ``init_from`` says only that they began with a run: each seed begins with the float run of that seed.

    Unless it is what tells two of them apart.
    """
    marked = [
        dataclasses.replace(run, config={**run.config, "init_from": "a run"}) if run.config.get("init_from") else run
        for run in runs
    ]
    keys = differing_keys([run.config for run in marked])
    seen = {(run.seed, *(canonical(run.config.get(key)) for key in keys)) for run in marked}
    before = {(run.seed, *(canonical(run.config.get(key)) for key in (*keys, "init_from"))) for run in runs}
    return marked if len(seen) == len(before) else runs


def _replicates(runs: list[Run], notes: list[str]) -> tuple[list[Run], list[Run]]:
    """The finished and the unfinished runs, one a seed: the same run twice is not two replicates."""
    kept: dict[tuple[Any, Any], Run] = {}
    for run in sorted(runs, key=lambda run: not run.finished):  # stable: the finished one of two counts
        if run.seed in kept:
            notes.append(f"{run.name}: the same config and seeds as {kept[run.seed].name}; the latter counts")
        else:
            kept[run.seed] = run
    return [r for r in kept.values() if r.finished], [r for r in kept.values() if not r.finished]


def _listed(keys: Sequence[str]) -> str:
    return ", ".join(keys[:12]) + (f" and {len(keys) - 12} more" if len(keys) > 12 else "") if keys else "none"
