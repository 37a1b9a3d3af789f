"""Learning-rate schedules by name, from a config."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
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
    wsd           `learning_rate`, at last half a cosine to `final_factor` × it over `decay_percent` of the run; of the
                  part before a restart over `cooldown_percent`
    ============  =============================================================================================

    ``warmup_steps | warmup_epochs | warmup_percent`` prepend a line from 0. Two more, for what happens to the network
    in a part of the run only, such as a deficit of precision (exactly one of them):

    * ``hold_steps | hold_epochs | hold_percent`` from ``hold_start_…`` (0) on: the schedule stands still there, at the
      value it has reached, and decays over what is left of the run. The warm-up is not held: with H the held updates
      after the warm-up W, u = (t − W − held so far)/(N − W − H). A deficit of R steps and ``hold_steps`` R, in a run of
      R + n steps, is followed by the decay of a run of n.
    * ``restart_steps | restart_epochs | restart_percent``: the schedule, warm-up included, begins anew there, and each
      of the two parts has one of its own length (Loshchilov & Hutter 2017, arXiv 1608.03983, one restart).

    `key` names the config in messages.

    wsd is warm-up, stable, decay (Hu et al. 2024, arXiv 2404.06395); with a restart, float training with its cooldown,
    say, then quantized. A decay that has no room after the warm-up is cut; decay_percent=100 is one all along.

    Raises:
      UsageError: for an unknown name, a number out of range, a warm-up as long as the run (or as a part of it), a hold
        that leaves nothing of the run to decay in, a restart beyond its end.
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
    for field in ("decay_percent", "cooldown_percent"):
        if not 0 <= config[field] <= 100:
            raise UsageError(f"{key}.{field}={config[field]!r}: give a number from 0 to 100 (percent of the run)")
    boundaries = list(config["boundaries_percent"])
    if name == "step" and not boundaries:
        raise UsageError("optimizer.boundaries_percent is empty: give percents between 0 and 100")
    if not all(isinstance(percent, int | float) and 0 < percent < 100 for percent in boundaries):
        raise UsageError(f"{key}.boundaries_percent={boundaries}: give percents between 0 and 100")
    units = {"steps_per_epoch": steps_per_epoch, "total_steps": total_steps}
    warmup_steps = duration(config, "warmup", "optimizer", **units, default=0)
    hold_start, hold, restart = (
        duration(config, name, "optimizer", **units, default=0) for name in ("hold_start", "hold", "restart")
    )
    if hold and restart:
        raise UsageError("optimizer.hold and optimizer.restart are both set: give exactly one of them")
    if hold_start and not hold:
        raise UsageError(
            "optimizer.hold_start is set without optimizer.hold_steps, hold_epochs or hold_percent: how long?"
        )
    if restart >= total_steps:
        raise UsageError(f"optimizer.restart is step {restart} of {total_steps}: give a step before the run's end")
    parts = [restart, total_steps - restart] if restart else [total_steps]
    if warmup_steps >= min(parts):
        part = f"{total_steps}" if not restart else f"a part of {min(parts)} (optimizer.restart)"
        raise UsageError(f"optimizer.warmup is {warmup_steps} steps of {part}: make it shorter than the run")
    total, warmup = -(-total_steps // steps_per_update), warmup_steps // steps_per_update
    if not restart:
        held = tuple(min(step // steps_per_update, total) for step in (hold_start, hold_start + hold))
        first, last = (max(update, warmup) for update in held)
        if hold and total - warmup - (last - first) < 1:
            raise UsageError(
                f"optimizer.hold is {hold} steps from step {hold_start} on: of {total_steps} steps none is left for "
                f"optimizer.schedule={name!r}; make it shorter"
            )
        return _held(_part(config, total, warmup, last - first), first, last)
    at = restart // steps_per_update
    # A restart within the first update, or the last, leaves a part without any.
    before = {**config, "decay_percent": config["cooldown_percent"]}
    pieces = [_part(each, max(n, warmup + 1), warmup) for each, n in ((before, at), (config, total - at))]
    return optax.join_schedules(pieces, [at])


def _held(schedule: optax.Schedule, first: int, last: int) -> optax.Schedule:
    """`schedule`, standing still from update `first` to `last` where it has come to by then."""
    if last <= first:
        return schedule
    return lambda update: schedule(update - jnp.clip(update - first, 0, last - first))


def _part(config: Mapping[str, Any], total: int, warmup: int, held: int = 0) -> optax.Schedule:
    """The schedule of `total` updates, of which `held` do not count after the warm-up."""
    name, peak, final = config["schedule"], config["learning_rate"], config["final_factor"]
    rest = total - warmup - held
    if name == "cosine":
        main: optax.Schedule = optax.cosine_decay_schedule(peak, rest, alpha=final)
    elif name == "linear":
        main = optax.linear_schedule(peak, peak * final, rest)
    elif name == "step":
        factors: dict[int, float] = {}
        for percent in config["boundaries_percent"]:  # in a short run two of them may fall on one update
            at = round(percent / 100 * (total - held)) - warmup
            factors[at] = factors.get(at, 1.0) * config["decay_factor"]
        main = optax.piecewise_constant_schedule(peak, factors)
    elif name == "wsd":
        falling = min(round(config["decay_percent"] / 100 * (total - held)), rest)
        main = optax.constant_schedule(peak)
        if falling:
            decay = optax.cosine_decay_schedule(peak, falling, alpha=final)
            main = optax.join_schedules([main, decay], [rest - falling])
    else:
        main = optax.constant_schedule(peak)
    if not warmup:
        return main
    return optax.join_schedules([optax.linear_schedule(0.0, peak, warmup), main], [warmup])
