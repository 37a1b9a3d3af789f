"""A family's points against a cost: frontiers, hypervolumes, rank correlations, one group against another."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Hashable, Mapping

import numpy as np

from qtrain import statistics
from qtrain.report.points import SCHEDULE, Family, Point
from qtrain.report.quality import Cost, quality_label
from qtrain.statistics import Interval


@dataclasses.dataclass(frozen=True, eq=False)
class Means:
    """The points of a family that have a cost: their means over seeds, and the same resampled.

    cost, quality: [points], the quality that of `qtrain.report.quality.quality_at`; drawn_cost, drawn_quality:
    [draws, points]; seeds: [points], how many each mean is of.
    """

    family: Family
    against: Cost
    points: list[Point]
    cost: np.ndarray
    quality: np.ndarray
    seeds: np.ndarray
    drawn_cost: np.ndarray
    drawn_quality: np.ndarray
    level: float

    @property
    def label(self) -> str:
        """Of the quality."""
        return quality_label(self.family.metric, self.against)

    def interval(self, index: int) -> Interval:
        """Of a point's quality over its seeds."""
        n = int(self.seeds[index])
        low, high = (math.nan, math.nan)
        if n > 1:
            low, high = statistics.percentiles(self.drawn_quality[:, index], self.level)
        return Interval(float(self.quality[index]), low, high, n)

    def of(self, group: str | None) -> np.ndarray:
        """Which points are of a group; all for None."""
        return np.array([i for i, point in enumerate(self.points) if group in (None, point.group)], np.int64)

    def front(self, group: str | None = None) -> np.ndarray:
        """Which points of a group no other one of it beats, the cheapest first."""
        mine = self.of(group)
        return mine[statistics.pareto_front(self.cost[mine], self.quality[mine], maximize=self.family.metric.maximize)]


@dataclasses.dataclass(frozen=True)
class Frontier:
    """One group's frontier; `group` is None for all points together.

    hypervolume: quality × decades of cost, up to `reference` (cost, quality), the worst of all points in both.
    correlation: Spearman's, of cost and quality over the points (for a loss, of less loss). single: how many points
    have one seed, of whose spread the interval knows nothing.
    """

    group: str | None
    front: tuple[Point, ...]
    points: int
    single: int
    reference: tuple[float, float]
    hypervolume: Interval
    correlation: Interval


@dataclasses.dataclass(frozen=True)
class Comparison:
    """What group `a` gains over group `b` at equal cost, on the costs that both cover, `low` to `high`.

    mean: units of quality, on average over the logarithm of the cost; area: the same times the decades; both above zero
    where `a` is better.
    """

    a: str
    b: str
    points: tuple[int, int]
    single: int
    low: float
    high: float
    mean: Interval
    area: Interval


def means(family: Family, cost: Cost, *, draws: int, level: float) -> Means | None:
    """The means of the points that have this cost; None where there is none."""
    points = family.with_cost(cost)
    if not points:
        return None
    samples: list[Mapping[Hashable, tuple[float, float]]] = []
    for point in points:
        quality, costs = point.quality(family.metric, cost), point.values(cost)
        samples.append({seed: (costs[seed], quality[seed]) for seed in quality if seed in costs})
    kept = [i for i, sample in enumerate(samples) if sample]
    if not kept:
        return None
    points, samples = [points[i] for i in kept], [samples[i] for i in kept]
    drawn = statistics.draw_means(samples, draws=draws)
    exact = np.array([np.mean(list(sample.values()), axis=0) for sample in samples])
    return Means(
        family=family,
        against=cost,
        points=points,
        cost=exact[:, 0],
        quality=exact[:, 1],
        seeds=np.array([len(sample) for sample in samples]),
        drawn_cost=drawn[..., 0],
        drawn_quality=drawn[..., 1],
        level=level,
    )


def frontiers(found: Means) -> list[Frontier]:
    """That of all points, then that of each group where there are several."""
    groups: list[str | None] = [None]
    if len(present := [g for g in found.family.groups if len(found.of(g))]) > 1:
        groups += present
    return [_frontier(found, group) for group in groups]


