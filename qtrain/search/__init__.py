"""A width for each layer under a budget: the problem, its solution, and what a run makes of it without retraining."""

from qtrain.search.integer_program import front, infeasible, solve
from qtrain.search.problem import UNITS, Costs, Problem, layer_costs, precisions, searched_layers, squared_errors

__all__ = [
    "UNITS",
    "Costs",
    "Problem",
    "front",
    "infeasible",
    "layer_costs",
    "precisions",
    "searched_layers",
    "solve",
    "squared_errors",
]
