"""Transition rates of runs as a picture, from their rows of metrics. matplotlib is imported when something is drawn."""

from __future__ import annotations

import io
import json
import pathlib
from collections.abc import Iterable, Mapping
from typing import Any

from qtrain.errors import UsageError

FORMATS = ("png", "pdf", "svg")
PANELS = {
    "transition/running": "transition rate (share of codes per update)",
    "transition/talr": "transition-adaptive learning rate U",
    "accuracy": "accuracy",
    "transition/distance": "distance to a transition (steps of the grid)",
    "transition/oscillation": "oscillations (share of updates)",
}
LOGARITHMIC = ("transition/running", "transition/talr")


def plot_transition_rates(
    runs: Mapping[str, Any], out: Any, *, layer: str | None = None, accuracy: str | None = None
) -> pathlib.Path:
    """Draw transition rate, learning rate, accuracy, distance and oscillations of runs over the steps, one panel each.

    The first panel has the running rate K of each run as a line, the rate k as a faint line behind it and the target R
    dashed, on a logarithmic axis; what is 0 is not on it. A panel for which no run has numbers is left out.

    Args:
      runs: label → rows of ``metrics.jsonl`` (mappings with ``step``), or the path of such a file or its folder.
      out: file to write: .png, .pdf or .svg.
      layer: path of one quantized leaf (``Dense_0/kernel``); None draws the overall values.
      accuracy: name of the accuracy; by default the first of ``test_accuracy``, ``accuracy`` that a run has.

    Returns:
      the path that was written.

    Raises:
      UsageError: no runs, no rows of transitions in any, an unknown layer, a file that cannot be read or written.
    """
    file = pathlib.Path(out)
    if file.suffix[1:].lower() not in FORMATS:
        raise UsageError(f"{file}: the ending {file.suffix!r} must be one of {FORMATS}")
    if not file.parent.is_dir():
        raise UsageError(f"{file}: cannot be written, the folder {file.parent} does not exist; create it first")
    if not runs:
        raise UsageError("runs: there is none to draw")
    prefix = "transition/" + (f"{layer}/" if layer else "")
    read = {str(label): _rows(label, source) for label, source in runs.items()}
    series = {label: _series(rows, prefix, accuracy) for label, rows in read.items()}
    panels = [key for key in PANELS if any(key in found for found in series.values())]
    if "transition/running" not in panels:
        names = sorted({name for rows in read.values() for row in rows for name in row if name.endswith("/running")})
        raise UsageError(f"runs: no row has {prefix + 'running'!r}; there are {names or 'no transition rates at all'}")
    from matplotlib.figure import Figure
    from matplotlib.ticker import EngFormatter

    figure = Figure(figsize=(8.0, 0.9 + 2.6 * len(panels)), dpi=110, layout="constrained")
    column = figure.subplots(len(panels), 1, sharex=True, squeeze=False)[:, 0]
    for axes, key in zip(column, panels, strict=True):
        for index, (label, found) in enumerate(series.items()):
            colour = f"C{index % 10}"
            if key == "transition/running":
                if "transition/rate" in found:
                    axes.plot(*_positive(found["transition/rate"]), color=colour, alpha=0.25, linewidth=0.8)
                if "transition/target" in found:
                    axes.plot(*_positive(found["transition/target"]), color=colour, linestyle="--", linewidth=1.0)
            if key in found:
                points = _positive(found[key]) if key in LOGARITHMIC else found[key]
                axes.plot(*points, color=colour, label=label, linewidth=1.4)
        axes.set_ylabel(PANELS[key].replace(" (", "\n("), fontsize=9)
        axes.grid(alpha=0.3)
        if key in LOGARITHMIC:
            axes.set_yscale("log")
    column[0].set_title(f"{layer or 'all quantized weights'}: K solid, k faint, target R dashed", fontsize=10)
    column[-1].set_xlabel("training step")
    column[-1].xaxis.set_major_formatter(EngFormatter(sep=""))
    handles, labels = _legend(column)
    figure.legend(handles, labels, loc="outside right upper", fontsize=8.5)
    drawn = io.BytesIO()  # drawn in full first, so that a failure leaves no half-written file
    figure.savefig(drawn, format=file.suffix[1:].lower())
    try:
        file.write_bytes(drawn.getvalue())
    except OSError as error:
        raise UsageError(f"{file}: cannot be written ({error.strerror or error}); name a file you may write") from None
    return file


Points = tuple[list[float], list[float]]


def _rows(label: Any, source: Any) -> list[Mapping[str, Any]]:
    if not isinstance(source, str | pathlib.Path):
        return list(source)
    path = pathlib.Path(source)
    path = path / "metrics.jsonl" if path.is_dir() else path
    try:
        lines = path.read_text().split("\n")[:-1]  # a last line that is still being written is left out
        return [json.loads(line) for line in lines]
    except OSError as error:
        raise UsageError(f"runs[{label!r}]: {path} cannot be read ({error.strerror or error})") from None
    except ValueError:
        raise UsageError(f"runs[{label!r}]: {path} is no file of JSON lines") from None


def _series(rows: Iterable[Mapping[str, Any]], prefix: str, accuracy: str | None) -> dict[str, Points]:
    rows = list(rows)
    names_of_series = ("rate", "running", "target", "talr", "distance", "oscillation")
    wanted = {f"transition/{name}": [f"{prefix}{name}"] for name in names_of_series}
    wanted["accuracy"] = [accuracy] if accuracy else ["test_accuracy", "accuracy"]
    found = {}
    for key, names in wanted.items():
        for name in names:
            points = [(row["step"], row[name]) for row in rows if row.get(name) is not None]
            if points:
                found[key] = ([float(step) for step, _ in points], [float(value) for _, value in points])
                break
    return found


def _positive(points: Points) -> Points:
    """With gaps where a logarithmic axis has no place."""
    steps, values = points
    return steps, [value if value > 0 else float("nan") for value in values]


def _legend(column: Iterable[Any]) -> tuple[list[Any], list[str]]:
    """Each run once, whichever panels it is in."""
    found: dict[str, Any] = {}
    for axes in column:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            found.setdefault(label, handle)
    return list(found.values()), list(found)
