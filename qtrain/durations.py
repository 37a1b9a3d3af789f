"""Durations in a config: as steps, epochs or percent of the run, exactly one of them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from qtrain.errors import UsageError

UNITS = ("steps", "epochs", "percent")


def duration(
    section: Mapping[str, Any],
    name: str,
    key: str,
    *,
    steps_per_epoch: int,
    total_steps: int | None = None,
    default: int | None = None,
    at_least: int = 0,
) -> int:
    """The steps that ``section[name + "_steps" | "_epochs" | "_percent"]`` stand for; 0 and None are unset.

    Args:
      section: a part of the config.
      name: prefix of the key, such as "warmup" or "every"; "" when the keys are the bare units.
      key: where the section stands in the config, for messages.
      steps_per_epoch: of the training data.
      total_steps: of the run, which percent refers to; None where percent has no meaning.
      default: when none is set; None makes that an error.
      at_least: what a set duration is rounded up to: a small share of a short run may be less than a step.

    Raises:
      UsageError: when none or several are set; one that is negative, not finite, or above 100 percent.
    """
    names = {unit: f"{name}_{unit}" if name else unit for unit in UNITS}
    allowed = [names[unit] for unit in UNITS if unit != "percent" or total_steps is not None]
    given = {label: section.get(label) for label in allowed if section.get(label)}
    if len(given) > 1:
        listed = ", ".join(f"{key}.{label}={value}" for label, value in given.items())
        raise UsageError(f"{listed}: give exactly one of {allowed} and set the others to 0")
    if not given:
        if default is None:
            raise UsageError(f"{key}: give exactly one of {allowed}")
        return default
    ((label, value),) = given.items()
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < math.inf:
        raise UsageError(f"{key}.{label}={value!r}: give a number of at least 0")
    if label == names["epochs"]:
        return max(round(value * steps_per_epoch), at_least)
    if label == names["percent"]:
        assert total_steps is not None
        if value > 100:
            raise UsageError(f"{key}.{label}={value!r}: give at most 100 (percent of the run's {total_steps} steps)")
        return max(round(value / 100 * total_steps), at_least)
    if value != int(value):
        raise UsageError(f"{key}.{label}={value!r}: give a whole number of steps")
    return max(int(value), at_least)
