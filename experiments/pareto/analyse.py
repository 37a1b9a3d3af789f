"""The tables and figures of this folder's README, from results.jsonl alone.

python -m experiments.pareto.analyse    # tables as Markdown; writes pareto.png, grid.png, linear.png, bytes.png
"""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

import numpy as np

from experiments.reading import (
    BITOPS,
    BYTES,
    LINEAR,
    TITLES,
    by_family,
    difference,
    family_of,
    means_of,
    provenance,
    show,
    unit,
)
from qtrain.report.drawing import COLOURS, cost_axis, make_figure, png
from qtrain.report.frontiers import Means, gains
from qtrain.report.quality import Cost
from qtrain.statistics import best_within, percentiles

HERE = Path(__file__).parent
KINDS = {  # how a point is marked
    "static, W = A": ("0.25", "s"),
    "static, W ≠ A": (COLOURS[5], "."),
    "static, other width": ("0.55", "v"),
    "both scheduled": (COLOURS[1], "o"),
    "weights scheduled": (COLOURS[2], "^"),
    "activations scheduled": (COLOURS[3], "D"),
    "linear, in opposition": (COLOURS[4], "P"),
    "scheduled, other width": (COLOURS[6], "X"),
}


def main() -> None:
    """Print and draw."""
    runs = by_family(HERE / "results.jsonl")
    found = {name: means_of(family_of(mine), BITOPS) for name, mine in runs.items()}
    print(provenance([run for mine in runs.values() for run in mine]), end="\n\n")
    print(spending(found), end="\n\n")
    print(frontier_summary(runs), end="\n\n")
    for name, means in found.items():
        print(f"### {TITLES[name]}\n\n{table(means)}\n")
    (HERE / "pareto.png").write_bytes(scatter(found, BITOPS))
    for cost, file in ((LINEAR, "linear.png"), (BYTES, "bytes.png")):
        (HERE / file).write_bytes(scatter({name: means_of(family_of(mine), cost) for name, mine in runs.items()}, cost))
    (HERE / "grid.png").write_bytes(heatmaps(found))


def kind_of(means: Means, index: int) -> str:
    """Which of `KINDS` a point is."""
    config = means.points[index].config
    # Most points have the width that the task has.
    other = config["model.width"] != statistics.mode(point.config["model.width"] for point in means.points)
    if means.points[index].group == "static":
        if other:
            return "static, other width"
        return "static, W = A" if len(set(widths(config))) == 1 else "static, W ≠ A"
    if other:
        return "scheduled, other width"
    names = [config.get(f"schedule.{kind}.name") or config["schedule.name"] for kind in ("weights", "acts")]
    if names == ["linear", "linear"]:
        same = config["schedule.weights.start_bits"] == config["schedule.acts.start_bits"]
        return "both scheduled" if same else "linear, in opposition"
    if "constant" in names:
        return "weights scheduled" if names[1] == "constant" else "activations scheduled"
    return "both scheduled"


def widths(config: Any) -> tuple[int, int]:
    """Static bits of weights and activations."""
    found = (config.get(f"schedule.{kind}.bits") or config["schedule.high"] for kind in ("weights", "acts"))
    weights, acts = (int(bits) for bits in found)
    return weights, acts


def grid(means: Means) -> dict[tuple[int, int], int]:
    """(weights, acts) → index of the static point of the task's own width."""
    return {
        widths(means.points[i].config): i
        for i in range(len(means.points))
        if kind_of(means, i) in ("static, W = A", "static, W ≠ A")
    }


