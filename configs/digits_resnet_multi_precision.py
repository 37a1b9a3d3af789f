"""ResNet-8 at half width on the handwritten digits, at 8, 6, 4 and 2 bits at once: Double Rounding (arXiv 2502.01199).

As digits_cnn_multi_precision, with six layers between the first and the last for `qtrain search` to choose from.
Command: qtrain train --config configs/digits_resnet_multi_precision.py --workdir runs/digits_widths
then:    qtrain search --workdir runs/digits_widths --budget bits=3
Time: 52 s of CPU time, on two cores. Expected test accuracy at 8/6/4/2 bits: 99.2/99.2/99.5/95.6 % (mean of seeds 0-2;
an image is 0.28 points).
"""

from qtrain.config import base_config, finish


def get_config(argument: str = ""):
    config = base_config("digits_resnet")
    config.quant.recipe = "multi_precision"
    config.multi_precision.update(widths=(8, 6, 4, 2), alrs="one_minus")
    config.schedule.name = "rounds"
    config.schedule.grads.name = "float"
    config.data.repeat = 4
    config.train.update(steps=0, epochs=24.0)
    return finish(config, argument)
