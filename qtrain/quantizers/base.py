"""What every quantizer is: a frozen value with a pure call, and the checks and gradients they share."""

from __future__ import annotations

import abc
import operator
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qtrain.errors import UsageError
from qtrain.quantizers.coded import Coded

Array = jax.Array
Axes = Sequence[int]

FLOAT_BITS = 24
"""Bits at or above this leave a tensor as it is: a float32 significand has 24 bits, so no finer grid exists."""


class Quantizer(abc.ABC):
    """A function from an array and a width to the array on that width's grid.

    Subclasses are frozen, hashable dataclasses of static choices: everything that varies during training (bits,
    ranges, noise) is an argument and may be traced. See `Uniform`, and the README for a quantizer in 20 lines.
    """

    @property
    def stochastic(self) -> bool:
        """Whether a call needs a `key`."""
        return False

    @property
    def ema(self) -> float | None:
        """Momentum of the range statistics that are kept in ``quant_stats``; None keeps none."""
        return None

    @property
    def delayed(self) -> bool:
        """Whether training quantizes with the range kept in ``quant_stats``, that of the steps before."""
        return False

    @property
    def learns(self) -> bool:
        """Whether it has parameters of its own, kept in ``quant``: `init` makes them, a call needs them."""
        return False

    @property
    def frozen(self) -> frozenset[str]:
        """Names of those parameters that no optimizer is to move."""
        return frozenset()

    def init(self, x: Array, bits: Any = 8, *, axes: Axes | None = None) -> dict[str, Array]:
        """The parameters to begin with for a tensor like `x` at `bits`; empty where it learns none.

        Args:
          x: weights, or the activations of a calibration batch.
          bits: the width that training begins with; may be traced.
          axes: the contracted axes, as for a call.

        Returns:
          name → float32 array. A single scale has shape ``()``, several have the shape that broadcasts against `x`.
        """
        return {}

    @property
    def chooses_width(self) -> bool:
        """Whether it decides for itself how many bits a tensor takes: `width` says."""
        return False

    def width(
        self,
        x: Array | None,
        bits: Any,
        params: Mapping[str, Array] | None = None,
        *,
        axes: Axes | None = None,
        rounded: bool = True,
    ) -> Array:
        """The bits that an element takes, on average over the tensor: float32 scalar, where `chooses_width`.

        Args:
          x: the tensor; may be None where the width depends on parameters alone.
          bits: the step's, which a width that is learned does not exceed.
          params: what was learned.
          axes: the contracted axes, as for a call.
          rounded: whole bits as they are in force; False: a width that is learned as it stands before it is rounded.
        """
        raise NotImplementedError(f"{type(self).__name__} takes the width it is given")

    @property
    def code_dtype(self) -> str | None:
        """What `coded` gives: "int8", the name of an 8-bit float, or None where there are no such codes."""
        return None

    def coded(
        self,
        x: Array,
        bits: Any,
        params: Mapping[str, Array] | None = None,
        *,
        key: Array | None = None,
        axes: Axes | None = None,
    ) -> Coded:
        """`x` in 8 bits an element, for native execution: what it decodes to is what a call gives, at up to 8 bits.

        Arguments are those of a call. Widths above 8 are not checked, and would overflow.
        """
        raise NotImplementedError(f"{type(self).__name__} has no 8-bit codes")

    @abc.abstractmethod
    def __call__(
        self,
        x: Array,
        bits: Any,
        params: Mapping[str, Array] | None = None,
        *,
        key: Array | None = None,
        axes: Axes | None = None,
    ) -> Array:
        """`x` fake-quantized to `bits`.

        Args:
          x: any shape, float32 or bfloat16; the result has the same.
          bits: whole number of bits, a Python number or an array that broadcasts against the scale; may be traced.
          params: what the quantizer keeps between calls (a calibrated range, learned scales); None for none.
          key: PRNG key (typed, or the older uint32 pair), or a uint32 [2] seed of `qtrain.quantizers.noise`.
          axes: the axes of `x` that are contracted by the operation it feeds.
        """

    def describe(self) -> str:
        """A few words for the plan."""
        return type(self).__name__


def static_bits(bits: Any) -> int | None:
    """`bits` as an int when it is a concrete Python or numpy number (checked), or None when it is an array.

    Raises:
      UsageError: for a number that is not whole, or below 1.
    """
    if isinstance(bits, jax.Array):
        return None
    message = f"bits: {bits!r} is not a width; give a whole number of at least 1 (24 and above: float)"
    try:
        if isinstance(bits, bool | np.bool_ | str | bytes):
            raise TypeError
        if isinstance(bits, np.ndarray) and bits.ndim:
            check_bits_array(bits)
            return None
        number = int(bits) if float(bits) == int(bits) else operator.index(bits)
    except (TypeError, ValueError, OverflowError):
        raise UsageError(message) from None
    if number < 1:
        raise UsageError(message)
    return number


def check_bits_array(bits: np.ndarray) -> None:
    """Refuse a concrete vector of widths with an entry that is not a whole number of at least 1."""
    if not np.all((bits >= 1) & (bits == np.floor(bits))):
        raise UsageError("bits: an entry is not a whole number of at least 1")


@jax.custom_jvp
def straight_through(x: Array, quantized: Array) -> Array:
    """`quantized`; its derivative is that of `x` (Bengio et al. 2013): ∂/∂x = 1 everywhere, in every order and mode."""
    return quantized


@straight_through.defjvp
def _straight_through_jvp(primals: tuple[Array, Array], tangents: tuple[Array, Array]) -> tuple[Array, Array]:
    return straight_through(*primals), tangents[0]


@jax.custom_jvp
def straight_through_inside(x: Array, quantized: Array, inside: Array) -> Array:
    """`quantized`; its derivative is that of `x` where `inside` is true and is zero elsewhere."""
    return quantized


@straight_through_inside.defjvp
def _inside_jvp(primals: tuple[Array, Array, Array], tangents: tuple[Array, Any, Any]) -> tuple[Array, Array]:
    inside, x_dot = primals[2], tangents[0]
    return straight_through_inside(*primals), jnp.where(inside, x_dot, jnp.zeros_like(x_dot))


def power_of_two(exponent: Array) -> Array:
    """2^exponent for whole exponents 0…24, exactly, as float32: by integer shift, since exp2 on floats is not exact."""
    return jnp.left_shift(jnp.int32(1), exponent.astype(jnp.int32)).astype(jnp.float32)
