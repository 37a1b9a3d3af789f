"""Draws results.jsonl and prints the tables of the README.

    python experiments/multi_precision/plot.py

``widths.png``: test accuracy at each width, one network for all and networks trained apart (two arms diverged and are
in the tables alone). ``search.png``: widths chosen by layer against one width for all, at the same average. Points are
means over seeds, whiskers 95 % bootstrap intervals over seeds.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from qtrain.statistics import bootstrap_interval

HERE = Path(__file__).parent
WIDTHS = ("8", "6", "4", "3", "2")
ARMS = {
    "joint": ("#1f5fa8", "o", "joint, ALRS one_minus"),
    "no ALRS": ("#8fbbe8", "o", "joint, no ALRS"),
    "ALRS clamp": ("#3d8b37", "s", "joint, ALRS clamp"),
    "accumulated": ("#c0392b", "v", "joint, accumulated step"),
    "distilled": ("#8e44ad", "D", "joint, distilled"),
    "apart": ("#111111", "_", "apart, a network each"),
}


def at(rows: list[dict[str, Any]], task: str, name: str) -> dict[str, dict[int, float]]:
    """Width → seed → accuracy in percent, of an arm; "apart": of the networks trained for one width."""
    found: dict[str, dict[int, float]] = {}
    for row in rows:
        mine = row["group"] == "separate" if name == "apart" else row["name"] == name
        if row["task"] == task and mine:
            for width, value in row["accuracy"].items():
                found.setdefault(width, {})[row["seed"]] = 100 * value
    return found


def widths(rows: list[dict[str, Any]], path: Path) -> None:
    """A panel a task."""
    figure = Figure(figsize=(12, 4.8), layout="constrained")
    FigureCanvasAgg(figure)
    panels = (("digits_cnn", "digits CNN (an image is 0.28 points)"), ("mnist_cnn", "MNIST CNN"))
    for axes, (task, title) in zip(figure.subplots(1, 2), panels, strict=True):
        shown = [name for name in ARMS if at(rows, task, name)]
        for index, name in enumerate(shown):
            colour, marker, label = ARMS[name]
            found = at(rows, task, name)
            places = [position for position, width in enumerate(WIDTHS) if width in found]
            stats = [bootstrap_interval(found[WIDTHS[position]].values()) for position in places]
            offset = 0.1 * (index - (len(shown) - 1) / 2)
            axes.errorbar(
                [position + offset for position in places],
                [mean for mean, *_ in stats],
                yerr=np.array([[mean - low, high - mean] for mean, low, high, _ in stats]).T,
                fmt=marker,
                color=colour,
                ms=9 if marker == "_" else 5,
                lw=1,
                label=label,
            )
        axes.set_xticks(range(len(WIDTHS)), WIDTHS)
        axes.set_xlabel("bits of weights and activations")
        axes.set_ylabel("test accuracy, %")
        low, high = axes.get_ylim()
        axes.set_ylim(low - 0.45 * (high - low), high)
        axes.set_title(title, size=10)
        axes.legend(fontsize=8, loc="lower left")
    figure.savefig(path, dpi=120)


def search(rows: list[dict[str, Any]], path: Path) -> None:
    """Accuracy against average bits, trained with and without layers that switch."""
    figure = Figure(figsize=(7.5, 4.8), layout="constrained")
    axes = figure.subplots()
    FigureCanvasAgg(figure)
    for name, colour, label in (("joint", "#1f5fa8", "joint"), ("HASB σ=0.5", "#c0392b", "with HASB")):
        mine = [row for row in rows if row["task"] == "digits_resnet" and row["name"] == name]
        if not mine:
            continue
        uniform = at(rows, "digits_resnet", name)
        mixed: dict[float, list[tuple[float, float]]] = {}
        for row in mine:
            for each in row["mixed"]:
                mixed.setdefault(each["budget"], []).append((each["bits"], 100 * each["accuracy"]))
        for points, form, what in (
            (
                {float(width): [(float(width), v) for v in of.values()] for width, of in uniform.items()},
                "s--",
                "uniform",
            ),
            (mixed, "*-", "searched"),
        ):
            ordered = [points[key] for key in sorted(points)]
            stats = [bootstrap_interval(value for _, value in each) for each in ordered]
            axes.errorbar(
                [np.mean([bits for bits, _ in each]) for each in ordered],
                [mean for mean, *_ in stats],
                yerr=np.array([[mean - low, high - mean] for mean, low, high, _ in stats]).T,
                fmt=form,
                color=colour,
                mfc="none" if what == "uniform" else colour,
                lw=1,
                label=f"{label}, {what}",
            )
    assert axes.has_data(), "no rows of digits_resnet"
    axes.set_xlabel("average bits of the searched layers' weights")
    axes.set_ylabel("test accuracy, %")
    axes.legend(fontsize=8, loc="lower right")
    figure.savefig(path, dpi=120)


def tables(rows: list[dict[str, Any]]) -> str:
    """Accuracy by arm and width; times; shifts; what search finds."""
    lines = []
    for task in dict.fromkeys(row["task"] for row in rows):
        lines += [f"\n### {task}\n", "| trained | seeds | 8 | 6 | 4 | 3 | 2 |", "|---|---|---|---|---|---|---|"]
        names = dict.fromkeys("apart" if r["group"] == "separate" else r["name"] for r in rows if r["task"] == task)
        for name in names:
            found = at(rows, task, name)
            cells = [_cell(found[width].values()) if width in found else "" for width in WIDTHS]
            seeds = max(len(of) for of in found.values())
            lines.append(f"| {name} | {seeds} | " + " | ".join(cells) + " |")
        joint, apart = at(rows, task, "joint"), at(rows, task, "apart")
        for width in (width for width in WIDTHS if width in joint and width in apart):
            pairs = [apart[width][seed] - joint[width][seed] for seed in joint[width] if seed in apart[width]]
            lines.append(f"\n{task}, {width} bits: joint is {_cell(pairs)} points below apart, {len(pairs)} pairs")
        for kind in ("seconds", "cpu_seconds"):
            together = [r[kind] for r in rows if r["task"] == task and r["name"] == "joint"]
            alone = [r[kind] for r in rows if r["task"] == task and r["group"] == "separate" and r["widths"] != [3]]
            if together and alone:
                sums = 4 * np.mean(alone)
                lines.append(f"\n{task}: joint {np.mean(together):.0f} {kind}, four apart {sums:.0f}")
    shifts = [row for row in rows if "bare_shift" in row and row["name"] == "joint"]
    for kind in ("rounded_shift", "bare_shift"):
        for task in dict.fromkeys(row["task"] for row in shifts):
            mine = [row[kind] for row in shifts if row["task"] == task]
            cells = [f"{width}: {100 * np.mean([of[width] for of in mine]):.2f}" for width in mine[0]]
            lines.append(f"\n{task}, {kind}, {len(mine)} seeds: {', '.join(cells)}")
    for name in ("joint", "HASB σ=0.5"):
        mine = [row for row in rows if row["task"] == "digits_resnet" and row["name"] == name]
        for index in range(len(mine[0]["mixed"]) if mine else 0):
            each = [row["mixed"][index] for row in mine]
            bits = np.mean([one["bits"] for one in each])
            accuracy = _cell(100 * one["accuracy"] for one in each)
            lines.append(f"\ndigits_resnet, {name}, searched at {bits:.2f} bits: {accuracy}")
    return "\n".join(lines)


def _cell(values: Iterable[float]) -> str:
    values = list(values)
    mean, low, high, _ = bootstrap_interval(values)
    return f"{mean:.2f}" + (f" [{low:.2f}, {high:.2f}]" if len(values) > 1 else "")


def main() -> None:
    """Read, draw, print."""
    rows = [json.loads(line) for line in (HERE / "results.jsonl").read_text().splitlines()]
    widths(rows, HERE / "widths.png")
    search(rows, HERE / "search.png")
    print(tables(rows))


if __name__ == "__main__":
    main()
