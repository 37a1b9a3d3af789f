"""The ten cyclic precision schedules (Wolfe & Kyrillidis 2024, arXiv 2403.02243) on a CNN on the handwritten digits.

Each of CR CT LR LT ER ETV ETH RR RTV RTH moves weights and activations between 3 and 8 bits, 8 times; gradients 8 bits,
stochastic. Three seeds of initialisation and rounding each; order and augmentation are those of `data.seed`.
Command: qtrain sweep --config configs/digits_cnn_suite.py --workdir runs/suite --vectorized
One of them: qtrain train --config configs/digits_cnn_suite.py --workdir runs/cr --config.schedule.name=CR
"""

from qtrain import sweep as points
from qtrain.config import base_config, finish
from qtrain.schedules import SUITE


def get_config(argument: str = ""):
    config = base_config("digits_cnn")
    config.schedule.update(name="CR", low=3, high=8, cycles=8)
    config.schedule.grads.update(name="constant", bits=8)
    return finish(config, argument)


def sweep():
    return points.product({"schedule.name": SUITE, "seed": range(3)})
