"""The figures of the study, from the lines of results.jsonl; called by `analyse.py`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from analyse import COURSES, Lines, curve, exact_and_sampled, families, select, sensitivity
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter
from sweep import EARLY, FAMILIES, LENGTH, PATTERNS

KINDS = {
    "weights": ("#1f5fa8", "o", "weights"),
    "acts": ("#c76b12", "s", "activations"),
    "both": ("#222222", "D", "both"),
    "blur": ("#8e44ad", "^", "blur (data)"),
}
RATES = {
    "decayed": ("#c0392b", "v", "rate decays throughout"),
    "held": ("#222222", "D", "rate held"),
    "restarted": ("#3d8b37", "P", "rate restarted after it"),
    "constant": ("#7a7a7a", "X", "rate constant"),
}
COLOURS = ("#222222", "#c0392b", "#1f5fa8", "#3d8b37", "#c76b12", "#8e44ad")
WIDTH, HEIGHT = 3.9, 2.9  # inches, of a panel


def draw(lines: Lines, folder: Path) -> None:
    """Write the PNGs for which there are runs."""
    for part, labels in (
        ("removal", ("steps with the deficit, R, before a full run", "held")),
        ("window", ("first step of the deficit", "decayed")),
    ):
        if names := families(lines, part):
            _save(_sensitivities(lines, part, names, *labels), folder / f"{part}.png")
    if names := families(lines, "patterns"):
        _save(_patterns(lines, names), folder / "patterns.png")
    if names := families(lines, "fisher"):
        _save(_fisher(lines, names), folder / "fisher.png")


def _panels(rows: int, columns: int) -> tuple[Figure, Any]:
    figure = Figure(figsize=(WIDTH * columns + 1.4, HEIGHT * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False)
    for panel in axes.flat:
        panel.grid(alpha=0.25, linewidth=0.6)
        panel.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _save(figure: Figure, path: Path) -> None:
    FigureCanvasAgg(figure)
    figure.savefig(path, dpi=110)


def _sensitivities(lines: Lines, part: str, names: list[str], xlabel: str, main: str) -> Figure:
    kinds = [(kind, main, style) for kind, style in KINDS.items()]
    rates = [("both", rate, style) for rate, style in RATES.items()]
    rows = [("what is quantized", kinds, False), ("both quantized; learning rate", rates, False)]
    rows += [
        (f"test loss, {title}", [(kind, rate, style) for kind, style in KINDS.items()], True)
        for rate, (*_, title) in RATES.items()
        if any(curve(lines, name, part, "weights", rate) for name in names)
    ]
    figure, axes = _panels(len(rows), len(names))
    for column, name in enumerate(names):
        for panel, (title, series, loss) in zip(axes[:, column], rows, strict=True):
            curves = [(style, curve(lines, name, part, kind, rate, loss)) for kind, rate, style in series]
            drawn = [(style, points) for style, points in curves if points]
            for index, (style, points) in enumerate(drawn):
                _whiskers(panel, points, style, (index - (len(drawn) - 1) / 2) * 0.012 * FAMILIES[name].steps)
            panel.axhline(0, color="#999999", linewidth=0.8)
            panel.set_xlabel(xlabel)
            panel.set_title(f"{name}: {title}", fontsize=9)
            if loss and part == "window":
                _without_last(panel, [points for _, points in drawn])
            if column == 0:
                panel.set_ylabel("test loss gained, hundredths" if loss else "accuracy lost to the deficit, points")
    for row in axes:
        _beside(row[-1], row[0])
    title = "Mean and 95 % bootstrap interval over seeds"
    if part == "window":
        title += f"; a window is {LENGTH:.0%} of the run; losses on the scale of all windows but the last"
    figure.suptitle(title, fontsize=10)
    return figure


def _without_last(panel: Axes, curves: list[Any]) -> None:
    """The scale of all windows but the last, which ends with the run and would flatten the others."""
    ends = [end for points in curves for _, value in points[:-1] for end in value[:3] if np.isfinite(end)]
    if ends:
        margin = 0.08 * (max(ends) - min(ends))
        panel.set_ylim(min(*ends, 0) - margin, max(*ends, 0) + margin)


def _log(*axes: Axis) -> None:
    """Logarithmic, with plain numbers at 1, 2 and 5; at more where there is less than a decade."""
    for axis in axes:
        low, high = axis.get_data_interval()
        axis.axes.set(**{f"{axis.axis_name}scale": "log"})
        axis.set_major_locator(LogLocator(subs=(1, 2, 5) if high > 10 * low else (1, 1.5, 2, 3, 5, 7)))
        axis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axis.set_minor_formatter(NullFormatter())


def _beside(panel: Axes, of: Axes) -> None:
    """The legend of a row, beside its last panel, so that it covers no curve."""
    panel.legend(
        *of.get_legend_handles_labels(), loc="center left", bbox_to_anchor=(1.02, 0.5), fontsize=8, frameon=False
    )


def _whiskers(panel: Axes, points: list[Any], style: tuple[str, str, str], shift: float) -> None:
    """A curve; shifted a little along the steps, so that whiskers of several stay apart."""
    x = np.array([position for position, _ in points], float) + shift
    y = np.array([[value.estimate, value.low, value.high] for _, value in points])
    colour, marker, label = style
    ends = np.nan_to_num(np.abs(y[:, 1:] - y[:, :1])).T
    panel.errorbar(x, y[:, 0], ends, color=colour, marker=marker, markersize=4, linewidth=1.2, capsize=2, label=label)


def _patterns(lines: Lines, names: list[str]) -> Figure:
    figure, axes = _panels(3, len(names))
    titles = ("‖gradient‖", "‖update‖ / ‖weights‖")
    for column, name in enumerate(names):
        here = [line for line in lines if (line["family"], line["part"]) == (name, "patterns")]
        plain = select(here, pattern="high")
        for colour, pattern in zip(COLOURS, PATTERNS, strict=True):
            own = select(here, pattern=pattern)
            if not own:
                continue
            steps = next(iter(own.values()))["course"]["step"]
            for row, metric in enumerate((COURSES["patterns"][1], COURSES["patterns"][3])):
                values = np.mean([line["course"][metric] for line in own.values()], axis=0)
                axes[row, column].plot(steps, values, color=colour, linewidth=1.2, label=pattern)
            difference = sensitivity(own, plain)
            if difference is not None and pattern != "high":
                place = PATTERNS.index(pattern)
                ends = np.nan_to_num(np.abs(np.array(difference[1:3]) - difference.estimate))[:, None]
                axes[2, column].errorbar([place], [difference.estimate], ends, color=colour, marker="o", capsize=3)
        for row, title in enumerate(titles):
            panel = axes[row, column]
            panel.axvspan(0, EARLY * FAMILIES[name].steps, color="#eeeeee", zorder=0)
            _log(panel.yaxis)
            panel.set_title(f"{name}: {title}", fontsize=9)
            panel.set_xlabel("step (patterns differ in the grey part)")
        axes[2, column].axhline(0, color="#999999", linewidth=0.8)
        axes[2, column].set_xticks(range(1, len(PATTERNS)), PATTERNS[1:], fontsize=7)
        axes[2, column].set_title(f"{name}: accuracy below that of 8 bits, points", fontsize=9)
    _beside(axes[0, -1], axes[0, 0])
    axes[0, 0].set_ylabel("mean of a row's steps")
    axes[2, 0].set_ylabel("points")
    figure.suptitle("Bits of the first fifth; means over seeds, 95 % bootstrap intervals below", fontsize=10)
    return figure


def _fisher(lines: Lines, names: list[str]) -> Figure:
    figure, axes = _panels(2, len(names))
    for column, name in enumerate(names):
        here = [line for line in lines if (line["family"], line["part"]) == (name, "fisher")]
        cases = list(dict.fromkeys((line["kind"], line["onset"]) for line in here))
        for colour, (kind, onset) in zip(COLOURS, cases, strict=False):
            own = select(here, kind=kind, onset=onset, samples=1)
            label = "no deficit" if kind == "none" else f"{kind} from step {onset}"
            for line in own.values():
                axes[0, column].plot(
                    line["course"]["step"], line["course"]["fisher/trace_q_max"], color=colour, linewidth=0.4, alpha=0.5
                )
            if own:
                steps = next(iter(own.values()))["course"]["step"]
                values = np.mean([line["course"]["fisher/trace_q_max"] for line in own.values()], axis=0)
                axes[0, column].plot(steps, values, color=colour, linewidth=1.5, label=label)
        _second(axes[1, column], name, here)
        axes[0, column].set_title(f"{name}: tr F at 8 bits", fontsize=9)
        axes[0, column].legend(fontsize=7, frameon=False)
        _log(axes[0, column].yaxis)
        axes[0, column].set_xlabel("step")
    axes[0, 0].set_ylabel("tr F (mean of seeds, thin: each)")
    figure.suptitle("Trace of the Fisher information, a label drawn for each example", fontsize=10)
    return figure


def _second(panel: Axes, name: str, here: Lines) -> None:
    """Sampled against exact traces where both were measured; else the traces of each kernel, without a deficit."""
    pairs = exact_and_sampled(here)
    if pairs:
        exact, sampled = (np.concatenate(parts) for parts in zip(*pairs, strict=True))
        ends = [min(exact.min(), sampled.min()), max(exact.max(), sampled.max())]
        panel.plot(ends, ends, color="#999999", linewidth=0.8)
        panel.scatter(exact, sampled, s=5, color="#1f5fa8", alpha=0.6)
        _log(panel.xaxis, panel.yaxis)
        panel.set(xlabel="exact (all labels)", ylabel="one label an example")
        panel.set_title(f"{name}: estimators, a point a row", fontsize=9)
        return
    own = [line for seed, line in select(here, kind="none", samples=1).items() if seed == 0]
    kernels = [key for key in own[0]["course"] if key.endswith("kernel/trace")] if own else []
    for index, key in enumerate(kernels):
        values = np.mean([line["course"][key] for line in own], axis=0)
        label = key.removeprefix("fisher/").removesuffix("/kernel/trace")
        style = ("-", "--", ":")[index // len(COLOURS) % 3]
        colour = COLOURS[index % len(COLOURS)]
        panel.plot(own[0]["course"]["step"], values, linewidth=1.2, color=colour, linestyle=style, label=label)
    _log(panel.yaxis)
    panel.set_xlabel("step")
    panel.set_title(f"{name}: tr F of each kernel, no deficit, seed 0", fontsize=9)
    panel.legend(fontsize=6, frameon=False)
