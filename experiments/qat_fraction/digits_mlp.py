"""When to switch quantization on: a perceptron on the handwritten digits, an example for a token.

Weights at 2 and 4 bits for the last 0 to 100 % of 1000 steps, fused and with a cooldown in float; fused also at 250
steps. Three seeds.
Command: qtrain sweep --config experiments/qat_fraction/digits_mlp.py --workdir runs/qat_fraction/digits_mlp \
    --vectorized --separate
digits_mlp.py:controls, in digits_mlp-controls, has what the learning rate does by itself.
"""

import runpy
from pathlib import Path

from qtrain.config import base_config, finish

shared = runpy.run_path(str(Path(__file__).with_name("grid.py")))

STEPS = (1000, 250)


def get_config(argument: str = ""):
    """The config that the points change."""
    config = base_config("digits_mlp")
    config.model.features = (32, 32)
    config.data.update(augment=("crop",), crop_padding=1)
    config.train.update(steps=STEPS[0], log_every_steps=100)
    shared["settings"](config)
    return finish(config, "" if argument == "controls" else argument)


def sweep(argument: str = ""):
    """The points; of the argument "controls" those of `grid.controls`."""
    if argument == "controls":
        return shared["controls"]((2, 4), STEPS[0], seeds=range(3))
    return shared["lengths"]((2, 4), STEPS, seeds=range(3))
