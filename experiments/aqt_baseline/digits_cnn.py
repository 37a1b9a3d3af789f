"""AQT at static 4 and 8 bits against qtrain on AQT's grid, a schedule on top: a CNN on the handwritten digits.

Command: qtrain sweep --config experiments/aqt_baseline/digits_cnn.py --workdir runs/aqt_baseline/digits_cnn \
    --vectorized --separate
"""

import runpy
from pathlib import Path

from qtrain.config import base_config, finish

shared = runpy.run_path(str(Path(__file__).with_name("arms.py")))


def get_config(argument: str = ""):
    """The config that the points change."""
    config = base_config("digits_cnn")
    shared["settings"](config, steps=1500)
    return finish(config, argument)


def sweep():
    """The points."""
    return shared["points"]()
