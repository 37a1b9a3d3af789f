"""Quantized models as files: integer codes packed at the width they need, scales, and a model that runs on them.

`save` writes one, `load` reads it and runs it; ``qtrain export`` does it for a run.
"""

from qtrain.export.encode import Stored
from qtrain.export.model import Exported, load
from qtrain.export.save import Report, save

__all__ = ["Exported", "Report", "Stored", "load", "save"]
