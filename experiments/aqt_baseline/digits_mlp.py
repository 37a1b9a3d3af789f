"""AQT at static 4 and 8 bits against qtrain on AQT's grid, a schedule on top: a perceptron on the handwritten digits.

Command: qtrain sweep --config experiments/aqt_baseline/digits_mlp.py --workdir runs/aqt_baseline/digits_mlp \
    --vectorized --separate
"""

import runpy
from pathlib import Path

from qtrain.config import base_config, finish

shared = runpy.run_path(str(Path(__file__).with_name("arms.py")))


def get_config(argument: str = ""):
    """The config that the points change."""
    config = base_config("digits_mlp")
    shared["settings"](config, steps=1000)
    return finish(config, argument)


def sweep():
    """The points."""
    return shared["points"]()
