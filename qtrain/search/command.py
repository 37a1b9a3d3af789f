"""``qtrain search``: a width for each layer of a trained run, under a budget."""

from __future__ import annotations

import contextlib
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path

from qtrain.arguments import Parser
from qtrain.errors import UsageError, did_you_mean

_EXAMPLE = "example: qtrain search --workdir runs/digits --budget bits=3"
JSON, PICTURE = "search.json", "search.png"
_UNITS = ("bits", "bytes", "bitops")


def _parser() -> Parser:
    parser = Parser(
        prog="qtrain search",
        description="Choose a width for each layer of a trained run, under a budget, by its Hessian traces and an "
        "integer program; evaluate it without retraining; write search.json and search.png.",
        example=_EXAMPLE,
    )
    parser.add_argument("--workdir", required=True, metavar="RUN", help="the run's folder; its newest checkpoint")
    parser.add_argument(
        "--budget",
        required=True,
        metavar="UNIT=N",
        help="at most so much: bits=3 (on average over the weights of the layers searched), bytes=60000 (of the "
        "weights), bitops=1e9 (of one example's forward pass)",
    )
    parser.add_argument("--widths", metavar="N,N,…", help="candidates (default: the widths the run was trained at)")
    parser.add_argument("--out", metavar="DIR", help="folder for search.json and search.png (default: the run's)")
    parser.add_argument(
        "--batches", type=int, default=4, metavar="N", help="training batches for the Hessian traces (default 4)"
    )
    parser.add_argument("--draws", type=int, default=100, metavar="N", help="draws of a trace, at most (default 100)")
    parser.add_argument(
        "--front", type=int, default=24, metavar="N", help="points of the front, at most; 0: all (default 24)"
    )
    parser.add_argument(
        "--evaluate-front", action="store_true", help="also evaluate every point of the front on the test set"
    )
    return parser


def run(argv: list[str]) -> int:
    """Search, write ``search.json`` and ``search.png``, print a table.

    Args:
      argv: the arguments after ``qtrain search``.

    Returns:
      the exit status: 0.

    Raises:
      UsageError: an unknown flag or a wrong value; no run, or none that has a checkpoint; no layer to search; a budget
        that cannot be met; a folder that cannot be written.
    """
    flags = _parser().flags(argv)
    if flags is None:
        return 0
    unit, budget = _budget(flags.budget)
    widths = _widths(flags.widths)
    if flags.front < 0 or flags.front == 1:
        raise UsageError(f"--front {flags.front}: give at least 2 points, or 0 for all of them")
    folder = _folder(flags.out if flags.out is not None else flags.workdir, made=flags.out is not None)

    from qtrain.search.picture import draw
    from qtrain.search.report import table
    from qtrain.search.run import search_run
    from qtrain.workdir import replace_file, write_json

    with _printing_to_stderr():
        found = search_run(
            flags.workdir,
            unit,
            budget,
            widths,
            batches=flags.batches,
            draws=flags.draws,
            points=flags.front,
            evaluate_front=flags.evaluate_front,
        )
    picture = draw(found)  # in full first, so that a failure leaves neither file
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / JSON, found)
    replace_file(folder / PICTURE, picture)
    print(table(found))
    print(f"\nwritten: {folder / JSON}, {folder / PICTURE}")
    return 0


@contextlib.contextmanager
def _printing_to_stderr() -> Iterator[None]:
    """HiGHS 1.12 prints a line of its own now and then, past Python, which is no part of this command's output."""
    sys.stdout.flush()
    kept = os.dup(1)
    os.dup2(2, 1)
    try:
        yield
    finally:
        os.dup2(kept, 1)
        os.close(kept)


def _budget(given: str) -> tuple[str, str]:
    match = re.fullmatch(r"\s*(\w+)\s*=\s*([0-9.]+(?:[eE][+-]?\d+)?)\s*", given)
    if match is None:
        raise UsageError(f"--budget {given!r}: give a unit and a number, such as bits=3, bytes=60000 or bitops=1e9")
    unit, number = match.groups()
    if unit not in _UNITS:
        raise UsageError(f"--budget {given!r}: the unit is one of {', '.join(_UNITS)}.{did_you_mean(unit, _UNITS)}")
    try:
        positive = 0 < float(number) < float("inf")
    except ValueError:
        positive = False
    if not positive:
        raise UsageError(f"--budget {given!r}: {number!r} is no number above 0; give one, such as {unit}=3")
    return unit, number


def _widths(given: str | None) -> tuple[int, ...]:
    if given is None:
        return ()
    if not re.fullmatch(r"\s*\d+\s*(,\s*\d+\s*)*", given):
        raise UsageError(f"--widths {given!r}: give whole numbers of bits with commas between them, such as 8,6,4,2")
    return tuple(int(number) for number in given.split(","))


def _folder(given: str | os.PathLike[str], *, made: bool) -> Path:
    """Refuse a folder that cannot be written before anything is computed; `made`: it need not exist yet."""
    folder = Path(given)
    above = folder
    while made and not above.exists() and above != above.parent:
        above = above.parent
    flag = "--out" if made else "--workdir"
    if above.exists() and not above.is_dir():
        raise UsageError(f"{flag} {os.fspath(given)!r}: {str(above)!r} is a file; give a folder")
    if above.is_dir() and not os.access(above, os.W_OK):
        raise UsageError(f"{flag} {os.fspath(given)!r}: {str(above)!r} cannot be written; name another by --out")
    return folder
