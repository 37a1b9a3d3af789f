"""The tables and figures of the study, from ``results.jsonl`` alone.

python experiments/transition_rate/plot.py            # prints the tables, writes the .png files beside itself
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from arms import PAIRS
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from qtrain.statistics import bootstrap_interval

HERE = Path(__file__).parent
NAMES = {"sgd": "SGD", "adam": "Adam", "adamw": "AdamW", "sgdt": "SGDT", "adamt": "AdamT", "adamwt": "AdamWT"}
PLAIN, RATED = "#6b6b6b", "#1f5fa8"
RULES = {"multiplicative": "#c76b12", "proportional": "#3d8b37"}
DRAWS = 20_000  # of the bootstrap
WINDOW, EVERY = 50, 100  # steps between the points of a curve, and of accuracy
Rows = list[dict[str, Any]]


def accuracies(rows: Rows, group: str, name: str, key: str = "test_accuracy") -> dict[int, float]:
    """Seed → accuracy in percent."""
    return {row["seed"]: 100 * row[key] for row in rows if (row["group"], row["name"]) == (group, name)}


def differences(one: dict[int, float], other: dict[int, float]) -> list[float]:
    """`one` − `other`, seed by seed."""
    return [one[seed] - other[seed] for seed in sorted(one.keys() & other.keys())]


def signed(values: Sequence[float]) -> str:
    """Mean and interval of differences."""
    _, low, high, _ = bootstrap_interval(values, draws=DRAWS)
    return f"{np.mean(values):+.2f} [{low:+.2f}, {high:+.2f}]"


def spread(found: dict[int, float]) -> str:
    """Mean and standard deviation over seeds."""
    return f"{np.mean(list(found.values())):.2f} ± {np.std(list(found.values()), ddof=1):.2f}"


def tables(rows: Rows) -> str:
    """Three tables in Markdown: pairs, other rules and neighbours, what was tuned."""
    exact = accuracies(rows, "float", "float")
    lines = [
        "| | float | plain | with transition rate | difference, points [95 %] | seeds |",
        "|---|---|---|---|---|---|",
    ]
    for bits in (2, 3, 4):
        for plain, rated in PAIRS.items():
            without, with_ = (accuracies(rows, "main", f"{name} {bits}") for name in (plain, rated))
            if not with_ or not without:
                continue
            base = {seed: exact[seed] for seed in without}
            lines.append(
                f"| {NAMES[plain]} → {NAMES[rated]}, W{bits}A{bits} | {spread(base)} | {spread(without)} "
                f"| {spread(with_)} | {signed(differences(with_, without))} | {len(with_)} |"
            )
    lines += ["", "| W2A2 | test accuracy | difference from Adam, points [95 %] | seeds |", "|---|---|---|---|"]
    names = ["adam 2", "adamt 2", *(f"adamt 2 {rule}" for rule in RULES), "adam+dampening 2", "adam+freezing 2"]
    adam = accuracies(rows, "main", "adam 2")
    for name in names:
        found = accuracies(rows, "main", name)
        if found:
            less = "" if name == "adam 2" else signed(differences(found, adam))
            lines.append(f"| {name.replace(' 2', '')} | {spread(found)} | {less} | {len(found)} |")
    lines += ["", "| W2A2, next lower learning rate | plain | with transition rate | difference [95 %] | seeds |"]
    lines += ["|---|---|---|---|---|"]
    for plain, rated in PAIRS.items():
        without, with_ = (accuracies(rows, "main", f"{name} 2 lower") for name in (plain, rated))
        if with_:
            shown = f"{spread(without)} | {spread(with_)} | {signed(differences(with_, without))} | {len(with_)}"
            lines.append(f"| {NAMES[plain]} → {NAMES[rated]} | {shown} |")
    lines += ["", "| transition rate k at W2A2, by quarter of the run | | | | |", "|---|---|---|---|---|"]
    for name in (*PAIRS, *PAIRS.values(), *(f"adamt {rule}" for rule in RULES), "adam+dampening", "adam+freezing"):
        first, _, rest = name.partition(" ")
        own = " ".join(filter(None, [first, "2", rest]))
        rates = [row["transition_rate"] for row in rows if (row["group"], row["name"]) == ("main", own)]
        if rates:
            lines.append(f"| {name} | " + " | ".join(f"{value:.1e}" for value in np.median(rates, 0)) + " |")
    lines += ["", "| tuned | training loss, mean of the tuning seeds |", "|---|---|"]
    tuned = dict.fromkeys(row["name"] for row in rows if row["group"] == "tune")
    for name in tuned:
        losses = [row["train_loss"] for row in rows if (row["group"], row["name"]) == ("tune", name)]
        lines.append(f"| {name} | {np.mean(losses):.4f} |")
    return "\n".join(lines)


def draw_curves(rows: Rows, path: Path) -> None:
    """Transition rate, learning rate of the quantized weights and accuracy over the steps, a column a pair."""
    pairs = [pair for pair in PAIRS.items() if accuracies(rows, "main", f"{pair[1]} 2")]
    figure = Figure(figsize=(3.9 * len(pairs) + 0.4, 8.4), layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(3, len(pairs), sharex=True, sharey="row", squeeze=False)
    for column, (plain, rated) in enumerate(pairs):
        top, middle, bottom = grid[:, column]
        top.set_title(f"{NAMES[plain]} and {NAMES[rated]}")
        for name, colour, label in ((plain, PLAIN, "plain: k"), (rated, RATED, "with transition rate: k")):
            curves = [row["curves"] for row in rows if (row["group"], row["name"]) == ("main", f"{name} 2")]
            _band(top, curves, "k", WINDOW, colour, label)
            _band(middle, curves, "talr", WINDOW, colour, "")
            _band(bottom, curves, "accuracy", EVERY, colour, "", scale=100)
            if "target" in curves[0]:
                steps = (np.arange(len(curves[0]["target"])) + 0.5) * WINDOW
                top.plot(steps, curves[0]["target"], "k--", linewidth=1.1, label="target R")
                running = np.median([curve["running"] for curve in curves], 0)
                top.plot(steps, running, color="#7db3e8", linewidth=1.2, label="running rate K")
        top.set_yscale("log")
        top.set_ylim(1e-5, 0.2)
        middle.set_yscale("log")
        middle.set_ylim(1e-5, 1)
        for axes in grid[:, column]:
            axes.grid(alpha=0.3)
        bottom.set_xlabel("training step")
    grid[0, 0].set_ylabel("transition rate\n(share of codes per update)")
    grid[1, 0].set_ylabel("learning rate of quantized weights\n(plain: its schedule; else U)")
    grid[2, 0].set_ylabel("test accuracy, %")
    grid[2, 0].set_ylim(60, 100)
    figure.legend(*grid[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=4)
    seeds = len(accuracies(rows, "main", f"{pairs[0][1]} 2"))
    figure.suptitle(
        f"W2A2 on the digits: median of {seeds} seeds and range (shaded); rates averaged over {WINDOW} steps"
    )
    figure.savefig(path, dpi=110)


def _band(
    axes: Any, curves: Iterable[dict[str, Any]], key: str, every: int, colour: str, label: str, scale: float = 1
) -> None:
    values = scale * np.array([curve[key] for curve in curves])
    steps = (np.arange(values.shape[1]) + (1 if key == "accuracy" else 0.5)) * every
    floor = 1e-12 if key != "accuracy" else 0.0
    axes.plot(steps, np.maximum(np.median(values, 0), floor), color=colour, linewidth=1.5, label=label)
    axes.fill_between(steps, np.maximum(values.min(0), floor), values.max(0), color=colour, alpha=0.18, linewidth=0)


def draw_sweep(rows: Rows, path: Path) -> None:
    """Accuracy against λ, with the plain optimizer at its best learning rate."""
    swept = [row for row in rows if row["group"] == "sweep"]
    optimizers = [name for name in PAIRS if any(row["optimizer"] == PAIRS[name] for row in swept)]
    figure = Figure(figsize=(4.6 * len(optimizers), 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    row_of_axes = figure.subplots(1, len(optimizers), squeeze=False)[0]  # one of them spreads far wider
    for axes, plain in zip(row_of_axes, optimizers, strict=True):
        factors = sorted({row["factor"] for row in swept if row["optimizer"] == PAIRS[plain]})
        found = [accuracies(rows, "sweep", f"{PAIRS[plain]} λ={factor:g}") for factor in factors]
        means = np.array([np.mean(list(each.values())) for each in found])
        ends = np.array([bootstrap_interval(each.values(), draws=DRAWS)[1:3] for each in found]).T
        for factor, each in zip(factors, found, strict=True):
            axes.plot([factor] * len(each), list(each.values()), ".", color=RATED, alpha=0.35, markersize=5)
        axes.errorbar(
            factors, means, np.abs(ends - means), color=RATED, marker="o", capsize=3, label=NAMES[PAIRS[plain]]
        )
        base = accuracies(rows, "main", f"{plain} 2")
        same = [base[seed] for seed in found[0] if seed in base]
        if same:
            axes.axhline(np.mean(same), color=PLAIN, linestyle="--", label=f"{NAMES[plain]}, plain")
            axes.axhspan(*bootstrap_interval(same, draws=DRAWS)[1:3], color=PLAIN, alpha=0.15, linewidth=0)
        axes.set_xscale("log")
        axes.set_xlabel("λ, where R₀ = λ·√2 (share of codes per update)")
        axes.grid(alpha=0.3)
        axes.legend(loc="lower center")
    row_of_axes[0].set_ylabel("test accuracy at W2A2, %")
    figure.suptitle(f"{len(found[0])} seeds: mean, 95 % bootstrap interval, single runs as dots", fontsize=11)
    figure.savefig(path, dpi=110)


def draw_pairs(rows: Rows, path: Path) -> None:
    """Accuracy of every pair at every width, seed by seed."""
    figure = Figure(figsize=(9.5, 4.4), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, 3, sharey=True)
    for axes, bits in zip(panels, (2, 3, 4), strict=True):
        for place, (plain, rated) in enumerate(PAIRS.items()):
            pair = [accuracies(rows, "main", f"{name} {bits}") for name in (plain, rated)]
            for seed in pair[0].keys() & pair[1].keys():
                ends = [each[seed] for each in pair]
                axes.plot([place - 0.16, place + 0.16], ends, color="#b5b5b5", linewidth=0.8, zorder=1)
            for offset, each, colour, label in ((-0.16, pair[0], PLAIN, "plain"), (0.16, pair[1], RATED, "rated")):
                if each:
                    label = "with transition rate" if label == "rated" else label
                    values = list(each.values())
                    axes.plot([place + offset] * len(values), values, ".", color=colour, alpha=0.5)
                    shown = {"label": label} if place == 0 else {}
                    axes.plot([place + offset], [np.mean(values)], "D", color=colour, markersize=7, **shown)
        seeds = accuracies(rows, "main", f"adam {bits}")
        exact = accuracies(rows, "float", "float")
        level = np.mean([exact[seed] for seed in seeds])
        axes.axhline(level, color="k", linewidth=1, linestyle=":", label="float checkpoint")
        axes.set_title(f"W{bits}A{bits}, {len(seeds)} seeds")
        axes.set_xticks(range(3), [NAMES[name] for name in PAIRS])
        axes.set_xlim(-0.5, 2.5)
        axes.grid(alpha=0.3, axis="y")
    panels[0].set_ylabel("test accuracy, %")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    figure.savefig(path, dpi=110)


def main() -> None:
    """Tables and figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=HERE / "results.jsonl")
    parser.add_argument("--out", type=Path, default=HERE)
    arguments = parser.parse_args()
    rows = [json.loads(line) for line in arguments.results.read_text().splitlines()]
    print(tables(rows))
    for name, draw in (("curves", draw_curves), ("sweep", draw_sweep), ("pairs", draw_pairs)):
        draw(rows, arguments.out / f"{name}.png")


if __name__ == "__main__":
    main()
