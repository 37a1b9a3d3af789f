"""The bits of one step, as data."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Precision:
    """Bits of the weights, the activations and the gradients (cotangents) at one step: a pytree of numbers.

    Each field is a whole number of bits, at least 1: a Python number, or an array that may be traced, so that one
    compiled program serves every width. 24 and above leave a tensor as it is (float32 has no finer grid). ``None``
    leaves that kind of operand unquantized, and is part of the pytree's structure: changing it does recompile.

    >>> Precision(weights=4, acts=4, grads=8)
    Precision(weights=4, acts=4, grads=8)
    """

    weights: Any = None
    acts: Any = None
    grads: Any = None
