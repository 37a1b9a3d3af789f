"""The digits CNN at constant bits, 8 by default: the baseline a schedule is compared with.

Expected test accuracy: 99.8 % at 8 bits (99.4-100), 99.4 % at 4 (99.2-99.7), 99.4 % at 3
(98.9-99.7), seeds 0-2; 15 s on two CPU cores.
Command: qtrain train --config configs/digits_cnn_static.py --workdir runs/static4 --config.schedule.bits=4
"""

from qtrain.config import base_config, finish


def get_config(argument: str = ""):
    config = base_config("digits_cnn")
    config.schedule.update(name="constant", bits=8)
    config.schedule.grads.update(name="constant", bits=8)
    return finish(config, argument)
