"""A CNN on the handwritten digits under MuPPET's precision switching (Rajagopal et al. 2020, arXiv 2006.09049).

Weights, activations and gradients at 8, 12, 14, 16 bits, then in float: the next width when the gradients of the last
three epochs agree far more than they did. When that is the training decides, and so what the run costs. The first and
the last layer keep weights and activations of 8 bits, as in the other configs.
Command: qtrain train --config configs/digits_cnn_muppet.py --workdir runs/muppet
Time: 15 s on two CPU cores.
"""

from qtrain.config import base_config, finish


def get_config(argument: str = ""):
    config = base_config("digits_cnn")
    config.schedule.update(name="muppet", values=(8, 12, 14, 16, 32))
    return finish(config, argument)