def spending(found: dict[str, Means]) -> str:
    """Which one to spend bits on: pairs of mirrored points, which cost about the same."""
    lines = [
        "| family | measure | W4A2 − W2A4 | W8A2 − W2A8 | W8A3 − W3A8 | W8A4 − W4A8 | W8A8 − W8A2 | W8A8 − W2A8 |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, means in found.items():
        at = grid(means)
        pairs = [
            ((4, 2), (2, 4)),
            ((8, 2), (2, 8)),
            ((8, 3), (3, 8)),
            ((8, 4), (4, 8)),
            ((8, 8), (8, 2)),
            ((8, 8), (2, 8)),
        ]
        digits, measure = unit(means)
        cells = [show(difference(means, [at[a]], [at[b]]), digits, "+") for a, b in pairs]
        lines.append(f"| {TITLES[name]} | {measure} | {' | '.join(cells)} |")
    return "\n".join(lines)


def frontier_summary(runs: dict[str, Any]) -> str:
    """Scheduled points against the static frontier, by three costs."""
    lines = [
        "| family | cost | scheduled points | above the static frontier | below | best gain |",
        "|---|---|---|---|---|---|",
    ]
    for name, mine in runs.items():
        for cost in (BITOPS, LINEAR, BYTES):
            means = means_of(family_of(mine), cost)
            over = gains(means, "scheduled", "static")
            digits, _ = unit(means)
            best = max(over, key=lambda i: over[i].estimate)
            lines.append(
                f"| {TITLES[name]} | {cost.short} | {len(over)} | {sum(gain.low > 0 for gain in over.values())} "
                f"| {sum(gain.high < 0 for gain in over.values())} "
                f"| {show(over[best], digits, '+')}, {means.points[best].label} |"
            )
    return "\n".join(lines)


def table(means: Means) -> str:
    """A line a point, the cheapest first."""
    over = gains(means, "scheduled", "static")
    front = set(means.front().tolist())
    digits, measure = unit(means)
    top = means.cost[grid(means)[8, 8]]
    lines = [
        f"| bits | kind | BitOps, W8A8 = 1 | {measure} | above the best static within its cost | frontier |",
        "|---|---|---|---|---|---|",
    ]
    for i in np.argsort(means.cost).tolist():
        gain = show(over[i], digits, "+") if i in over else ""
        mark = "●" if i in front else ""
        lines.append(
            f"| {means.points[i].label} | {kind_of(means, i)} | {means.cost[i] / top:.3f} "
            f"| {show(means.interval(i), digits)} | {gain} | {mark} |"
        )
    return "\n".join(lines)


def scatter(found: dict[str, Means], cost: Cost) -> bytes:
    """A panel a family: gain over W8A8, paired by seed, against cost; the static frontier as a line."""
    figure = make_figure(11.5, 4.1 * -(-len(found) // 2) + 0.6)
    panels = figure.subplots(-(-len(found) // 2), 2, squeeze=False).ravel()
    handles: dict[str, Any] = {}
    for axes, (name, means) in zip(panels, found.items(), strict=False):
        sign, top = 1 if means.family.metric.maximize else -1, grid(means)[8, 8]
        y = sign * (means.quality - means.quality[top])
        low, high = percentiles(sign * (means.drawn_quality - means.drawn_quality[:, [top]]))
        errors = np.maximum(np.array([y - low, high - y]), 0)
        shown = y >= _lowest_shown(y)
        static = means.of("static")
        budgets = np.geomspace(means.cost.min(), means.cost.max() * 1.02, 400)
        (handles["static frontier"],) = axes.plot(
            budgets, best_within(means.cost[static], y[static], budgets), color="0.25", linewidth=1
        )
        for i in np.flatnonzero(shown):
            kind = kind_of(means, int(i))
            colour, marker = KINDS[kind]
            at = means.cost[i], y[i], errors[:, [i]]
            handles.setdefault(kind, axes.errorbar(*at, fmt=marker, color=colour, markersize=5.5, elinewidth=0.8))
        margin = 0.06 * np.ptp(y[shown])
        axes.set_ylim(y[shown].min() - margin, y[shown].max() + 3 * margin)
        if not shown.all():
            note = f"{np.sum(~shown)} points below or left"
            axes.annotate(note, (0.98, 0.02), xycoords="axes fraction", ha="right", fontsize=8, color="0.3")
        cost_axis(axes, list(means.cost[shown]), cost.label)
        axes.set_title(TITLES[name], fontsize=10)
        axes.set_ylabel("gain over W8A8, " + ("points" if sign > 0 else "nats a byte"))
        axes.grid(alpha=0.3)
    for axes in panels[len(found) :]:
        axes.set_axis_off()
    ordered = {kind: handles[kind] for kind in ("static frontier", *KINDS) if kind in handles}
    figure.legend(ordered.values(), ordered.keys(), loc="outside lower center", ncols=5, fontsize=9, frameon=False)
    return png(figure)


def _lowest_shown(y: np.ndarray) -> float:
    """What is far below the rest (2 bits) would leave no room for it."""
    middle = np.percentile(y, 40)
    return float(middle - 1.8 * (y.max() - middle))


def heatmaps(found: dict[str, Means]) -> bytes:
    """Quality of the static grid, weights against activations."""
    figure = make_figure(3.4 * len(found), 3.4)
    for axes, (name, means) in zip(figure.subplots(1, len(found), squeeze=False).ravel(), found.items(), strict=True):
        at = grid(means)
        bits = sorted({weights for weights, acts in at if weights != acts})
        values = np.array([[means.quality[at[weights, acts]] for acts in bits] for weights in bits])
        maximize = means.family.metric.maximize
        axes.imshow(values, origin="lower", cmap="viridis" if maximize else "viridis_r")
        for row, column in np.ndindex(values.shape):
            text = f"{values[row, column]:.{1 if maximize else 2}f}"
            axes.text(column, row, text, ha="center", va="center", fontsize=8, color="white", path_effects=_outlined())
        axes.set_xticks(range(len(bits)), bits)
        axes.set_yticks(range(len(bits)), bits)
        axes.set_xlabel("bits of activations")
        axes.set_ylabel("bits of weights")
        axes.set_title(f"{TITLES[name]}\n{means.label if maximize else 'test loss, nats a byte'}", fontsize=9)
    return png(figure)


def _outlined() -> list[Any]:
    from matplotlib.patheffects import withStroke

    return [withStroke(linewidth=2, foreground="black")]


if __name__ == "__main__":
    main()
