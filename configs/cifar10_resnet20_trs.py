"""ResNet-20 on CIFAR-10 at 2 bits under transition-rate scheduling (Lee et al., ICCV 2025, arXiv 2404.19248).

Their recipe: SGDT from a float checkpoint, 400 epochs, batch 256, decay 1e-4, crop and flip, first and last layer in
float, activation scales at rate 0.01, target transition rate a cosine from 5e-3 (see cifar100_resnet20_trs).
Command: qtrain train --config configs/cifar10_resnet20_trs.py --workdir runs/w2a2 --config.data.dir=FOLDER
--config.init_from=runs/float; before that the float run: the same with --workdir runs/float, without init_from, and
with --config.schedule.bits=32 --config.optimizer.name=sgd (32 bits are float).
W1A1: --config.schedule.bits=1. AdamT: --config.optimizer.name=adamt --config.optimizer.learning_rate=1e-3.
Made for a GPU; hardware and time: not measured. Expected: not measured by us at full length; the paper gives, plain →
with transition rates, 90.2 → 90.7 % for SGD and 90.2 → 91.1 % for Adam at W2A2.
"""

from qtrain.config import base_config, finish


def get_config(argument: str = ""):
    config = base_config("cifar10_resnet20")
    config.data.batch_size = 256
    config.quant.recipe = "trs"
    config.schedule.update(name="constant", bits=2)
    config.schedule.grads.update(name="float")
    config.optimizer.update(name="sgdt", learning_rate=0.1, schedule="cosine", weight_decay=1e-4)
    config.optimizer.quant.learning_rate = 0.01
    config.optimizer.transition.update(factor=5e-3, schedule="cosine", target_scale="none")
    config.train.steps = 78_125  # 400 epochs of 50,000 images
    return finish(config, argument)
