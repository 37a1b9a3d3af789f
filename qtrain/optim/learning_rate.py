"""Learning-rate schedules by name, from a config."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import optax

from qtrain.durations import duration
from qtrain.errors import UsageError, did_you_mean

SCHEDULES = ("constant", "cosine", "linear", "step", "wsd")


def learning_rate_schedule(
    config: Mapping[str, Any], total_steps: int, steps_per_epoch: int, steps_per_update: int = 1, key: str = "optimizer"
) -> optax.Schedule:
    """Learning rate over the optimizer's updates, one per `steps_per_update` steps.

    ============  =============================================================================================
    schedule      learning rate after the warm-up, u = progress from its end to the end of the run
    ============  =============================================================================================
    constant      `learning_rate`
    cosine        from `learning_rate` to `final_factor` × it, half a cosine
    linear        from `learning_rate` to `final_factor` × it, a line
    step          × `decay_factor` at each of `boundaries_percent` (percent of the run)
    wsd           `learning_rate`, at last half a cosine to `final_factor` × it over `decay_percent` of the run; with a
                  `restart_percent` half a cosine over the `cooldown_percent` before it, too, and after it all anew
    ============  =============================================================================================

    ``warmup_steps | warmup_epochs | warmup_percent`` prepend a line from 0. `key` names the config in
    messages.

    wsd is warm-up, stable, decay (Hu et al. 2024, arXiv 2404.06395). What follows `restart_percent`, if that is above
    0, is such a part of its own, with the warm-up again: training in float with its cooldown, then quantized. Lengths
    that a part has no room for, after its warm-up, are cut; decay_percent=100 is a decay all along.

    Raises:
      UsageError: for an unknown name, a number out of range, a warm-up as long as the run.
    """
    name, peak = config["schedule"], config["learning_rate"]
    if name not in SCHEDULES:
        raise UsageError(f"{key}.schedule={name!r}: give one of {SCHEDULES}.{did_you_mean(name, SCHEDULES)}")
    for field, value, allowed, fits in (
        ("learning_rate", peak, "a number above 0", 0 < peak < math.inf),
        ("final_factor", config["final_factor"], "a number from 0 to 1", 0 <= config["final_factor"] <= 1),
        ("decay_factor", config["decay_factor"], "a number above 0", 0 < config["decay_factor"] < math.inf),
    ):
        if not fits:
            raise UsageError(f"{key}.{field}={value!r}: give {allowed}")
    for field in ("decay_percent", "restart_percent", "cooldown_percent"):
        if not 0 <= config[field] <= 100:
            raise UsageError(f"{key}.{field}={config[field]!r}: give a number from 0 to 100 (percent of the run)")
    boundaries = list(config["boundaries_percent"])
    if not all(isinstance(percent, int | float) and 0 < percent < 100 for percent in boundaries):
        raise UsageError(f"{key}.boundaries_percent={boundaries}: give percents between 0 and 100")
    warmup_steps = duration(
        config, "warmup", "optimizer", steps_per_epoch=steps_per_epoch, total_steps=total_steps, default=0
    )
    if warmup_steps >= total_steps:
        raise UsageError(f"optimizer.warmup is {warmup_steps} steps of {total_steps}: make it shorter than the run")
    total, warmup = -(-total_steps // steps_per_update), warmup_steps // steps_per_update
    if name == "wsd":
        return _warmup_stable_decay(config, total, warmup)
    rest = total - warmup
    final = config["final_factor"]
    if name == "cosine":
        main: optax.Schedule = optax.cosine_decay_schedule(peak, rest, alpha=final)
    elif name == "linear":
        main = optax.linear_schedule(peak, peak * final, rest)
    elif name == "step":
        if not boundaries:
            raise UsageError("optimizer.boundaries_percent is empty: give percents between 0 and 100")
        factors: dict[int, float] = {}
        for percent in boundaries:  # in a short run two of them may fall on one update
            at = round(percent / 100 * total) - warmup
            factors[at] = factors.get(at, 1.0) * config["decay_factor"]
        main = optax.piecewise_constant_schedule(peak, factors)
    else:
        main = optax.constant_schedule(peak)
    if not warmup:
        return main
    return optax.join_schedules([optax.linear_schedule(0.0, peak, warmup), main], [warmup])


def _warmup_stable_decay(config: Mapping[str, Any], total: int, warmup: int) -> optax.Schedule:
    peak, final = config["learning_rate"], config["final_factor"]
    restart, cooldown, decay = (
        round(config[field] / 100 * total) for field in ("restart_percent", "cooldown_percent", "decay_percent")
    )
    # In a very short run the restart may fall on its end: the last update is the earliest that can be anew.
    restart = min(restart, total - 1)
    parts = [(restart, cooldown), (total - restart, decay)] if restart else [(total, decay)]
    schedules: list[optax.Schedule] = []
    ends: list[int] = []
    for length, falling in parts:
        rising = min(warmup, length - 1)
        falling = min(falling, length - rising)
        for steps, schedule in (
            (rising, lambda steps: optax.linear_schedule(0.0, peak, steps)),
            (length - rising - falling, lambda steps: optax.constant_schedule(peak)),
            (falling, lambda steps: optax.cosine_decay_schedule(peak, steps, alpha=final)),
        ):
            if steps:
                schedules.append(schedule(steps))
                ends.append((ends[-1] if ends else 0) + steps)
    return optax.join_schedules(schedules, ends[:-1])
