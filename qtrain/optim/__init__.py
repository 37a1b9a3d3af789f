"""Optimizers: optax by name, from a config; transforms that know which codes the weights are quantized to."""

from qtrain.optim.build import NAMES, OPTIMIZERS, Groups, optimizer
from qtrain.optim.codes import Codes, codes_per_leaf
from qtrain.optim.freezing import FreezeState, freeze_oscillations, freezing_threshold
from qtrain.optim.learning_rate import SCHEDULES, learning_rate_schedule
from qtrain.optim.oscillation import OscillationState, track_oscillations
from qtrain.optim.rows_in_use import only_rows_in_use
from qtrain.optim.transition import TransitionState, scale_by_transition_rate
from qtrain.optim.transition_metrics import named_rows, oscillation_metrics, transition_metrics
from qtrain.optim.transition_optimizers import adamt, adamwt, sgdt
from qtrain.optim.transition_picture import plot_transition_rates
from qtrain.optim.transition_rules import RULES

__all__ = [
    "NAMES",
    "OPTIMIZERS",
    "RULES",
    "SCHEDULES",
    "Codes",
    "FreezeState",
    "Groups",
    "OscillationState",
    "TransitionState",
    "adamt",
    "adamwt",
    "codes_per_leaf",
    "freeze_oscillations",
    "freezing_threshold",
    "learning_rate_schedule",
    "named_rows",
    "only_rows_in_use",
    "optimizer",
    "oscillation_metrics",
    "plot_transition_rates",
    "scale_by_transition_rate",
    "sgdt",
    "track_oscillations",
    "transition_metrics",
]
