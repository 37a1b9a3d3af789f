"""ResNet-50 on ImageNet trained at 8, 6, 4 and 2 bits at once: Double Rounding (arXiv 2502.01199).

From a float checkpoint, whose norm layers every width begins with; first and last layer at 8 bits, each batch at every
width. SGD with momentum 0.9, batch 256, decay 1e-4, a cosine from 0.01 over 90 epochs: what the authors took we could
not read. Images are cropped at random to 224x224 and flipped, evaluated on the centre of 256. Reads the prepared TFDS
set imagenet2012, decoding each image when it is used, once for all widths.
Command: qtrain train --config configs/imagenet_resnet50_multi_precision.py --workdir runs/r50
--config.data.dir=FOLDER --config.init_from=runs/float
Made for GPUs; hardware and time: not measured. Expected: not measured by us; the paper gives 76.51/76.28/75.74/72.31 %
at 8/6/4/2 bits.
"""

from qtrain.config import base_config, finish


def get_config(argument: str = ""):
    config = base_config("imagenet_resnet50")
    config.quant.recipe = "multi_precision"
    config.multi_precision.update(widths=(8, 6, 4, 2), alrs="one_minus")
    config.schedule.name = "rounds"
    config.schedule.grads.name = "float"
    config.optimizer.update(learning_rate=0.01)
    config.data.repeat = 4
    config.train.update(steps=0, epochs=90.0)
    return finish(config, argument)
