"""A schedule from a plain mapping, as configs write it."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any

from qtrain.errors import UsageError, did_you_mean
from qtrain.schedules.basic import constant, linear, piecewise, rounds
from qtrain.schedules.combinators import delayed, window
from qtrain.schedules.controller import Decided
from qtrain.schedules.cycles import PROFILES, SUITE, by_name, cyclic
from qtrain.schedules.muppet import VALUES
from qtrain.schedules.schedule import FLOAT_BITS, MOST_STEPS, Schedule, increasing_steps, one_of, shown, whole_number

SHARED_KEYS = frozenset({"low", "high", "cycles", "profile", "pattern", "bits", "weights", "acts", "grads"})
"""Keys that configs have in common, so that one override of ``schedule.name`` is enough to change the schedule."""

DURATIONS = ("begin", "start", "length", "boundaries")

CONTROLLERS = ("fractrain", "muppet", "budget_keeper")
"""Names of schedules whose bits are decided while training."""

INTERVAL = ("interval_steps", "interval_epochs", "interval_percent")

TAKES: dict[str, tuple[str, ...]] = {
    "constant": ("bits", "high"),
    "float": (),
    "linear": ("start_bits", "end_bits", "high", "low", "begin"),
    "piecewise": ("boundaries", "values"),
    "rounds": ("values",),
    "cyclic": ("profile", "low", "high", "cycles", "pattern", "reflection", "rate", "beta", "cycle_length"),
    **{name: ("low", "high", "cycles", "rate", "beta", "cycle_length") for name in SUITE},
    "window": ("start", "length", "inside", "outside", "low", "high"),
    "delayed": ("start", "bits", "high", "then", "restart"),
    "fractrain": ("values", "epsilon", "alpha", "scale_epochs", *INTERVAL),
    "muppet": ("values", "window", "violations", "margin", "margin_decay", *INTERVAL),
    "budget_keeper": (
        "low",
        "high",
        "cycles",
        "budget_share",
        "budget_of",
        "signal",
        "gain",
        "memory",
        *INTERVAL,
    ),
}
"""The keys of each name; a duration stands for its ``_steps`` and ``_percent``."""

ALL_KEYS = frozenset(
    f"{key}{unit}"
    for keys in TAKES.values()
    for key in keys
    for unit in (("_steps", "_percent") if key in DURATIONS else ("",))
)
"""Every key that some name uses."""

_USED_WITH = {
    "rate": " It belongs to profile='exponential'.",
    "beta": " It belongs to profile='rex'.",
    "reflection": " It belongs to name='cyclic' with pattern='triangular'; the ten names carry theirs.",
}

INNER_KEYS = ("inside", "outside", "then")
"""Keys that may hold a schedule of their own."""


def from_config(mapping: Any, total_steps: int, path: str = "schedule") -> Schedule:
    """The schedule that a plain mapping describes.

    ================= ==========================================================================================
    name              keys
    ================= ==========================================================================================
    constant          bits; unset, it is `high`: the static counterpart of a cyclic config
    float             none: 32 bits, not quantized
    linear            start_bits (default `high`), end_bits (default `low`), begin_steps | begin_percent (default 0)
    piecewise         boundaries_steps | boundaries_percent, values
    rounds            values: step t has the t-th of them, from the first again after the last
    cyclic            profile, low, high, cycles; pattern, cycle_length; rate (exponential), beta (rex), reflection
                      (triangular)
    CR CT LR LT ER    low, high, cycles; cycle_length; rate (E…), beta (R…)
    ETV ETH RR RTV RTH
    window            start_steps | start_percent, length_steps | length_percent; inside (default `low`), outside
                      (default `high`): bits or a mapping
    delayed           start_steps | start_percent; bits (default `high`), or `then`: a mapping; restart (default
                      False): `then` counts steps, and its percents, from the start on
    fractrain         values: bits of each stage; epsilon, alpha, scale_epochs
    muppet            values (default 8 12 14 16 32), window, violations, margin, margin_decay
    budget_keeper     low, high; budget_share of the BitOps of budget_of ("static", or a name of the ten, which needs
                      cycles; default "static"); signal, gain, memory
    ================= ==========================================================================================

    - The last three are controllers (`qtrain.schedules.Controller`), which decide bits while training: what is returned
      says which bits alone, and is no function of the step. They also take interval_steps | interval_epochs |
      interval_percent.
    - A key whose value is ``None`` is unset.
    - The keys low, high, cycles, profile, pattern, bits, weights, acts and grads may be set for any name, also one that
      does not use them. Any other key that the name does not use is an error.
    - A duration is given in steps or in percent (0 to 100) of `total_steps`, rounded to a step: exactly one of the two.
      Boundaries in percent that fall on one step, as in a very short run, leave out the pieces between them.
    - A mapping inside (`inside`, `outside`, `then`) has a name of its own, and starts from the low, high, cycles,
      profile and pattern around it.

    Args:
      mapping: a mapping, or an ``ml_collections.ConfigDict``.
      total_steps: N, the steps of the run; at least 1.
      path: what to call the mapping in messages.

    Raises:
      UsageError: a key that is missing, unknown, not used by the name, or has a value the schedule refuses; it begins
        with the path of the mapping.

    >>> from_config({"name": "cyclic", "profile": "cosine", "low": 3, "high": 8, "cycles": 8}, total_steps=64_000)
    cyclic(profile='cosine', low=3, high=8, cycles=8, total_steps=64000)
    >>> from_config({"name": "window", "low": 3, "high": 8, "start_percent": 25, "length_steps": 10}, total_steps=100)
    window(start=25, length=10, inside=constant(bits=3), outside=constant(bits=8))
    """
    settings = set_keys(mapping, path)
    check_keys(settings, settings, path)
    return build(settings, total_steps, path)


def set_keys(mapping: Any, path: str) -> dict[str, Any]:
    """The keys of `mapping` that are not ``None``."""
    if not hasattr(mapping, "items"):
        raise UsageError(f"{path}={shown(mapping)}: must be a mapping such as {{'name': 'constant', 'bits': 8}}")
    return {str(key): value for key, value in mapping.items() if value is not None}


def inherit(own: Mapping[str, Any], parent: Mapping[str, Any]) -> dict[str, Any]:
    """`parent`'s keys with `own` over them; an own duration replaces the parent's whatever its unit."""
    taken = {key for base in DURATIONS for key in _units(base) if any(unit in own for unit in _units(base))}
    return {**{key: value for key, value in parent.items() if key not in taken}, **own}


def check_keys(
    own: Mapping[str, Any], settings: Mapping[str, Any], path: str, allowed: frozenset = SHARED_KEYS
) -> None:
    """Raise for the first key of `own` that the schedule named in `settings` neither uses nor shares."""
    name = schedule_name(settings, path)
    takes = taken_keys(name, settings)
    for key in own:
        if key == "name" or key in takes or key in allowed:
            continue
        keys = f"takes {', '.join(takes)}" if takes else "takes no keys"
        near = _USED_WITH.get(key) or did_you_mean(key, takes)
        if key in SHARED_KEYS:  # set beside a name that came from around it: most likely the name is what is missing
            near = f" Set {path}.name as well, for instance to 'constant'."
        raise UsageError(f"{path}.{key}: not used by {path}.name={name!r}, which {keys}.{near}")


def schedule_name(settings: Mapping[str, Any], path: str) -> str:
    """The checked name in `settings`."""
    if "name" not in settings:
        raise UsageError(f"{path}.name: not set; must be one of {', '.join(TAKES)}")
    return one_of(f"{path}.name", settings["name"], TAKES)


def taken_keys(name: str, settings: Mapping[str, Any]) -> tuple[str, ...]:
    """The keys that `name` uses beside the other `settings`: `beta` has no meaning for a cosine, for one."""
    choice: Mapping[str, Any] = SUITE.get(name, settings)
    unused = set()
    if name == "cyclic" or name in SUITE:
        profile, pattern = choice.get("profile"), choice.get("pattern", "repeated")
        if profile in PROFILES:  # a profile that is missing or unknown is the mistake to tell of
            unused |= {"rate", "beta"} - {{"exponential": "rate", "rex": "beta"}.get(str(profile))}
        unused |= {"reflection"} if pattern == "repeated" else set()
    keys: list[str] = []
    for key in TAKES[name]:
        keys += _units(key) if key in DURATIONS else [key] if key not in unused else []
    return tuple(keys)


def build(settings: Mapping[str, Any], total_steps: int, path: str) -> Schedule:
    """The schedule of `settings`, of which only the keys that its name uses are looked at."""
    total_steps = whole_number("total_steps", total_steps, 1, MOST_STEPS)
    name = schedule_name(settings, path)
    takes = taken_keys(name, settings)
    given = {key: settings[key] for key in takes if key in settings and key not in INNER_KEYS}
    for key in DURATIONS:
        value = _duration(given, key, total_steps, path)
        if value is not None:
            given[key] = value
    for key in INNER_KEYS:
        if key in takes and key in settings:
            left = total_steps - given["start"] if given.get("restart") is True and "start" in given else total_steps
            given[key] = _inner(settings, key, max(left, 1), path)
    try:
        return _construct(name, given, total_steps, path)
    except UsageError as error:
        message = str(error)
        raise (error if message.startswith(path) else UsageError(f"{path}: {message}")) from None


def _construct(name: str, given: dict[str, Any], total_steps: int, path: str) -> Schedule:
    def need(*keys: str) -> Any:
        for key in keys:
            if key in given:
                return given[key]
        names = " or ".join(unit for key in keys for unit in (_units(key) if key in DURATIONS else [key]))
        raise UsageError(f"{path}: name={name!r} needs {names}, which is not set")

    if name == "constant":
        return constant(need("bits", "high"))
    if name == "float":
        return constant(FLOAT_BITS)
    if name == "linear":
        return linear(need("start_bits", "high"), need("end_bits", "low"), total_steps, given.get("begin", 0))
    if name == "piecewise":
        return _piecewise(need("boundaries"), need("values"), collapse="boundaries_percent" in given)
    if name == "rounds":
        return rounds(need("values"))
    if name == "window":
        return window(need("start"), need("length"), need("inside", "low"), need("outside", "high"))
    if name == "delayed":
        if "then" in given and "bits" in given:
            raise UsageError("bits, then: exactly one of them")
        return delayed(need("start"), need("then", "bits", "high"), given.get("restart", False))
    if name in CONTROLLERS:
        for key in ("low", "high") if name == "budget_keeper" else ():
            need(key)
        return _decided(name, given)
    required = {key: need(key) for key in ("profile", "low", "high", "cycles") if key in TAKES[name]}
    options = {key: given[key] for key in TAKES[name] if key in given and key not in required}
    if name == "cyclic":
        return cyclic(**required, **options, total_steps=total_steps)
    return by_name(name, **required, **options, total_steps=total_steps)


def _decided(name: str, given: Mapping[str, Any]) -> Decided:
    settings = dict(given)
    if name == "budget_keeper":
        low, high = constant(settings["low"]).bits, constant(settings["high"]).bits
        if low >= high:
            raise UsageError(f"low={low}, high={high}: high must be above low")
        values: Any = tuple(range(low, high + 1))
    else:
        values = settings.pop("values", VALUES if name == "muppet" else None)
        if values is None:
            raise UsageError(f"name={name!r} needs values, which is not set")
    return Decided(name, values, tuple(sorted(settings.items())))


def _piecewise(boundaries: list[int], values: Any, collapse: bool) -> Schedule:
    if collapse and hasattr(values, "__len__") and len(values) == len(boundaries) + 1:
        last = [i for i in range(len(boundaries)) if i + 1 == len(boundaries) or boundaries[i] != boundaries[i + 1]]
        boundaries, values = [boundaries[i] for i in last], [values[0], *(values[i + 1] for i in last)]
    return piecewise(boundaries, values)


def _inner(settings: Mapping[str, Any], key: str, total_steps: int, path: str) -> Any:
    value = settings[key]
    if not hasattr(value, "items"):
        if key == "then":
            raise UsageError(f"{path}.then={shown(value)}: must be a mapping such as {{'name': 'CR'}}; bits go in bits")
        return value
    own = set_keys(value, f"{path}.{key}")
    around = {k: settings[k] for k in ("low", "high", "cycles", "profile", "pattern") if k in settings}
    merged = inherit(own, around)
    check_keys(own, merged, f"{path}.{key}")
    if merged.get("name") in CONTROLLERS:
        raise UsageError(
            f"{path}.{key}.name={merged['name']!r}: it decides bits while training, throughout the run; give it as "
            f"{path}.name"
        )
    return build(merged, total_steps, f"{path}.{key}")


def _units(key: str) -> list[str]:
    return [f"{key}_steps", f"{key}_percent"]


def _duration(given: Mapping[str, Any], key: str, total_steps: int, path: str) -> Any:
    in_steps, in_percent = (given.get(unit) for unit in _units(key))
    if in_steps is not None and in_percent is not None:
        raise UsageError(f"{path}: {key}_steps and {key}_percent are both set; exactly one of them")
    if in_percent is None:
        if in_steps is None:
            return None
        if key == "boundaries":
            return increasing_steps(f"{path}.boundaries_steps", in_steps)
        return whole_number(f"{path}.{key}_steps", in_steps, 0, MOST_STEPS)
    if key != "boundaries":
        steps = _percent(f"{path}.{key}_percent", in_percent, total_steps)
        return min(steps, total_steps - 1) if key == "begin" else steps  # a ramp has a step, in the shortest run too
    if isinstance(in_percent, str) or not hasattr(in_percent, "__iter__"):
        raise UsageError(f"{path}.{key}_percent={shown(in_percent)}: must be a list of percents")
    percents = list(in_percent)
    boundaries = [_percent(f"{path}.{key}_percent[{i}]", percent, total_steps) for i, percent in enumerate(percents)]
    if any(after <= before for before, after in itertools.pairwise(percents)):
        raise UsageError(f"{path}.{key}_percent={shown(percents)}: must increase from one to the next")
    return boundaries


def _percent(key: str, percent: Any, total_steps: int) -> int:
    try:
        if isinstance(percent, bool | str):
            raise TypeError
        share = float(percent)
    except TypeError:
        share = -1.0
    if not 0 <= share <= 100:
        raise UsageError(f"{key}={shown(percent)}: must be a number from 0 to 100 (percent of the run's steps)")
    return round(total_steps * share / 100)
