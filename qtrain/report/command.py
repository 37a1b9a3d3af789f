"""``qtrain report``: a page, pictures and tables about runs and sweeps."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path

from qtrain.arguments import Parser
from qtrain.errors import UsageError
from qtrain.report.runs import ROWS
from qtrain.statistics import DRAWS
from qtrain.workdir import replace_file

_EXAMPLE = "example: qtrain report runs/suite --out report --compare schedule"
_SHOWN_NOTES = 10
FILES = ".report.json"
"""The list of a report's files, by which the next one into the same folder knows what to replace."""


def _parser() -> Parser:
    parser = Parser(
        prog="qtrain report",
        description="Quality against cost, frontiers, schedules, sensitivity and layers of runs, from their metrics "
        "files: a self-contained HTML page, its pictures, and tables as CSV and Markdown.",
        example=_EXAMPLE,
    )
    parser.add_argument(
        "runs",
        nargs="+",
        metavar="RUN_OR_SWEEP",
        help="folder of a run, or one with runs below it, or a file that --rows wrote",
    )
    parser.add_argument("--out", default="report", metavar="DIR", help="folder for the report (default: report)")
    parser.add_argument(
        "--metric", metavar="NAME", help="judge all runs by this number of their summaries, such as test_loss"
    )
    parser.add_argument(
        "--compare",
        metavar="KEY[=A,B]",
        help="group the points by a config key, and compare its two values, or the two named; 'schedule': static bits "
        "against scheduled ones",
    )
    parser.add_argument("--draws", type=int, default=DRAWS, metavar="N", help=f"of the bootstrap (default {DRAWS})")
    parser.add_argument("--level", type=float, default=0.95, metavar="P", help="of the intervals (default 0.95)")
    parser.add_argument(
        "--rows",
        metavar="FILE",
        help=f"write the runs without their curves as JSON lines, too, into a file *{ROWS}: small enough to commit, "
        "and a report can be made of it",
    )
    parser.add_argument("--title", default="qtrain report", metavar="TEXT", help="heading of the page")
    return parser


def run(argv: list[str]) -> int:
    """Read the runs, write the report, say what it found.

    Args:
      argv: the arguments after ``qtrain report``.

    Returns:
      the exit status: 0.

    Raises:
      UsageError: an unknown flag or a wrong value; no run; a folder that cannot be written or holds something else.
    """
    flags = _parser().flags(argv)
    if flags is None:
        return 0
    if flags.draws < 100:
        raise UsageError(f"--draws {flags.draws}: give at least 100, or the ends of an interval are chance")
    if not 0.5 <= flags.level < 1:
        raise UsageError(f"--level {flags.level:g}: must be from 0.5 to below 1, such as 0.95")
    key, groups = _compared(flags.compare)
    out = Path(flags.out)
    before = _former(out)
    rows = _rows(flags.rows)

    from qtrain.report import PAGE, find_runs, make_report, read_runs, rows_of

    notes: list[str] = []
    runs = read_runs(find_runs(flags.runs, notes), notes)
    if not runs:
        raise UsageError(
            f"no run can be reported on: {notes[0]}" + (f"; and {len(notes) - 1} more" if notes[1:] else "")
        )
    report = make_report(
        runs,
        notes,
        title=flags.title,
        metric=flags.metric,
        compare_by=key,
        groups=groups,
        draws=flags.draws,
        level=flags.level,
    )
    _write(out, report.files, before)
    if rows is not None:
        replace_file(rows, rows_of(runs).encode())
    for note in report.notes[:_SHOWN_NOTES]:
        print(f"warning: {note}", file=sys.stderr)
    if len(report.notes) > _SHOWN_NOTES:
        print(f"warning: and {len(report.notes) - _SHOWN_NOTES} more, on the page", file=sys.stderr)
    for line in report.said:
        print(line)
    print(f"{len(runs)} runs; {len(report.files)} files in {out}, the page is {out / PAGE}")
    return 0


def _compared(text: str | None) -> tuple[str | None, tuple[str, str] | None]:
    """``KEY`` or ``KEY=A,B``."""
    if text is None:
        return None, None
    key, equals, values = text.partition("=")
    groups = tuple(part.strip() for part in values.split(","))
    if not key or (equals and (len(groups) != 2 or not all(groups) or groups[0] == groups[1])):
        raise UsageError(f"--compare {text}: give KEY or KEY=A,B with two different values; {_EXAMPLE}")
    return key, (groups[0], groups[1]) if equals else None


def _rows(path: str | None) -> Path | None:
    if path is None:
        return None
    if not path.endswith(ROWS):
        raise UsageError(f"--rows {path}: must end in {ROWS}, by which a report knows it; give {path}{ROWS}, say")
    if Path(path).is_dir() or not Path(path).absolute().parent.is_dir():
        raise UsageError(f"--rows {path}: no file can be written there; name a file in a folder that is there")
    return Path(path)


def _former(out: Path) -> list[str]:
    """The files of the report that `out` holds; none of a new or empty folder. Anything else is not ours to replace."""
    if not out.exists():
        return []
    if not out.is_dir():
        raise UsageError(f"--out {out}: is a file; name a folder that is new, empty or holds a report")
    if not any(out.iterdir()):
        return []
    try:
        names = json.loads((out / FILES).read_text())["files"]
        return [name for name in names if name == os.path.basename(name)]
    except (OSError, ValueError, KeyError, TypeError):
        raise UsageError(
            f"--out {out}: holds something else; name a folder that is new, empty or holds a report"
        ) from None


def _write(out: Path, files: Mapping[str, bytes], before: list[str]) -> None:
    try:
        out.mkdir(parents=True, exist_ok=True)
        # The list first, with what was there: a report that is interrupted can still be replaced.
        (out / FILES).write_text(json.dumps({"files": sorted({*files, *before})}) + "\n")
        for name, content in files.items():
            (out / name).write_bytes(content)
        for name in set(before) - set(files):
            (out / name).unlink(missing_ok=True)
        (out / FILES).write_text(json.dumps({"files": sorted(files)}, indent=1) + "\n")
    except OSError as error:
        raise UsageError(f"--out {out}: cannot be written ({error.strerror or error}); name another folder") from None
