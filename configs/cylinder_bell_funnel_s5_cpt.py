"""S5 on the cylinder-bell-funnel time series (Saito 1994) under cyclic precision training, CR 3-8 bits, gradients 8.

The three shapes are generated: 128 noisy steps each. Two layers of width 16; A is held at 16 bits.
Command: qtrain train --config configs/cylinder_bell_funnel_s5_cpt.py --workdir runs/cbf
Expected: not measured.
"""

from qtrain.config import base_config, finish


def get_config(argument: str = ""):
    config = base_config("cylinder_bell_funnel_s5")
    config.quant.recipe = "cpt"
    config.schedule.update(name="cyclic", profile="cosine", low=3, high=8, cycles=8, pattern="repeated")
    config.schedule.grads.update(name="constant", bits=8)
    return finish(config, argument)
