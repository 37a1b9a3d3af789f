"""``qtrain bench``: its flags, and the run through the suites."""

from __future__ import annotations

import contextlib
import gc
import json
import os
import tempfile
from collections.abc import Iterator, Sequence
from typing import Any

from qtrain.arguments import Parser
from qtrain.bench import ARMS, SUITES
from qtrain.errors import UsageError, did_you_mean

_EXAMPLE = "example: qtrain bench --suite matmul,block --out bench.json"


def _parser() -> Parser:
    parser = Parser(
        prog="qtrain bench",
        description="Measure whole train steps: float32, bfloat16, qtrain (fake and native execution), AQT and Qwix. "
        "The arms of a case are compiled first, then run in turn in one process; a ratio is an arm's time over that of "
        "the float32 steps just before and after it: its median and quartiles over the rounds are reported. An arm "
        "that cannot run is a row that says why.",
        example=_EXAMPLE,
    )
    parser.add_argument("--suite", default=",".join(SUITES), metavar="S,...", help="suites (default: %(default)s)")
    parser.add_argument("--out", metavar="FILE", help="also write the rows, one JSON array, to this file")
    parser.add_argument("--rounds", type=int, metavar="N", help="measurements of each arm (default 20; 2 with --quick)")
    parser.add_argument(
        "--arms",
        default=",".join(ARMS),
        metavar="A,...",
        help="arms besides the baseline float32 (default: all)",
    )
    parser.add_argument("--bits", metavar="B,...", help="widths of suite matmul, 2 to 8 (default 8,4); others are at 8")
    parser.add_argument("--quick", action="store_true", help="tiny sizes: a smoke test, not a measurement")
    parser.add_argument("--markdown", action="store_true", help="print a Markdown table")
    return parser


def run(argv: list[str]) -> int:
    """Measure, print the table, write the rows.

    Args:
      argv: the arguments after ``qtrain bench``.

    Returns:
      the exit status: 0.

    Raises:
      UsageError: an unknown flag, suite or arm, a width or number out of range, a file that cannot be written, settings
        under which the baseline would not be float32. Before anything compiles.
    """
    flags = _parser().flags(argv)
    if flags is None:
        return 0
    suites = _listed("suite", flags.suite, SUITES)
    arms = _listed("arms", flags.arms, ARMS)
    if flags.bits is not None and "matmul" not in suites:
        raise UsageError(
            "qtrain bench: --bits is for suite matmul, which is not among --suite; the others are at 8 bits"
        )
    widths = tuple(map(int, _listed("bits", flags.bits or "8,4", tuple(map(str, range(2, 9))))))
    rounds = flags.rounds if flags.rounds is not None else 2 if flags.quick else 20
    if rounds < 1:
        raise UsageError(f"qtrain bench: --rounds {rounds}; give at least 1")
    if flags.out is not None:
        check_writable(flags.out)

    from qtrain.bench.programs import check_settings
    from qtrain.bench.rows import table
    from qtrain.bench.suites import cases

    check_settings()
    rows: list[dict[str, Any]] = []
    with _no_compilation_cache():
        for suite in suites:
            for case in cases(suite, widths, flags.quick):
                measured = measure(case, arms, rounds)
                print(table(measured, flags.markdown, header=not rows), flush=True)
                rows += measured
                if flags.out is not None:
                    write(rows, flags.out)
    return 0


def measure(case: Any, arms: tuple[str, ...], rounds: int) -> list[dict[str, Any]]:
    """The rows of one case."""
    from qtrain.bench.arms import runners
    from qtrain.bench.rows import rows
    from qtrain.bench.timing import interleave

    found = runners(case, arms)
    baseline, *others = [runner for runner in found if runner.programs]
    gc.collect()
    times, repeats = interleave(baseline, others, rounds)
    return rows(found, times, repeats)


def check_writable(path: str) -> None:
    """Refuse a file that could not be written later.

    Raises:
      UsageError: naming it.
    """
    folder = os.path.dirname(path) or "."
    if not os.path.isdir(folder):
        raise UsageError(f"qtrain bench: --out {path!r}: there is no folder {folder!r}; create it")
    if os.path.exists(path) and not os.path.isfile(path):
        raise UsageError(f"qtrain bench: --out {path!r} is not a file; give a file such as bench.json")
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise UsageError(f"qtrain bench: --out {path!r} cannot be written ({error.strerror}); give another") from None


def write(rows: list[dict[str, Any]], path: str) -> None:
    """The rows as one JSON array, a line each; the file is replaced whole, so that it is never half written."""
    text = "[\n" + ",\n".join(json.dumps(row) for row in rows) + "\n]\n"
    part = f"{path}.part"
    with open(part, "w") as file:
        file.write(text)
    os.replace(part, path)


def _listed(flag: str, text: str, allowed: Sequence[str]) -> tuple[str, ...]:
    """The comma-separated words of a flag, each once, all of them allowed."""
    words = tuple(dict.fromkeys(word.strip() for word in text.split(",") if word.strip()))
    if not words:
        raise UsageError(f"qtrain bench: --{flag} is empty; give some of {', '.join(allowed)}")
    for word in words:
        if word not in allowed:
            near = did_you_mean(word, allowed)
            raise UsageError(f"qtrain bench: --{flag}: there is no {word!r}; there are {', '.join(allowed)}.{near}")
    return words


@contextlib.contextmanager
def _no_compilation_cache() -> Iterator[None]:
    """A program read from jax's cache on disk would have no time to compile."""
    import jax

    before = jax.config.jax_enable_compilation_cache  # type: ignore[attr-defined]
    jax.config.update("jax_enable_compilation_cache", False)
    try:
        yield
    finally:
        jax.config.update("jax_enable_compilation_cache", before)
