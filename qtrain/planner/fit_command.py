"""``qtrain fit``: laws of the planner fitted to one's own runs."""

from __future__ import annotations

import json
import sys

from qtrain.arguments import Parser
from qtrain.errors import UsageError
from qtrain.planner.constants import Constant
from qtrain.planner.file import save
from qtrain.planner.fit import DRAWS, Fitted, as_json, fit
from qtrain.planner.fit_fraction import FittedFraction
from qtrain.planner.fit_loss import FittedLoss
from qtrain.planner.memory import parse_count
from qtrain.planner.runs import COLUMNS, METRIC, NEEDED, read_runs

_EXAMPLE = "example: qtrain fit runs/qat --out law.json, then qtrain plan-budget --law law.json"


def _parser() -> Parser:
    parser = Parser(
        prog="qtrain fit",
        description="Fit a loss law and the fraction law of qtrain plan-budget to runs, with intervals and residuals.",
        example=_EXAMPLE,
    )
    parser.add_argument(
        "runs",
        nargs="+",
        metavar="RUNS",
        help=f"folders of runs, or tables (.csv, .jsonl) with {', '.join(NEEDED)}, "
        f"and {' and '.join(COLUMNS[len(NEEDED) :])} where they differ",
    )
    parser.add_argument("--out", metavar="FILE", help="write the laws there, for qtrain plan-budget --law FILE")
    parser.add_argument("--metric", default=METRIC, metavar="NAME", help=f"of a run's summary (default {METRIC})")
    parser.add_argument("--tokens-per-step", metavar="N", help="of a run (default: batch size, times length for text)")
    parser.add_argument("--draws", type=int, default=DRAWS, metavar="N", help=f"of the bootstrap (default {DRAWS})")
    parser.add_argument("--json", action="store_true", help="print everything as JSON")
    return parser


def run(argv: list[str]) -> int:
    """Fit, print the constants and the residuals, write them if asked.

    Args:
      argv: the arguments after ``qtrain fit``.

    Returns:
      the exit status: 0.

    Raises:
      UsageError: an unknown flag, a wrong value; runs that cannot be read, or identify no law; a file that cannot be
        written.
    """
    flags = _parser().flags(argv)
    if flags is None:
        return 0
    per_step = None if flags.tokens_per_step is None else parse_count(flags.tokens_per_step, "--tokens-per-step")
    rows, left_out = read_runs(flags.runs, metric=flags.metric, tokens_per_step=per_step)
    fitted = fit(rows, draws=flags.draws)
    for note in (*left_out, *fitted.notes):
        print(f"warning: {note}", file=sys.stderr)
    sys.stderr.flush()
    if fitted.loss is None and fitted.fraction is None:
        raise UsageError(f"{len(rows)} runs identify no law; the warnings say what to add")
    if flags.out is not None:
        save(flags.out, fitted)
    print(json.dumps(as_json(fitted), indent=2) if flags.json else text(fitted))
    if flags.out is not None and not flags.json:
        print(f"\nwritten: {flags.out}; qtrain plan-budget --law {flags.out}")
    return 0


def text(fitted: Fitted) -> str:
    """The constants with their intervals, and how far the runs are from the laws."""
    parts = [f"{fitted.runs} runs; intervals 95 %, bootstrap"]
    if fitted.loss is not None:
        parts.append("\n".join(_loss_lines(fitted, fitted.loss)))
    if fitted.fraction is not None:
        parts.append("\n".join(_fraction_lines(fitted.fraction)))
    return "\n\n".join(parts)


def _loss_lines(fitted: Fitted, loss: FittedLoss) -> list[str]:
    lines = [f"loss      {fitted.loss_law().equation}"]
    named = [*loss.constants.items(), *((f"eff({bits})", value) for bits, value in sorted(loss.efficiency.items()))]
    lines += [f"  {name:<8}  {_shown(value)}" for name, value in named]
    lines += ["", f"{'params':>10}  {'tokens':>10}  {'bits':>4}  {'n':>3}  {'loss':>8}  {'law':>8}  {'error':>8}"]
    lines += [
        f"{cell.params:>10.4g}  {cell.tokens:>10.4g}  {cell.bits:>4}  {cell.n:>3}  {cell.loss:>8.5g}  "
        f"{cell.predicted:>8.5g}  {cell.error:>+8.2%}"
        for cell in loss.residuals
    ]
    return lines


def _fraction_lines(fraction: FittedFraction) -> list[str]:
    lines = [f"fraction  f* = exp(-a/ln S), a = {_shown(fraction.constant)}", ""]
    lines.append(
        f"{'params':>10}  {'tokens':>10}  {'bits':>4}  {'S':>8}  {'seeds':>5}  {'optimum':>7}  {'interval':>14}  "
        f"{'law':>5}"
    )
    for cell in fraction.cells:
        interval = f"{cell.low:.3f} to {cell.high:.3f}" if cell.seeds > 1 else "-"
        remark = "" if cell.used else "  not used"
        remark += f"  at the {cell.edge} fraction" if cell.edge else ""
        lines.append(
            f"{cell.params:>10.4g}  {cell.tokens:>10.4g}  {cell.bits:>4}  {cell.tokens_per_byte:>8.4g}  "
            f"{cell.seeds:>5}  {cell.optimum:>7.3f}  {interval:>14}  {cell.law:>5.3f}{remark}"
        )
    return lines


def _shown(value: Constant) -> str:
    if value.low == value.high:
        return f"{value.value:.4g} (by definition)"
    interval = f"{value.value:.4g} [{value.low:.4g}, {value.high:.4g}]"
    return interval if value.identified else f"{interval} not identified"
