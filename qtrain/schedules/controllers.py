"""A controller from the schedules of a config, some of whose bits it decides."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from qtrain.durations import duration
from qtrain.errors import UsageError
from qtrain.precision import Precision
from qtrain.schedules.basic import Constant
from qtrain.schedules.budget_keeper import budget_keeper
from qtrain.schedules.controller import Controller, Decided
from qtrain.schedules.cycles import SUITE, by_name
from qtrain.schedules.fractrain import fractrain
from qtrain.schedules.muppet import muppet
from qtrain.schedules.precisions import KINDS, PrecisionSchedule
from qtrain.schedules.schedule import evaluate, one_of, shown

STATIC = "static"


def controller_from_schedule(
    schedule: PrecisionSchedule,
    total_steps: int,
    steps_per_epoch: int,
    price: Callable[[Precision], float],
    seed: int = 0,
    path: str = "schedule",
) -> Controller | None:
    """The controller of those kinds of `schedule` that are `Decided`; None where none is.

    Its interval is an epoch unless given (``interval_steps | interval_epochs | interval_percent``), of a budget keeper
    a hundredth of the run.

    Args:
      schedule: as `precisions_from_config` gives it.
      total_steps, steps_per_epoch: of the run.
      price: BitOps of one step at a precision.
      seed: of noise, where the signal is that.
      path: what to call the mapping in messages.

    Raises:
      UsageError: kinds with different controllers, numbers out of range, a budget that cannot be met.
    """
    kinds: dict[str, Decided] = {kind: one for kind in KINDS if isinstance(one := getattr(schedule, kind), Decided)}
    if not kinds:
        return None
    (first, one), *others = kinds.items()
    for kind, other in others:
        if (other.name, other.settings) != (one.name, one.settings):
            raise UsageError(
                f"{path}: one controller decides all its kinds, and {first} and {kind} have different ones "
                f"({one.name} {dict(one.settings)}, {other.name} {dict(other.settings)}); give {kind} the same, or a "
                f"schedule of its own, such as {path}.{kind}.name='constant'"
            )
    settings = dict(one.settings)
    interval = _interval(settings, one.name, total_steps, steps_per_epoch, path)
    levels = Precision(**{kind: each.values for kind, each in kinds.items()})
    try:
        if one.name == "fractrain":
            return fractrain(levels, interval, **settings)
        if one.name == "muppet":
            return muppet(levels, interval, **settings)
        return _keeper(schedule, levels, interval, {**settings, "noise_seed": seed}, total_steps, price)
    except UsageError as error:
        raise UsageError(f"{path}: {str(error).replace('levels.', '')}") from None


def _interval(settings: dict[str, Any], name: str, total_steps: int, steps_per_epoch: int, path: str) -> int:
    given = {key: settings.pop(key) for key in tuple(settings) if key.startswith("interval_")}
    default = max(round(total_steps / 100), 1) if name == "budget_keeper" else steps_per_epoch
    units = {"steps_per_epoch": steps_per_epoch, "total_steps": total_steps}
    return duration(given, "interval", path, **units, default=default, at_least=1)


def _keeper(
    schedule: PrecisionSchedule,
    levels: Precision,
    interval: int,
    settings: dict[str, Any],
    total_steps: int,
    price: Callable[[Precision], float],
) -> Controller:
    low, high = settings.pop("low"), settings.pop("high")
    cycles, of = settings.pop("cycles", None), one_of("budget_of", settings.pop("budget_of", STATIC), (STATIC, *SUITE))
    share = settings.pop("budget_share", None if of == STATIC else 1.0)
    if share is None or isinstance(share, bool) or not isinstance(share, int | float) or not share > 0:
        raise UsageError(
            f"budget_share={shown(share)}: give the share of the BitOps of budget_of={of!r} that the run may spend, "
            "such as 0.6"
        )
    fixed = {}
    for kind in KINDS:
        if getattr(levels, kind) is not None or getattr(schedule, kind) is None:
            continue
        constant = getattr(schedule, kind)
        if not isinstance(constant, Constant):
            raise UsageError(
                f"budget_keeper: the bits of {kind} change by themselves ({constant}), and a step's cost would not be "
                f"known by its level; give {kind}.name='constant'"
            )
        fixed[kind] = constant.bits
    widths = range(low, high + 1)
    costs = [
        float(price(Precision(**fixed, **{kind: bits for kind, each in vars(levels).items() if each is not None})))
        for bits in widths
    ]
    if not costs[-1] > costs[0]:
        raise UsageError("budget_keeper: no layer's cost follows the schedule, so that there is nothing to decide")
    if of == STATIC:
        pace = np.full(total_steps, costs[-1])
    else:
        if cycles is None:
            raise UsageError(f"budget_of={of!r}: it needs cycles, which is not set")
        bits = evaluate(by_name(of, low=low, high=high, cycles=cycles, total_steps=total_steps), total_steps)
        pace = np.asarray(costs)[bits.astype(int) - low]
    least, most = (total_steps * cost / pace.sum() for cost in (costs[0], costs[-1]))
    if not least * (1 - 1e-9) <= share <= most * (1 + 1e-9):
        raise UsageError(
            f"budget_share={share:g}: from {low} to {high} bits the run can spend from {least:.4g} to {most:.4g} of "
            f"the BitOps of budget_of={of!r}"
        )
    return budget_keeper(levels, costs, pace, share * float(pace.sum()), interval, **settings)


def without_decided(schedule: PrecisionSchedule) -> PrecisionSchedule:
    """`schedule` with None for the kinds that a controller decides: what can be evaluated before training."""
    kinds = {kind: getattr(schedule, kind) for kind in KINDS}
    left = {kind: None if isinstance(one, Decided) else one for kind, one in kinds.items()}
    return schedule if left == kinds else PrecisionSchedule(**left, total_steps=schedule.total_steps)


def bounds(schedule: PrecisionSchedule) -> tuple[PrecisionSchedule, PrecisionSchedule]:
    """`schedule` with the fewest bits of each decided kind throughout, and with the most."""

    def at(pick: Callable[[Any], int]) -> PrecisionSchedule:
        kinds = {kind: getattr(schedule, kind) for kind in KINDS}
        chosen = {kind: Constant(pick(one.values)) if isinstance(one, Decided) else one for kind, one in kinds.items()}
        return PrecisionSchedule(**chosen, total_steps=schedule.total_steps)

    return at(min), at(max)
