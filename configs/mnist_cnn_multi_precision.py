"""A small CNN on MNIST trained at 8, 6, 4 and 2 bits at once: Double Rounding (arXiv 2502.01199).

As digits_cnn_multi_precision, for 3 epochs, each batch at every width. Reads a prepared TFDS set.
Command: qtrain train --config configs/mnist_cnn_multi_precision.py --workdir runs/mnist_widths --config.data.dir=FOLDER
Other widths: --config.multi_precision.widths=4,3,2 --config.data.repeat=3
Time: 6.4 minutes of CPU time, on two cores. Expected test accuracy at 8/6/4/2 bits: 99.22/99.23/99.15/98.97 % (mean of
seeds 0-2).
"""

from qtrain.config import base_config, finish


def get_config(argument: str = ""):
    config = base_config("mnist_cnn")
    config.quant.recipe = "multi_precision"
    config.multi_precision.update(widths=(8, 6, 4, 2), alrs="one_minus")
    config.schedule.name = "rounds"
    config.schedule.grads.name = "float"
    config.data.repeat = 4
    config.train.update(steps=0, epochs=3.0)
    return finish(config, argument)
