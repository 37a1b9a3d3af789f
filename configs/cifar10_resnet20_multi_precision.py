"""ResNet-20 on CIFAR-10 trained at 8, 6, 4 and 2 bits at once: Double Rounding (arXiv 2502.01199).

SGD at 0.1 with momentum 0.9, batch 128, decay 1e-4, crop and flip, each batch at every width, first and last layer at
8 bits. The length (160 epochs) and the schedule of the rate are those of cifar10_resnet20_cpt: the authors' we could
not read. Scales and offsets have the rate 0.01.
Command: qtrain train --config configs/cifar10_resnet20_multi_precision.py --workdir runs/r20 --config.data.dir=FOLDER
The paper's other set: --config.multi_precision.widths=4,3,2 --config.data.repeat=3
Made for a GPU; hardware and time: not measured. Expected: not measured by us; the paper gives 92.25/92.32/92.09/90.19 %
at 8/6/4/2 bits, and without ALRS (--config.multi_precision.alrs=none) 92.17/92.20/92.17/89.67.
"""

from qtrain.config import base_config, finish


def get_config(argument: str = ""):
    config = base_config("cifar10_resnet20")
    config.quant.recipe = "multi_precision"
    config.multi_precision.update(widths=(8, 6, 4, 2), alrs="one_minus")
    config.schedule.name = "rounds"
    config.schedule.grads.name = "float"
    config.optimizer.quant.learning_rate = 0.01
    config.data.repeat = 4
    config.train.update(steps=0, epochs=160.0)
    return finish(config, argument)
