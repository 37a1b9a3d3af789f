"""The arms that every family of this study has."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

FAMILIES = ("digits_mlp", "digits_cnn", "transformer")
SEEDS = 3
STATIC = (4, 8)
LOW, HIGH, CYCLES = 4, 8, 8


def points() -> Iterator[dict[str, Any]]:
    """AQT and qtrain at static bits, qtrain under the cyclic schedule, float: for each seed."""
    for seed in range(SEEDS):
        for bits in STATIC:
            for backend in ("aqt", "qtrain"):
                yield {"quant.backend": backend, "schedule.name": "constant", "schedule.bits": bits, "seed": seed}
        yield {"quant.backend": "qtrain", "schedule.name": "CR", "seed": seed}
        yield {"quant.backend": "qtrain", "schedule.name": "float", "seed": seed}


def settings(config: Any, steps: int) -> None:
    """AQT's numerics for both: its grid for weights and activations, gradients in float, a loss for every step."""
    config.quant.update(weights="aqt/channel", acts="aqt/channel", grads="none")
    config.schedule.update(name="constant", low=LOW, high=HIGH, cycles=CYCLES)
    config.schedule.grads.update(name="float")
    config.train.update(steps=steps, log_every_steps=1)
    config.eval.update(every_percent=0.0, splits=("test",))
    config.checkpoint.update(every_percent=50.0)
