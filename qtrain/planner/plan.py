"""A plan: when to switch quantization on, at which width, under a memory."""

from __future__ import annotations

import dataclasses
from typing import Any

from qtrain.errors import UsageError
from qtrain.planner.fraction import FractionLaw, tokens_per_parameter_byte
from qtrain.planner.laws import LAWS, LossLaw, Setting
from qtrain.planner.memory import params_that_fit, show_bytes, weight_bytes
from qtrain.planner.runs import FLOAT_BITS

FLOPS_PER_PARAMETER = 6
"""Of a token in training: ``C = 6·N·D`` (Kaplan et al. 2020, arXiv 2001.08361)."""


DREMOV = FractionLaw()


@dataclasses.dataclass(frozen=True)
class Option:
    """One width.

    bits: of the weights. params, tokens: N and D. weight_bytes: of the packed weights, with scales where a group size
    was given. fits: within the memory, None without one. tokens_per_byte: S. fraction: of the tokens to train
    quantized, 0 for float. loss: by the loss law.
    """

    bits: int
    params: float
    tokens: float
    weight_bytes: float
    fits: bool | None
    tokens_per_byte: float
    fraction: float
    loss: float


@dataclasses.dataclass(frozen=True)
class Plan:
    """What `plan_budget` found.

    chosen: the width; options: all that were compared, narrow to wide. warnings: how the laws are outside their range.
    notes: what else to know. memory, group_size: as asked.
    """

    chosen: Option
    options: tuple[Option, ...]
    loss_law: LossLaw
    fraction_law: FractionLaw
    warnings: tuple[str, ...]
    notes: tuple[str, ...]
    memory: float | None
    group_size: float | None

    def as_json(self) -> dict[str, Any]:
        """Plain data, as ``--json`` prints it."""
        loss, fraction = self.loss_law, self.fraction_law
        return {
            **dataclasses.asdict(self.chosen),
            "float_percent": 100 * (1 - self.chosen.fraction),
            "memory_bytes": self.memory,
            "group_size": self.group_size,
            "options": [dataclasses.asdict(option) for option in self.options],
            "fraction_law": {
                "name": fraction.name,
                "equation": fraction.equation,
                "source": fraction.source,
                "constant": fraction.constant,
                "tokens_per_byte_range": [fraction.low, fraction.high],
                "params_range": list(fraction.params),
                "widths": list(fraction.widths),
            },
            "loss_law": {
                "name": loss.name,
                "equation": loss.equation,
                "source": loss.source,
                "ranges": {name: list(ends) for name, ends in loss.ranges.items()},
                "widths": list(loss.supported or loss.widths),
            },
            "warnings": list(self.warnings),
            "notes": list(self.notes),
        }


