"""Sizes: amounts as people write them, and the bytes that weights of b bits take."""

from __future__ import annotations

import math
import re

from qtrain.errors import UsageError

SCALE_BYTES = 4
"""A scale is stored as float32."""
_BYTES = {"": 1, "b": 1} | {
    f"{letter}{middle}b": base**power
    for middle, base in (("", 1000), ("i", 1024))
    for power, letter in enumerate("kmgt", start=1)
}
_COUNTS = {"": 1.0, "k": 1e3, "m": 1e6, "b": 1e9, "t": 1e12}
_NUMBER = r"\s*([0-9]*\.?[0-9]+(?:[eE][+-]?[0-9]+)?)\s*([A-Za-z]*)\s*"


def parse_bytes(text: str, flag: str = "--memory") -> float:
    """``50MB``, ``1.5GiB``, ``5e7``: bytes. MB is 10⁶, MiB is 2²⁰; upper or lower case.

    Raises:
      UsageError: for what is no amount above 0.

    >>> parse_bytes("50MB"), parse_bytes("1.5 KiB")
    (50000000.0, 1536.0)
    """
    return _parsed(text, flag, _BYTES, "bytes such as 50MB, 1.5GiB or 5e7")


def parse_count(text: str, flag: str) -> float:
    """``1e8``, ``100M``, ``2B``: a number of parameters, tokens or operations; K, M, B and T are powers of a thousand.

    Raises:
      UsageError: for what is no number above 0.

    >>> parse_count("100M", "--params")
    100000000.0
    """
    return _parsed(text, flag, _COUNTS, "a number above 0 such as 1e8 or 100M")


def _parsed(text: str, flag: str, units: dict[str, float] | dict[str, int], allowed: str) -> float:
    match = re.fullmatch(_NUMBER, text)
    if match is None or match[2].lower() not in units:
        raise UsageError(f"{flag} {text!r}: give {allowed}")
    value = float(match[1]) * units[match[2].lower()]
    if not 0 < value < math.inf:
        raise UsageError(f"{flag} {text!r}: give {allowed}")
    return value


def weight_bytes(params: float, bits: float, group_size: float | None = None) -> float:
    """``N·b/8 + 4·N/G``: packed codes, and a float32 scale for each G weights; None: scales are left out.

    >>> weight_bytes(1e8, 4), weight_bytes(1e8, 4, group_size=128)
    (50000000.0, 53125000.0)
    """
    return params * (bits / 8 + (SCALE_BYTES / group_size if group_size else 0.0))


def params_that_fit(memory: float, bits: float, group_size: float | None = None) -> float:
    """The N whose `weight_bytes` are `memory`.

    >>> params_that_fit(50e6, 4)
    100000000.0
    """
    return memory / weight_bytes(1.0, bits, group_size)


def show_bytes(count: float) -> str:
    """``50 MB``: bytes with a decimal unit.

    >>> show_bytes(53_125_000)
    '53.12 MB'
    """
    for unit, size in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= size:
            return f"{count / size:.4g} {unit}"
    return f"{count:.4g} B"
