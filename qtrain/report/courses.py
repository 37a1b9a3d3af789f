"""Over the steps and over the widths: the schedule above the loss of each point, and sensitivity curves."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from qtrain.report.drawing import COLOURS, MARKERS, loss_axis, make_figure, plural, png, shortened, step_axis
from qtrain.report.points import Family, Point, natural
from qtrain.report.runs import Run
from qtrain.report.sensitivity import Curve

MOST_PANELS = 12
FLOAT_BITS = 24
_KINDS = (("weights", "#d55e00", "-", 1.8), ("activations", "#009e73", "--", 1.0), ("gradients", "#cc79a7", ":", 1.2))
_MOST_CURVES = 10
_DOTTED = 60  # rows, up to which each is a dot


def panels(family: Family, fronts: Sequence[Point]) -> list[Point]:
    """Which points get a panel: those on a frontier, then the best, `MOST_PANELS` at most."""
    first = {id(point) for point in fronts}
    ordered = sorted(family.points, key=lambda p: (id(p) not in first, not p.number, p.number))
    chosen = {id(point) for point in ordered if any(len(run.curve.steps) for run in _runs(point))}
    kept = [point for point in ordered if id(point) in chosen][:MOST_PANELS]
    return sorted(kept, key=lambda p: (not p.number, p.number))


def draw_courses(points: Sequence[Point]) -> bytes:
    """A PNG: for each point the training loss (mean over seeds, single runs faint) and the bits it was trained at."""
    columns = min(3, len(points))
    rows = math.ceil(len(points) / columns)
    figure = make_figure(max(1.0 + 3.6 * columns, 6.0), 1.1 + 2.5 * rows)
    grid = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
    cells = list(grid.flat)
    highest = _highest(points)
    losses = np.concatenate([run.curve.loss for point in points for run in _runs(point)])
    losses = losses[np.isfinite(losses)]
    logarithmic = bool(len(losses)) and losses.min() > 0 and losses.max() > 3 * losses.min()
    shown: dict[str, Any] = {}
    for index, (axes, point) in enumerate(zip(cells, points, strict=False)):
        for run in _runs(point):
            axes.plot(run.curve.steps, run.curve.loss, color=COLOURS[0], alpha=0.25, linewidth=0.7)
        steps, loss = _mean(_runs(point), lambda run: run.curve.loss)
        shown["training loss"] = axes.plot(steps, loss, color=COLOURS[0], linewidth=1.5)[0]
        if logarithmic:
            loss_axis(axes)
        right = axes.twinx()
        shown |= _draw_bits(right, _runs(point), highest)
        right.set_ylim(0, highest * 1.06)
        _bit_ticks(right, highest, labelled=index % columns == columns - 1)
        axes.set_zorder(right.get_zorder() + 1)  # the loss above the bits
        axes.patch.set_visible(False)
        number = f"{point.number}  " if point.number else ""
        unfinished = "" if point.finished else " (unfinished)"
        axes.set_title(f"{number}{shortened(point.label, 40)}{unfinished}", fontsize=9)
        axes.grid(alpha=0.25)
        step_axis(axes)
        axes.tick_params(labelbottom=index + columns >= len(points))
    for empty in cells[len(points) :]:
        empty.set_axis_off()
    figure.supxlabel("training step", fontsize=10)
    figure.supylabel("training loss", fontsize=10)
    figure.legend(
        shown.values(),
        shown.keys(),
        loc="outside upper center",
        ncols=4 if columns > 1 else 2,
        fontsize=9,
        frameon=False,
    )
    return png(figure)


def draw_sensitivity(family: Family, key: str, curves: Sequence[Curve], level: float) -> bytes:
    """A PNG: quality against the width `key`, a line for everything else that is equal."""
    from matplotlib.ticker import MaxNLocator

    figure = make_figure(8.0, 5.0)
    axes = figure.subplots()
    kept = sorted(curves[:_MOST_CURVES], key=lambda curve: natural(curve.label))
    aside = 0.3 / len(kept)  # of a bit, so that whiskers do not cover each other
    for index, curve in enumerate(kept):
        ends = np.array([[q.estimate - q.low, q.high - q.estimate] if q else [0.0, 0.0] for q in curve.quality]).T
        axes.errorbar(
            [bits + aside * (index - (len(kept) - 1) / 2) for bits in curve.bits],
            [quality.estimate for quality in curve.quality],
            yerr=np.maximum(ends, 0.0) if ends.any() else None,
            fmt=f"{MARKERS[index % len(MARKERS)]}-",
            color=COLOURS[index % len(COLOURS)],
            markersize=5,
            linewidth=1.3,
            label=shortened(curve.label, 60) or None,
        )
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel(f"{key}, bits")
    axes.set_ylabel(family.metric.label)
    axes.grid(alpha=0.3)
    n = sorted({quality.n for curve in kept for quality in curve.quality})
    seeds = plural(n[0], "seed") if len(n) == 1 else f"{n[0]} to {n[-1]} seeds"
    whiskers = f", {100 * level:g} % bootstrap intervals" if n[-1] > 1 else ""
    left = f"; {len(curves) - len(kept)} more curves in the table" if len(curves) > len(kept) else ""
    axes.set_title(f"{family.title}; means of {seeds}{whiskers}{left}", fontsize=10)
    if any(curve.label for curve in kept):
        figure.legend(loc="outside lower center", ncols=2, fontsize=8.5, frameon=False)
    return png(figure)


def _runs(point: Point) -> list[Run]:
    return point.finished or point.unfinished


def _draw_bits(axes: Any, runs: Sequence[Run], highest: float) -> dict[str, Any]:
    """The widths as steps, means over seeds; equal ones lie on each other, the dashed above the solid."""
    drawn: dict[str, Any] = {}
    steps, bits = _mean(runs, lambda run: np.where(run.curve.bits >= FLOAT_BITS, highest, run.curve.bits))
    # What a row says is the width of its last step: the line holds it since the row before, the first since step 0.
    steps, bits = np.concatenate([[0], steps]), np.concatenate([bits[:1], bits])
    for index, (name, colour, dashes, width) in enumerate(_KINDS):
        look: dict[str, Any] = {"color": colour, "linestyle": dashes, "linewidth": width, "alpha": 0.7}
        drawn[f"bits of {name}"] = axes.step(steps, bits[:, index], where="pre", **look)[0]
        if len(steps) <= _DOTTED:
            axes.plot(steps[1:], bits[1:, index], ".", color=colour, markersize=3, alpha=0.7)
    return drawn


def _bit_ticks(axes: Any, highest: float, labelled: bool) -> None:
    step = 1 if highest <= 6 else 2 if highest <= 12 else 4
    ticks = [*range(step, int(highest) + 1, step)]
    if highest != int(highest):  # its last half is what stands for float
        ticks = [tick for tick in ticks if tick < highest - step / 2]
        axes.set_yticks([*ticks, highest], [*map(str, ticks), "float"])
    else:
        axes.set_yticks(ticks)
    axes.tick_params(labelright=labelled, labelsize=8, colors="0.35")
    if labelled:
        axes.set_ylabel("bits", color="0.35")


def _highest(points: Sequence[Point]) -> float:
    """The top of the axis of bits: the widest there is; where there is float a place above it, which ends in .5."""
    bits = np.concatenate([run.curve.bits.ravel() for point in points for run in _runs(point)])
    bits = bits[np.isfinite(bits)]
    narrow = bits[bits < FLOAT_BITS]
    top = float(np.ceil(narrow.max())) if len(narrow) else 2.0
    return top + 1.5 if len(narrow) < len(bits) else top


def _mean(runs: Sequence[Run], of: Any) -> tuple[np.ndarray, np.ndarray]:
    """Steps, and the mean of a curve over runs at the steps that all of them have; of the longest if there are none."""
    with_rows = [run for run in runs if len(run.curve.steps)]
    steps = with_rows[0].curve.steps
    for run in with_rows[1:]:
        steps = np.intersect1d(steps, run.curve.steps)
    if not len(steps):
        with_rows = [max(with_rows, key=lambda run: len(run.curve.steps))]
        steps = with_rows[0].curve.steps
    values = [of(run)[np.searchsorted(run.curve.steps, steps)] for run in with_rows]
    return steps, np.mean(values, axis=0)
