"""Points of a sweep: mappings of a config's dotted keys to values, combined. Pure Python."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from qtrain.errors import UsageError

Overrides = dict[str, Any]
Sweep = Mapping[str, Iterable[Any]] | Iterable[Mapping[str, Any]]
"""Points, or an axis of values for each key."""


def product(*sweeps: Sweep) -> Iterator[Overrides]:
    """Every point of each with every point of the others, the last changing fastest; every value of each axis.

    Raises:
      UsageError: a key on both sides; an axis that is no list of values.

    >>> [list(point.values()) for point in product({"schedule.low": (3, 4), "seed": (0, 1)})]
    [[3, 0], [3, 1], [4, 0], [4, 1]]
    """
    for parts in itertools.product(*_axes("product", sweeps)):
        yield _merged("product", parts)


def zip(*sweeps: Sweep) -> Iterator[Overrides]:
    """The first point (or value) of each together, the second of each, and so on.

    Raises:
      UsageError: of different lengths; a key on both sides; an axis that is no list of values.

    >>> list(zip({"schedule.low": (3, 4), "schedule.high": (6, 8)}))
    [{'schedule.low': 3, 'schedule.high': 6}, {'schedule.low': 4, 'schedule.high': 8}]
    """
    axes = _axes("zip", sweeps)
    if len({len(axis) for axis in axes}) > 1:
        lengths = ", ".join(f"{'/'.join(axis[0]) if axis else '(none)'}: {len(axis)}" for axis in axes)
        raise UsageError(f"sweep: zip of different lengths ({lengths}); give as many values of each")
    for index in range(len(axes[0]) if axes else 0):
        yield _merged("zip", [axis[index] for axis in axes])


def chain(*sweeps: Sweep) -> Iterator[Overrides]:
    """The points of the first, then those of the second, and so on; of axes those of their `product`.

    >>> [*chain([{"schedule.bits": 8}], {"schedule.bits": (4, 6)})]
    [{'schedule.bits': 8}, {'schedule.bits': 4}, {'schedule.bits': 6}]
    """
    for sweep in sweeps:
        yield from product(sweep)


def _axes(name: str, sweeps: Iterable[Sweep]) -> list[list[Overrides]]:
    axes: list[list[Overrides]] = []
    for sweep in sweeps:
        if isinstance(sweep, Mapping):
            axes += [[{key: value} for value in _values(name, key, values)] for key, values in sweep.items()]
        else:
            axes.append([_point(name, point) for point in _values(name, "a sweep", sweep)])
    return axes


def _values(name: str, key: str, values: Any) -> list[Any]:
    if isinstance(values, str | bytes) or not isinstance(values, Iterable):
        raise UsageError(f"sweep: {name}: {key}={values!r}: give a list of values, such as [{values!r}]")
    return list(values)


def _point(name: str, point: Any) -> Overrides:
    if not isinstance(point, Mapping):
        raise UsageError(f"sweep: {name}: {point!r} is no point; give mappings of dotted keys to values")
    return dict(point)


def _merged(name: str, parts: Iterable[Overrides]) -> Overrides:
    merged: Overrides = {}
    for part in parts:
        if twice := merged.keys() & part.keys():
            raise UsageError(f"sweep: {name}: {min(twice)!r} comes from both sides; leave it to one of them")
        merged |= part
    return merged
