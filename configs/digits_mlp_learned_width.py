"""A perceptron on the handwritten digits that learns a bit width for each output of a layer, at most 3 on average.

Weights by `qtrain.quantizers.LearnedWidth`: a range and a width of 2 to 8 bits for each column of a kernel, trained by
the loss; a budget holds the average width to ``budget.target`` bits by a multiplier that adapts. Activations and
gradients stay in float. After Uhlich et al. 2020 (arXiv 1905.11452) and Sun et al. 2024, HGQ (arXiv 2405.00645).
Time: under a minute on two CPU cores. Expected test accuracy: 97.5 % (seed 0), with every width at 2 bits, less than
the budget allows: a width that was driven down is not drawn up again once the training loss is near 0.
Command: qtrain train --config configs/digits_mlp_learned_width.py --workdir runs/learned_width
"""

from qtrain.config import base_config, finish


def get_config(argument: str = ""):
    config = base_config("digits_mlp")
    config.quant.update(weights="learned_width/signed/channel", acts="none", grads="none")
    config.schedule.update(name="constant", bits=8)  # the most that a width may become
    config.budget.update(unit="bits", target=3.0)
    return finish(config, argument)
