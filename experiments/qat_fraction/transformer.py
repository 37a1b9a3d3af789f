"""When to switch quantization on (Dremov et al. 2025, arXiv 2509.22935): a small byte-level transformer.

Weights at 2, 3 and 4 bits for the last 0 to 100 % of 800 steps, tiny_shakespeare; a cooldown in float and a second
warm-up against none (fused). Fused also at 400 steps. Three seeds.
Command: qtrain sweep --config experiments/qat_fraction/transformer.py --workdir runs/qat_fraction/transformer \
    --vectorized --separate
transformer.py:controls, in transformer-controls, has what the learning rate does by itself.
"""

import runpy
from pathlib import Path

from qtrain import sweep as points
from qtrain.config import base_config, finish

shared = runpy.run_path(str(Path(__file__).with_name("grid.py")))

STEPS = (800, 400)


def get_config(argument: str = ""):
    """The config that the points change."""
    config = base_config("tiny_shakespeare_transformer")
    config.model.update(num_layers=2, width=32, num_heads=2)
    config.data.update(batch_size=16, length=64)
    config.quant.ops = ("weighted",)
    config.optimizer.learning_rate = 4e-3
    config.train.update(steps=STEPS[0], log_every_steps=100)
    shared["settings"](config)
    return finish(config, "" if argument == "controls" else argument)


def sweep(argument: str = ""):
    """The points; of the argument "controls" those of `grid.controls`."""
    if argument == "controls":
        return shared["controls"]((2, 3, 4), STEPS[0], seeds=range(3))
    # The third seed was added later, and a sweep grows at its end.
    parts = (shared["lengths"]((2, 3, 4), STEPS, seeds=seeds) for seeds in ((0, 1), (2,)))
    return points.chain(*parts)
