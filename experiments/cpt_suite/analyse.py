"""The tables and the figure of this folder's README, from results.jsonl alone.

python -m experiments.cpt_suite.analyse             # tables as Markdown; writes suite.png
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from experiments.reading import (
    BITOPS,
    TITLES,
    above_line,
    by_family,
    difference,
    family_of,
    means_of,
    provenance,
    show,
    unit,
)
from qtrain.report.drawing import COLOURS, make_figure, png
from qtrain.report.frontiers import Means, gains
from qtrain.statistics import Interval, best_within, percentiles, rank_correlation

HERE = Path(__file__).parent
GROUPS = {  # by what they save against the highest bits throughout: the published clusters
    "large_saving": ("RR", "RTH"),
    "medium_saving": ("LR", "LT", "CR", "CT", "ETV", "RTV"),
    "small_saving": ("ER", "ETH"),
}


def main() -> None:
    """Print and draw."""
    runs = by_family(HERE / "results.jsonl")
    found = {name: means_of(family_of(mine), BITOPS) for name, mine in runs.items()}
    in_float = {name: means_of(family_of(mine, suffix="_float"), BITOPS) for name, mine in runs.items()}
    print(provenance([run for mine in runs.values() for run in mine]), end="\n\n")
    print(summary(found, in_float), end="\n\n")
    for name, means in found.items():
        print(f"### {TITLES[name]}\n\n{table(means)}\n")
    (HERE / "suite.png").write_bytes(figure(found))


def suite_name(label: str) -> str:
    """The name of a schedule, "" of static bits."""
    return "" if "bit" in label else label.split()[0]


def group_of(name: str) -> str:
    """The cluster a schedule is of."""
    return next(group for group, names in GROUPS.items() if name in names)


def static_at_most(means: Means) -> float:
    """What the highest static width costs: saving is against it."""
    return float(means.cost[means.of("static")].max())


def table(means: Means) -> str:
    """A line a point, the cheapest first."""
    over = gains(means, "scheduled", "static")
    top = static_at_most(means)
    digits, measure = unit(means)
    lines = [
        f"| bits | group | saving | {measure} | above the best static within its cost | above the line between static "
        "widths | evaluated in float |",
        "|---|---|---|---|---|---|---|",
    ]
    for i in np.argsort(means.cost):
        point = means.points[i]
        name = suite_name(point.label)
        gain = show(over[int(i)], digits, "+") if int(i) in over else ""
        line = show(above_line(means, int(i)), digits, "+") if name else ""
        in_float = float(np.mean([means.family.metric.of(run, "_float") for run in point.finished]))
        group = group_of(name).replace("_", " ") if name else "static"
        saving = 100 * (1 - means.cost[i] / top)
        cells = [point.label, group, f"{saving:.1f} %", show(means.interval(int(i)), digits), gain, line]
        lines.append(f"| {' | '.join(cells)} | {in_float:.{digits}f} |")
    return "\n".join(lines)


def summary(found: dict[str, Means], in_float: dict[str, Means]) -> str:
    """A line a family: rank correlations, groups, points above the static frontier; the same evaluated in float."""
    lines = [
        "| family | measure | rank correlation of cost and quality, 10 schedules | large, medium, small saving: "
        "mean quality | small − large | above the static frontier | below | above the static line | below "
        "| in float: above the line | below |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for name, means in found.items():
        digits, measure = unit(means)
        scheduled = means.of("scheduled")
        sign = 1 if means.family.metric.maximize else -1
        rank = rank_correlation(means.cost[scheduled], sign * means.quality[scheduled])
        levels = {group: _group(means, group) for group in GROUPS}
        small_over_large = difference(means, _members(means, "small_saving"), _members(means, "large_saving"))
        over = gains(means, "scheduled", "static").values()
        above, below = sum(gain.low > 0 for gain in over), sum(gain.high < 0 for gain in over)
        line = [above_line(means, i) for i in scheduled.tolist()]
        also = [above_line(in_float[name], i) for i in in_float[name].of("scheduled").tolist()]
        shown = " / ".join(f"{interval.estimate:.{digits}f}" for interval in levels.values())
        lines.append(
            f"| {TITLES[name]} | {measure} | {show(rank)} | {shown} | {show(small_over_large, digits, '+')} "
            f"| {above} of {len(over)} | {below} of {len(over)} "
            f"| {sum(gain.low > 0 for gain in line)} of {len(line)} "
            f"| {sum(gain.high < 0 for gain in line)} of {len(line)} "
            f"| {sum(gain.low > 0 for gain in also)} of {len(also)} "
            f"| {sum(gain.high < 0 for gain in also)} of {len(also)} |"
        )
    return "\n".join(lines)


def _members(means: Means, group: str) -> list[int]:
    return [i for i, point in enumerate(means.points) if suite_name(point.label) in GROUPS[group]]


def _group(means: Means, group: str) -> Interval:
    mine = _members(means, group)
    return Interval(
        float(means.quality[mine].mean()),
        *percentiles(means.drawn_quality[:, mine].mean(1)),
        int(means.seeds[mine].min()),
    )


def figure(found: dict[str, Means]) -> bytes:
    """A panel a family: gain over static 8 bits against cost, paired by seed; the colours are the groups."""
    columns = min(3, len(found))
    rows = -(-len(found) // columns)
    drawn = make_figure(4.6 * columns, 3.7 * rows + 0.5)
    panels = drawn.subplots(rows, columns, squeeze=False).ravel()
    colours = dict(zip(GROUPS, (COLOURS[1], COLOURS[0], COLOURS[2]), strict=True))
    for axes, (name, means) in zip(panels, found.items(), strict=False):
        static = means.of("static")
        order = static[np.argsort(means.cost[static])]
        top, sign = order[-1], 1 if means.family.metric.maximize else -1
        x = means.cost / means.cost[top]
        y = sign * (means.quality - means.quality[top])
        low, high = percentiles(sign * (means.drawn_quality - means.drawn_quality[:, [top]]))
        errors = np.maximum(np.array([y - low, high - y]), 0)
        marks = [(order, "s", "0.35", "static bits")]
        marks += [(_members(means, group), "o", colour, group.replace("_", " ")) for group, colour in colours.items()]
        for mine, marker, colour, label in marks:
            axes.errorbar(x[mine], y[mine], errors[:, mine], fmt=marker, color=colour, markersize=5, label=label)
        budgets = np.linspace(x[order].min(), 1.02, 300)
        best = best_within(x[order], y[order], budgets)
        axes.plot(budgets, best, color="0.35", linewidth=1, label="best static within the cost")
        for i in order:
            width = means.points[i].label.split()[0]
            axes.annotate(width, (x[i], y[i]), (4, -11), textcoords="offset points", fontsize=7, color="0.35")
        _leave_collapsed(axes, means, y)
        axes.axhline(0, color="0.6", linewidth=0.7, linestyle="--")
        axes.set_title(TITLES[name], fontsize=10)
        axes.set_xlabel("BitOps of training, static 8 bits = 1")
        axes.set_ylabel("gain over static 8 bits, " + ("points" if sign > 0 else "nats a byte"))
        axes.grid(alpha=0.3)
    for axes in panels[len(found) :]:
        axes.set_axis_off()
    handles, labels = panels[0].get_legend_handles_labels()
    drawn.legend(handles, labels, loc="outside lower center", ncols=5, fontsize=9, frameon=False)
    return png(drawn)


def _leave_collapsed(axes: Any, means: Means, y: np.ndarray) -> None:
    """End the axis above what is far below the rest, and name it: it would flatten everything else."""
    middle = np.median(y)
    far = y < middle - 6 * (y.max() - middle) - 6 * np.median(np.abs(y - middle))
    if far.any():
        kept = y[~far]
        axes.set_ylim(kept.min() - 0.5 * np.ptp(kept), kept.max() + 0.4 * np.ptp(kept))
        axes.annotate(
            "below: " + ", ".join(f"{means.points[i].label} at {y[i]:.1f}" for i in np.flatnonzero(far)),
            (0.02, 0.02),
            xycoords="axes fraction",
            fontsize=8,
            color="0.35",
        )


if __name__ == "__main__":
    main()
