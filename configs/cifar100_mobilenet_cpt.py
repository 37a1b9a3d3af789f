"""MobileNetV2 on CIFAR-100 under cyclic precision training, the setting of Wolfe & Kyrillidis (2024, arXiv 2403.02243).

Width 1, the image divided by 8 in all; SGD at 0.03, a tenth of it after half and three quarters of 64,000 steps of 128.
CR: 3 to 8 bits, 8 cycles, gradients 8.
Command: qtrain train --config configs/cifar100_mobilenet_cpt.py --workdir runs/mobilenet --config.data.dir=FOLDER
Made for GPUs; hardware and time: not measured. Expected: not measured by us; the paper gives 0.37 points more than
static 8 bits.
"""

from qtrain.config import base_config, finish


def get_config(argument: str = ""):
    config = base_config("cifar100_mobilenet")
    config.quant.recipe = "cpt"
    config.schedule.update(name="cyclic", profile="cosine", low=3, high=8, cycles=8, pattern="repeated")
    config.schedule.grads.update(name="constant", bits=8)
    return finish(config, argument)
