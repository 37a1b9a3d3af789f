"""Runs in, a report out."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

from qtrain.errors import UsageError
from qtrain.report import contents, courses, scatter, sensitivity
from qtrain.report.frontiers import Comparison, Frontier, Means, compare, frontiers, gains, means, pair
from qtrain.report.layers import layers
from qtrain.report.page import Figure, Section, render
from qtrain.report.points import Family, check_key, make_families, slug
from qtrain.report.quality import COSTS, asked_metric
from qtrain.report.runs import Run
from qtrain.report.tables import Table, signed
from qtrain.statistics import DRAWS

PAGE = "index.html"


@dataclasses.dataclass(frozen=True)
class Report:
    """What is to be written: name of a file → its content; `notes` for the reader; `said` in a few lines."""

    files: dict[str, bytes]
    notes: tuple[str, ...]
    said: tuple[str, ...]


def make_report(
    runs: Sequence[Run],
    notes: Sequence[str] = (),
    *,
    title: str = "qtrain report",
    metric: str | None = None,
    compare_by: str | None = None,
    groups: tuple[str, str] | None = None,
    draws: int = DRAWS,
    level: float = 0.95,
) -> Report:
    """A page, its figures and its tables, from runs that were read.

    Args:
      runs: `qtrain.report.read_runs`.
      notes: what reading them found odd.
      title: heading of the page.
      metric: judge all runs by this name in their summaries; unless given each by `qtrain.report.quality.metric_of`.
      compare_by: the config key whose values are the groups, or "schedule": static against scheduled.
      groups: the two values of it to compare, where it has more than two.
      draws: resamples of the bootstrap.
      level: of the intervals.

    Raises:
      UsageError: no runs; a metric or a key that no run has, or with one value; a key with several values and no
        `groups`, or `groups` that are not among them.
    """
    if not runs:
        raise UsageError("there is no run to report on; give the folder of a run that has written a row")
    found = list(notes)
    judged = asked_metric(metric, runs) if metric is not None else None
    families = make_families(runs, found, judged, compare_by)
    asked = _groups(families, compare_by, groups)
    builder = _Builder(families, found, asked, draws, level)
    sections = [section for family in families for section in builder.family(family)]
    sections = builder.summary() + sections
    sections.append(Section("Runs", tables=(contents.runs_table(runs, families),)))
    unfinished = sum(not run.finished for run in runs)
    lead = f"{len(runs)} runs, {sum(len(f.points) for f in families)} points (runs that differ in their seeds alone)"
    lead += f", {unfinished} runs unfinished: marked, and in no mean." if unfinished else "."
    lead += f" Intervals: bootstrap over seeds, {100 * level:g} %, {draws} draws, percentiles for means."
    if few := _few_seeds(families, level):
        lead += few
    page = render(title, lead, found, sections)
    files = {PAGE: page.encode()}
    for section in sections:
        files |= {figure.name: figure.png for figure in section.figures}
        for table in section.tables:
            files[f"{table.slug}.csv"], files[f"{table.slug}.md"] = table.csv().encode(), table.markdown().encode()
    return Report(files, tuple(found), tuple(builder.said))


class _Builder:
    """Sections of a report; what several of them show is worked out once."""

    def __init__(self, families: Sequence[Family], notes: list[str], asked: Any, draws: int, level: float):
        self.notes, self.asked, self.draws, self.level = notes, asked, draws, level
        self.means: dict[int, list[Means]] = {}
        self.frontiers: list[tuple[Means, list[Frontier]]] = []
        self.comparisons: list[tuple[Means, Comparison]] = []
        self.curves: list[tuple[Family, list[sensitivity.Curve]]] = []
        self.said: list[str] = []
        for family in families:
            self._measure(family)

    def _measure(self, family: Family) -> None:
        mine = [means(family, cost, draws=self.draws, level=self.level) for cost in COSTS]
        self.means[id(family)] = known = [each for each in mine if each is not None]
        self.frontiers += [(each, frontiers(each)) for each in known]
        self.curves.append((family, sensitivity.curves(family, draws=self.draws, level=self.level)))
        two = pair(family, self.asked)
        if two is None:
            if len(family.groups) != 1 or self.asked:
                self.notes.append(f"{family.title}: not compared: the groups are {', '.join(family.groups)}")
            return
        for each in known:
            one = compare(each, *two)
            if one is None:
                self.notes.append(f"{family.title}, {each.against.short}: not compared: one of {two} has no such point")
                continue
            if math.isfinite(one.mean.estimate):
                self.comparisons.append((each, one))
                form = signed(contents.quality_form(family))
                gain = contents.describe(one.mean, form, self.level)
                what = f"{one.a} against {one.b} at equal {each.against.short}"
                self.said.append(f"{family.title}: {what}, {family.metric.unit}: {gain}")
            else:
                self.notes.append(f"{family.title}: {one.a} and {one.b} share no range of {each.against.short}")

    def summary(self) -> list[Section]:
        """What holds for all families."""
        tables: list[Table] = []
        if self.comparisons:
            tables.append(contents.comparison_table(self.comparisons))
        if self.frontiers:
            tables.append(contents.frontier_table(self.frontiers))
        return [Section("Summary", tuple(self.said), tables=tuple(tables))] if tables else []

    def family(self, family: Family) -> list[Section]:
        """Frontiers and points; courses; sensitivity; layers: of one family, as far as there are any."""
        known = self.means[id(family)]
        figures = [self._frontier_figure(each) for each in known]
        figures += [self._comparison_figure(each, one) for each, one in self.comparisons if each.family is family]
        grouped = f"Grouped by {family.grouped_by}." if family.grouped_by else ""
        differ = f"The points differ in {', '.join(family.keys)}." if family.keys else "There is one point."
        tables = [contents.points_table(family, known)]
        for each, one in self.comparisons:
            if each.family is family and (found := gains(each, one.a, one.b)):
                tables.append(contents.gains_table(each, one, found))
        sections = [Section(family.title, (f"{differ} {grouped}".strip(),), tuple(figures), tuple(tables))]
        if figure := self._courses(family, known):
            sections.append(Section(f"Schedules and loss, {family.title}", figures=(figure,)))
        sections += self._sensitivity(family)
        by_layer = contents.layer_tables(family, layers(family.points))
        if by_layer:
            sections.append(Section(f"By layer, {family.title}", tables=tuple(by_layer)))
        return sections

    def _frontier_figure(self, each: Means) -> Figure:
        family, cost = each.family, each.against
        caption = f"{each.label} against {cost.label}. Lines are frontiers: the best within a budget. Numbers are "
        caption += "those of the table."
        return Figure(f"pareto_{cost.short}_{family.slug}.png", scatter.draw_frontiers(each), caption)

    def _comparison_figure(self, each: Means, one: Comparison) -> Figure:
        family, cost = each.family, each.against
        caption = f"What {one.a} and {one.b} reach within a budget of {cost.short}, and the difference."
        return Figure(f"compare_{cost.short}_{family.slug}.png", scatter.draw_comparison(each, one), caption)

    def _courses(self, family: Family, known: Sequence[Means]) -> Figure | None:
        fronts = [each.points[i] for each in known for i in each.front()]
        shown = courses.panels(family, fronts)
        if not shown:
            return None
        caption = (
            "Training loss and the bits it was trained at, as the rows have them: between two rows the bits may have "
        )
        caption += "changed more often."
        if left := len(family.points) - len(shown):
            caption += f" {len(shown)} points: those on a frontier, then the best; {left} more are not shown."
        return Figure(f"courses_{family.slug}.png", courses.draw_courses(shown), caption)

    def _sensitivity(self, family: Family) -> list[Section]:
        mine = next(curves for each, curves in self.curves if each is family)
        if not mine:
            return []
        figures = []
        for key in dict.fromkeys(curve.key for curve in mine):
            drawn = courses.draw_sensitivity(family, key, [c for c in mine if c.key == key], self.level)
            caption = f"{family.metric.label} against {key}, everything else equal."
            figures.append(Figure(f"sensitivity_{slug(key)}_{family.slug}.png", drawn, caption))
        table = contents.sensitivity_table([(family, mine)])
        table = dataclasses.replace(table, slug=f"sensitivity_{family.slug}")
        return [Section(f"Sensitivity to one width, {family.title}", figures=tuple(figures), tables=(table,))]


def _groups(families: Sequence[Family], key: str | None, asked: tuple[str, str] | None) -> tuple[str, str] | None:
    """The groups to compare where a key was given; None where the families have two anyway, or nobody asked."""
    if key is None or not families:
        return None
    check_key(key, families)
    every = list(dict.fromkeys(group for family in families for group in family.groups))
    if asked is not None:
        for group in asked:
            if group not in every:
                raise UsageError(
                    f"--compare {key}={','.join(asked)}: no run has {group!r}; there are {', '.join(every)}"
                )
        return asked
    if len(every) > 2:
        raise UsageError(f"--compare {key}: it has {len(every)} values, {', '.join(every)}; name two, {key}=A,B")
    return None


def _few_seeds(families: Sequence[Family], level: float) -> str:
    """What a reader must know of intervals over so few seeds."""
    seeds = [len(point.finished) for family in families for point in family.points if point.number]
    covers = {2: 50, 3: 75, 4: 79, 5: 84, 6: 86}  # measured: see `bootstrap_interval`
    fewest = min((n for n in seeds if n > 1), default=0)
    single = f" {seeds.count(1)} of {len(seeds)} points have one seed and no interval." if 1 in seeds else ""
    if fewest not in covers or level != 0.95:
        return single
    return f"{single} With {fewest} seeds such an interval covers the true mean in about {covers[fewest]} % of cases."
