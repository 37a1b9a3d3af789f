"""What the keys of ``config.model`` may hold."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any


@dataclasses.dataclass(frozen=True)
class Value:
    """What a config value may be, in words, and the value as the module takes it, ``None`` when it is illegal."""

    allowed: str
    convert: Callable[[Any], Any]


def choice(*allowed: Any) -> Value:
    """One of `allowed`, of its type: 50.0 is no depth, and True no number."""

    def convert(value: Any) -> Any:
        return next((one for one in allowed if type(one) is type(value) and one == value), None)

    return Value("one of " + ", ".join(map(str, allowed)), convert)


def whole(value: Any, least: int) -> int | None:
    """`value` if it is a whole number of at least `least`, else None."""
    return value if isinstance(value, int) and not isinstance(value, bool) and value >= least else None


def _real(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _wholes(value: Any, most: int | None = None) -> tuple[int, ...] | None:
    if isinstance(value, str) or not isinstance(value, Sequence):
        return None
    if most is not None and not 1 <= len(value) <= most:
        return None
    return None if any(whole(number, 1) is None for number in value) else tuple(value)


def wholes(most: int) -> Value:
    """A list of 1 to `most` whole numbers."""
    return Value(f"a list of 1 to {most} whole numbers of at least 1", lambda value: _wholes(value, most))


POSITIVE = Value("a whole number of at least 1", lambda value: whole(value, 1))
NATURAL = Value("a whole number of at least 0", lambda value: whole(value, 0))
RATE = Value("a rate from 0 to below 1", lambda value: float(value) if _real(value) and 0 <= value < 1 else None)
FACTOR = Value("a number above 0", lambda value: float(value) if _real(value) and value > 0 else None)
SWITCH = Value("True or False", lambda value: value if isinstance(value, bool) else None)
WIDTHS = Value("a list of whole numbers of at least 1", _wholes)
