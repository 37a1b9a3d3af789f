"""A precision schedule and a transition rate at once: CR 2-8 bits, AdamT, the digits CNN. In no paper that we know of.

Weights and activations follow cyclic precision training's cosine from 2 to 8 bits (Fu et al., arXiv 2101.09868); how
many weights change their code follows Lee et al. (arXiv 2404.19248), whose R = λ·√b·cosine takes the bits of the step:
a finer grid, on which the same step crosses more boundaries, is allowed more crossings. A change of the grid is counted
as no transition.
Command: qtrain train --config configs/digits_cnn_trs_cpt.py --workdir runs/trs_cpt
Time: 30-47 s on two shared CPU cores. Expected test accuracy, at 8 bits: 99.6 % (98.9-100, seeds 0-2); 32.3 % fewer
BitOps than 8 bits throughout.
"""

from qtrain.config import base_config, finish


def get_config(argument: str = ""):
    config = base_config("digits_cnn")
    config.quant.recipe = "trs"
    config.schedule.update(name="cyclic", profile="cosine", low=2, high=8, cycles=8, pattern="repeated")
    config.schedule.grads.update(name="float")
    config.optimizer.name = "adamt"
    config.optimizer.transition.update(factor=5e-3, schedule="cosine", target_scale="sqrt_bits")
    return finish(config, argument)
