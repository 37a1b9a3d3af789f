"""Draws results.jsonl: each arm's time over float32's as a bar, with the quartiles over the rounds as whiskers.

    python experiments/speed/plot.py [--backend cpu] [--out speed.png]

Only rows that were measured without special environment settings are drawn. A bar that would leave the panel is cut
and carries its number.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

HERE = Path(__file__).parent
LARGEST = 2.0
COLOURS = {
    "float32_materialised": "#9a9a9a",
    "bfloat16": "#6f6f6f",
    "qtrain_fake": "#8fbbe8",
    "qtrain_native": "#1f5fa8",
    "aqt_qat": "#f4b77a",
    "aqt_int8": "#c76b12",
    "qwix_qat": "#a5d19b",
    "qwix_int8": "#3d8b37",
}


def main() -> None:
    """Read, draw, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backend", default="cpu")
    parser.add_argument("--out", type=Path, default=HERE / "speed.png")
    parser.add_argument("--results", type=Path, default=HERE / "results.jsonl")
    arguments = parser.parse_args()
    rows = [json.loads(line) for line in arguments.results.read_text().splitlines()]
    drawn = [row for row in rows if row["backend"] == arguments.backend and not row["environment"]]
    if not drawn:
        raise SystemExit(f"{arguments.results} holds no rows of backend {arguments.backend!r}")
    draw(drawn, arguments.out)
    print(f"drawn in {arguments.out}")


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """One panel a case."""
    panels = list(dict.fromkeys(_panel(row) for row in rows))
    columns = min(2, len(panels))
    lines = math.ceil(len(panels) / columns)
    figure = Figure(figsize=(6.4 * columns, 0.9 + 2.7 * lines), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, panel in zip(figure.subplots(lines, columns, squeeze=False).flat, panels, strict=False):
        _bars(axes, panel, [row for row in rows if _panel(row) == panel and row["arm"] != "float32"])
    for axes in figure.axes[len(panels) :]:
        axes.set_visible(False)
    where = rows[0]
    figure.suptitle(
        f"Time of a train step over float32's (1 = float32; less is faster)\n{where['device']}, jax {where['jax']}"
    )
    figure.savefig(path, dpi=120)


def _panel(row: dict[str, Any]) -> str:
    if row["suite"] == "schedule":
        return "schedule: 2 to 8 bits in turn"
    return f"{row['suite']}: {row['case']}, {row['bits']} bits"


def _bars(axes: Any, title: str, rows: list[dict[str, Any]]) -> None:
    named = [f"{row['arm']}, {row['case']}" if row["suite"] == "schedule" else row["arm"] for row in rows]
    for place, row in enumerate(rows):
        ratio = row["ratio_to_float32"]
        if ratio is None:
            axes.text(0.02, place, "does not run", va="center", size=8, color="#777777")
            continue
        low, high = row["ratio_quartiles"]
        axes.barh(place, min(ratio, LARGEST), color=COLOURS[row["arm"]], height=0.7)
        if high < LARGEST:
            axes.errorbar(ratio, place, xerr=[[ratio - low], [high - ratio]], color="black", lw=1, capsize=2.5)
        text, end = (f"{ratio:.1f} ▸", LARGEST) if ratio > LARGEST else (f"{ratio:.2f}", min(max(ratio, high), LARGEST))
        background = {"facecolor": "white", "edgecolor": "none", "pad": 0.8}
        axes.text(end + 0.04, place, text, va="center", size=8, bbox=background)
    axes.axvline(1.0, color="black", lw=0.8, ls=":")
    axes.set(xlim=(0, 1.15 * LARGEST), ylim=(len(rows) - 0.5, -0.5), title=title)
    axes.title.set_size(10)
    axes.set_yticks(range(len(rows)), named, size=8)
    axes.tick_params(axis="x", labelsize=8)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


if __name__ == "__main__":
    main()
