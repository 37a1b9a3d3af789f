"""Trained parameters of a quantizer: how they are kept, and the statistics of a tensor that they begin with."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from qtrain.errors import UsageError
from qtrain.quantizers.base import FLOAT_BITS, Array, Axes, Quantizer, static_bits
from qtrain.quantizers.granularity import Layout, Per, layout
from qtrain.quantizers.scales import SMALLEST, reduce_range

_WITHOUT_WIDTH = 8  # a width that rounds nothing has no parameters of its own; this is `Quantizer.init`'s default


def stored(
    quantizer: Quantizer, params: Mapping[str, Array] | None, name: str, view: Layout, leading: tuple[int, ...] = ()
) -> Array:
    """The parameter `name`, float32, in the shape that broadcasts against the viewed tensor (after `leading`).

    Raises:
      UsageError: where there is none, or it was made for another tensor.
    """
    if params is None or name not in params:
        raise UsageError(
            f"{quantizer.describe()}: it needs its parameter {name!r}; pass params=, which init(x, bits) makes"
        )
    value = jnp.asarray(params[name], jnp.float32)
    expected = (*leading, *view.scale_shape)
    if value.shape != expected and (view.num_scales != 1 or value.shape != leading):
        raise UsageError(
            f"{quantizer.describe()}: {name!r} has shape {value.shape}, and a tensor viewed as {view.shape} needs "
            f"{expected}; make it by init on such a tensor, or share one scale with per='tensor'"
        )
    return value.reshape(expected)


def as_stored(value: Array, view: Layout) -> Array:
    """`value`, one for each scale, in the shape it is kept in: ``()`` for a single one."""
    value = lax.stop_gradient(value).astype(jnp.float32)
    return value.reshape(()) if view.num_scales == 1 and value.size == 1 else value


def calibration(x: Array, bits: Any, per: Per, axes: Axes | None) -> tuple[Array, Array, Layout]:
    """What an `init` works on: x in float32 and in its view, the bits (8 for those that round nothing), the view."""
    concrete = static_bits(bits)
    view = layout(x.shape, per, axes)
    bits = jnp.asarray(bits if concrete is None else concrete)
    bits = jnp.where(bits >= FLOAT_BITS, _WITHOUT_WIDTH, bits)
    return lax.stop_gradient(x).reshape(view.shape).astype(jnp.float32), bits, view


def elements_per_scale(view: Layout) -> int:
    """How many elements share a scale; at least 1."""
    return max(math.prod(view.shape[axis] for axis in view.axes), 1)


def mean_and_deviation(values: Array, view: Layout) -> tuple[Array, Array]:
    """Mean and standard deviation (of the population) of the elements that share a scale."""
    count = elements_per_scale(view)
    # Of values of at most 1, whose squares neither overflow nor vanish.
    largest = jnp.max(jnp.abs(values), axis=view.axes, keepdims=True, initial=0.0)
    size = jnp.where(largest < SMALLEST, 1.0, largest)
    values = values / size
    mean = jnp.sum(values, axis=view.axes, keepdims=True) / count
    deviation = jnp.sqrt(jnp.sum((values - mean) ** 2, axis=view.axes, keepdims=True) / count)
    return mean * size, deviation * size


def usable(statistic: Array, values: Array, view: Layout) -> Array:
    """`statistic`, or where it is nothing but rounding mean|x|; of a tensor of zeros 1, for want of a magnitude."""
    typical = reduce_range(values, "absmean", view.axes)
    typical = jnp.where(typical < SMALLEST, 1.0, typical)
    return jnp.where(statistic < 1e-5 * typical, typical, statistic)


def check_flags(quantizer: Any, *names: str) -> None:
    """Refuse fields of these names that are not True or False: a word from a config would silently count as True."""
    for name in names:
        if not isinstance(getattr(quantizer, name), bool):
            raise UsageError(f"{name}={getattr(quantizer, name)!r}: give True or False")


def check_widths(widths: tuple[int, ...]) -> None:
    """Refuse a table of widths that is empty, unsorted, or holds what is no width below 24."""
    whole = all(isinstance(width, int | np.integer) and not isinstance(width, bool) for width in widths)
    if not widths or not whole or list(widths) != sorted(set(widths)) or widths[0] < 1 or widths[-1] >= FLOAT_BITS:
        raise UsageError(f"widths={widths!r}: give different whole numbers of bits from 1 to 23, ascending")


def table_row(widths: Sequence[int], bits: Any) -> Array:
    """The row of `bits` in a table of ascending `widths`, int32: the nearest width at or below, else the lowest.

    >>> print(table_row((2, 4, 8), jnp.array([1, 2, 5, 8, 16])))
    [0 0 1 2 2]
    """
    row = jnp.zeros(jnp.shape(bits), jnp.int32)
    for width in widths[1:]:
        row = row + (bits >= width)
    return row


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RowInUse:
    """Which row of a variable a step uses.

    Attributes:
      axis: the variable's axis of rows; static.
      index: int32, the row; −1: none.
    """

    axis: int = dataclasses.field(metadata={"static": True})
    index: Array
