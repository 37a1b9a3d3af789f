"""The quantizer of transition-rate scheduling: a range in standard deviations, codes scaled by γ."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp

from qtrain.errors import UsageError
from qtrain.quantizers.base import FLOAT_BITS, Array, Axes
from qtrain.quantizers.granularity import Layout, Per, check_per
from qtrain.quantizers.learned import (
    Gradient,
    Grid,
    GridQuantizer,
    exact_power,
    floored,
    signed_bounds,
    unsigned_bounds,
)
from qtrain.quantizers.parameters import as_stored, calibration, check_flags, mean_and_deviation, stored, usable

_RECTIFIED = math.sqrt(1.0 - 2.0 / math.pi)  # the standard deviation of |z| for a standard normal z


@dataclasses.dataclass(frozen=True)
class TRS(GridQuantizer):
    """Lee et al.'s quantizer: x_q = (1/γ) · rint(clip(γx/s, α, β)), times s unless it is `normalised`.

    Signed (weights): α = −2^(b−1), β = 2^(b−1) − 1, γ = 2^(b−1); at 1 bit sign(x), with sign(0) = +1. Unsigned
    (activations): α = 0, β = 2^b − 1, γ = 2^b. s is a *range*, not a step: it means the same at every width, and a
    change of the bits needs nothing.

    Gradients, by the straight-through rule, for u = γx/s and α < u < β (inside):

    ===============  ==========  ==================  ==========  ==================
    ..               times s                         normalised
    ..               inside      outside             inside      outside
    ===============  ==========  ==================  ==========  ==================
    ∂/∂x             1           0                   1/s         0
    ∂/∂s             (rint u − u)/γ   α/γ or β/γ     −x/s²       0
    ===============  ==========  ==================  ==========  ==================

    At 1 bit with sign(u), α = −1 and β = 1. Nothing flows to the bits. A stored scale at or below zero acts as the
    smallest normal float32, with the gradient of s itself.

    The paper leaves x_q normalised, a norm layer following each convolution. A rule here applies to anybody's model, so
    that the product is multiplied by s by default. Under a norm the gradients of latent weights are the same either
    way: a norm's output does not depend on s, its input gradient is 1/s times as large for an input s times as large,
    and the s of ∂(s·x_q)/∂x = s · ∂x_q/∂x makes up for it.

    Parameter: ``scale``, frozen for weights (a scale that moved would change codes without an update, see
    `qtrain.optim`) and learned for activations.

    Attributes:
      signed: for weights; unsigned is for what follows a ReLU (negative values become 0).
      per: what shares a scale; see `qtrain.quantizers.granularity.layout`.
      normalised: leave out the factor s. (24 bits and above still return x itself.)
      learned: whether an optimizer moves the scale; None: where it is unsigned.
      initial: the initial range in standard deviations σ_x of the tensor at hand: signed s = 3σ_x, unsigned
        s = 3σ_x/√(1 − 2/π), which is 3σ for x = |N(0, σ²)|. For a constant tensor mean|x| takes the place of σ_x, for
        one of zeros 1. σ is the population's; the authors' code divides by N − 1.

    Native execution: none, arithmetic is float ("fake") only.

    Lee et al., Transition-rate scheduling for quantization-aware training, ICCV 2025 (arXiv 2404.19248).

    >>> import jax.numpy as jnp
    >>> params = {"scale": jnp.float32(2.0)}
    >>> x = jnp.array([-3.0, -0.6, 0.4, 1.9])
    >>> print(TRS()(x, 2, params), TRS(normalised=True)(x, 2, params))
    [-2. -1.  0.  1.] [-1.  -0.5  0.   0.5]

    Raises:
      UsageError: for a field that holds something it does not allow.
    """

    signed: bool = True
    per: Per = "tensor"
    normalised: bool = False
    learned: bool | None = None
    initial: float = 3.0

    def __post_init__(self) -> None:
        if isinstance(self.per, list):
            object.__setattr__(self, "per", tuple(self.per))
        check_per(self.per)
        if not isinstance(self.initial, int | float) or not 0.0 < self.initial < math.inf:
            raise UsageError(f"initial={self.initial!r}: give the initial range in standard deviations, above 0")
        if self.learned is None:
            object.__setattr__(self, "learned", not self.signed)
        check_flags(self, "signed", "normalised", "learned")

    @property
    def learns(self) -> bool:
        """It keeps a scale, frozen or not."""
        return True

    @property
    def frozen(self) -> frozenset[str]:
        """The scale, where it is not learned."""
        return frozenset() if self.learned else frozenset({"scale"})

    def describe(self) -> str:
        """``trs/signed/tensor``, and what differs from the usual."""
        words = [f"trs/{'signed' if self.signed else 'unsigned'}/{self.per}"]
        words += ["normalised"] if self.normalised else []
        words += [] if self.learned is not self.signed else ["learned" if self.learned else "frozen"]
        return " ".join(words)

    def bounds(self, bits: Any) -> tuple[Array, Array]:
        """α and β at `bits`, float32; signed at 1 bit −1 and 1."""
        return signed_bounds(bits) if self.signed else unsigned_bounds(bits)

    def init(self, x: Array, bits: Any = 8, *, axes: Axes | None = None) -> dict[str, Array]:
        """The initial scale for a tensor like `x`, the same at all `bits`; see ``initial``, and `Quantizer.init`."""
        values, _, view = calibration(x, bits, self.per, axes)
        deviation = usable(mean_and_deviation(values, view)[1], values, view)
        return {"scale": as_stored(deviation * (self.initial / (1.0 if self.signed else _RECTIFIED)), view)}

    def _one_bit(self, bits: Array) -> Array:
        return (bits == 1) & self.signed

    def _grid(self, values: Array, bits: Array, view: Layout, params: Mapping[str, Array] | None) -> Grid:
        low, high = self.bounds(bits)
        inverse = exact_power((1 if self.signed else 0) - jnp.minimum(bits, FLOAT_BITS))  # 1/γ
        step = floored(stored(self, params, "scale", view) * inverse)
        unit = jnp.broadcast_to(inverse, step.shape) if self.normalised else None
        return Grid(step, low, high, self._one_bit(bits), unit=unit)

    def _gradient(self, inputs: Array, in_steps: Array, codes: Array, grid: Grid) -> Gradient:
        plain = super()._gradient(inputs, in_steps, codes, grid)
        if grid.unit is None:
            return plain
        # unit · x/step, differentiable once more; in this order, since 1/step² may overflow.
        slope = grid.unit / grid.step
        return Gradient(plain.inside, (grid.step,), (jnp.where(plain.inside, inputs / grid.step * -slope, 0.0),), slope)
