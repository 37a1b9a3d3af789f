"""``qtrain schedules``: the ten schedules as a table, and as a picture."""

from __future__ import annotations

from qtrain.arguments import Parser
from qtrain.schedules.picture import draw_suite, suite_table

_EXAMPLE = "example: qtrain schedules --low 3 --high 8 --plot s.png"


def _parser() -> Parser:
    parser = Parser(
        prog="qtrain schedules",
        description="Print the ten cyclic precision schedules with what each saves, and draw them.",
        example=_EXAMPLE,
    )
    parser.add_argument("--low", type=int, required=True, metavar="BITS", help="the lowest bits of a cycle")
    parser.add_argument("--high", type=int, required=True, metavar="BITS", help="the highest, and the static run's")
    parser.add_argument("--cycles", type=int, default=8, metavar="N", help="cycles in the run (default 8)")
    parser.add_argument("--steps", type=int, default=64_000, metavar="N", help="steps of the run (default 64000)")
    parser.add_argument("--grads", type=int, metavar="BITS", help="bits of the gradients (default: those of --high)")
    parser.add_argument("--plot", metavar="FILE", help="also draw them: a .png, .pdf or .svg file")
    return parser


def run(argv: list[str]) -> int:
    """Print the table, write the picture if asked.

    Args:
      argv: the arguments after ``qtrain schedules``.

    Returns:
      the exit status: 0.

    Raises:
      UsageError: an unknown flag, a value of the wrong type or out of range, a picture that cannot be written.
    """
    flags = _parser().flags(argv)
    if flags is None:
        return 0
    table = suite_table(flags.low, flags.high, flags.cycles, flags.steps, flags.grads)
    if flags.plot is not None:
        # before the table is printed: a picture that cannot be written is an error, and an error stands alone
        written = draw_suite(flags.low, flags.high, flags.cycles, flags.steps, flags.plot, flags.grads)
        print(f"{table}\n\ndrawn in {written}")
    else:
        print(table)
    return 0
