"""Quality against cost, drawn: points with their intervals and frontiers; what two groups reach within a budget."""

from __future__ import annotations

from typing import Any

import numpy as np

from qtrain import statistics
from qtrain.report.drawing import cost_axis, make_figure, plural, png, shortened, style
from qtrain.report.frontiers import Comparison, Means
from qtrain.report.quality import quality_at

_MOST_NUMBERED = 16
_BUDGETS = 200


def draw_frontiers(means: Means) -> bytes:
    """A PNG: a mark for each point, its interval, its number if it is on a frontier; a line for each frontier."""
    family = means.family
    figure = make_figure(9.0, 5.6)
    axes = figure.subplots()
    groups = [group for group in family.groups if len(means.of(group))]
    numbered: set[int] = set()
    for group in groups:
        colour, marker = style(family.groups, group)
        mine = means.of(group)
        several = means.seeds[mine] > 1
        for chosen, face in ((mine[several], colour), (mine[~several], "white")):
            if len(chosen):
                axes.errorbar(
                    means.cost[chosen],
                    means.quality[chosen],
                    yerr=_ends(means, chosen),
                    fmt=marker,
                    color=colour,
                    markerfacecolor=face,
                    markersize=5.5,
                    linewidth=1,
                    alpha=0.85 if len(means.points) < 100 else 0.45,
                    zorder=3,
                )
        front = means.front(group)
        numbered |= set(front.tolist())
        _steps(axes, means.cost[front], means.quality[front], means.cost.max(), color=colour, linewidth=1.4)
        axes.plot(
            [],
            [],
            marker=marker,
            color=colour,
            linewidth=1.4,
            label=f"{shortened(group)} ({plural(len(mine), 'point')})",
        )
    if len(groups) > 1:
        front = means.front()
        line: dict[str, Any] = {"color": "0.2", "linewidth": 4, "alpha": 0.18, "zorder": 1}
        _steps(axes, means.cost[front], means.quality[front], means.cost.max(), **line)
        axes.plot([], [], **line, label="frontier of all points")
    so_far = [
        (means.against.of(run), quality_at(run, family.metric, means.against))
        for point in family.points
        for run in point.unfinished
    ]
    so_far = [(cost, quality) for cost, quality in so_far if cost > 0 and np.isfinite(quality)]
    if so_far:
        axes.plot(*zip(*so_far, strict=True), "x", color="0.45", markersize=6, label="unfinished runs, so far")
    if bool((means.seeds == 1).any()) and bool((means.seeds > 1).any()):
        axes.plot([], [], "o", color="0.3", markerfacecolor="white", linestyle="", label="hollow: one seed")
    # Where there are many, the frontier of all points says what matters.
    _number(axes, means, sorted(numbered) if len(numbered) <= _MOST_NUMBERED else means.front().tolist())
    _leave_far_below(axes, means)
    cost_axis(axes, [*means.cost, *(cost for cost, _ in so_far)], means.against.label)
    axes.set_ylabel(means.label)
    axes.grid(alpha=0.3)
    few, many = int(means.seeds.min()), int(means.seeds.max())
    seeds = plural(few, "seed") if few == many else f"{few} to {many} seeds"
    whiskers = f"whiskers {100 * means.level:g} % bootstrap intervals" if many > 1 else "no intervals"
    axes.set_title(f"{family.title}; means of {seeds}, {whiskers}", fontsize=10)
    figure.legend(loc="outside lower center", ncols=3, fontsize=8.5, frameon=False)
    return png(figure)


