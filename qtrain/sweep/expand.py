"""The points of a sweep as configs: every key and value checked, each point named, before anything runs."""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import json
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from absl import flags
from ml_collections import ConfigDict

from qtrain import overrides as config_files
from qtrain.errors import UsageError

_LONGEST_NAME = 100


@dataclasses.dataclass(frozen=True, eq=False)
class Point:
    """One run of a sweep.

    index: its place in the sweep. name: of its folder. overrides: dotted key → value. config: all of it, locked.
    """

    index: int
    name: str
    overrides: dict[str, Any]
    config: ConfigDict

    @property
    def digest(self) -> str:
        """Of the config: another process that makes the same point of the config file finds the same."""
        text = json.dumps(self.config.to_dict(), sort_keys=True, default=str)
        return hashlib.sha256(text.encode()).hexdigest()[:16]


def expand(base: ConfigDict, points: Iterable[Mapping[str, Any]], given: Collection[str] = ()) -> list[Point]:
    """The points of a sweep, in order.

    Args:
      base: the config that the points are changes of; it is left as it is.
      points: what ``sweep()`` yields.
      given: keys that the command line overrides, which a sweep would override again.

    Raises:
      UsageError: no point; one that is no mapping; a key that the config lacks, or whose value it does not take; two
        points that are the same; a key of `given`.
    """
    found = []
    for index, point in enumerate(points):
        where = f"sweep: point {index}"
        if not isinstance(point, Mapping):
            raise UsageError(f"{where} is {point!r:.60}; yield mappings of dotted keys to values")
        changes = {}
        config = copy.deepcopy(base)
        for key, value in point.items():
            if key in given:
                raise UsageError(f"--config.{key}: the sweep sets this key itself; change sweep(), or leave it out")
            changes[key] = _set(config, key, value, where)
        found.append((changes, config))
    if not found:
        raise UsageError("sweep: sweep() yields no point; yield mappings of dotted keys to values")
    _refuse_twins(found)
    names = _names([changes for changes, _ in found])
    return [Point(index, names[index], *parts) for index, parts in enumerate(found)]


def resolved(arguments: Sequence[str], values: flags.FlagValues | None = None) -> tuple[str, ConfigDict, list[Point]]:
    """A command's config file, as given, its config, and the points of its ``sweep()``.

    Args:
      arguments: ``--config``, its overrides, and whatever else `values` has.
      values: flags of the command, which are parsed with them.

    Raises:
      UsageError: for whatever is wrong with them.
    """
    base = config_files.parse("sweep", flags.FlagValues() if values is None else values, arguments)
    source = config_files.source_of(arguments)
    assert source is not None  # or parse had refused them
    return source, base, expand(base, config_files.sweep(source), config_files.overridden(arguments))


def selected(points: Sequence[Point], text: str | None) -> list[Point]:
    """The points that ``--points`` names: indices and ranges, such as ``0,3,10-14``; all for None.

    Raises:
      UsageError: for what is no index of a point.
    """
    if text is None:
        return list(points)
    chosen: set[int] = set()
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d+)(?:-(\d+))?\s*", part)
        first, last = (int(match[1]), int(match[2] or match[1])) if match else (1, 0)
        if first > last or last >= len(points):
            raise UsageError(f"--points {text}: {part!r} is none of the points 0-{len(points) - 1}; give 0,2,5-7, say")
        chosen |= set(range(first, last + 1))
    return [point for point in points if point.index in chosen]


def _set(config: ConfigDict, key: Any, value: Any, where: str) -> Any:
    """Set a dotted key; the value as the config holds it."""
    if not isinstance(key, str):
        raise UsageError(f"{where}: {key!r} is no key; give dotted keys, such as 'schedule.low'")
    config_files.check_key(config, key, f"{where}: {key}")
    *sections, name = key.split(".")
    section = config
    for part in sections:
        section = section[part]
    if isinstance(section[name], ConfigDict):
        raise UsageError(f"{where}: {key} is a section; set its keys, as {key}.NAME")
    if isinstance(value, np.generic):
        value = value.item()
    kind = section.get_type(name)
    if isinstance(value, bool) and kind is not bool and kind is not type(None):
        raise UsageError(f"{where}: {key}={value!r}: must be {config_files.allowed(kind, key)}")
    try:
        section[name] = value
    except (TypeError, ValueError, KeyError):
        raise UsageError(f"{where}: {key}={value!r}: must be {config_files.allowed(kind, key)}") from None
    return section[name]


def _refuse_twins(found: Sequence[tuple[dict[str, Any], ConfigDict]]) -> None:
    seen: dict[str, int] = {}
    for index, (changes, config) in enumerate(found):
        text = json.dumps(config.to_dict(), sort_keys=True, default=str)
        if text in seen:
            raise UsageError(f"sweep: points {seen[text]} and {index} are the same ({changes}); leave one of them out")
        seen[text] = index


def _names(points: Sequence[Mapping[str, Any]]) -> list[str]:
    """``003_name-CR_seed-0``: the index, then the ends of the keys, as long as they have to be, and the values."""
    keys = list(dict.fromkeys(key for point in points for key in point))
    ends = {key: _end(key, keys) for key in keys}
    digits = max(3, len(str(len(points) - 1)))
    names = []
    for index, point in enumerate(points):
        parts = [f"{ends[key]}-{_shown(value)}" for key, value in point.items()]
        names.append("_".join([f"{index:0{digits}d}", *parts])[:_LONGEST_NAME].rstrip("_-."))
    return names


def _end(key: str, keys: Sequence[str]) -> str:
    parts = key.split(".")
    ends = (".".join(parts[-length:]) for length in range(1, len(parts) + 1))
    return next(
        end for end in ends if end == key or not any(k != key and (k == end or k.endswith(f".{end}")) for k in keys)
    )


def _shown(value: Any) -> str:
    if isinstance(value, list | tuple):
        text = "-".join(map(_shown, value)) or "none"
    else:
        text = f"{value:g}" if isinstance(value, float) else str(value).lower() if value is None else str(value)
    return re.sub(r"[^A-Za-z0-9.+-]+", "-", text) or "empty"
