"""What runs recorded layer by layer, as tables."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import numpy as np

from qtrain.report.points import Point

ALL = "(all)"


@dataclasses.dataclass(frozen=True)
class Layer:
    """The newest numbers of a layer, means over the seeds of a point: metric → mean."""

    point: Point
    layer: str
    seeds: int
    values: dict[str, float]


def layers(points: Sequence[Point]) -> dict[str, list[Layer]]:
    """Kind ("transition", "size", "width", "budget") → a row for each point and layer, in the order written."""
    found: dict[str, list[Layer]] = {}
    for point in points:
        runs = point.finished or point.unfinished
        names = dict.fromkeys(name for run in runs for name in run.layers)
        rows: dict[tuple[str, str], dict[str, float]] = {}
        for name in names:
            kind, layer, metric = split(name)
            values = [run.layers[name] for run in runs if math.isfinite(run.layers.get(name, math.nan))]
            if values:
                rows.setdefault((kind, layer), {})[metric] = float(np.mean(values))
        for (kind, layer), metrics in rows.items():
            found.setdefault(kind, []).append(Layer(point, layer, len(runs), metrics))
    return found


def split(name: str) -> tuple[str, str, str]:
    """Kind, layer and metric of a metric's name.

    >>> split("transition/Dense_0/kernel/rate"), split("size/bytes"), split("width/Dense_0/kernel")
    (('transition', 'Dense_0/kernel', 'rate'), ('size', '(all)', 'bytes'), ('width', 'Dense_0/kernel', 'bits'))
    """
    kind, *rest = name.split("/")
    if kind == "width":  # no metric at the end: a width is all there is
        return kind, ALL if rest == ["average"] else "/".join(rest), "bits"
    return kind, "/".join(rest[:-1]) or ALL, rest[-1]
