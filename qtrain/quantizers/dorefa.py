"""DoReFa-Net's quantizers: weights through tanh, activations clipped to [0, 1]; nothing is learned."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp

from qtrain.errors import UsageError, did_you_mean
from qtrain.quantizers.base import FLOAT_BITS, Array
from qtrain.quantizers.granularity import Layout, Per, check_per
from qtrain.quantizers.learned import Gradient, Grid, GridQuantizer, unsigned_bounds
from qtrain.quantizers.scales import SMALLEST, positive, reduce_range

KINDS = ("weights", "acts")


@dataclasses.dataclass(frozen=True)
class DoReFa(GridQuantizer):
    """DoReFa-Net, for q_b(z) = rint(n·z)/n and n = 2^b − 1.

    Weights: w_q = 2·q_b(t/2 + ½) − 1 with t = tanh w / max|tanh w|: levels in [−1, 1], whatever the size of w, and no 0
    among them. At 1 bit sign(w)·⟨|w|⟩. Activations: x_q = q_b(clip(x, 0, 1)).

    Gradient of weights: that of t, through tanh and through the maximum as well, the rounding being passed straight
    through (the paper's chain rule; the authors' code differentiates the maximum, too, and so do we). At 1 bit 1, and
    none through ⟨|w|⟩. Of activations: 1 where 0 < x < 1. A tensor of zeros has 1 for its maximum. Nothing flows to the
    bits.

    It has no parameters; a change of the bits needs nothing.

    Attributes:
      kind: "weights" or "acts".
      per: what shares the maximum and ⟨|w|⟩ of weights, by default the whole tensor as in the paper; see
        `qtrain.quantizers.granularity.layout`. Activations have nothing to share.

    Native execution: none, arithmetic is float ("fake") only.

    Zhou et al., DoReFa-Net, 2016 (arXiv 1606.06160), eqs. 7–11.

    >>> import jax.numpy as jnp
    >>> print(DoReFa("weights")(jnp.array([-2.0, -0.1, 0.3, 1.0]), 2))
    [-1.         -0.3333333   0.33333337  1.        ]
    >>> print(DoReFa("acts")(jnp.array([-2.0, 0.1, 0.3, 1.5]), 2))
    [0.         0.         0.33333334 1.        ]

    Raises:
      UsageError: for a field that holds something it does not allow.
    """

    kind: str = "weights"
    per: Per = "tensor"

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise UsageError(f"kind={self.kind!r}: give one of {KINDS}.{did_you_mean(self.kind, KINDS)}")
        if isinstance(self.per, list):
            object.__setattr__(self, "per", tuple(self.per))
        check_per(self.per)
        if self.kind == "acts" and self.per != "tensor":
            raise UsageError(
                f"per={self.per!r}: DoReFa's activations share nothing, their range is fixed; leave it out"
            )

    def describe(self) -> str:
        """``dorefa/acts``; of weights with what shares a maximum."""
        return "dorefa/acts" if self.kind == "acts" else f"dorefa/weights/{self.per}"

    def bounds(self, bits: Any) -> tuple[Array, Array]:
        """0 and 2^b − 1, float32; of weights at 1 bit −1 and 1."""
        low, high = unsigned_bounds(bits)
        return jnp.where(self._one_bit(jnp.asarray(bits)), -1.0, low), high

    def _one_bit(self, bits: Array) -> Array:
        return (bits == 1) & (self.kind == "weights")

    def _grid(self, values: Array, bits: Array, view: Layout, params: Mapping[str, Array] | None) -> Grid:
        low, high = self.bounds(bits)
        one_bit = self._one_bit(bits)
        if self.kind == "acts":
            step = jnp.broadcast_to(1.0 / high, jnp.broadcast_shapes(high.shape, view.scale_shape))
            return Grid(step, low, high, one_bit)
        size = positive(reduce_range(values, "absmean", view.axes))
        # On t, which lies in [−1, 1].
        return Grid(jnp.where(one_bit, size, 2.0 / high), low, high, one_bit, offset=jnp.where(one_bit, 0.0, -1.0))

    def _transformed(self, x: Array, bits: Array, view: Layout) -> Array:
        if self.kind == "acts":
            return x
        x = x.astype(jnp.float32)
        bent = jnp.tanh(x)
        largest = jnp.max(jnp.abs(bent), axis=view.axes, keepdims=True, initial=0.0)
        largest = jnp.where(largest < SMALLEST, 1.0, largest)
        return jnp.where((bits == 1) | (bits >= FLOAT_BITS), x, bent / largest)

    def _gradient(self, inputs: Array, in_steps: Array, codes: Array, grid: Grid) -> Gradient:
        return Gradient(jnp.ones(inputs.shape, bool) if self.kind == "weights" else (inputs > 0) & (inputs < 1))
