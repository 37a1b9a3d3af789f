"""A CNN on the handwritten digits under cyclic precision training (Fu et al. 2021, arXiv 2101.09868).

Paper's schedule CR: weights and activations follow a cosine from 3 to 8 bits, 8 times; gradients 8 bits, stochastic.
Command: qtrain train --config configs/digits_cnn_cpt.py --workdir runs/digits
Time: 15 s on two CPU cores, of which 3 s compile. Expected test accuracy: 99.7 % (99.4-100, seeds 0-2), as float32
(99.6 %, 99.4-99.7); 35.4 % fewer BitOps than 8 bits throughout.
"""

from qtrain.config import base_config, finish


def get_config(argument: str = ""):
    config = base_config("digits_cnn")  # "cifar10_resnet20", "tiny_shakespeare_transformer": data, model and optimizer
    config.schedule.update(name="cyclic", profile="cosine", low=3, high=8, cycles=8, pattern="repeated")
    config.schedule.grads.update(name="constant", bits=8)
    return finish(config, argument)
