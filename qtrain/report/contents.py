"""The tables of a report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from qtrain.report.drawing import shortened
from qtrain.report.frontiers import Comparison, Frontier, Means
from qtrain.report.labels import canonical
from qtrain.report.layers import Layer
from qtrain.report.points import Family, Point, slug
from qtrain.report.quality import COSTS, Cost, Metric, quality_label
from qtrain.report.runs import Run
from qtrain.report.sensitivity import Curve
from qtrain.report.tables import Column, Form, Table, decimals, digits, few_digits, show, si, signed
from qtrain.statistics import Interval

MARK = "●"


def points_table(family: Family, found: Sequence[Means]) -> Table:
    """A row for each point, the best quality first."""
    metric, form = family.metric, quality_form(family)
    fronts = {means.against: {id(means.points[i]) for i in means.front()} for means in found}
    intervals = {id(p): m.interval(i) for m in found if not m.against.stored for i, p in enumerate(m.points)}
    stored = [
        cost for cost in COSTS if cost.stored and any(_at_stored(p, metric, cost) is not None for p in family.points)
    ]
    grouped = len(family.groups) > 1
    columns = [Column("#", help="the number in the figures"), Column("point")]
    columns += [Column("group", help=family.grouped_by)] if grouped else []
    columns += [
        Column("seeds", help="finished runs, which differ in their seeds alone"),
        Column(metric.label, form, f"{metric.direction}; mean over seeds and its bootstrap interval"),
        *(Column(quality_label(metric, cost), form, "the same at the bits of the last step") for cost in stored),
        *(Column(cost.short, si, f"mean over seeds: {cost.label}") for cost in COSTS),
        Column("saving, %", decimals(1), "of bit operations, against the highest bits at every step"),
        *(Column(f"front, {cost.short}", help=f"no point is better and needs fewer {cost.short}") for cost in COSTS),
        Column("unfinished", help="runs that have not finished: not in any mean"),
        *(Column(key, csv_only=True) for key in family.keys),
    ]
    rows = []
    for point in family.points:
        mean = point.mean(metric) if point.number else None
        rows.append(
            (
                point.number or None,
                point.label,
                *([point.group] if grouped else []),
                len(point.finished),
                intervals.get(
                    id(point), Interval(mean, np.nan, np.nan, len(point.finished)) if mean is not None else None
                ),
                *(_at_stored(point, metric, cost) for cost in stored),
                *(point.mean(cost) for cost in COSTS),
                _saving(point),
                *(MARK if id(point) in fronts.get(cost, ()) else None for cost in COSTS),
                len(point.unfinished) or None,
                *(canonical(point.config.get(key)) for key in family.keys),
            )
        )
    note = "The CSV also has each key in which the points differ." if family.keys else ""
    return Table(f"Points: {family.title}", f"points_{family.slug}", tuple(columns), tuple(rows), note)


def runs_table(runs: Sequence[Run], families: Sequence[Family]) -> Table:
    """A row for each run, in the order of its point."""
    place = {run.name: (f, p) for f in families for p in f.points for run in (*p.finished, *p.unfinished)}
    order = {name: index for index, name in enumerate(place)}
    columns = (
        Column("run"),
        Column("data"),
        Column("point"),
        Column("seed", help="seed and data.seed"),
        Column("state", help="an unfinished run's numbers are those of its newest row"),
        Column("metric"),
        Column("quality", digits),
        Column("train loss", digits),
        *(Column(cost.short, si, cost.label) for cost in COSTS),
        Column("seconds", digits, "wall time"),
    )
    rows = []
    for run in sorted(runs, key=lambda run: (order.get(run.name, len(order)), run.name)):
        family, point = place.get(run.name, (None, None))
        rows.append(
            (
                run.name,
                family.data if family else str(run.config.get("data.name", "")),
                point.label if point else "",
                "/".join(map(str, dict.fromkeys(run.seed))),
                state(run),
                family.metric.label if family else "",
                family.metric.of(run) if family else None,
                run.values.get("train_loss", run.values.get("loss")),
                *(cost.of(run) for cost in COSTS),
                run.values.get("wall_seconds"),
            )
        )
    return Table("Runs", "runs", columns, tuple(rows))


def state(run: Run) -> str:
    """Finished, or how far it has come."""
    if run.finished:
        return "finished"
    return f"unfinished: step {run.step}" + (f" of {run.total}" if run.total else "")


def frontier_table(found: Sequence[tuple[Means, Sequence[Frontier]]]) -> Table:
    """A row for each family, cost and group."""
    columns = (
        Column("data and metric"),
        Column("cost"),
        Column("group"),
        Column("points"),
        Column("one seed", help="points with a single seed: the interval does not know of their spread"),
        Column("frontier", help="the points that no other one of the group beats, by number, the cheapest first"),
        Column("hypervolume", digits, "quality × decades of cost, up to the reference"),
        Column("reference", help="the highest cost and the worst quality of all points"),
        Column(
            "rank correlation",
            decimals(2),
            "Spearman's, of cost and quality over the points; no interval for fewer than 6 points or in perfect order",
        ),
    )
    rows = []
    for means, each in found:
        form = quality_form(means.family)
        for one in each:
            rows.append(
                (
                    means.family.title,
                    means.against.short,
                    one.group or "all points",
                    one.points,
                    one.single,
                    ", ".join(str(point.number) for point in one.front),
                    one.hypervolume,
                    f"{si(one.reference[0])}, {form(one.reference[1])}",
                    one.correlation,
                )
            )
    return Table("Frontiers", "frontiers", columns, tuple(rows), _AREAS)


def comparison_table(found: Sequence[tuple[Means, Comparison]]) -> Table:
    """A row for each family and cost."""
    columns = (
        Column("data and metric"),
        Column("cost"),
        Column("A"),
        Column("B"),
        Column("points of A, B"),
        Column("one seed", help="points with a single seed: the interval does not know of their spread"),
        Column("from", si, "the lowest cost that both cover"),
        Column("to", si, "the highest cost that both cover"),
        Column("A above B", signed(few_digits), "mean gain in quality at equal cost, over the logarithm of the cost"),
        Column("unit"),
        Column("area", signed(few_digits), "the same, times the decades of cost"),
    )
    rows = [
        (
            means.family.title,
            means.against.short,
            one.a,
            one.b,
            f"{one.points[0]}, {one.points[1]}",
            one.single,
            one.low,
            one.high,
            one.mean,
            means.family.metric.unit,
            one.area,
        )
        for means, one in found
    ]
    return Table("One group against another", "comparison", columns, tuple(rows), _CHANCES)


def gains_table(means: Means, one: Comparison, found: Mapping[int, Interval]) -> Table:
    """A row for each point of group A that has a rival in B, the cheapest first."""
    family, short = means.family, means.against.short
    form = quality_form(family)
    columns = (
        Column("#", help="the number in the figures"),
        Column("point"),
        Column("seeds"),
        Column(short, si, means.against.label),
        Column(means.label, form),
        Column(
            f"above the best {shortened(one.b)}",
            signed(form),
            f"gain over the best point of {one.b} that costs no more, in {family.metric.unit}, and its interval",
        ),
    )
    rows = tuple(
        (
            means.points[i].number,
            means.points[i].label,
            int(means.seeds[i]),
            float(means.cost[i]),
            float(means.quality[i]),
            found[i],
        )
        for i in sorted(found, key=lambda i: means.cost[i])
    )
    above = sum(bool(gain) and gain.low > 0 for gain in found.values())
    below = sum(bool(gain) and gain.high < 0 for gain in found.values())
    note = f"Of {len(rows)} points {above} are above the frontier of {one.b} and {below} below it by more than their "
    note += f"interval. {_CHANCES}".strip()
    title = f"{one.a.capitalize()} point by point, {short}: {family.title}"
    return Table(title, f"gains_{short}_{family.slug}", columns, rows, note)


def sensitivity_table(found: Sequence[tuple[Family, Sequence[Curve]]]) -> Table:
    """A row for each width of each curve."""
    columns = (
        Column("data and metric"),
        Column("key"),
        Column("everything else"),
        Column("bits", digits),
        Column("quality", digits, "mean over seeds and its bootstrap interval"),
    )
    rows = [
        (family.title, curve.key, curve.label, bits, quality)
        for family, curves in found
        for curve in curves
        for bits, quality in zip(curve.bits, curve.quality, strict=True)
    ]
    return Table("Sensitivity to one width", "sensitivity", columns, tuple(rows))


def layer_tables(family: Family, found: Mapping[str, Sequence[Layer]]) -> list[Table]:
    """A table for each kind of numbers."""
    tables = []
    for kind, rows in found.items():
        metrics = list(dict.fromkeys(name for row in rows for name in row.values))
        columns = (Column("point"), Column("layer"), Column("seeds"), *(Column(name, digits) for name in metrics))
        cells = tuple((r.point.label, r.layer, r.seeds, *(r.values.get(name) for name in metrics)) for r in rows)
        title, name = f"By layer, {kind}: {family.title}", f"layers_{slug(kind)}_{family.slug}"
        tables.append(Table(title, name, columns, cells, "The newest row of each run, means over seeds."))
    return tables


def quality_form(family: Family) -> Form:
    """Two decimals of a percentage, four digits of anything else."""
    return decimals(2) if family.metric.factor == 100 else digits


def describe(interval: Interval, form: Form, level: float) -> str:
    """An interval in a sentence."""
    if interval:
        seeds = f"{interval.n} or more seeds a point" if interval.n > 1 else "some points have one seed"
        return f"{show(interval, form)} ({100 * level:g} % bootstrap interval; {seeds})"
    why = "one seed a point" if interval.n == 1 else "resampled, they do not always share a cost"
    return f"{form(interval.estimate)} (no interval: {why})"


def _at_stored(point: Point, metric: Metric, cost: Cost) -> float | None:
    """The quality at the stored widths, where these are narrower than what the metric is measured at."""
    values = point.quality(metric, cost)
    return float(np.mean(list(values.values()))) if values and values != point.values(metric) else None


def _saving(point: Point) -> float | None:
    values = [100 * run.values["saving"] for run in point.finished if "saving" in run.values]
    return float(np.mean(values)) if values else None


_AREAS = (
    "The hypervolume is the area between a frontier and the reference, over log10 of the cost: only comparable within "
    "one data set, metric and cost. A frontier of means over few seeds picks lucky points, the more so the more points "
    "there are to pick from. Its interval (basic bootstrap) takes the luck back; the number may lie at its upper end."
)
_CHANCES = (
    "Above zero: A is better at equal cost. The group with more points has more chances to be lucky. The interval, a "
    "basic bootstrap, takes the luck of both back; the number itself does not."
)
