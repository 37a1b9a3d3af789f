"""Loss terms of quantized weights, each with a rate of its own that may follow a schedule.

A term is a function ``(weights, params, quant, precision) -> float32 scalar`` of the table of quantized weights
(`qtrain.inject.Weight`), the parameters, what quantizers have learned, and the step's precision.
"""

from qtrain.losses.build import LOSSES, Penalty, penalty_from_config
from qtrain.losses.shares import SCHEDULES
from qtrain.losses.terms import bin_count, dampening, deviation, inverse_scale

__all__ = [
    "LOSSES",
    "SCHEDULES",
    "Penalty",
    "bin_count",
    "dampening",
    "deviation",
    "inverse_scale",
    "penalty_from_config",
]
