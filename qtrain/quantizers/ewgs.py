"""EWGS: element-wise gradient scaling, around any quantizer on a grid."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from qtrain.errors import UsageError
from qtrain.quantizers.base import FLOAT_BITS, Array, Axes, Quantizer, static_bits

_NEEDED = ("position", "transitions", "bounds", "encode", "decode", "scale")


@dataclasses.dataclass(frozen=True)
class EWGS(Quantizer):
    """Another quantizer, whose gradient g_q to its input becomes g_x = g_q · (1 + δ · sign(g_q) · (x_n − x_q)).

    x_n is the input in the unit of the authors' code: the range of the grid is [0, 1], so that x_n = clip(p, first,
    last level)/(number of levels − 1) for the position p in steps, and |x_n − x_q| is at most half a step of
    1/(2^b − 1). A step downhill, −g_x, of an element above its level is longer downwards than upwards: elements move to
    their level faster than away from it.

    g_q is what the quantizer passes to its input: nothing where it clips. Its parameters keep their own gradient of the
    plain straight-through rule (the authors' clip levels get theirs through g_x). Values are the wrapped quantizer's.
    The scaling is not linear in g: reverse mode only, and no second derivatives through it.

    Parameters: those of the quantizer, and ``delta``, a frozen float32 scalar, to be set while training; see
    `ewgs_delta`.

    Attributes:
      quantizer: `Uniform` with deterministic rounding and a range of the tensor's own, or one of the learned ones.
      delta: δ to begin with, at least 0; the authors' 1e-3 where they do not follow the Hessian.

    Native execution: none, arithmetic is float ("fake") only.

    Lee, Kim and Ham, Network Quantization with Element-wise Gradient Scaling, CVPR 2021 (arXiv 2104.00903), eqs. 4–8.

    >>> import jax, jax.numpy as jnp
    >>> from qtrain.quantizers import PACT
    >>> q = EWGS(PACT(initial=3.0), delta=0.3)
    >>> x = jnp.array([0.4, 0.6])
    >>> print(jax.grad(lambda x: q(x, 2, q.init(x)).sum())(x))
    [1.04 0.96]

    Raises:
      UsageError: for a quantizer it cannot wrap, or a delta that is negative.
    """

    quantizer: Quantizer
    delta: float = 1e-3

    def __post_init__(self) -> None:
        inner = self.quantizer
        if not isinstance(inner, Quantizer) or isinstance(inner, EWGS) or not all(hasattr(inner, n) for n in _NEEDED):
            raise UsageError(
                f"quantizer={inner!r}: EWGS wraps a quantizer on a grid: Uniform, LSQ, TRS, PACT or DoReFa"
            )
        if inner.chooses_width:
            raise UsageError(
                f"quantizer={inner.describe()!r}: it chooses its own width, and EWGS scales by that of the step; give "
                "LSQ, TRS or PACT"
            )
        if inner.stochastic or inner.ema is not None:
            raise UsageError(f"quantizer={inner.describe()!r}: EWGS needs deterministic rounding and no running range")
        if not isinstance(self.delta, int | float) or not 0.0 <= self.delta < math.inf:
            raise UsageError(f"delta={self.delta!r}: give a number of at least 0")

    @property
    def _inner(self) -> Any:
        return self.quantizer

    @property
    def per(self) -> Any:
        """What shares a scale."""
        return self._inner.per

    @property
    def learns(self) -> bool:
        """It keeps delta."""
        return True

    @property
    def frozen(self) -> frozenset[str]:
        """Delta, and what the quantizer freezes."""
        return self.quantizer.frozen | {"delta"}

    def describe(self) -> str:
        """``ewgs/`` and the quantizer."""
        return f"ewgs/{self.quantizer.describe()}"

    def init(self, x: Array, bits: Any = 8, *, axes: Axes | None = None) -> dict[str, Array]:
        """The quantizer's parameters, and delta."""
        return {**self.quantizer.init(x, bits, axes=axes), "delta": jnp.float32(self.delta)}

    def __call__(
        self,
        x: Array,
        bits: Any,
        params: Mapping[str, Array] | None = None,
        *,
        key: Array | None = None,
        axes: Axes | None = None,
    ) -> Array:
        """The wrapped quantizer's value of `x`; see the class and `Quantizer.__call__`.

        Raises:
          UsageError: as the quantizer's call, and without the parameter delta.
        """
        concrete = static_bits(bits)
        if concrete is not None and concrete >= FLOAT_BITS:
            return x
        if params is None or "delta" not in params:
            raise UsageError(f"{self.describe()}: it needs its parameter 'delta'; pass params=, made by init(x, bits)")
        own = self._own(params)
        position = lax.stop_gradient(self._inner.position(lax.stop_gradient(x), bits, own, axes=axes))
        first, last = self._inner.transitions(bits)
        low, high = first - 0.5, last + 0.5
        inside = jnp.clip(position, low, high)
        apart = (inside - jnp.round(inside)) / (high - low)
        if concrete is None:
            apart = jnp.where(jnp.asarray(bits) >= FLOAT_BITS, 0.0, apart)
        return self.quantizer(_scaled(x, apart, lax.stop_gradient(params["delta"])), bits, own, axes=axes)

    def encode(
        self, x: Array, bits: Any, params: Mapping[str, Array] | None = None, *, axes: Axes | None = None
    ) -> tuple[Array, Any]:
        """The quantizer's codes and scale."""
        return self._inner.encode(x, bits, self._own(params), axes=axes)

    def decode(self, codes: Array, scale: Any, *, axes: Axes | None = None) -> Array:
        """The values of the quantizer's codes."""
        return self._inner.decode(codes, scale, axes=axes)

    def position(
        self, x: Array, bits: Any, params: Mapping[str, Array] | None = None, *, axes: Axes | None = None
    ) -> Array:
        """Where `x` lies on the quantizer's grid, in steps."""
        return self._inner.position(x, bits, self._own(params), axes=axes)

    def transitions(self, bits: Any) -> tuple[Array, Array]:
        """The quantizer's lowest and highest transition."""
        return self._inner.transitions(bits)

    def bounds(self, bits: Any) -> tuple[Array, Array]:
        """The quantizer's lowest and highest code."""
        return self._inner.bounds(bits)

    def scale(
        self, x: Array, bits: Any, params: Mapping[str, Array] | None = None, *, axes: Axes | None = None
    ) -> Array:
        """The quantizer's step size."""
        return self._inner.scale(x, bits, self._own(params), axes=axes)

    def _own(self, params: Mapping[str, Array] | None) -> dict[str, Array] | None:
        """The quantizer's own parameters; one that has none takes None."""
        return {name: value for name, value in (params or {}).items() if name != "delta"} or None


def ewgs_delta(hessian_trace: Any, size: int, gradient_std: Any) -> Array:
    """The paper's δ = max(0, (Tr H/N)/(3·std g)), float32: the curvature over the size of a large gradient.

    Args:
      hessian_trace: the trace of the loss's Hessian with respect to the quantized tensor; may be traced.
      size: its number of elements N.
      gradient_std: standard deviation of the elements of the gradient that reaches it. Where it is 0, so is δ.

    Raises:
      UsageError: for a size below 1.

    >>> print(ewgs_delta(12.0, 100, 0.5))
    0.08
    """
    if size < 1:
        raise UsageError(f"size={size!r}: give the number of elements, at least 1")
    spread = 3.0 * jnp.asarray(gradient_std, jnp.float32)
    safe = jnp.where(spread > 0, spread, 1.0)
    return jnp.where(spread > 0, jnp.maximum(jnp.asarray(hessian_trace, jnp.float32) / size / safe, 0.0), 0.0)


@jax.custom_vjp
def _scaled(x: Array, apart: Array, delta: Array) -> Array:
    """`x`; its cotangent g becomes g + δ·|g|·apart."""
    return x


def _scaled_forward(x: Array, apart: Array, delta: Array) -> tuple[Array, tuple[Array, Array]]:
    return x, (apart, delta)


def _scaled_backward(saved: tuple[Array, Array], g: Array) -> tuple[Array, None, None]:
    apart, delta = saved
    wide = g.astype(jnp.float32)
    return (wide + delta * jnp.abs(wide) * apart).astype(g.dtype), None, None


_scaled.defvjp(_scaled_forward, _scaled_backward)
