"""Fine-tuning under cyclic precision: two cycles of CR 3-8 from a float checkpoint (arXiv 2403.02243: n = 2 there).

A fifth of the steps of training from scratch, at a tenth of the rate.
Command: qtrain train --config configs/digits_resnet_finetune.py --workdir runs/tuned --config.init_from=runs/float
Before that the float run: qtrain train --config configs/digits_resnet_cpt.py --workdir runs/float
--config.schedule.name=float --config.schedule.grads.name=float
Expected: not measured.
"""

from qtrain.config import base_config, finish


def get_config(argument: str = ""):
    config = base_config("digits_resnet")
    config.quant.recipe = "cpt"
    config.schedule.update(name="cyclic", profile="cosine", low=3, high=8, cycles=2, pattern="repeated")
    config.schedule.grads.update(name="constant", bits=8)
    config.optimizer.learning_rate = 2e-4
    config.train.steps = 300
    return finish(config, argument)
