"""What was found, drawn. matplotlib is imported when something is drawn, without its global state."""

from __future__ import annotations

import io
from collections.abc import Mapping
from typing import Any

from qtrain.search.problem import UNITS


def draw(found: Mapping[str, Any]) -> bytes:
    """A PNG of what `search_run` returned: Ω and test accuracy against the cost, and the width of each layer."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import EngFormatter, MaxNLocator

    unit = found["unit"]
    layers, assignment = found["layers"], found["assignment"]
    width = min(max(9.0, 0.32 * len(layers) + 2), 24.0)
    figure = Figure(figsize=(width, 7.5), dpi=110, layout="constrained")
    halves: Any = figure.subfigures(2, 1, height_ratios=(3, 2))
    upper, lower = halves
    error, accuracy = upper.subplots(1, 2)

    uniform = found["uniform"]
    front = found["front"]
    for axes, kind in ((error, "omega"), (accuracy, "accuracy")):
        factor = 100.0 if kind == "accuracy" else 1.0
        mixed = [(point[unit], factor * point[kind]) for point in front if kind in point]
        if mixed:
            axes.plot(*zip(*mixed, strict=True), ".-", color="C0", label="front, mixed widths")
        points = [(row[unit], factor * row[kind], bits) for bits, row in uniform.items()]
        axes.plot([x for x, _, _ in points], [y for _, y, _ in points], "s", color="C1", label="one width for all")
        for x, y, bits in points:
            axes.annotate(f"{bits} bits", (x, y), xytext=(5, 5), textcoords="offset points", fontsize=8)
        at = found["result"][unit], factor * found["result"][kind]
        axes.plot(*at, "*", color="C3", markersize=12, label="chosen")
        axes.axvline(found["budget"], color="0.6", linestyle=":", linewidth=1, label="budget")
        axes.set_xlabel(UNITS[unit])
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
        axes.grid(alpha=0.3)
        axes.margins(0.15)
    if all(point["omega"] > 0 for point in (*front, *uniform.values())):
        error.set_yscale("log")
    error.set_ylabel("Ω, twice the expected rise of the loss")
    accuracy.set_ylabel("test accuracy, %")
    error.legend(fontsize=8)

    axes = lower.subplots()
    widths = [assignment[layer["path"]] for layer in layers]
    axes.bar(range(len(layers)), widths, color="C3", width=0.7)
    axes.set_xticks(range(len(layers)), [layer["path"] for layer in layers], rotation=60, ha="right", fontsize=7)
    axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_ylabel("bits")
    axes.set_title("chosen width of each layer", fontsize=9.5)
    axes.grid(axis="y", alpha=0.3)
    drawn = io.BytesIO()
    figure.savefig(drawn, format="png")
    return drawn.getvalue()
