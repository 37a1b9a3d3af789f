"""ResNet-20 on CIFAR-100 at 2 bits under transition-rate scheduling (Lee et al., ICCV 2025, arXiv 2404.19248).

Their recipe: SGDT from a float checkpoint, 400 epochs, batch 256, decay 1e-4, crop and flip, first and last layer in
float, activation scales at rate 0.01, target transition rate a cosine from 5e-3. That is their code's number; the
paper's λ·√b with λ = 5e-3 begins at 7.1e-3: --config.optimizer.transition.target_scale=sqrt_bits. The rule is the
paper's, additive; their code's: --config.optimizer.transition.rule=multiplicative.
Command: qtrain train --config configs/cifar100_resnet20_trs.py --workdir runs/w2a2 --config.data.dir=FOLDER
--config.init_from=runs/float; before that the float run: the same with --workdir runs/float, without init_from, and
with --config.schedule.bits=32 --config.optimizer.name=sgd (32 bits are float).
W1A1: --config.schedule.bits=1. AdamT: --config.optimizer.name=adamt --config.optimizer.learning_rate=1e-3. Without a
transition rate: --config.optimizer.name=sgd, or adam.
Made for a GPU; hardware and time: not measured. Expected: not measured by us; the paper gives, plain → with transition
rates, 64.1 → 65.5 % for SGD and 63.3 → 65.2 % for Adam at W2A2, 54.9 → 55.8 % at W1A1.
"""

from qtrain.config import base_config, finish


def get_config(argument: str = ""):
    config = base_config("cifar10_resnet20")
    config.data.update(name="cifar100", batch_size=256)
    config.quant.recipe = "trs"
    config.schedule.update(name="constant", bits=2)
    config.schedule.grads.update(name="float")
    config.optimizer.update(name="sgdt", learning_rate=0.1, schedule="cosine", weight_decay=1e-4)
    config.optimizer.quant.learning_rate = 0.01
    config.optimizer.transition.update(factor=5e-3, schedule="cosine", target_scale="none")
    config.train.steps = 78_125  # 400 epochs of 50,000 images
    return finish(config, argument)
