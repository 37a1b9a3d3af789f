"""The precision range test's law: which width is the lowest that trains (Fu et al. 2021, arXiv 2101.09868)."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import NamedTuple

from qtrain.errors import UsageError


class Range(NamedTuple):
    """What a range test finds.

    Attributes:
      gains: of each width.
      low: the first width whose gain passes the threshold; None where none does.
    """

    gains: tuple[float, ...]
    low: int | None


def lowest_that_trains(widths: Sequence[int], accuracies: Sequence[float], threshold: float) -> Range:
    """q_min by the precision range test.

    Training begins at the lowest width and goes on at each of the next in turn. With A_i the training accuracy averaged
    over the last steps at width i, and A_{−1} over the first steps of all::

        gain_i = A_i − A_{i−1}          q_min = the first width with gain_i > threshold

    The paper leaves the threshold and the lengths open; both are parameters. q_max is the static counterpart's width.

    Args:
      widths: increasing.
      accuracies: one more than widths: A_{−1}, A_0, ….
      threshold: a share of the examples, such as 0.05.

    Raises:
      UsageError: for lists that do not go together.

    >>> lowest_that_trains((2, 3, 4), (0.1, 0.12, 0.6, 0.9), 0.05).low
    3
    """
    if list(widths) != sorted(set(widths)) or not widths:
        raise UsageError(f"widths={tuple(widths)}: give them increasing, one at least")
    if len(accuracies) != len(widths) + 1:
        raise UsageError(f"accuracies: {len(widths)} widths need {len(widths) + 1}, got {len(accuracies)}")
    gains = tuple(after - before for before, after in itertools.pairwise(accuracies))
    return Range(gains, next((width for width, gain in zip(widths, gains, strict=True) if gain > threshold), None))
