"""A graph convolutional network on Cora (Kipf and Welling 2017, arXiv 1609.02907) under cyclic precision training.

Two layers of width 16, dropout 0.5, Adam at 0.01, L2 5e-4, 200 full-batch steps, the Planetoid split. CR: weights and
activations follow a cosine from 3 to 8 bits, 8 times; gradients 8 bits, stochastic; the last layer (0.5 % of the
products) and the sums over neighbours are float.
Command: qtrain train --config configs/cora_gcn_cpt.py --workdir runs/cora
Time: 30 s on two busy CPU cores. Expected test accuracy: 81.2 % (80.6-81.8, seeds 0-2).
"""

from qtrain.config import base_config, finish


def get_config(argument: str = ""):
    config = base_config("cora_gcn")
    config.quant.recipe = "cpt"
    config.schedule.update(name="cyclic", profile="cosine", low=3, high=8, cycles=8, pattern="repeated")
    config.schedule.grads.update(name="constant", bits=8)
    return finish(config, argument)
