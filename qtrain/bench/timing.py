"""Measuring the arms in turn: every measurement has a baseline's just before and just after it."""

from __future__ import annotations

import dataclasses
import math
import time

from qtrain.bench.arms import Runner

_LEAST_SECONDS = 0.05
"""A measurement is repeated until it lasts this long, so that a timer's and a dispatch's share is small."""


_SLOW, _SLOW_SECONDS, _EVERY = 5.0, 1.0, 4
"""An arm that takes this many times the baseline and this long is measured in every fourth round only."""


@dataclasses.dataclass
class Times:
    """What was measured of one runner: seconds of a step, and by round its ratio to the baseline's of that moment."""

    seconds: list[float] = dataclasses.field(default_factory=list)
    ratios: dict[int, float] = dataclasses.field(default_factory=dict)


def interleave(baseline: Runner, others: list[Runner], rounds: int) -> tuple[dict[int, Times], int]:
    """Measure in rounds: baseline, arm, baseline, arm, ..., baseline; every second round in reverse.

    A ratio is the arm's time over the mean of its two neighbours', which a busy machine disturbs alike.

    Args:
      baseline: whose ratio is 1.
      others: of the same case.
      rounds: measurements of each arm; fewer of one that is much slower.

    Returns:
      the times by ``id`` of the runner, and the number of visits in each measurement.
    """
    repeats = max(1, min(100, math.ceil(_LEAST_SECONDS / (_seconds(baseline, 1) * len(baseline.visits)))))
    times = {id(runner): Times() for runner in (baseline, *others)}
    usual = _seconds(baseline, repeats)
    first = {id(runner): _seconds(runner, 1) for runner in others}
    visit = len(baseline.visits) * repeats
    slow = {runner for runner, seconds in first.items() if seconds > max(_SLOW * usual, _SLOW_SECONDS / visit)}
    for number in range(rounds):
        before = _seconds(baseline, repeats)
        times[id(baseline)].seconds.append(before)
        times[id(baseline)].ratios[number] = 1.0
        for runner in others if number % 2 == 0 else reversed(others):
            if number % _EVERY and id(runner) in slow:
                continue
            own = _seconds(runner, repeats)
            after = _seconds(baseline, repeats)
            times[id(runner)].seconds.append(own)
            times[id(runner)].ratios[number] = 2 * own / (before + after)
            times[id(baseline)].seconds.append(after)
            before = after
    return times, repeats


def _seconds(runner: Runner, repeats: int) -> float:
    """Wall time of one step, over so many visits."""
    start = time.perf_counter()
    runner.run(repeats)
    return (time.perf_counter() - start) / (repeats * len(runner.visits))