def _frontier(found: Means, group: str | None) -> Frontier:
    maximize = found.family.metric.maximize
    worst = float(found.quality.min() if maximize else found.quality.max())
    reference = float(found.cost.max()), worst
    mine = found.of(group)
    single = int(np.sum(found.seeds[mine] == 1))

    def volume(cost: np.ndarray, quality: np.ndarray) -> np.ndarray:
        return statistics.hypervolume(cost[..., mine], quality[..., mine], reference, maximize=maximize, log_cost=True)

    value = float(volume(found.cost, found.quality))
    low, high = math.nan, math.nan
    if single < len(mine):
        low, high = statistics.basic_ends(value, volume(found.drawn_cost, found.drawn_quality), found.level)
    better = found.quality[mine] if maximize else -found.quality[mine]
    return Frontier(
        group=group,
        front=tuple(found.points[i] for i in found.front(group)),
        points=len(mine),
        single=single,
        reference=reference,
        hypervolume=Interval(value, low, high, int(found.seeds[mine].min())),
        correlation=statistics.rank_correlation(found.cost[mine], better, level=found.level),
    )


def pair(family: Family, asked: tuple[str, str] | None = None) -> tuple[str, str] | None:
    """The two groups to compare: those asked for, or the only two, scheduled against static; None without two."""
    if asked is not None:
        return asked if set(asked) <= set(family.groups) else None
    if len(family.groups) != 2:
        return None
    a, b = family.groups
    return (a, b) if family.grouped_by != SCHEDULE else ("scheduled", "static")


def gains(found: Means, a: str, b: str) -> dict[int, Interval]:
    """Index of a point of group `a` → what it gains over the best point of group `b` that costs no more.

    ::

        gain_i = q_i − max {q_j : j of b, c_j ≤ c_i}

    in units of quality, above zero where the point is better (for a loss, lower); basic bootstrap intervals over seeds,
    because the best of several means is too good (`qtrain.statistics.basic_ends`). Points below all costs of `b` are
    left out. Of many points some have an interval above zero by chance: at a level of 0.95 one in forty of those
    without a gain, and more with few seeds.
    """
    sign = 1.0 if found.family.metric.maximize else -1.0
    others = found.of(b)
    result = {}
    for i in found.of(a).tolist():
        rivals = others[found.cost[others] <= found.cost[i] * (1 + 1e-9)]
        if not len(rivals):
            continue
        estimate, drawn = (
            sign * quality[..., i] - (sign * quality[..., rivals]).max(-1)
            for quality in (found.quality, found.drawn_quality)
        )
        seeds = int(min(found.seeds[i], found.seeds[rivals].min()))
        low, high = statistics.basic_ends(float(estimate), drawn, found.level) if seeds > 1 else (math.nan, math.nan)
        result[i] = Interval(float(estimate), low, high, seeds)
    return result


def compare(found: Means, a: str, b: str) -> Comparison | None:
    """Group `a` against group `b`; None where one of them has no point."""
    one, other = found.of(a), found.of(b)
    if not len(one) or not len(other):
        return None
    maximize = found.family.metric.maximize

    def between(cost: np.ndarray, quality: np.ndarray) -> statistics.AreaBetween:
        sides = (cost[..., one], quality[..., one], cost[..., other], quality[..., other])
        return statistics.area_between(*sides, maximize=maximize, log_cost=True)

    exact, drawn = between(found.cost, found.quality), between(found.drawn_cost, found.drawn_quality)
    both = np.concatenate([one, other])
    single, seeds = int(np.sum(found.seeds[both] == 1)), int(found.seeds[both].min())

    def interval(estimate: float, values: np.ndarray) -> Interval:
        ends = (math.nan, math.nan)
        if single < len(both) and math.isfinite(estimate):
            ends = statistics.basic_ends(estimate, values, found.level)
        return Interval(estimate, *ends, seeds)

    return Comparison(
        a=a,
        b=b,
        points=(len(one), len(other)),
        single=single,
        low=exact.low,
        high=exact.high,
        mean=interval(exact.mean, drawn.mean),
        area=interval(exact.area, drawn.area),
    )
