"""A schedule each for the weights, the activations and the gradients."""

from __future__ import annotations

import dataclasses
from typing import Any

from qtrain.errors import UsageError, did_you_mean
from qtrain.precision import Precision
from qtrain.schedules.config import ALL_KEYS, build, check_keys, inherit, schedule_name, set_keys, taken_keys
from qtrain.schedules.schedule import (
    MOST_STEPS,
    ScheduleLike,
    as_step,
    bits_or_schedule,
    call,
    highest,
    whole_number,
)

KINDS = ("weights", "acts", "grads")


@dataclasses.dataclass(frozen=True)
class PrecisionSchedule:
    """A function ``step -> Precision``: what the train step evaluates, inside jit.

    Fields:
      weights, acts, grads: a schedule each; bits stand for a constant one; ``None`` leaves that kind unquantized.
      total_steps: the steps of the run, by which `q_max` knows what a plain function reaches. ``None`` if not known.

    Raises:
      UsageError: when a field is neither a schedule nor a bit width.

    >>> from qtrain.schedules import cyclic
    >>> cosine = cyclic("cosine", low=3, high=8, cycles=8, total_steps=64_000)
    >>> precisions = PrecisionSchedule(weights=cosine, acts=cosine, grads=8)
    >>> precisions.q_max
    Precision(weights=8, acts=8, grads=8)
    """

    weights: Any = None
    acts: Any = None
    grads: Any = None
    total_steps: int | None = None

    def __post_init__(self):
        for kind in KINDS:
            if getattr(self, kind) is not None:
                object.__setattr__(self, kind, bits_or_schedule(kind, getattr(self, kind)))
        if self.total_steps is not None:
            object.__setattr__(self, "total_steps", whole_number("total_steps", self.total_steps, 1, MOST_STEPS))

    def __call__(self, step: Any) -> Precision:
        """The bits of each kind at `step`: float32 of `step`'s shape; ``None`` where a kind is unquantized."""
        step = as_step(step)

        def bits(schedule: ScheduleLike | None) -> Any:
            return None if schedule is None else call(schedule, step)

        return Precision(weights=bits(self.weights), acts=bits(self.acts), grads=bits(self.grads))

    @property
    def q_max(self) -> Precision:
        """The most bits of each kind over the run, Python ints, at most 32: the static counterpart's precision.

        A cyclic schedule answers with its upper bound, also where the run is too short to reach it.
        """
        weights, acts, grads = (highest(getattr(self, kind), self.total_steps) for kind in KINDS)
        return Precision(weights=weights, acts=acts, grads=grads)


def precisions_from_config(mapping: Any, total_steps: int, path: str = "schedule") -> PrecisionSchedule:
    """The schedules of weights, activations and gradients that one mapping describes.

    The mapping's own keys, as in `from_config`, serve all three. The mappings `weights`, `acts` and `grads` inside it
    set what differs: each starts from the keys around it, with or without a name of its own. Inside one of them that
    has no name of its own, every key must be one that the name around it uses.

    Args:
      mapping: a mapping, or an ``ml_collections.ConfigDict``.
      total_steps: N, the steps of the run; at least 1.
      path: what to call the mapping in messages.

    Raises:
      UsageError: as `from_config` does.

    >>> config = {"name": "CR", "low": 3, "high": 8, "cycles": 8, "grads": {"name": "constant", "bits": 8}}
    >>> precisions_from_config(config, total_steps=64_000).grads
    constant(bits=8)
    """
    settings = set_keys(mapping, path)
    kinds = {kind: set_keys(settings.pop(kind), f"{path}.{kind}") for kind in KINDS if kind in settings}
    if "name" in settings:
        check_keys(settings, settings, path)
    elif len(kinds) < len(KINDS) or any("name" not in own for own in kinds.values()):
        schedule_name(settings, path)
    else:
        _check_nameless(settings, path)
    schedules = {}
    bits_used = "bits" not in settings
    for kind in KINDS:
        own = kinds.get(kind, {})
        merged = inherit(own, settings)
        name = schedule_name(merged, f"{path}.{kind}")
        bits_used = bits_used or ("bits" not in own and "bits" in taken_keys(name, merged))
        if own:
            inner_path = f"{path}.{kind}"
            if "name" in own:
                check_keys(own, merged, inner_path)
            else:
                check_keys(own, merged, inner_path, allowed=frozenset())
            schedules[kind] = build(merged, total_steps, inner_path)
        else:
            schedules[kind] = build(merged, total_steps, path)
    if not bits_used:
        # The other shared keys are what one name leaves for another; bits say that somebody wants these bits.
        raise UsageError(
            f"{path}.bits={settings['bits']!r}: not used by {path}.name={settings.get('name')!r}; "
            f"set {path}.name='constant' as well"
        )
    return PrecisionSchedule(**schedules, total_steps=total_steps)


def _check_nameless(settings: dict[str, Any], path: str) -> None:
    """Keys that serve only as defaults of three named mappings must at least be keys of some schedule."""
    for key in settings:
        if key not in ALL_KEYS:
            raise UsageError(f"{path}.{key}: not a key of any schedule.{did_you_mean(key, ALL_KEYS)}")
