"""The ten cyclic schedules against static bits, one family after the colon: mlp, cnn, resnet, transformer, s5, gcn.

Command: qtrain sweep --config experiments/cpt_suite/config.py:mlp --workdir runs/cpt_suite/mlp --vectorized
"""

import runpy
from pathlib import Path

from qtrain import sweep as points
from qtrain.config import finish
from qtrain.schedules import SUITE

short = runpy.run_path(str(Path(__file__).parents[1] / "short_tasks.py"))["short"]


def get_config(argument: str = "mlp"):
    family, _, smoke = argument.partition(":")
    config = short(family)
    config.schedule.update(name="CR", low=3, high=8, cycles=8)
    config.schedule.grads.update(name="constant", bits=8)
    return finish(config, smoke)


def sweep():
    return points.product(
        points.chain(
            [{"schedule.name": name} for name in SUITE],
            [{"schedule.name": "constant", "schedule.high": bits} for bits in range(3, 9)],
        ),
        {"seed": range(3)},
    )
