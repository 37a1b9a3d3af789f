"""What the figures share: colours, axes of costs, PNG bytes. matplotlib is imported when something is drawn."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#8c510a", "#7f7f7f")
"""Told apart by colour-blind readers too (Okabe and Ito, without yellow and black)."""
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
DPI = 110
_LONGEST = 34


def make_figure(width: float, height: float) -> Any:
    """A figure without matplotlib's global state."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), dpi=DPI, layout="constrained")


def style(groups: Sequence[str], group: str) -> tuple[str, str]:
    """Colour and marker of a group."""
    index = groups.index(group)
    return COLOURS[index % len(COLOURS)], MARKERS[index % len(MARKERS)]


def png(figure: Any) -> bytes:
    """The figure as a file."""
    drawn = io.BytesIO()
    figure.savefig(drawn, format="png")
    return drawn.getvalue()


def cost_axis(axes: Any, costs: Sequence[float], label: str) -> None:
    """A logarithmic axis with readable numbers, also where it spans less than a decade."""
    from matplotlib.ticker import EngFormatter, FixedLocator, LogLocator, MaxNLocator, NullFormatter, NullLocator

    low, high = min(costs), max(costs)
    margin = max((high / low) ** 0.06, 1.02)
    low, high = low / margin, high * margin
    axes.set_xscale("log")
    axes.set_xlim(low, high)
    if high / low < 10_000:  # powers of ten alone would be too few
        locator = MaxNLocator(nbins=7, steps=[1, 2, 2.5, 5, 10]) if high / low < 8 else LogLocator(subs=(1.0, 2.0, 5.0))
        axes.xaxis.set_major_locator(FixedLocator([t for t in locator.tick_values(low, high) if low <= t <= high]))
        axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(EngFormatter(sep=" "))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_xlabel(label)


def shortened(label: str, longest: int = _LONGEST) -> str:
    """A label that fits a legend."""
    return label if len(label) <= longest else label[: longest - 1] + "…"


def plural(count: int, what: str) -> str:
    """A count with its noun."""
    return f"{count} {what}{'' if count == 1 else 's'}"


def loss_axis(axes: Any) -> None:
    """A logarithmic axis with plain numbers."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axes.set_yscale("log")
    low, high = axes.get_ylim()
    axes.yaxis.set_major_locator(LogLocator(subs=(1.0,) if high / low > 300 else (1.0, 2.0, 5.0)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())


def step_axis(axes: Any) -> None:
    """Training steps, with prefixes for thousands."""
    from matplotlib.ticker import EngFormatter, MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=5, steps=[1, 2, 2.5, 5, 10], min_n_ticks=1))
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
