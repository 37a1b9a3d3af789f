"""Operation counting from the traced program, and what the operations cost at given bits.

`count` reads every dot and convolution of a function's forward pass, with what its gradients add. `bitops` and its
neighbours price them at a precision that may be traced; `effective` and `static` price a whole schedule; `Total` keeps
the running sum in the train state.
"""

from qtrain.cost.accumulate import Total, add, value, zero
from qtrain.cost.bitops import (
    bitops,
    bitops_accumulator,
    breakdown,
    linear,
    memory_bits,
    relative,
    saving,
    weight_bytes,
)
from qtrain.cost.count import count
from qtrain.cost.marker import OpBits, decode, encode
from qtrain.cost.ops import PASSES, Op, Operand, Ops
from qtrain.cost.schedule_cost import effective, static, tabulated

__all__ = [
    "PASSES",
    "Op",
    "OpBits",
    "Operand",
    "Ops",
    "Total",
    "add",
    "bitops",
    "bitops_accumulator",
    "breakdown",
    "count",
    "decode",
    "effective",
    "encode",
    "linear",
    "memory_bits",
    "relative",
    "saving",
    "static",
    "tabulated",
    "value",
    "weight_bytes",
    "zero",
]
