"""ResNet-18 on ImageNet at 2 bits under transition-rate scheduling (Lee et al., ICCV 2025, arXiv 2404.19248).

SGDT from a float checkpoint; first and last layer in float. Which optimizer settings the authors took for ImageNet we
could not read: 100 epochs, batch 256, rate 0.1 and decay 1e-4 are the common ones, λ = 5e-3 is that of their CIFAR
runs. Images are cropped at random to 224x224 and flipped, evaluated on the centre of 256. Reads the prepared TFDS set
imagenet2012, decoding each image when it is used.
Command: qtrain train --config configs/imagenet_resnet18_trs.py --workdir runs/w2a2 --config.data.dir=FOLDER
--config.init_from=runs/float; before that the float run: the same with --workdir runs/float, without init_from, and
with --config.schedule.bits=32 --config.optimizer.name=sgd (32 bits are float).
Made for GPUs; hardware and time: not measured. Expected: not measured by us; the paper gives 66.8 → 66.9 % at W2A2.
"""

from qtrain.config import base_config, finish


def get_config(argument: str = ""):
    config = base_config("imagenet_resnet18")
    config.quant.recipe = "trs"
    config.schedule.update(name="constant", bits=2)
    config.schedule.grads.update(name="float")
    config.optimizer.update(name="sgdt", schedule="cosine")
    config.optimizer.quant.learning_rate = 0.01
    config.optimizer.transition.update(factor=5e-3, schedule="cosine", target_scale="none")
    return finish(config, argument)
