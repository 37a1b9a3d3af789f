"""ResNet-20 on CIFAR-10 under cyclic precision training, the authors' setting (Wolfe & Kyrillidis, arXiv 2403.02243).

Their quantizers (affine, float zero point, every convolution, final dense in float, stochastic 8-bit gradients) and
their recipe: SGD momentum 0.9, rate 0.1 cut by 10 at 50 % and 75 % of 64k steps, batch 128, decay 1e-4, crop and flip.
CR 3-8 bits, n = 8. Made for a GPU: on two CPU cores the 64k steps take about 11 hours (1.7 steps a second).
Expected: not measured at full length, so no accuracy is given; the first 40 steps bring the loss from 3.3 to 2.1.
Command: qtrain train --config configs/cifar10_resnet20_cpt.py --workdir runs/cifar --config.data.dir=FOLDER
"""

from qtrain.config import base_config, finish


def get_config(argument: str = ""):
    config = base_config("cifar10_resnet20")
    config.quant.recipe = "cpt"
    config.schedule.update(name="cyclic", profile="cosine", low=3, high=8, cycles=8, pattern="repeated")
    config.schedule.grads.update(name="constant", bits=8)
    return finish(config, argument)
