"""DeiT-T on ImageNet at 2 bits under transition-rate scheduling (Lee et al., ICCV 2025, arXiv 2404.19248).

AdamWT from a float checkpoint at the authors' rate 3e-4; first and last layer in float. The rest of their setting for
transformers we could not read: what is here otherwise is DeiT's (Touvron et al. 2021, arXiv 2012.12877) without its
distillation, mixup and repeated augmentation: batch 1,024, 300 epochs, decay 0.05, stochastic depth 0.1.
Command: qtrain train --config configs/imagenet_vit_trs.py --workdir runs/w2a2 --config.data.dir=FOLDER
--config.init_from=runs/float; before that the float run: the same with --workdir runs/float, without init_from, and
with --config.schedule.bits=32 --config.optimizer.name=adamw --config.optimizer.learning_rate=1e-3.
Made for GPUs; hardware and time: not measured. Expected: not measured by us; the paper gives 54.6 → 57.4 % at W2A2.
"""

from qtrain.config import base_config, finish


def get_config(argument: str = ""):
    config = base_config("imagenet_vit")
    config.quant.recipe = "trs"
    config.schedule.update(name="constant", bits=2)
    config.schedule.grads.update(name="float")
    config.optimizer.update(name="adamwt", learning_rate=3e-4)
    config.optimizer.quant.learning_rate = 0.01
    config.optimizer.transition.update(factor=5e-3, schedule="cosine", target_scale="none")
    return finish(config, argument)
