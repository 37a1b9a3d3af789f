"""What a point of a sweep is called: by the config keys that differ, and its schedules by their usual names."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

KINDS = ("weights", "acts", "grads")
PROFILES = {"cosine": "C", "linear": "L", "exponential": "E", "rex": "R"}
"""The letters of `qtrain.schedules.cycles.SUITE`, which imports JAX."""
_SUITE = ("CR", "CT", "LR", "LT", "ER", "ETV", "ETH", "RR", "RTV", "RTH")
_AMBIGUOUS = ("weights", "acts", "grads", "bias", "rate", "schedule", "target", "seed", "factor", "momentum")
_FIRST = ("model.name", "quant.backend", "quant.recipe", "quant.weights", "quant.acts", "optimizer.name")
_FLOAT_BITS = 24


def canonical(value: Any) -> str:
    """A value as text that is equal for equal values: 8 and 8.0 are the same number."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return value if isinstance(value, str) else json.dumps(value, sort_keys=True)


def shown(value: Any) -> str:
    """A value for people."""
    if value is None:
        return "unset"
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, list | tuple):
        return f"({', '.join(map(shown, value))})"
    return str(value)


def is_static(config: Mapping[str, Any]) -> bool:
    """Whether weights and activations have the same bits at all steps."""
    return all(_section(config, kind).get("name") in ("constant", "float") for kind in KINDS[:2])


def describe_schedules(config: Mapping[str, Any], *, grads: bool = True) -> str:
    """The schedules of a config in a few words.

    >>> describe_schedules({"schedule.name": "CR", "schedule.low": 3, "schedule.high": 8}, grads=False)
    'CR 3–8'
    """
    weights, acts, cotangents = (_describe(_section(config, kind)) for kind in KINDS)
    text = weights if weights == acts else f"w {weights}, a {acts}"
    return f"{text}, g {cotangents}" if grads and cotangents != weights else text


def short_keys(keys: Sequence[str]) -> dict[str, str]:
    """The shortest names of `keys` that tell them apart and say enough.

    >>> short_keys(["model.width", "optimizer.quant.learning_rate", "quant.weights"])
    {'model.width': 'width', 'optimizer.quant.learning_rate': 'learning_rate', 'quant.weights': 'quant.weights'}
    """
    last = [key.rsplit(".", 1)[-1] for key in keys]
    return {
        key: key if leaf in _AMBIGUOUS or leaf.isdigit() or last.count(leaf) > 1 else leaf
        for key, leaf in zip(keys, last, strict=True)
    }


def label_points(configs: Sequence[Mapping[str, Any]], keys: Sequence[str], *, schedules: bool = True) -> list[str]:
    """A label for each of `configs`, which differ in `keys`: different labels for different points, as short as can be.

    First the schedules of weights and activations, where these differ; then, key by key, what tells apart points whose
    labels are equal so far, and for these alone. So a label does not have every key that differs.

    Args:
      configs: dotted key → value.
      keys: those in which they differ.
      schedules: whether to describe them; False for configs that are not whole.
    """
    of_schedule = [key for key in keys if key.startswith("schedule.")]
    others = sorted((key for key in keys if key not in of_schedule), key=_priority)
    names = short_keys(others) | {key: key.removeprefix("schedule.") for key in of_schedule}
    labels = [""] * len(configs)
    parts = [[_part(names[key], config.get(key)) for config in configs] for key in (*others, *of_schedule)]
    if schedules and (of_schedule or not keys):
        labels = [describe_schedules(config, grads=not keys) for config in configs]
        gradients = [f"g {_describe(_section(config, 'grads'))}" for config in configs]
        parts.insert(sum(key in _FIRST for key in others), gradients)
    for texts in parts:
        alike: dict[str, set[str]] = {}
        for label, text in zip(labels, texts, strict=True):
            alike.setdefault(label, set()).add(text)
        labels = [
            f"{label}, {text}".removeprefix(", ") if len(alike[label]) > 1 else label
            for label, text in zip(labels, texts, strict=True)
        ]
    return labels


def _priority(key: str) -> int:
    """What says most first, the rest as the config has them (sorting is stable)."""
    return _FIRST.index(key) if key in _FIRST else len(_FIRST)


def _part(name: str, value: Any) -> str:
    return shown(value) if name == "name" or name.endswith(".name") else f"{name}={shown(value)}"


def _section(config: Mapping[str, Any], kind: str) -> dict[str, Any]:
    """The keys of a kind's schedule that are set: its own over the shared ones."""
    found = {}
    for prefix in ("schedule.", f"schedule.{kind}."):
        for key, value in config.items():
            if key.startswith(prefix) and value is not None and "." not in key[len(prefix) :]:
                found[key[len(prefix) :]] = value
    return found


def _describe(keys: Mapping[str, Any]) -> str:
    name, low, high = (keys.get(key) for key in ("name", "low", "high"))
    if name == "constant":
        return _bits(keys.get("bits", high))
    if name == "float":
        return "float"
    if name in _SUITE:
        return f"{name} {low}–{high}"
    if name == "budget_keeper":
        share, of = keys.get("budget_share", 1.0), keys.get("budget_of", "static")
        return f"budget_keeper {low}–{high} at {share:g} of {of}"
    if name == "cyclic":
        return f"{_letters(keys)} {low}–{high}"
    if name == "linear":
        return f"linear {shown(keys.get('start_bits', high))}→{shown(keys.get('end_bits', low))}"
    if name == "window":
        inside, outside = keys.get("inside", low), keys.get("outside", high)
        return f"{_bits(inside)} at {_time(keys, 'start')} for {_time(keys, 'length')}, else {_bits(outside)}"
    if name == "delayed":
        return f"float until {_time(keys, 'start')}, then {_bits(keys.get('bits', high))}"
    values = keys.get("values")
    return f"{name} {shown(values)}" if values is not None else str(name)


def _letters(keys: Mapping[str, Any]) -> str:
    profile = keys.get("profile", "")
    letter = PROFILES.get(profile, shown(profile))
    if keys.get("pattern", "repeated") == "repeated":
        return letter + "R"
    mirrored = profile in ("exponential", "rex")
    return letter + "T" + (keys.get("reflection", "vertical")[0].upper() if mirrored else "")


def _bits(value: Any) -> str:
    if isinstance(value, int | float):
        return "float" if value >= _FLOAT_BITS else f"{value:g} bits"
    return shown(value)


def _time(keys: Mapping[str, Any], name: str) -> str:
    percent = keys.get(f"{name}_percent")
    return f"{percent:g} %" if percent is not None else f"step {keys.get(f'{name}_steps', 0):g}"
