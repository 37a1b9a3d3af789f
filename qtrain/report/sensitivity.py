"""Quality against one width: points that differ in one key of bits, and runs that were evaluated at several widths."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Sequence

from qtrain import statistics
from qtrain.report.labels import canonical, label_points
from qtrain.report.points import Family, Point
from qtrain.statistics import Interval

BITS_KEY = re.compile(
    r"schedule\.(.*\.)?(bits|low|high|start_bits|end_bits|inside|outside)"
    r"|quant\.(ends|weights|acts|grads|bias)|quant\.rules\.\d+\.(weights|acts|grads|bias)|budget\.target"
)
"""Config keys whose numbers are widths."""
EVALUATED = "width it is evaluated at"


@dataclasses.dataclass(frozen=True)
class Curve:
    """Quality at each width, everything else equal.

    key: what differs; label: what the points have in common that other curves of this key have not.
    """

    key: str
    label: str
    bits: tuple[float, ...]
    quality: tuple[Interval, ...]


def curves(family: Family, *, draws: int, level: float) -> list[Curve]:
    """All curves of at least two widths, by key."""
    points = [point for point in family.points if point.number]
    found: list[Curve] = []
    for key in [key for key in family.keys if BITS_KEY.fullmatch(key)]:
        others = [each for each in family.keys if each != key]
        lines: dict[tuple[str, ...], list[Point]] = {}
        for point in points:
            if _is_width(point.config.get(key)):
                lines.setdefault(tuple(canonical(point.config.get(o)) for o in others), []).append(point)
        kept = [line for line in lines.values() if len({p.config[key] for p in line}) > 1]
        for line, label in zip(kept, _labels([line[0] for line in kept], key, others), strict=True):
            line.sort(key=lambda point: point.config[key])
            values = [list(point.values(family.metric).values()) for point in line]
            intervals = tuple(statistics.bootstrap_interval(v, draws=draws, level=level) for v in values)
            found.append(Curve(key, label, tuple(float(p.config[key]) for p in line), intervals))
    return found + _evaluated(family, points, draws, level)


def _evaluated(family: Family, points: Sequence[Point], draws: int, level: float) -> list[Curve]:
    name = re.compile(re.escape(family.metric.name) + r"_(\d+)bit")
    found = []
    for point in points:
        widths = sorted({int(m[1]) for run in point.finished for m in map(name.fullmatch, run.values) if m})
        at = {width: [family.metric.of(run, f"_{width}bit") for run in point.finished] for width in widths}
        at = {width: kept for width, each in at.items() if (kept := [v for v in each if math.isfinite(v)])}
        if len(at) > 1:
            intervals = tuple(statistics.bootstrap_interval(v, draws=draws, level=level) for v in at.values())
            found.append(Curve(EVALUATED, point.label, tuple(map(float, at)), intervals))
    return found


def _labels(points: Sequence[Point], key: str, others: Sequence[str]) -> list[str]:
    """What tells the curves of one key apart: the other keys that differ between them, without the width itself."""
    if len(points) < 2:
        return ["" for _ in points]
    configs = [{k: v for k, v in point.config.items() if k != key} for point in points]
    apart = [each for each in others if len({canonical(config.get(each)) for config in configs}) > 1]
    return label_points([{k: config.get(k) for k in apart} for config in configs], apart, schedules=False)


def _is_width(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
