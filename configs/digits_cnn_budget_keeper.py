"""A CNN on the handwritten digits that ends at a given number of bit operations, spent where the loss stands still.

Weights and activations between 3 and 8 bits, gradients 8: the controller (ours, `qtrain.schedules.budget_keeper`)
spends what the cosine schedule CR would have, and when it would have, but more while the training loss falls slowly and
less while it falls fast. What the signal has to beat: --config.schedule.signal=none. Another budget:
--config.schedule.budget_of=static --config.schedule.budget_share=0.5
Command: qtrain train --config configs/digits_cnn_budget_keeper.py --workdir runs/budget_keeper
Time: 15 s on two CPU cores. 35.4 % fewer BitOps than 8 bits throughout, as CR.
"""

from qtrain.config import base_config, finish


def get_config(argument: str = ""):
    config = base_config("digits_cnn")
    config.schedule.update(name="budget_keeper", low=3, high=8, cycles=8, budget_of="CR")
    config.schedule.grads.update(name="constant", bits=8)
    return finish(config, argument)