def draw_comparison(means: Means, found: Comparison) -> bytes:
    """A PNG: the best quality within a budget for both groups, and the difference, with bands over resampled seeds."""
    family = means.family
    figure = make_figure(9.0, 6.4)
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=(3, 2))
    low, high = means.cost.min(), means.cost.max()
    budgets = np.unique(np.concatenate([np.geomspace(low, high, _BUDGETS), means.cost]))
    best, drawn = {}, {}
    for group in (found.a, found.b):
        mine, colour = means.of(group), style(family.groups, group)[0]
        maximize = family.metric.maximize
        best[group] = statistics.best_within(means.cost[mine], means.quality[mine], budgets, maximize=maximize)
        drawn[group] = statistics.best_within(
            means.drawn_cost[:, mine], means.drawn_quality[:, mine], budgets, maximize=maximize
        )
        upper.step(budgets, best[group], where="post", color=colour, linewidth=1.6, label=shortened(group))
        _band(upper, budgets, best[group], drawn[group], means, colour)
        upper.plot(means.cost[mine], means.quality[mine], style(family.groups, group)[1], color=colour, alpha=0.3, ms=4)
    sign = 1 if family.metric.maximize else -1
    difference = sign * (best[found.a] - best[found.b])
    lower.step(budgets, difference, where="post", color="0.15", linewidth=1.4)
    _band(lower, budgets, difference, sign * (drawn[found.a] - drawn[found.b]), means, "0.15")
    lower.axhline(0, color="0.5", linewidth=1, linestyle="--")
    for axes in (upper, lower):
        if np.isfinite(found.low) and found.high > found.low:
            axes.axvspan(found.low, found.high, color="#f0e442", alpha=0.18, linewidth=0)
        axes.grid(alpha=0.3)
    cost_axis(lower, list(means.cost), f"budget: {means.against.label}")
    upper.set_ylabel(f"best {means.label}\nwithin the budget", fontsize=9.5)
    lower.set_ylabel(f"gain of {shortened(found.a, 20)},\n{family.metric.unit}", fontsize=9.5)
    upper.legend(fontsize=9, loc="lower right" if means.family.metric.maximize else "upper right")
    bands = f"bands {100 * means.level:g} % bootstrap intervals over seeds; " if means.seeds.max() > 1 else ""
    upper.set_title(f"{family.title}; {bands}shaded: the costs that both cover", fontsize=10)
    return png(figure)


def _leave_far_below(axes: Any, means: Means) -> None:
    """End the axis below the frontiers and the better half: a run that failed is not to flatten everything else."""
    sign = 1 if means.family.metric.maximize else -1
    values, drawn = sign * means.quality, np.sort(np.array(axes.get_ylim()) * sign)
    fronts = [
        sign * means.quality[means.front(group)].min() for group in (*means.family.groups, None) if len(means.of(group))
    ]
    best, middle = values.max(), np.median(values)
    worst = min(*fronts, best - 5 * (best - middle))
    left = int(np.sum(values < worst))
    if left and middle < best:
        end = worst - 0.08 * (best - worst)
        axes.set_ylim(*((end, drawn[1]) if sign > 0 else (-drawn[1], -end)))
        text = f"{plural(left, 'point')} beyond the axis"
        axes.plot([], [], "v" if sign > 0 else "^", color="0.6", linestyle="", label=text)


def _ends(means: Means, chosen: np.ndarray) -> np.ndarray | None:
    ends = [means.interval(int(i)) for i in chosen]
    if not any(ends):
        return None
    # The interval of a skewed few may leave out its own estimate by a rounding error.
    return np.array([[max(e.estimate - e.low, 0.0), max(e.high - e.estimate, 0.0)] for e in ends]).T


def _steps(axes: Any, costs: np.ndarray, qualities: np.ndarray, last: float, **line: Any) -> None:
    """A frontier as the best quality within a budget, drawn on to the highest cost."""
    axes.step([*costs, last], [*qualities, qualities[-1]], where="post", **line)


def _band(axes: Any, budgets: np.ndarray, best: np.ndarray, drawn: np.ndarray, means: Means, colour: str) -> None:
    if means.seeds.max() > 1:
        low, high = statistics.basic_ends(best, drawn, means.level)
        axes.fill_between(budgets, low, high, step="post", color=colour, alpha=0.2, linewidth=0)


def _number(axes: Any, means: Means, which: list[int]) -> None:
    """Numbers beside points, each at the first of a few places where it covers no other one."""
    taken: list[tuple[float, float]] = []
    costs, qualities = np.log(means.cost), means.quality
    across, up = (max(float(np.ptp(values)), 1e-12) for values in (costs, qualities))
    for index in which:
        x, y = (costs[index] - costs.min()) / across, (qualities[index] - qualities.min()) / up
        for dx, dy in ((6, 5), (6, -12), (-14, 5), (-14, -12), (6, 16), (-14, 16), (6, -23)):
            at = x + dx / 560, y + dy / 330  # points of the axes' width and height, roughly
            if all(abs(at[0] - a) > 0.025 or abs(at[1] - b) > 0.035 for a, b in taken):
                break
        taken.append(at)
        text = str(means.points[index].number)
        place = (means.cost[index], means.quality[index])
        axes.annotate(text, place, xytext=(dx, dy), textcoords="offset points", fontsize=8.5, zorder=4)
