"""Optimizers: optax by name, from a config."""

from qtrain.optim.build import OPTIMIZERS, SCHEDULES, learning_rate_schedule, optimizer

__all__ = ["OPTIMIZERS", "SCHEDULES", "learning_rate_schedule", "optimizer"]
