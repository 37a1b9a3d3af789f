"""PACT: activations clipped at a level that is trained by the loss."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp

from qtrain.errors import UsageError
from qtrain.quantizers.base import Array, Axes
from qtrain.quantizers.granularity import Layout, Per, check_per
from qtrain.quantizers.learned import Gradient, Grid, GridQuantizer, floored, unsigned_bounds
from qtrain.quantizers.parameters import as_stored, calibration, stored


@dataclasses.dataclass(frozen=True)
class PACT(GridQuantizer):
    """Parameterized clipping: y = clip(x, 0, α), ŷ = rint(y·(2^b − 1)/α) · α/(2^b − 1).

    Gradients: ∂ŷ/∂x = 1 where 0 < x < α and 0 elsewhere; ∂ŷ/∂α = 1 where x ≥ α and 0 elsewhere (the rounding of what
    lies inside passes nothing to α: unlike LSQ's s). Nothing flows to the bits. α is a range: a change of the bits
    needs nothing. A stored α at or below zero acts as one next to zero, with the gradient of α itself.

    Parameter: ``alpha``. The authors train it with weight decay, which is the optimizer's to give (§3 there).

    Attributes:
      initial: α to begin with, whatever the tensor: the paper starts from 10 or 8, well above most activations, and
        lets the decay bring it down.
      per: what shares a level; see `qtrain.quantizers.granularity.layout`. The paper has one for each layer.

    Native execution: none, arithmetic is float ("fake") only.

    Choi et al., PACT, 2018 (arXiv 1805.06085), eqs. 1–3.

    >>> import jax.numpy as jnp
    >>> print(PACT()(jnp.array([-1.0, 0.4, 2.1, 7.0]), 2, {"alpha": jnp.float32(3.0)}))
    [0. 0. 2. 3.]

    Raises:
      UsageError: for a field that holds something it does not allow.
    """

    initial: float = 10.0
    per: Per = "tensor"

    def __post_init__(self) -> None:
        if isinstance(self.per, list):
            object.__setattr__(self, "per", tuple(self.per))
        check_per(self.per)
        if not isinstance(self.initial, int | float) or not 0.0 < self.initial < math.inf:
            raise UsageError(f"initial={self.initial!r}: give the initial clipping level, above 0")

    @property
    def learns(self) -> bool:
        """It does."""
        return True

    def describe(self) -> str:
        """``pact/tensor``."""
        return f"pact/{self.per}"

    def bounds(self, bits: Any) -> tuple[Array, Array]:
        """0 and 2^b − 1, float32."""
        return unsigned_bounds(bits)

    def init(self, x: Array, bits: Any = 8, *, axes: Axes | None = None) -> dict[str, Array]:
        """α = ``initial`` for a tensor of the shape of `x`; see `Quantizer.init`."""
        _, _, view = calibration(x, bits, self.per, axes)
        return {"alpha": as_stored(jnp.full(view.scale_shape, self.initial, jnp.float32), view)}

    def _grid(self, values: Array, bits: Array, view: Layout, params: Mapping[str, Array] | None) -> Grid:
        low, high = self.bounds(bits)
        alpha = floored(stored(self, params, "alpha", view))
        return Grid(floored(alpha * (1.0 / high)), low, high, self._one_bit(bits), source=alpha)

    def _gradient(self, inputs: Array, in_steps: Array, codes: Array, grid: Grid) -> Gradient:
        assert grid.source is not None
        above = inputs >= grid.source
        return Gradient((inputs > 0) & ~above, (grid.source,), (jnp.where(above, 1.0, 0.0),))
