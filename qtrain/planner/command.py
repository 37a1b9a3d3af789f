"""``qtrain plan-budget``: when to switch quantization on, and at which width, under a memory."""

from __future__ import annotations

import json
import os
import sys

from qtrain.arguments import Parser
from qtrain.errors import UsageError
from qtrain.planner.fraction import FractionLaw
from qtrain.planner.laws import LAWS, LossLaw, loss_law
from qtrain.planner.memory import parse_bytes, parse_count, show_bytes
from qtrain.planner.plan import Plan, plan_budget

_EXAMPLE = "example: qtrain plan-budget --params 1e8 --tokens 2e9 --memory 50MB"


def _parser() -> Parser:
    parser = Parser(
        prog="qtrain plan-budget",
        description="Say when to switch quantization on and at which width, by which law and within which range of it.",
        example=_EXAMPLE,
    )
    parser.add_argument("--params", metavar="N", help="parameters, such as 1e8; unset: as many as fit the memory")
    parser.add_argument("--tokens", metavar="N", help="training tokens, float and quantized together, such as 2e9")
    parser.add_argument("--compute", metavar="FLOPS", help="instead of --tokens: tokens = FLOPS/(6*params)")
    parser.add_argument("--memory", metavar="SIZE", help="of the stored weights, such as 50MB or 1.5GiB")
    parser.add_argument("--bits", type=int, metavar="N", help="this width; unset: the best that fits")
    parser.add_argument("--acts", type=int, metavar="N", help="bits of the activations (default: of the weights)")
    parser.add_argument("--group-size", metavar="N", help="weights that share a float32 scale (default: not counted)")
    parser.add_argument(
        "--law",
        default="quest",
        metavar="NAME|FILE",
        help=f"the loss law: {', '.join(LAWS)} (default quest), or a file that qtrain fit wrote",
    )
    parser.add_argument("--json", action="store_true", help="print the plan as JSON")
    return parser


def run(argv: list[str]) -> int:
    """Print a plan; what is outside a law's range is a line each on stderr, and in the JSON.

    Args:
      argv: the arguments after ``qtrain plan-budget``.

    Returns:
      the exit status: 0.

    Raises:
      UsageError: an unknown flag, a wrong value, a law that cannot be read, no width that fits.
    """
    if argv[:1] == ["fit"]:
        raise UsageError(
            "qtrain plan-budget fit: laws are fitted by a command of its own: qtrain fit RUNS... --out law.json"
        )
    flags = _parser().flags(argv)
    if flags is None:
        return 0
    numbers = {
        name: None if (given := getattr(flags, name)) is None else parse_count(given, f"--{name.replace('_', '-')}")
        for name in ("params", "tokens", "compute", "group_size")
    }
    memory = None if flags.memory is None else parse_bytes(flags.memory)
    losses, fractions = _laws(flags.law)
    plan = plan_budget(
        **numbers, memory=memory, bits=flags.bits, acts=flags.acts, loss_law=losses, fraction_law=fractions
    )
    for warning in plan.warnings:
        print(f"warning: {warning}", file=sys.stderr)
    sys.stderr.flush()
    print(json.dumps(plan.as_json(), indent=2) if flags.json else text(plan))
    return 0


def _laws(given: str) -> tuple[LossLaw, FractionLaw]:
    if given in LAWS or not (given.endswith(".json") or os.path.exists(given)):
        return loss_law(given), FractionLaw()
    from qtrain.planner.file import load

    fitted = load(given)
    if fitted.loss is None and fitted.fraction is None:
        raise UsageError(f"--law {given!r}: its runs identified no law; fit more runs (qtrain fit says which)")
    losses = LAWS["quest"] if fitted.loss is None else fitted.loss_law()
    return losses, FractionLaw() if fitted.fraction is None else fitted.fraction_law()


def text(plan: Plan) -> str:
    """The plan as a table of the widths, what to do, and the laws it is by."""
    chosen = plan.chosen
    lines = [f"{'bits':>6}  {'params':>9}  {'weights':>9}  {'fits':>4}  {'S':>9}  {'quantized':>9}  {'loss':>7}"]
    for option in plan.options:
        mark = "->" if option is chosen else "  "
        fits = {True: "yes", False: "no", None: "-"}[option.fits]
        lines.append(
            f"{mark}{option.bits:>4}  {option.params:>9.4g}  {show_bytes(option.weight_bytes):>9}  {fits:>4}  "
            f"{option.tokens_per_byte:>9.4g}  {option.fraction:>9.1%}  {option.loss:>7.4g}"
        )
    float_tokens = chosen.tokens * (1 - chosen.fraction)
    memory = "" if plan.memory is None else f" in {show_bytes(plan.memory)}"
    percent = 100 * (1 - chosen.fraction)
    if chosen.fraction:
        when = (
            f"float for the first {percent:.1f} % of {chosen.tokens:.4g} tokens, then quantized: on at token "
            f"{float_tokens:.4g}, fraction {chosen.fraction:.4f}"
        )
        schedule = (
            f"--config.schedule.name=delayed --config.schedule.start_percent={percent:.1f} "
            f"--config.schedule.bits={chosen.bits}"
        )
    else:
        when, schedule = f"float throughout, {chosen.tokens:.4g} tokens", "--config.schedule.name=float"
    lines += [
        "",
        f"plan      {chosen.params:.4g} parameters at {chosen.bits} bits: {show_bytes(chosen.weight_bytes)}{memory}",
        f"          {when}",
        f"config    {schedule}",
        "          gradients, and layers with bits of their own, are as the config has them: see its qtrain plan",
        f"fraction  {plan.fraction_law.equation}: S {plan.fraction_law.low:.6g} to {plan.fraction_law.high:.6g}"
        f"{_sizes(plan.fraction_law)}",
        f"          {plan.fraction_law.source}",
        f"loss      {plan.loss_law.equation}",
        f"          {_ranges(plan.loss_law)}",
        f"          {plan.loss_law.source}",
    ]
    lines += [f"note      {note}" for note in plan.notes]
    return "\n".join(lines)


def _sizes(law: FractionLaw) -> str:
    sizes = f", {law.params[0]:.4g} to {law.params[1]:.4g} parameters" if law.params else ""
    return sizes + (f", {_listed(law.widths)} bits" if law.widths else "")


def _ranges(law: LossLaw) -> str:
    ranges = [f"{name} {low:.4g} to {high:.4g}" for name, (low, high) in law.ranges.items()]
    remark = [law.remark] if law.remark else []
    return ", ".join([*ranges, f"{_listed(law.supported or law.widths)} bits"]) + "".join(f"; {r}" for r in remark)


def _listed(widths: tuple[int, ...]) -> str:
    if len(widths) > 2 and widths == tuple(range(widths[0], widths[-1] + 1)):
        return f"{widths[0]} to {widths[-1]}"
    return ", ".join(map(str, widths))
