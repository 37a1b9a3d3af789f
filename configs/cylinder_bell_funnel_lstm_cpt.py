"""An LSTM on the cylinder-bell-funnel time series (Saito 1994) under cyclic precision training, CR 3-8, gradients 8.

The three shapes are generated: 128 noisy steps each. One layer of 32.
Command: qtrain train --config configs/cylinder_bell_funnel_lstm_cpt.py --workdir runs/cbf
"""

from qtrain.config import base_config, finish


def get_config(argument: str = ""):
    config = base_config("cylinder_bell_funnel_lstm")
    config.quant.recipe = "cpt"
    config.schedule.update(name="cyclic", profile="cosine", low=3, high=8, cycles=8, pattern="repeated")
    config.schedule.grads.update(name="constant", bits=8)
    return finish(config, argument)
