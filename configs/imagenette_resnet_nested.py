"""A residual network on Imagenette that learns how coarsely its weights may be stored: nested quantization layers.

A convolution block and four residual stages (ResNet-18's, half as wide) on 128x128 images. Kernels and biases are
P_r = s·⌊P/s⌋, with one s for each filter of a convolution, each column of the dense kernel, and its bias; s grows where
gradients are small against the parameter. Activations and gradients stay in float. The source is a thesis on learned
quantization schemes (a convolution block and four residual stages); depth, widths and recipe are ours. Reads the
prepared TFDS set imagenette/160px-v2, decoding each image when it is used.
Made for a GPU; time: not measured. Expected: not measured.
Command: qtrain train --config configs/imagenette_resnet_nested.py --workdir runs/imagenette
--config.data.dir=FOLDER
"""

from qtrain.config import base_config, finish


def get_config(argument: str = ""):
    config = base_config("imagenette_resnet")
    config.quant.update(weights="nested/filter", acts="none", grads="none")
    dense = {"weight_quantizer": "nested/column", "bias_quantizer": "nested", "act_quantizer": "none"}
    config.quant.rules = ({"ops": ("dot",), **dense},)
    config.schedule.update(name="constant", bits=8)  # of the steps that the scales begin with
    config.optimizer.quant.learning_rate = 5e-5
    return finish(config, argument)
