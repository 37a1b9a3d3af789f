"""AQT at static 4 and 8 bits against qtrain on AQT's grid, a schedule on top: a small byte-level transformer.

Command: qtrain sweep --config experiments/aqt_baseline/transformer.py --workdir runs/aqt_baseline/transformer \
    --vectorized --separate
"""

import runpy
from pathlib import Path

from qtrain.config import base_config, finish

shared = runpy.run_path(str(Path(__file__).with_name("arms.py")))


def get_config(argument: str = ""):
    """The config that the points change."""
    config = base_config("tiny_shakespeare_transformer")
    config.model.update(num_layers=2, width=64, num_heads=2)
    config.data.update(batch_size=16, length=64)
    shared["settings"](config, steps=400)
    return finish(config, argument)


def sweep():
    """The points."""
    return shared["points"]()
