"""Quantizers: functions from an array and a traced width to the array on that width's grid. They know no Flax.

A quantizer is a frozen dataclass of static choices. ``q(x, bits)`` is the fake-quantized `x` with a stated gradient;
``q.encode(x, bits)`` gives integer codes and a scale, and ``q.decode(codes, scale)`` equals ``q(x, bits)`` exactly.
"""

from qtrain.quantizers.base import FLOAT_BITS, Quantizer, straight_through, straight_through_inside
from qtrain.quantizers.contraction import (
    RESIDUALS,
    Contraction,
    Conv,
    Dot,
    Operands,
    Traced,
    contract,
    quantize_cotangent,
)
from qtrain.quantizers.granularity import Layout, layout
from qtrain.quantizers.uniform import GRIDS, ROUNDINGS, AffineScale, Uniform

__all__ = [
    "FLOAT_BITS",
    "GRIDS",
    "RESIDUALS",
    "ROUNDINGS",
    "AffineScale",
    "Contraction",
    "Conv",
    "Dot",
    "Layout",
    "Operands",
    "Quantizer",
    "Traced",
    "Uniform",
    "contract",
    "layout",
    "quantize_cotangent",
    "straight_through",
    "straight_through_inside",
]
