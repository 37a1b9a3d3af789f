"""Schedules as a picture and as a table. matplotlib is imported when something is drawn, without its global state."""

from __future__ import annotations

import io
import math
import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from qtrain.errors import UsageError
from qtrain.schedules.cycles import GROUPS, Cyclic, suite
from qtrain.schedules.savings import saving
from qtrain.schedules.schedule import ScheduleLike, bits_or_schedule, evaluate, one_of, shown, whole_bits

FORMATS = ("png", "pdf", "svg")


def draw_suite(
    low: int, high: int, cycles: int, total_steps: int, path: Any, backward_bits: int | None = None
) -> pathlib.Path:
    """Draw the ten schedules of `suite` as small multiples with shared axes, each with its saving.

    Args:
      low: q_min, bits.
      high: q_max, bits.
      cycles: n.
      total_steps: N.
      path: the file to write: .png, .pdf or .svg.
      backward_bits: bits of the gradients, for the savings; `high` if not given.

    Returns:
      the path that was written.

    Raises:
      UsageError: as `cyclic` does; another kind of file; a path that cannot be written.
    """
    schedules = suite(low, high, cycles, total_steps)
    grads = whole_bits("backward_bits", high if backward_bits is None else backward_bits)
    titles = {}
    for name, schedule in schedules.items():
        saved = saving(schedule, high, grads, total_steps)
        titles[name] = f"{name}: saving {saved:.1%}\n{schedule.profile}, {_pattern(schedule)}"
    heading = f"Bits from {low} to {high} in {cycles} {_cycles(cycles)}; savings with gradients at {grads} bits"
    return _draw(schedules, total_steps, path, titles, heading, columns=5)


def draw(schedules: Mapping[str, ScheduleLike | int], total_steps: int, path: Any) -> pathlib.Path:
    """Draw schedules as small multiples with shared axes, each titled with its key.

    Args:
      schedules: title to schedule (or bits); at least one.
      total_steps: steps to draw.
      path: the file to write: .png, .pdf or .svg.

    Returns:
      the path that was written.

    Raises:
      UsageError: no schedules; a value that is neither schedule nor bits; another kind of file; a path that cannot be
        written.
    """
    if not schedules:
        raise UsageError("schedules: there is none to draw")
    checked = {str(name): bits_or_schedule(str(name), schedule) for name, schedule in schedules.items()}
    columns = min(5, math.ceil(math.sqrt(len(checked))))
    return _draw(checked, total_steps, path, {name: name for name in checked}, None, columns)


def suite_table(low: int, high: int, cycles: int, total_steps: int, backward_bits: int | None = None) -> str:
    """The ten schedules of `suite` as plain text: name, profile, pattern, mean bits, saving, group.

    The saving is the closed form of `saving` against `high` bits throughout, with gradients at `backward_bits` (`high`
    if not given) in both. The group is that of `GROUPS`.

    Raises:
      UsageError: as `cyclic` does.
    """
    schedules = suite(low, high, cycles, total_steps)
    grads = whole_bits("backward_bits", high if backward_bits is None else backward_bits)
    group_of = {name: group.removesuffix("_saving") for group, names in GROUPS.items() for name in names}
    rows = [("name", "profile", "pattern", "mean bits", "saving", "saving group")]
    for name, schedule in schedules.items():
        mean = evaluate(schedule, total_steps).mean(dtype=np.float64)
        saved = saving(schedule, high, grads, total_steps)
        rows.append((name, schedule.profile, _pattern(schedule), f"{mean:.2f}", f"{saved:.1%}", group_of[name]))
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    numeric = {3, 4}
    lines = [
        "  ".join(cell.rjust(width) if i in numeric else cell.ljust(width) for i, (cell, width) in enumerate(cells))
        for cells in (list(zip(row, widths, strict=True)) for row in rows)
    ]
    length = next(iter(schedules.values())).steps_per_cycle
    heading = (
        f"bits {low} to {high}, {cycles} {_cycles(cycles)} of {length} steps in {total_steps} steps; "
        f"saving of bit operations against {high} bits throughout, gradients at {grads} bits"
    )
    return "\n".join([heading, "", lines[0].rstrip(), "-" * len(lines[0]), *(line.rstrip() for line in lines[1:])])


def _cycles(cycles: int) -> str:
    return "cycle" if cycles == 1 else "cycles"


def _pattern(schedule: Cyclic) -> str:
    mirrored = schedule.pattern == "triangular" and schedule.profile in ("exponential", "rex")
    return f"{schedule.pattern}, {schedule.reflection}" if mirrored else schedule.pattern


def _draw(
    schedules: Mapping[str, Any],
    total_steps: int,
    path: Any,
    titles: Mapping[str, str],
    heading: str | None,
    columns: int,
) -> pathlib.Path:
    file = _writable(path)
    from matplotlib.figure import Figure
    from matplotlib.ticker import EngFormatter, MaxNLocator

    rows = math.ceil(len(schedules) / columns)
    figure = Figure(figsize=(1.2 + 2.7 * columns, 1.2 + 2.2 * rows), dpi=110, layout="constrained")
    grid = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
    cells = list(grid.flat)
    for axes, (name, schedule) in zip(cells, schedules.items(), strict=False):
        steps, bits = _corners(evaluate(schedule, total_steps))
        axes.step(steps, bits, where="post", linewidth=1.2)
        axes.set_title(titles[name], fontsize=9.5)
        axes.grid(alpha=0.3)
    for empty in cells[len(schedules) :]:
        empty.set_axis_off()
    for column in range(columns):  # a shared x axis labels its lowest row only; here a column may end above it
        lowest = max((i for i in range(len(schedules)) if i % columns == column), default=None)
        if lowest is not None:
            cells[lowest].tick_params(labelbottom=True)
    cells[0].yaxis.set_major_locator(MaxNLocator(integer=True, nbins=8, min_n_ticks=1))
    cells[0].xaxis.set_major_locator(MaxNLocator(integer=True, nbins=4, min_n_ticks=1))
    cells[0].xaxis.set_major_formatter(EngFormatter(sep=""))
    figure.supxlabel("training step")
    figure.supylabel("bits")
    if heading:
        figure.suptitle(heading)
    drawn = io.BytesIO()  # drawn in full first, so that a failure leaves no half-written file
    figure.savefig(drawn, format=file.suffix[1:].lower())
    try:
        file.write_bytes(drawn.getvalue())
    except OSError as error:
        raise UsageError(f"{file}: cannot be written ({error.strerror or error}); name a file you may write") from None
    return file


def _writable(path: Any) -> pathlib.Path:
    """`path` as a file that looks as if it could be written, before any work is done for it."""
    try:
        file = pathlib.Path(path)
    except TypeError:
        raise UsageError(f"path={shown(path)}: must be the path of a file") from None
    one_of(f"{file}: the ending", file.suffix[1:].lower(), FORMATS)
    if file.is_dir():
        raise UsageError(f"{file}: is a folder; name a file in it, such as {file / 'schedules.png'}")
    if not file.parent.is_dir():
        raise UsageError(f"{file}: cannot be written, the folder {file.parent} does not exist; create it first")
    return file


def _corners(bits: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The steps at which `bits` change and the end of the run, so that a million steps draw as a few hundred points."""
    changes = np.flatnonzero(np.diff(bits)) + 1
    steps = np.concatenate([[0], changes, [len(bits)]])
    return steps, np.concatenate([bits[steps[:-1]], bits[-1:]])
