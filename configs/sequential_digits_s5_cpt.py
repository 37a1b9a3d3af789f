"""An S5 state-space model on the digits, pixel by pixel, under cyclic precision training, CR 3-8 bits, gradients 8.

Two bidirectional layers of width 32, 64 steps of time. B, C and the other dense layers follow the schedule, A is held
at 16 bits; D, the step and the state are float unless rules name them (".*/ssm/D" and ".*/discretisation/.*" with
ops=("param",), ".*/state.*/value" with ops=("output",)).
Command: qtrain train --config configs/sequential_digits_s5_cpt.py --workdir runs/s5
Expected test accuracy: 97.2 % (seed 0), in float 97.5; 2 minutes on one CPU core.
"""

from qtrain.config import base_config, finish


def get_config(argument: str = ""):
    config = base_config("sequential_digits_s5")
    config.quant.recipe = "cpt"
    config.schedule.update(name="cyclic", profile="cosine", low=3, high=8, cycles=8, pattern="repeated")
    config.schedule.grads.update(name="constant", bits=8)
    return finish(config, argument)
