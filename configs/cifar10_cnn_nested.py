"""Three conv blocks and two dense layers on CIFAR-10 that learn how coarsely their weights may be stored.

Nested quantization layers: kernels and biases are P_r = s·⌊P/s⌋, with one s for each filter of a convolution, each
column of a dense kernel, and each bias; s grows where gradients are small against the parameter. Activations and
gradients stay in float. The source is a thesis on learned quantization schemes (three convolution blocks and two dense
layers); widths and recipe are ours. Reads a prepared TFDS set.
Time: not measured. Expected: not measured.
Command: qtrain train --config configs/cifar10_cnn_nested.py --workdir runs/cifar_nested --config.data.dir=FOLDER
"""

from qtrain.config import base_config, finish


def get_config(argument: str = ""):
    config = base_config("cifar10_cnn")
    config.quant.update(weights="nested/filter", bias="nested", acts="none", grads="none")
    dense = {"weight_quantizer": "nested/column", "bias_quantizer": "nested", "act_quantizer": "none"}
    config.quant.rules = ({"ops": ("dot",), **dense},)
    config.schedule.update(name="constant", bits=8)  # of the steps that the scales begin with
    config.optimizer.quant.learning_rate = 5e-5
    return finish(config, argument)
