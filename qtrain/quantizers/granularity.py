"""Which elements of a tensor share a scale."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax

from qtrain.errors import UsageError, did_you_mean

Array = jax.Array
Per = str | tuple[int, ...] | int

NAMES = ("tensor", "channel", "row", "column")


def check_per(per: Per) -> None:
    """Refuse a granularity that is neither a known name, a tuple of axes nor a group size.

    Raises:
      UsageError: with what is allowed.
    """
    if isinstance(per, str) and per in NAMES:
        return
    if isinstance(per, tuple) and all(isinstance(axis, int) and not isinstance(axis, bool) for axis in per):
        return
    if isinstance(per, int) and not isinstance(per, bool) and per >= 1:
        return
    hint = did_you_mean(per, NAMES) if isinstance(per, str) else ""
    raise UsageError(
        f"per={per!r}: give one of {NAMES}, a tuple of the axes that keep scales of their own, or a group size.{hint}"
    )


@dataclasses.dataclass(frozen=True)
class Layout:
    """How a tensor is viewed for its scales: reshaped to `shape`, and reduced over `axes` with the axes kept."""

    shape: tuple[int, ...]
    axes: tuple[int, ...]

    @property
    def scale_shape(self) -> tuple[int, ...]:
        """Shape of the scales, one for each group of elements that share one."""
        return tuple(1 if axis in self.axes else size for axis, size in enumerate(self.shape))

    @property
    def num_scales(self) -> int:
        """Number of scales."""
        return math.prod(self.scale_shape)


def layout(shape: Sequence[int], per: Per, contracted: Sequence[int] | None = None) -> Layout:
    """The layout for `per`, which is named from the contraction where there is one.

    * ``"tensor"``: one scale.
    * ``"channel"``: a scale is shared along the contracted axes only; without a contraction, one scale per index of the
      last axis (a vector knows one scale only).
    * ``"row"``, ``"column"``: one scale per index of the first, of the last axis (of a vector: one scale).
    * a tuple: one scale per index of these axes.
    * an int g: every g consecutive elements along the last contracted axis share one (without a contraction: along the
      axis before the last, the input axis of a kernel as Flax lays it out). The tensor is viewed with that axis split.

    Raises:
      UsageError: for an axis out of range, or a length that the group size does not divide.
    """
    shape = tuple(shape)
    ndim = len(shape)
    every = tuple(range(ndim))
    if contracted is not None:
        contracted = tuple(sorted(axis % ndim for axis in contracted))
    if per == "channel" and contracted is not None:
        return Layout(shape, contracted)
    if per == "tensor" or (isinstance(per, str) and ndim < 2):
        return Layout(shape, every)
    if per == "channel":
        return Layout(shape, every[:-1])
    if per == "row":
        return Layout(shape, every[1:])
    if per == "column":
        return Layout(shape, every[:-1])
    if isinstance(per, tuple):
        if any(not -ndim <= axis < ndim for axis in per):
            raise UsageError(f"per={per}: an axis is out of range for a tensor of shape {shape}")
        kept = {axis % ndim for axis in per}
        return Layout(shape, tuple(axis for axis in every if axis not in kept))
    assert isinstance(per, int)
    split = max(contracted) if contracted else max(ndim - 2, 0)
    if ndim == 0 or shape[split] % per:
        raise UsageError(f"per={per}: the group size does not divide axis {split} of a tensor of shape {shape}")
    blocked = (*shape[:split], shape[split] // per, per, *shape[split + 1 :])
    return Layout(blocked, (split + 1,))


def layout_of(quantizer: Any, shape: Sequence[int], contracted: Sequence[int] | None = None) -> Layout:
    """The layout of a quantizer's scales: by rules of its own where it has a `layout`, else for its ``per``.

    Raises:
      UsageError: where its granularity does not fit the shape.
    """
    own = getattr(quantizer, "layout", None)
    return layout(shape, quantizer.per, contracted) if own is None else own(shape)