def plan_budget(
    *,
    params: float | None = None,
    tokens: float | None = None,
    compute: float | None = None,
    memory: float | None = None,
    bits: int | None = None,
    acts: float | None = None,
    group_size: float | None = None,
    loss_law: LossLaw = LAWS["quest"],
    fraction_law: FractionLaw = DREMOV,
) -> Plan:
    """The width with the least predicted loss whose weights fit a memory, and what share of its training to quantize.

    Without `params`, each width gets as many as fit (``N = 8M/b``) and the best of them is a trade of size against
    width: fewer bits, more parameters. With `params`, wider is better by every published law, so that the plan is the
    widest width that fits.

    Args:
      params: N; None: as many as fit.
      tokens: D, of the whole training, float and quantized; or
      compute: C in floating-point operations, from which ``D = C/(6·N)``. Exactly one of the two.
      memory: M in bytes, of the packed weights; None with `bits`, where nothing is chosen.
      bits: the width, if it is given.
      acts: bits of the activations; None: those of the weights.
      group_size: weights that share a float32 scale; None: scales are not counted.
      loss_law: what widths are compared by. fraction_law: what says the share.

    Raises:
      UsageError: a number that is missing, given twice, or not above 0; no width that fits; bits the law does not have.

    >>> plan = plan_budget(params=1e8, tokens=2e9, memory=50e6)
    >>> plan.chosen.bits, plan.chosen.tokens_per_byte, round(plan.chosen.fraction, 3)
    (4, 40.0, 0.161)
    """
    _check(params, tokens, compute, memory, bits, group_size)
    widths = loss_law.widths if bits is None else (bits,)
    options, notes = [], list[str]()
    for width in widths:
        size = params if params is not None else params_that_fit(memory or 0.0, width, group_size)
        seen = tokens if tokens is not None else (compute or 0.0) / (FLOPS_PER_PARAMETER * size)
        taken = weight_bytes(size, width, group_size)
        # The least loss of doubles: N = 8M/b fills the memory to the last byte.
        fits = None if memory is None else taken <= memory * (1 + 1e-9)
        ratio = tokens_per_parameter_byte(size, seen, width)
        try:
            loss = loss_law(Setting(size, seen, width, acts, group_size))
        except UsageError as error:
            if bits is not None:
                raise
            notes.append(f"{width} bits left out: {error}")
            continue
        fraction = 0.0 if width >= FLOAT_BITS else fraction_law(ratio)
        options.append(Option(width, size, seen, taken, fits, ratio, fraction, loss))
    if not options:
        raise UsageError(f"the law {loss_law.name!r} has a loss for no width: {notes[0]}")
    fitting = [option for option in options if option.fits is not False]
    if not fitting:
        least = options[0]
        raise UsageError(
            f"--memory {show_bytes(memory or 0.0)}: the weights at {least.bits} bits take "
            f"{show_bytes(least.weight_bytes)}; give more memory or fewer --params, or leave --params out"
        )
    chosen = min(fitting, key=lambda option: (option.loss, option.bits))
    setting = Setting(chosen.params, chosen.tokens, chosen.bits, acts, group_size)
    warnings = loss_law.warnings(setting)
    if chosen.bits < FLOAT_BITS:
        warnings = [*fraction_law.warnings(chosen.tokens_per_byte, chosen.params, chosen.bits), *warnings]
    notes += _notes(chosen, fitting, memory if params is not None else None, group_size, loss_law)
    return Plan(chosen, tuple(options), loss_law, fraction_law, tuple(warnings), tuple(notes), memory, group_size)


def _check(
    params: float | None,
    tokens: float | None,
    compute: float | None,
    memory: float | None,
    bits: int | None,
    group_size: float | None,
) -> None:
    if (tokens is None) == (compute is None):
        given = "neither is" if tokens is None else "both are"
        raise UsageError(f"--tokens, --compute: {given} given; give exactly one, such as --tokens 2e9")
    if memory is None and bits is None:
        raise UsageError("--memory, --bits: neither is given; give --memory 50MB to choose a width, or --bits 4")
    if memory is None and params is None:
        raise UsageError("--params is missing; give it, or --memory, from which it can be chosen")
    named = {"--params": params, "--tokens": tokens, "--compute": compute, "--memory": memory, "--bits": bits}
    for flag, value in (named | {"--group-size": group_size}).items():
        if value is not None and not value > 0:
            raise UsageError(f"{flag} {value:g}: give a number above 0")


def _notes(
    chosen: Option, fitting: list[Option], memory: float | None, group_size: float | None, law: LossLaw
) -> list[str]:
    """`memory`: None where the number of parameters is chosen to fill it."""
    notes = []
    widest = max(fitting, key=lambda option: option.bits)
    if widest.bits != chosen.bits:
        notes.append(
            f"{widest.bits} bits fits too, with a loss of {widest.loss:.4g}, {widest.loss - chosen.loss:.3g} more by "
            f"the law {law.name!r}"
        )
    if group_size is None:
        full = memory is not None and weight_bytes(chosen.params, chosen.bits, 1024) > memory
        tight = "; with one for 1024 weights it would not fit" if full else ""
        notes.append(f"scales are not counted (--group-size N counts a float32 for every N weights){tight}")
    if chosen.bits < 4:
        notes.append(
            "begin the decay of the learning rate with the quantization only if measured: at 1 and 2 bits that can hurt"
        )
    elif chosen.bits <= 6:
        notes.append(
            "no decay of the learning rate in float: begin it with the quantization (cooldown fusion, Dremov et "
            "al. 2025)"
        )
    return notes
