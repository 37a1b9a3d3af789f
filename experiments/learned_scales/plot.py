"""Draws results.jsonl and prints the tables of the README.

    python experiments/learned_scales/plot.py

``pareto.png``: accuracy lost against compression, dense and convolution apart. ``range.png``: what λ does. Points are
means over the seeds of an arm, whiskers 95 % bootstrap intervals over seeds. Compression is float32 bytes of the whole
model over bytes of codes, tables, scales and what is left in float; the column `file` counts the file's header, too.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from qtrain.statistics import bootstrap_interval

HERE = Path(__file__).parent
STYLES = {
    "ratio": ("#1f5fa8", "o", "nested, ratio"),
    "ratio + bin_count": ("#c0392b", "s", "nested, ratio + bin_count"),
    "loss": ("#8e44ad", "D", "nested, loss + terms"),
    "lsq": ("#3d8b37", "^", "LSQ, 2/3/4/8 bits"),
    "uniform": ("#9a9a9a", "v", "uniform per channel, 2/3/4/8 bits"),
    "learned_width": ("#c76b12", "P", "learned width, 2/3/4 bits on average"),
}


def kind(row: dict[str, Any]) -> str:
    """Which style a row has."""
    return "ratio + bin_count" if row["method"] == "ratio" and "bin_count" in row.get("terms", {}) else row["method"]


def arms_of(rows: list[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """The rows of each arm."""
    found: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in rows:
        found.setdefault((row["group"], row["name"]), []).append(row)
    return list(found.values())


def lost(rows: list[dict[str, Any]], floats: dict[int, float]) -> list[float]:
    """Points of accuracy below the float model of the same seed."""
    return [100 * (floats[row["seed"]] - row["test_accuracy"]) for row in rows]


def floats_of(rows: list[dict[str, Any]], network: str) -> dict[int, float]:
    """Seed → accuracy of the float model."""
    return {row["seed"]: row["test_accuracy"] for row in rows if row["method"] == "float" and row["network"] == network}


def pareto(rows: list[dict[str, Any]], path: Path) -> None:
    """One panel a network."""
    figure = Figure(figsize=(12.5, 5.2), layout="constrained")
    FigureCanvasAgg(figure)
    panels = (("dense", "MNIST perceptron 784-256-10"), ("conv", "digits CNN 8-16-32"))
    for axes, (network, title) in zip(figure.subplots(1, 2), panels, strict=True):
        floats, front = floats_of(rows, network), []
        for arm in arms_of([row for row in rows if row["network"] == network and row["method"] != "float"]):
            colour, marker, label = STYLES[kind(arm[0])]
            mean, low, high, _ = bootstrap_interval(lost(arm, floats))
            ratio = float(np.mean([row["compression_model"] for row in arm]))
            axes.errorbar(
                ratio,
                mean,
                yerr=[[mean - low], [high - mean]],
                fmt=marker,
                color=colour,
                ms=6,
                lw=1,
                alpha=0.9,
                label=label,
            )
            front.append((ratio, mean))
        front = _front(front)
        axes.step([x for x, _ in front], [y for _, y in front], where="pre", color="#444444", lw=0.9, zorder=0)
        axes.axhline(0.5, color="#bbbbbb", lw=0.8, ls="--")
        axes.axhline(1.0, color="#bbbbbb", lw=0.8, ls=":")
        axes.invert_yaxis()
        axes.set_xlabel("times smaller than float32 (scales included)")
        axes.set_ylabel("points of test accuracy below float")
        low, high = axes.get_ylim()  # inverted: the legend goes below the points
        axes.set_ylim(low + 0.45 * (low - high), high)
        axes.set_title(f"{title}; float {100 * np.mean(list(floats.values())):.2f} %", size=10)
        handles = dict(zip(*axes.get_legend_handles_labels()[::-1], strict=True))
        axes.legend(handles.values(), handles.keys(), fontsize=8, loc="lower left")
    figure.suptitle("Means of 3 seeds, 95 % bootstrap intervals. Line: the front.", size=10)
    figure.savefig(path, dpi=120)


def _front(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """What no point beats in both."""
    best, kept = np.inf, []
    for ratio, mean in sorted(points, reverse=True):
        if mean < best:
            best = mean
            kept.append((ratio, mean))
    return kept[::-1]


def applicable_range(rows: list[dict[str, Any]], path: Path) -> None:
    """Compression and lost accuracy against λ."""
    figure = Figure(figsize=(11, 6.4), layout="constrained")
    FigureCanvasAgg(figure)
    series: list[tuple[str, list[dict[str, Any]], str]] = []
    for rate, colour in ((1e-4, "#8fbbe8"), (3e-4, "#1f5fa8")):
        found = [row for row in rows if row["group"] == "range" and row["rate"] == rate]
        series.append((f"MNIST, Adam, rate {rate:g}", found, colour))
    found = [row for row in rows if row["group"] == "range_sgd" and "threshold" in row]
    series.append(("MNIST, SGD, mean, rate 3e-5", found, "#c0392b"))
    for rate, colour in ((3e-4, "#a5d19b"), (1e-3, "#3d8b37")):
        found = [
            row
            for row in rows
            if row["network"] == "conv"
            and row.get("rate") == rate
            and row.get("per") == "tensor"
            and "terms" not in row
            and row["method"] == "ratio"
        ]
        series.append((f"digits CNN, Adam, rate {rate:g}", found, colour))
    upper, lower = figure.subplots(2, 1, sharex=True)
    for label, found, colour in series:
        if not found:
            continue
        arms = sorted(arms_of(found), key=lambda arm: arm[0]["threshold"])
        floats = floats_of(rows, found[0]["network"])
        across = [arm[0]["threshold"] for arm in arms]
        for axes, of in ((upper, lambda arm: [row["compression_model"] for row in arm]), (lower, None)):
            means = [bootstrap_interval(of(arm) if of else lost(arm, floats)) for arm in arms]
            centre = np.array([mean for mean, *_ in means])
            ends = np.array([[mean - low, high - mean] for mean, low, high, _ in means]).T
            axes.errorbar(across, centre, yerr=ends, fmt="o-", color=colour, ms=4, lw=1.2, label=label)
    upper.set_xscale("log")
    upper.set_ylabel("times smaller")
    lower.invert_yaxis()
    lower.set_ylabel("points below float")
    lower.set_xlabel("threshold λ")
    lower.axhline(0.5, color="#bbbbbb", lw=0.8, ls="--")
    upper.legend(fontsize=8)
    figure.suptitle("What λ does: compression of the model, and accuracy lost (one scale a tensor)", size=10)
    figure.savefig(path, dpi=120)


def tables(rows: list[dict[str, Any]]) -> str:
    """A table a group and network, markdown."""
    lines = []
    networks = {(row["group"], row["network"]): None for row in rows}
    for group, network in networks:
        lines += [
            f"\n{group}, {network}\n",
            "| arm | seeds | accuracy, % | below float | times smaller | stored bits | entropy, bits | file |",
            "|---|---|---|---|---|---|---|---|",
        ]
        floats = floats_of(rows, network)
        for arm in arms_of([row for row in rows if (row["group"], row["network"]) == (group, network)]):
            accuracy = 100 * np.mean([row["test_accuracy"] for row in arm])
            mean, low, high, _ = bootstrap_interval(lost(arm, floats))
            ends = f" [{low:.2f}, {high:.2f}]" if len(arm) > 1 else ""
            cells = [arm[0]["name"], f"{len(arm)}", f"{accuracy:.2f}", f"{mean:.2f}{ends}"]
            for name, form in (
                ("compression_model", "{:.2f}"),
                ("weight_bits", "{:.2f}"),
                ("weight_entropy_bits", "{:.2f}"),
                ("file_compression", "{:.2f}×"),
            ):
                values = [row[name] for row in arm if name in row]
                cells.append(form.format(np.mean(values)) if values else "")
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    """Read, draw, print."""
    rows = [json.loads(line) for line in (HERE / "results.jsonl").read_text().splitlines()]
    pareto(rows, HERE / "pareto.png")
    applicable_range(rows, HERE / "range.png")
    print(tables(rows))


if __name__ == "__main__":
    main()
