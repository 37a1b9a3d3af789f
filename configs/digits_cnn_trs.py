"""A CNN on the handwritten digits at 2 bits under transition-rate scheduling, AdamT (Lee et al., arXiv 2404.19248).

The paper's quantizers (first and last layer in float) and target R = λ·√b·cosine; from scratch, or from a float run of
the same network with --config.init_from=RUN.
Command: qtrain train --config configs/digits_cnn_trs.py --workdir runs/trs
A float run to start from: the same with --workdir runs/float --config.schedule.bits=32 --config.optimizer.name=adam.
Time: 24-30 s on two shared CPU cores. Expected test accuracy: 99.4 % (99.2-99.4, seeds 0-2, from scratch).
"""

from qtrain.config import base_config, finish


def get_config(argument: str = ""):
    config = base_config("digits_cnn")
    config.quant.recipe = "trs"
    config.schedule.update(name="constant", bits=2)
    config.schedule.grads.update(name="float")
    config.optimizer.name = "adamt"
    config.optimizer.transition.update(factor=5e-3, schedule="cosine", target_scale="sqrt_bits")
    return finish(config, argument)
