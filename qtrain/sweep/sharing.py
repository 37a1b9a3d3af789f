"""Which points can share a compiled step: those that differ only in what is data to it."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Sequence
from typing import Any

import jax

from qtrain.build import controller_of, losses_of, narrowest_of, schedule_of
from qtrain.config import check_keys
from qtrain.deficits import deficit_from_config
from qtrain.errors import UsageError
from qtrain.experiment import Experiment
from qtrain.optim.build import TRANSITION
from qtrain.optim.learning_rate import learning_rate_schedule
from qtrain.quantizers import FLOAT_BITS
from qtrain.recipes import check_values
from qtrain.schedules import Controller, PrecisionSchedule
from qtrain.schedules.precisions import KINDS
from qtrain.sweep.expand import Point
from qtrain.workdir import leaves

DATA = re.compile(
    r"seed|schedule(\..*)?|losses\.\w+\.(rate|schedule)|"
    r"optimizer\.(learning_rate|schedule|final_factor|decay_factor|boundaries_percent|decay_percent|cooldown_percent|"
    r"(warmup|hold|restart)_\w+)|"
    r"deficit\.(start|length)_\w+"
)
"""Keys whose values a compiled step takes as arguments: tables of bits, learning rates and rates, and keys."""
_SHOWN = 4


class NotTogether(UsageError):
    """A point needs another program than the others."""


def structure(point: Point) -> dict[str, Any]:
    """Dotted key → JSON of what a program is made of: the config without what is data, and what is made of that.

    Points with the same structure share a program, but for what their schedules have to have in common: `vary`.
    """
    return _structure(point.config.to_dict())


def _structure(config: dict[str, Any]) -> dict[str, Any]:
    found = {key: json.dumps(value, default=str) for key, value in leaves(config)}
    optimizer = config["optimizer"]
    kept = []
    if config["quant"]["backend"] == "aqt" or config["multi_precision"]["widths"]:
        kept.append(r"schedule(\..*)?")  # widths that are frozen, or that variables are held for
    if config["multi_precision"]["hasb"]["sigma"]:
        kept.append("seed")  # of the Hessian's probes
    own = any("learning_rate" in group for group in optimizer["groups"]) or optimizer["quant"]["learning_rate"]
    if own or optimizer["name"] in TRANSITION or "learned_width" in json.dumps(config["quant"], default=str):
        kept.append(r"optimizer\.learning_rate")  # other rates are a factor of it, or begin with it
    if optimizer["name"] in TRANSITION:
        # Of the target, which is no table.
        kept.append(r"optimizer\.(decay_factor|boundaries_percent|(decay|cooldown)_percent|(hold|restart)_\w+)")
    kept_keys = re.compile("|".join(kept) or "(?!)")
    result = {key: value for key, value in found.items() if not DATA.fullmatch(key) or kept_keys.fullmatch(key)}
    for name, term in config["losses"].items():
        result[f"losses.{name}.rate"] = "above 0" if term["rate"] else "0"  # a term that is left out is not computed
    return result


def differing(points: Sequence[Point]) -> list[str]:
    """The keys that keep points from sharing a program, those of the points' own overrides first."""
    structures = [structure(point) for point in points]
    keys = list(dict.fromkeys(key for one in structures for key in one))
    found = [key for key in keys if len({one.get(key) for one in structures}) > 1]
    own = {key for point in points for key in point.overrides}
    return sorted(found, key=lambda key: (key not in own, key))


def check(points: Sequence[Point]) -> None:
    """Refuse points that cannot share a program.

    Raises:
      UsageError: naming the keys that differ.
    """
    keys = differing(points)
    if keys:
        raise UsageError(
            f"--vectorized: the points differ in {_listed(keys)}, which no step takes as data "
            "(schedules, seed, learning rate and loss rates are); add --separate for a program for each group of "
            "points that can share one, or leave out --vectorized"
        )


def groups(points: Sequence[Point]) -> list[list[Point]]:
    """The points in groups that can share a program, in order of their first points."""
    found: dict[str, list[Point]] = {}
    for point in points:
        found.setdefault(json.dumps(structure(point), sort_keys=True), []).append(point)
    return list(found.values())


