"""A byte-level transformer on tiny_shakespeare under cyclic precision training, CR 4-8 bits, gradients 8.

Time: 27 minutes on part of one busy CPU core, 8 minutes of CPU time. Expected test loss: 1.77 nats a byte (seed 0), in
float 1.73.
Command: qtrain train --config configs/tiny_shakespeare_transformer_cpt.py --workdir runs/lm --config.data.dir=FOLDER
"""

from qtrain.config import base_config, finish


def get_config(argument: str = ""):
    config = base_config("tiny_shakespeare_transformer")
    config.schedule.update(name="cyclic", profile="cosine", low=4, high=8, cycles=8, pattern="repeated")
    config.schedule.grads.update(name="constant", bits=8)
    return finish(config, argument)
