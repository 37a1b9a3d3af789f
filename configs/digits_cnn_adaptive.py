"""A CNN on the handwritten digits whose precision falls from 8 to 2 bits, on one set of integers (arXiv 2502.01199).

The widths' machinery under a schedule: each batch is seen once, at the step's bits, and the integers of 8 bits that are
left hold every width. Norms and activations have what belongs to a width for 8, 6, 4 and 2 bits; others take the next
one below. A cycle instead: --config.schedule.name=CR --config.schedule.cycles=8
Command: qtrain train --config configs/digits_cnn_adaptive.py --workdir runs/digits_adaptive
Time: 80 s on two busy CPU cores. Expected test accuracy at 8/6/4/2 bits: 98.9/98.6/99.2/97.5 % (seed 0).
"""

from qtrain.config import base_config, finish


def get_config(argument: str = ""):
    config = base_config("digits_cnn")
    config.quant.recipe = "multi_precision"
    config.multi_precision.update(widths=(8, 6, 4, 2), alrs="one_minus")
    config.schedule.update(name="linear", low=2, high=8)
    config.schedule.grads.name = "float"
    return finish(config, argument)
