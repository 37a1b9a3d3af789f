"""Two dense layers on MNIST that learn how coarsely their weights may be stored: nested quantization layers.

Kernels and biases are P_r = s·⌊P/s⌋, with one s for each column of a kernel and one for a bias; s grows where gradients
are small against the parameter (`qtrain.quantizers.Nested`). Activations and gradients stay in float. The source is a
thesis on learned quantization schemes (two dense layers); width and recipe are ours. Reads a prepared TFDS set.
The loss term ``bin_count`` draws in the few large weights that would widen every code.
Time: about half a minute on two CPU cores. Expected test accuracy: 98.1 % (98.1-98.2, seeds 0-2) with weights at 3
bits, 10.5 times smaller than float32 with their scales (77,298 bytes); float32: 98.4 % (seed 0).
Command: qtrain train --config configs/mnist_mlp_nested.py --workdir runs/nested --config.data.dir=FOLDER
"""

from qtrain.config import base_config, finish


def get_config(argument: str = ""):
    config = base_config("mnist_mlp")
    config.model.features = (256,)
    config.quant.update(weights="nested/column", bias="nested", acts="none", grads="none")
    config.schedule.update(name="constant", bits=8)  # of the steps that the scales begin with
    config.optimizer.learning_rate = 2e-3
    config.optimizer.quant.learning_rate = 1e-4
    config.losses.bin_count.rate = 1e-5  # draws in the outliers, which the width of the codes is for
    return finish(config, argument)