def vary(base: Experiment, point: Point) -> Experiment:
    """`base` under the config of a point with the same structure, which is not built anew.

    Raises:
      UsageError: a wrong value.
      NotTogether: a schedule that needs another program than `base` has.
    """
    config = point.config
    check_keys(config)
    check_values(config)
    schedule, controller = base.schedule, base.controller
    steps_per_epoch = base.dataset.steps_per_epoch(config.data.batch_size) * config.data.repeat
    if base.fixed is None and not base.trained_widths:  # else it is the same
        schedule = schedule_of(config, None, base.total_steps)
        assert base.widths is not None
        controller = controller_of(config, schedule, base.widths, base.total_steps, steps_per_epoch)
        if (problem := _another_program(base, schedule, controller)) is not None:
            raise NotTogether(
                f"--vectorized: point {point.index} has {problem}, and the first of the points has not: they differ in "
                f"{_listed(_schedule_keys(base, point))}; add --separate for a program of its own, or leave out "
                "--vectorized"
            )
    assert base.widths is not None
    fields = config.optimizer.to_dict()
    rate = learning_rate_schedule(fields, base.total_steps, steps_per_epoch, base.steps_per_update)
    deficit = deficit_from_config(config.deficit, base.dataset, base.total_steps, steps_per_epoch)
    return dataclasses.replace(
        base.steered_by(controller).observing(deficit),
        config=config,
        schedule=schedule,
        learning_rate=rate,
        losses=losses_of(config, base.widths, schedule.q_max, base.total_steps),
    )


def program_key(experiment: Experiment) -> str:
    """Text that experiments have in common which can share a program, and others of one sweep do not."""
    floats = [bits is None or bits >= FLOAT_BITS for bits in vars(experiment.q_max).values()]
    made = _structure(experiment.config.to_dict()), str(_form(experiment.controller)), floats
    return json.dumps(made, sort_keys=True)


def _another_program(base: Experiment, schedule: PrecisionSchedule, controller: Controller | None) -> str | None:
    """Why a schedule needs another program than `base`; None if it does not."""
    if _form(controller) != _form(base.controller):
        if controller is None:
            return "bits that no controller decides"
        return f"bits that {controller.name} decides, by so many levels and with a state of that size"
    mine, theirs = schedule.q_max, base.q_max
    for kind in KINDS:
        here, there = (bits is None or bits >= FLOAT_BITS for bits in (getattr(mine, kind), getattr(theirs, kind)))
        if here != there and (
            _latent_matters(base) or (getattr(mine, kind) is None) != (getattr(theirs, kind) is None)
        ):
            return f"{kind} in float throughout" if here else f"quantized {kind}"
    if base.config.budget.unit != "none" and mine != theirs:
        return f"a schedule up to {_bits(mine)} bits, which the budget is relative to"
    ends = [narrowest_of(one, base.total_steps, base.qmodel.rules) for one in (schedule, base.schedule)]
    if any(rule.execution != "fake" for rule in base.qmodel.rules) and (mine, ends[0]) != (theirs, ends[1]):
        return f"a schedule up to {_bits(mine)} bits, by which quant.execution chooses"
    return None


def _schedule_keys(base: Experiment, point: Point) -> list[str]:
    """The keys of its schedule in which a point differs from `base`."""
    mine, theirs = (dict(leaves({"schedule": config.schedule.to_dict()})) for config in (point.config, base.config))
    return [key for key in dict.fromkeys([*mine, *theirs]) if mine.get(key) != theirs.get(key)]


def _listed(keys: Sequence[str]) -> str:
    more = f" and {len(keys) - _SHOWN} more" if len(keys) > _SHOWN else ""
    return ", ".join(keys[:_SHOWN]) + more


def _form(controller: Controller | None) -> Any:
    """What of a controller is no data."""
    leaves, structure = jax.tree.flatten(controller)
    return structure, [leaf.shape for leaf in leaves]


def _latent_matters(base: Experiment) -> bool:
    """Whether something is made for quantized weights alone: a loss term, a group of the optimizer, a code."""
    oscillation = base.config.optimizer.oscillation
    return (
        base.losses is not None
        or base.learns
        or base.config.optimizer.name in TRANSITION
        or oscillation.track
        or oscillation.freeze
    )


def _bits(precision: Any) -> str:
    return "/".join("float" if value is None else f"{value:g}" for value in vars(precision).values())
