"""A perceptron on the handwritten digits that learns a bit width for each output of a layer, at most 3 on average.

Weights by `qtrain.quantizers.LearnedWidth`: a range and a width of 2 to 8 bits for each column of a kernel, trained by
the loss; a budget holds the average width to ``budget.target`` bits by a multiplier that adapts. Activations and
gradients stay in float. After Uhlich et al. 2020 (arXiv 1905.11452) and Sun et al. 2024, HGQ (arXiv 2405.00645).
Time: 20 s on two CPU cores. Expected test accuracy: 97.5 % (seed 0) at 2.99 bits on average: 3.1 and 2.9 in the two
hidden layers, 3.4 in the head; as float (97.7 %) within the noise of one seed.
Command: qtrain train --config configs/digits_mlp_learned_width.py --workdir runs/learned_width
"""

from qtrain.config import base_config, finish


def get_config(argument: str = ""):
    config = base_config("digits_mlp")
    config.quant.update(weights="learned_width/signed/channel", acts="none", grads="none")
    config.schedule.update(name="constant", bits=8)  # the most that a width may become
    config.budget.update(unit="bits", target=3.0)
    return finish(config, argument)
