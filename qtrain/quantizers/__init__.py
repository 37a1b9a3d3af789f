"""Quantizers: functions from an array and a traced width to the array on that width's grid. They know no Flax.

A quantizer is a frozen dataclass of static choices. ``q(x, bits)`` is the fake-quantized `x` with a stated gradient;
``q.encode(x, bits)`` gives integer codes and a scale, and ``q.decode(codes, scale)`` equals ``q(x, bits)`` exactly.

================  =====================================================================================================
`Uniform`         one step size, from the tensor's own range or a running one
`Float`           small floats: e4m3, e5m2, …
`LSQ`             a step size, and with an offset LSQ+, trained by the loss: params = q.init(x), q(x, bits, params)
`TRS`             the quantizer of transition-rate scheduling: a range of 3σ, frozen for weights, trained for acts
`PACT`            activations clipped at a level that is trained
`DoReFa`          weights through tanh, activations clipped to [0, 1]; no parameters
`EWGS`            any of these but `Float`, with the gradient scaled element by element
`Nested`          a floor whose step (of a tensor, row, channel, …) is learned from gradient-to-parameter ratios
`LearnedWidth`    a range and a bit width, both trained by the loss
`DoubleRounding`  integers of h bits, and every narrower width from them by a shift
================  =====================================================================================================
"""

from qtrain.quantizers.base import FLOAT_BITS, Quantizer, straight_through, straight_through_inside
from qtrain.quantizers.coded import Coded
from qtrain.quantizers.contraction import RESIDUALS, Operands, Traced, contract, quantize_cotangent
from qtrain.quantizers.dorefa import DoReFa
from qtrain.quantizers.double_rounding import DoubleRounding, bare_shift, shift
from qtrain.quantizers.ewgs import EWGS, ewgs_delta
from qtrain.quantizers.formats import FORMATS
from qtrain.quantizers.granularity import Layout, layout, layout_of
from qtrain.quantizers.learned import GridQuantizer, distance_to_transition
from qtrain.quantizers.learned_width import LearnedWidth
from qtrain.quantizers.lsq import ACROSS_BITS, LSQ
from qtrain.quantizers.native import WIDEST, Paths
from qtrain.quantizers.nested import Nested
from qtrain.quantizers.operations import Contraction, Conv, Dot
from qtrain.quantizers.pact import PACT
from qtrain.quantizers.small_float import Float
from qtrain.quantizers.trs import TRS
from qtrain.quantizers.uniform import GRIDS, ROUNDINGS, AffineScale, Uniform

__all__ = [
    "ACROSS_BITS",
    "EWGS",
    "FLOAT_BITS",
    "FORMATS",
    "GRIDS",
    "LSQ",
    "PACT",
    "RESIDUALS",
    "ROUNDINGS",
    "TRS",
    "WIDEST",
    "AffineScale",
    "Coded",
    "Contraction",
    "Conv",
    "DoReFa",
    "Dot",
    "DoubleRounding",
    "Float",
    "GridQuantizer",
    "Layout",
    "LearnedWidth",
    "Nested",
    "Operands",
    "Paths",
    "Quantizer",
    "Traced",
    "Uniform",
    "bare_shift",
    "contract",
    "distance_to_transition",
    "ewgs_delta",
    "layout",
    "layout_of",
    "quantize_cotangent",
    "shift",
    "straight_through",
    "straight_through_inside",
]
