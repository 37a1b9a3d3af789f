"""A CNN on the handwritten digits trained at 8, 6, 4 and 2 bits at once: Double Rounding (arXiv 2502.01199).

Weights are integers of 8 bits, from which those of fewer follow by a shift; activations, and norms, have scales and
statistics of their own at each width. Every batch makes an update at each width in turn, the widest first, with the
learning rate of the scales by ALRS. Steps are updates: four for a batch.
Command: qtrain train --config configs/digits_cnn_multi_precision.py --workdir runs/digits_widths
Other widths: --config.multi_precision.widths=4,3,2 --config.data.repeat=3
Time: 35 s of CPU time, on two cores. Expected test accuracy at 8/6/4/2 bits: 99.8/99.7/99.8/99.2 % (mean of seeds 0-2;
an image is 0.28 points).
"""

from qtrain.config import base_config, finish


def get_config(argument: str = ""):
    config = base_config("digits_cnn")
    config.quant.recipe = "multi_precision"
    config.multi_precision.update(widths=(8, 6, 4, 2), alrs="one_minus")
    config.schedule.name = "rounds"
    config.schedule.grads.name = "float"
    config.data.repeat = 4
    config.train.update(steps=0, epochs=68.0)
    return finish(config, argument)
