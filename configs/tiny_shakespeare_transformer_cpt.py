"""A byte-level transformer on tiny_shakespeare under cyclic precision training, CR 4-8 bits, gradients 8.

Time: 5 steps a second on two CPU cores, 13 minutes. Expected: not measured at full length; 200 steps reach a test loss
of 2.56 nats per byte (seed 0, --config.train.steps=200).
Command: qtrain train --config configs/tiny_shakespeare_transformer_cpt.py --workdir runs/lm --config.data.dir=FOLDER
"""

from qtrain.config import base_config, finish


def get_config(argument: str = ""):
    config = base_config("tiny_shakespeare_transformer")
    config.schedule.update(name="cyclic", profile="cosine", low=4, high=8, cycles=8, pattern="repeated")
    config.schedule.grads.update(name="constant", bits=8)
    return finish(config, argument)
