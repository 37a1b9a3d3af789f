"""A CNN on the handwritten digits under FracTrain's progressive precision (Fu et al. 2020, arXiv 2012.13113).

Weights and activations 3, 4, 6, then 8 bits, gradients 6, 6, 8, 8: the next stage whenever the mean training loss of an
epoch is close to those of the four before it. When that is the training decides, and so what the run costs.
Command: qtrain train --config configs/digits_cnn_fractrain.py --workdir runs/fractrain
Time: 15 s on two CPU cores.
"""

from qtrain.config import base_config, finish


def get_config(argument: str = ""):
    config = base_config("digits_cnn")
    config.schedule.update(name="fractrain", values=(3, 4, 6, 8))
    config.schedule.grads.update(values=(6, 6, 8, 8))
    return finish(config, argument)
