"""A small vision transformer on the digits under cyclic precision training, CR 3-8 bits, gradients 8.

Four layers of width 64 on 16 patches of 2x2 pixels; AdamW. The products of attention are quantized too.
Command: qtrain train --config configs/digits_vit_cpt.py --workdir runs/vit
Expected test accuracy: 94.4 % (seed 0), in float 98.1; 3 minutes on one busy CPU core.
"""

from qtrain.config import base_config, finish


def get_config(argument: str = ""):
    config = base_config("digits_vit")
    config.quant.recipe = "cpt"
    config.schedule.update(name="cyclic", profile="cosine", low=3, high=8, cycles=8, pattern="repeated")
    config.schedule.grads.update(name="constant", bits=8)
    return finish(config, argument)
