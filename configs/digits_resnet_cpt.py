"""A small residual network on the digits under cyclic precision training (Fu et al. 2021, arXiv 2101.09868).

ResNet-8 at half the width. CR: weights and activations follow a cosine from 3 to 8 bits, 8 times; gradients 8 bits,
stochastic; the last layer in float.
Command: qtrain train --config configs/digits_resnet_cpt.py --workdir runs/resnet
Expected test accuracy: 99.4 % (seed 0); 31 s on one CPU core.
"""

from qtrain.config import base_config, finish


def get_config(argument: str = ""):
    config = base_config("digits_resnet")
    config.quant.recipe = "cpt"
    config.schedule.update(name="cyclic", profile="cosine", low=3, high=8, cycles=8, pattern="repeated")
    config.schedule.grads.update(name="constant", bits=8)
    return finish(config, argument)
