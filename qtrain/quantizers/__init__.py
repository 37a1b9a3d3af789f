"""Quantizers: functions from an array and a traced width to the array on that width's grid. They know no Flax.

A quantizer is a frozen dataclass of static choices. ``q(x, bits)`` is the fake-quantized `x` with a stated gradient;
``q.encode(x, bits)`` gives integer codes and a scale, and ``q.decode(codes, scale)`` equals ``q(x, bits)`` exactly.
"""

from qtrain.quantizers.base import FLOAT_BITS, Quantizer, straight_through, straight_through_inside
from qtrain.quantizers.coded import Coded
from qtrain.quantizers.contraction import RESIDUALS, Operands, Traced, contract, quantize_cotangent
from qtrain.quantizers.formats import FORMATS
from qtrain.quantizers.granularity import Layout, layout
from qtrain.quantizers.native import WIDEST, Paths
from qtrain.quantizers.operations import Contraction, Conv, Dot
from qtrain.quantizers.small_float import Float
from qtrain.quantizers.uniform import GRIDS, ROUNDINGS, AffineScale, Uniform

__all__ = [
    "FLOAT_BITS",
    "FORMATS",
    "GRIDS",
    "RESIDUALS",
    "ROUNDINGS",
    "WIDEST",
    "AffineScale",
    "Coded",
    "Contraction",
    "Conv",
    "Dot",
    "Float",
    "Layout",
    "Operands",
    "Paths",
    "Quantizer",
    "Traced",
    "Uniform",
    "contract",
    "layout",
    "quantize_cotangent",
    "straight_through",
    "straight_through_inside",
]
