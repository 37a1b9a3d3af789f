"""What a study says of its runs: intervals over seeds, Pareto frontiers, rank correlations. NumPy alone, no JAX.

>>> round(bootstrap_interval([0.95, 0.97, 0.96]).low, 3), pareto_front([1, 2, 3], [0.8, 0.7, 0.9])
(0.95, array([0, 2]))
"""

from __future__ import annotations

from qtrain.statistics.intervals import DRAWS, Interval, basic_ends, bootstrap_interval, draw_means, percentiles
from qtrain.statistics.pareto import AreaBetween, area_between, best_within, hypervolume, pareto_front
from qtrain.statistics.ranks import rank_correlation

__all__ = [
    "DRAWS",
    "AreaBetween",
    "Interval",
    "area_between",
    "basic_ends",
    "best_within",
    "bootstrap_interval",
    "draw_means",
    "hypervolume",
    "pareto_front",
    "percentiles",
    "rank_correlation",
]
