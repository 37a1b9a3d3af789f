"""A range test, drawn. matplotlib is imported when something is drawn, without its global state."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any


def draw(found: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> bytes:
    """A PNG of what `range_test` returned: the training accuracy over the steps (`rows` of metrics), and the gains."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(9, 3.6), dpi=110, layout="constrained")
    course, gains = figure.subplots(1, 2, width_ratios=(3, 2))
    course.plot([row["step"] for row in rows], [100 * row["accuracy"] for row in rows], ".-", linewidth=1)
    for index, width in enumerate(found["widths"]):
        start = index * found["steps"]
        course.axvline(start, color="0.8", linewidth=0.8, zorder=0)
        course.annotate(f"{width}", (start + found["steps"] / 2, 1.0), xycoords=("data", "axes fraction"), ha="center",
                        va="bottom", fontsize=8)  # fmt: skip
    course.set_xlabel("training step (above: bits)")
    course.set_ylabel("training accuracy, %")
    course.grid(alpha=0.3)
    passing = [width == found["low"] for width in found["widths"]]
    colours = ["C3" if here else "C0" for here in passing]
    gains.bar(found["widths"], [100 * gain for gain in found["gain"]], color=colours)
    gains.axhline(100 * found["threshold"], color="0.4", linestyle=":", linewidth=1)
    gains.xaxis.set_major_locator(MaxNLocator(integer=True))
    gains.set_xlabel("bits")
    gains.set_ylabel("gain, points (dotted: threshold)")
    gains.set_title("no width passes" if found["low"] is None else f"low = {found['low']} bits", fontsize=10)
    drawn = io.BytesIO()
    figure.savefig(drawn, format="png")
    return drawn.getvalue()
