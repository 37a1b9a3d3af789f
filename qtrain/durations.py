"""Durations in a config: as steps, epochs or percent of the run, exactly one of them."""

from __future__ import annotations

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
) -> int:
    """The steps that ``section[name + "_steps" | "_epochs" | "_percent"]`` stand for; 0 and None are unset.

    Args:
      section: a part of the config.
      name: prefix of the key, such as "warmup" or "every"; "" when the keys are the bare units.
      key: where the section stands in the config, for messages.
      steps_per_epoch: of the training data.
      total_steps: of the run, which percent refers to; None where percent has no meaning.
      default: when none is set; None makes that an error.

    Raises:
      UsageError: when none or several are set, or one is negative.
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
    (label, value), = given.items()
    if isinstance(value, bool) or not isinstance(value, int | float) or value < 0:
        raise UsageError(f"{key}.{label}={value!r}: give a number of at least 0")
    if label == names["epochs"]:
        return round(value * steps_per_epoch)
    if label == names["percent"]:
        assert total_steps is not None
        return round(value / 100 * total_steps)
    if value != int(value):
        raise UsageError(f"{key}.{label}={value!r}: give a whole number of steps")
    return int(value)
