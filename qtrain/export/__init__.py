"""Quantized models as files: integer codes packed at the width they need, scales, and a model that runs on them.

`save` writes one, `load` reads it and runs it at any width that follows from its integers, `stablehlo` makes a program
of it for others to serve; ``qtrain export`` does it for a run.
"""

from qtrain.export.encode import Stored
from qtrain.export.model import Exported, load
from qtrain.export.report import Report
from qtrain.export.save import save
from qtrain.export.serving import stablehlo, write_stablehlo

__all__ = ["Exported", "Report", "Stored", "load", "save", "stablehlo", "write_stablehlo"]
