"""LSQ and LSQ+: a step size (and an offset) trained by the loss."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import lax

from qtrain.errors import UsageError, did_you_mean
from qtrain.quantizers.base import FLOAT_BITS, Array, Axes
from qtrain.quantizers.granularity import Layout, Per, check_per
from qtrain.quantizers.learned import (
    Grid,
    GridQuantizer,
    exact_power,
    floored,
    scaled_gradient,
    signed_bounds,
    unsigned_bounds,
)
from qtrain.quantizers.parameters import (
    as_stored,
    calibration,
    check_flags,
    check_widths,
    elements_per_scale,
    mean_and_deviation,
    stored,
    table_row,
    usable,
)
from qtrain.quantizers.scales import reduce_range

ACROSS_BITS = ("rescale", "table", "keep")
INITIALS = ("lsq", "lsq+")


@dataclasses.dataclass(frozen=True)
class LSQ(GridQuantizer):
    """Learned step size s: v̂ = s · rint(clip(v/s, −Q_N, Q_P)), and with an offset v̂ = s · rint(clip((v − β)/s, …)) + β.

    Signed: Q_N = 2^(b−1), Q_P = 2^(b−1) − 1, and at 1 bit the sign grid {−s, +s}. Unsigned: Q_N = 0, Q_P = 2^b − 1.
    Gradients, by the straight-through rule, for u = (v − β)/s:

    =========  ====================  =====================  ====================
    ..         −Q_N < u < Q_P        u ≤ −Q_N               u ≥ Q_P
    =========  ====================  =====================  ====================
    ∂v̂/∂v      1                     0                      0
    ∂v̂/∂s      rint(u) − u           −Q_N                   Q_P
    ∂v̂/∂β      0                     1                      1
    =========  ====================  =====================  ====================

    At 1 bit the same with Q_N = Q_P = 1 and sign(u) for rint(u): v passes where |u| < 1. The gradient of s (not that of
    β) is multiplied by 1/√(N·Q_P), where N elements share the scale (of activations: with the batch's) and Q_P is that
    of the step's b. Second derivatives are those of the straight-through rule. Nothing flows to the bits. A stored
    scale at or below zero acts as the smallest normal float32, with the gradient of s itself, so that it can come back.

    Parameters: ``scale``; ``offset`` with an offset; and for ``across_bits="rescale"`` the frozen ``bits``.

    Attributes:
      signed: for weights; unsigned is for what follows a ReLU (negative values become 0).
      per: what shares a scale; see `qtrain.quantizers.granularity.layout`.
      offset: learn β, too (LSQ+; there for activations that are not symmetric).
      across_bits: what a scale that was learned at one width means at another.

        * "rescale": s_b = s · 2^(b₀ − b), an exact power of two, for the width b₀ that `init` was given (kept as the
          parameter ``bits``): the covered range −Q_N·s … stays, and all widths train one scale. LSQ's initial range
          grows with √Q_P, so begin at a width that matters: made at 8 bits it is too wide at 2. On the sign grid ±s_1
          is that range's end, larger than what suits 1 bit alone.
        * "table": a scale (and offset) for each of `widths`, of shape [len(widths), …], each with its own initial
          value. A traced width that is not among them takes the nearest one below, else the lowest.
        * "keep": the same s at every width: fewer bits clip more.
      widths: of the table; by default 1 … 8.
      gradient_scale: whether the gradient of s is multiplied by 1/√(N·Q_P).
      initial: "lsq": s = 2⟨|v|⟩/√Q_P, but ⟨|v|⟩ at 1 bit, the least squares solution (Rastegari et al. 2016). "lsq+":
        with an offset the smallest and largest value are the ends of the grid; signed without,
        s = max(|μ − 3σ|, |μ + 3σ|)/2^(b−1); unsigned without, s = max v/Q_P. By default "lsq+" with an offset. (Bhalgat
        et al. refine the activations' by least squares on a batch; we do not.) A tensor of zeros counts as one of ones.

    Native execution: none, arithmetic is float ("fake") only.

    Esser et al., Learned Step Size Quantization, ICLR 2020 (arXiv 1902.08153), eqs. 1–5 and §2.2; Bhalgat et al., LSQ+,
    CVPRW 2020 (arXiv 2004.09576), eqs. 4–8, which leave weights without an offset.

    >>> import jax.numpy as jnp
    >>> q = LSQ(signed=True)
    >>> params = {"scale": jnp.float32(0.5), "bits": jnp.float32(3)}
    >>> print(q(jnp.array([-3.0, -0.6, 0.2, 0.9]), 3, params), q(jnp.array([-3.0, -0.6, 0.2, 0.9]), 2, params))
    [-2.  -0.5  0.   1. ] [-2. -1.  0.  1.]

    Raises:
      UsageError: for a field that holds something it does not allow.
    """

    signed: bool = True
    per: Per = "tensor"
    offset: bool = False
    across_bits: str = "rescale"
    widths: tuple[int, ...] | None = None
    gradient_scale: bool = True
    initial: str | None = None

    def __post_init__(self) -> None:
        if isinstance(self.per, list):
            object.__setattr__(self, "per", tuple(self.per))
        check_per(self.per)
        check_flags(self, "signed", "offset", "gradient_scale")
        if self.across_bits not in ACROSS_BITS:
            hint = did_you_mean(self.across_bits, ACROSS_BITS)
            raise UsageError(f"across_bits={self.across_bits!r}: give one of {ACROSS_BITS}.{hint}")
        if self.initial is None:
            object.__setattr__(self, "initial", "lsq+" if self.offset else "lsq")
        if self.initial not in INITIALS:
            hint = did_you_mean(str(self.initial), INITIALS)
            raise UsageError(f"initial={self.initial!r}: give one of {INITIALS}.{hint}")
        if self.initial == "lsq" and self.offset:
            raise UsageError("initial='lsq' has no initial offset; give 'lsq+' with offset=True")
        if self.across_bits == "table":
            widths = tuple(range(1, 9)) if self.widths is None else tuple(self.widths)
            check_widths(widths)
            object.__setattr__(self, "widths", widths)
        elif self.widths is not None:
            raise UsageError(f"widths={self.widths!r}: only across_bits='table' has widths; leave it out")

    @property
    def learns(self) -> bool:
        """It does."""
        return True

    @property
    def frozen(self) -> frozenset[str]:
        """The width of the scale, where it is rescaled."""
        return frozenset({"bits"}) if self.across_bits == "rescale" else frozenset()

    def describe(self) -> str:
        """``lsq/signed/tensor``, or ``lsq+/…`` by how it begins, and what differs from the usual."""
        name = "lsq+" if self.initial == "lsq+" else "lsq"
        words = [f"{name}/{'signed' if self.signed else 'unsigned'}/{self.per}"]
        words += [self.across_bits] if self.across_bits != "rescale" else []
        words += ["offset"] if self.offset and self.signed else []
        words += ["no offset"] if name == "lsq+" and not self.offset and not self.signed else []
        return " ".join(words)

    def bounds(self, bits: Any) -> tuple[Array, Array]:
        """−Q_N and Q_P at `bits`, float32; signed at 1 bit −1 and 1."""
        return signed_bounds(bits) if self.signed else unsigned_bounds(bits)

    def init(self, x: Array, bits: Any = 8, *, axes: Axes | None = None) -> dict[str, Array]:
        """Initial parameters for a tensor like `x` at `bits`; see ``initial``, and `Quantizer.init`.

        24 bits and above, at which nothing is rounded, count as 8. A table has an initial value for each of its widths,
        whatever `bits` are.
        """
        values, bits, view = calibration(x, bits, self.per, axes)
        if self.across_bits != "table":
            params = {name: as_stored(value, view) for name, value in self._initial(values, bits, view).items()}
            return {**params, "bits": bits.astype(jnp.float32)} if self.across_bits == "rescale" else params
        assert self.widths is not None
        each = [self._initial(values, jnp.asarray(width), view) for width in self.widths]
        return {name: jnp.stack([as_stored(initial[name], view) for initial in each]) for name in each[0]}

    def _initial(self, values: Array, bits: Array, view: Layout) -> dict[str, Array]:
        low, high = self.bounds(bits)
        if self.initial == "lsq":
            typical = usable(reduce_range(values, "absmean", view.axes), values, view)
            return {"scale": typical * jnp.where(self._one_bit(bits), 1.0, 2.0 / jnp.sqrt(high))}
        if not self.offset and self.signed:
            mean, deviation = mean_and_deviation(values, view)
            largest = jnp.maximum(jnp.abs(mean - 3 * deviation), jnp.abs(mean + 3 * deviation))
            return {"scale": usable(largest, values, view) / -low}
        largest = reduce_range(values, "max", view.axes)
        if not self.offset:
            return {"scale": usable(largest, values, view) / high}
        smallest = reduce_range(values, "min", view.axes)
        scale = usable(largest - smallest, values, view) / (high - low)
        return {"scale": scale, "offset": smallest - low * scale}

    def _one_bit(self, bits: Array) -> Array:
        return (bits == 1) & self.signed

    def _check_width(self, bits: Any) -> None:
        if self.widths is None or not isinstance(bits, int | float | np.ndarray | np.number):
            return
        for width in np.ravel(bits):
            if width < FLOAT_BITS and width not in self.widths:
                raise UsageError(
                    f"bits: {width} is not among the widths {self.widths} that {self.describe()!r} has scales for; "
                    "add it to widths"
                )

    def _grid(self, values: Array, bits: Array, view: Layout, params: Mapping[str, Array] | None) -> Grid:
        low, high = self.bounds(bits)
        scale = self._at_width(params, "scale", bits, view)
        if self.across_bits == "rescale":
            assert params is not None
            if "bits" not in params:
                raise UsageError(f"{self.describe()}: parameter 'bits' is missing; it is the width that 'scale' is for")
            own = jnp.minimum(lax.stop_gradient(params["bits"]), FLOAT_BITS)
            scale = scale * exact_power(jnp.round(own) - jnp.minimum(bits, FLOAT_BITS))
        if self.gradient_scale:
            scale = scaled_gradient(scale, 1.0 / jnp.sqrt(elements_per_scale(view) * high))
        offset = self._at_width(params, "offset", bits, view) if self.offset else None
        return Grid(floored(scale), low, high, self._one_bit(bits), offset)

    def _at_width(self, params: Mapping[str, Array] | None, name: str, bits: Array, view: Layout) -> Array:
        if self.widths is None:
            return stored(self, params, name, view)
        table = stored(self, params, name, view, (len(self.widths),))
        index, value = table_row(self.widths, bits), table[0]
        for row in range(1, len(self.widths)):
            value = jnp.where(index >= row, table[row], value)
        return value
