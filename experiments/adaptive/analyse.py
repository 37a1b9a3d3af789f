"""The tables and the figure of this folder's README, from results.jsonl alone.

python -m experiments.adaptive.analyse             # tables as Markdown; writes adaptive.png
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from experiments import reading
from experiments.reading import BITOPS, above_line, by_family, difference, family_of, means_of, provenance, show
from qtrain.report.drawing import COLOURS, make_figure, png
from qtrain.report.frontiers import Means, gains
from qtrain.report.points import Point
from qtrain.statistics import best_within

HERE = Path(__file__).parent
TITLES = reading.TITLES | {"digits_cnn": "small CNN, digits", "digits_mlp": "small MLP, digits"}
CONTROLLERS = ("fractrain", "muppet", "budget_keeper")
FIXED = "fixed"


def main() -> None:
    """Print and draw."""
    runs = by_family(HERE / "results.jsonl", TITLES)
    found = {name: grouped(means_of(family_of(mine), BITOPS)) for name, mine in runs.items()}
    print(provenance([run for mine in runs.values() for run in mine]), end="\n\n")
    for name, means in found.items():
        print(f"### {TITLES[name]}\n\n{against_fixed(means)}\n\n{ablation(means)}\n")
    (HERE / "adaptive.png").write_bytes(figure(found))


def grouped(means: Means) -> Means:
    """The same, in groups by what decides the bits."""
    for point in means.points:
        name = point.config["schedule.name"]
        point.group = name if name in CONTROLLERS else FIXED
    return means


def top(means: Means) -> float:
    """The cost of static 8 bits, the highest of the fixed ones."""
    return float(means.cost[means.of(FIXED)].max())


def against_fixed(means: Means) -> str:
    """A line a controller: what it spent, and what it gains over the best fixed schedule that costs no more."""
    lines = [
        "| controller | BitOps, static 8 = 1 | quality [95 %] | above the best of the fixed that cost no more | above "
        "the line between static widths |",
        "|---|---|---|---|---|",
    ]
    for name in CONTROLLERS:
        over = gains(means, name, FIXED)
        for i in sorted(means.of(name).tolist(), key=lambda i: means.cost[i]):
            gain = show(over[i], 2, "+") if i in over else "cheaper than all of them"
            lines.append(
                f"| {means.points[i].label} | {means.cost[i] / top(means):.3f} | {show(means.interval(i))} | {gain} | "
                f"{show(above_line(means, i), 2, '+')} |"
            )
    return "\n".join(lines)


def ablation(means: Means) -> str:
    """Is it the signal or the budget: each signal against none, at the same budget, seed by seed."""
    keepers = [(i, p) for i, p in enumerate(means.points) if p.group == "budget_keeper"]
    budgets = sorted({budget(point) for _, point in keepers})
    signals = sorted({signal(point) for _, point in keepers} - {"none"})
    lines = [
        "| signal, minus none at the same budget | " + " | ".join(map(str, budgets)) + " |",
        "|---" * (len(budgets) + 1) + "|",
    ]
    for name in signals:
        cells = []
        for of in budgets:
            at = {signal(point): i for i, point in keepers if budget(point) == of}
            if name not in at or "none" not in at:
                cells.append("")
                continue
            cells.append(show(difference(means, [at[name]], [at["none"]]), 2, "+"))
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def budget(point: Point) -> str:
    """What a keeper may spend."""
    of = point.config.get("schedule.budget_of") or "static"
    share = point.config.get("schedule.budget_share")
    return f"{1 if share is None else share:g} of {of}"


def signal(point: Point) -> str:
    """What a keeper goes by."""
    gain: Any = point.config.get("schedule.gain")
    name = str(point.config.get("schedule.signal") or "loss")
    return name if gain is None or gain == 0.5 else f"{name}, gain {gain:g}"


def figure(found: dict[str, Means]) -> bytes:
    """A panel a family: quality against cost, the frontier of the fixed schedules behind."""
    drawn = make_figure(4.8 * len(found), 4.2)
    panels = drawn.subplots(1, len(found), squeeze=False).ravel()
    colours = dict(zip((FIXED, *CONTROLLERS), ("0.45", *COLOURS[:3]), strict=True))
    for axes, (name, means) in zip(panels, found.items(), strict=True):
        x = means.cost / top(means)
        ends = np.array([means.interval(i)[1:3] for i in range(len(means.points))]).T
        errors = np.abs(ends - means.quality)
        for group, colour in colours.items():
            mine = means.of(group)
            axes.errorbar(
                x[mine], means.quality[mine], errors[:, mine], fmt="o", markersize=4, linewidth=0.8, color=colour,
                label=group.replace("_", " "),
            )  # fmt: skip
        fixed = means.of(FIXED)
        costs = np.linspace(x[fixed].min(), max(1.02, x.max()), 300)
        best = best_within(x[fixed], means.quality[fixed], costs, maximize=means.family.metric.maximize)
        axes.plot(costs, best, color="0.45", linewidth=1, label="best fixed within the cost")
        axes.set_title(TITLES[name], fontsize=10)
        axes.set_xlabel("BitOps of training, static 8 bits = 1")
        axes.set_ylabel(means.label)
        axes.grid(alpha=0.3)
    handles, labels = panels[0].get_legend_handles_labels()
    drawn.legend(
        handles, labels, loc="outside lower center", ncols=5 if len(found) > 1 else 2, fontsize=9, frameon=False
    )
    return png(drawn)


if __name__ == "__main__":
    main()
