"""The two contractions that are quantized, with their static choices bound."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
from jax import lax

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class Dot:
    """``lax.dot_general`` with its static choices bound: a hashable function of two operands."""

    dimension_numbers: Any
    precision: Any = None
    preferred_element_type: Any = None
    out_sharding: Any = None

    def __call__(self, lhs: Array, rhs: Array) -> Array:
        """The contraction."""
        extra = {} if self.out_sharding is None else {"out_sharding": self.out_sharding}
        return lax.dot_general(
            lhs,
            rhs,
            self.dimension_numbers,
            precision=self.precision,
            preferred_element_type=self.preferred_element_type,
            **extra,
        )

    @property
    def contracted(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The contracted axes of each operand."""
        (lhs, rhs), _ = self.dimension_numbers
        return tuple(lhs), tuple(rhs)

    @property
    def batch(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The batch axes of each operand."""
        _, (lhs, rhs) = self.dimension_numbers
        return tuple(lhs), tuple(rhs)

    def free(self, lhs_ndim: int, rhs_ndim: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The axes of each operand that are neither contracted nor batch axes."""
        taken = [set(c) | set(b) for c, b in zip(self.contracted, self.batch, strict=True)]
        return (
            tuple(i for i in range(lhs_ndim) if i not in taken[0]),
            tuple(i for i in range(rhs_ndim) if i not in taken[1]),
        )


@dataclasses.dataclass(frozen=True)
class Conv:
    """``lax.conv_general_dilated`` with its static choices bound: a hashable function of two operands."""

    window_strides: tuple[int, ...]
    padding: Any
    lhs_dilation: tuple[int, ...] | None = None
    rhs_dilation: tuple[int, ...] | None = None
    dimension_numbers: Any = None
    feature_group_count: int = 1
    batch_group_count: int = 1
    precision: Any = None
    preferred_element_type: Any = None

    def __call__(self, lhs: Array, rhs: Array) -> Array:
        """The convolution."""
        return lax.conv_general_dilated(lhs, rhs, **{f.name: getattr(self, f.name) for f in dataclasses.fields(self)})

    @property
    def specs(self) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
        """Where lhs has its batch, feature and spatial axes; rhs output, input and spatial; the result batch, ..."""
        ndim = len(self.window_strides) + 2
        numbers = lax.conv_dimension_numbers((1,) * ndim, (1,) * ndim, self.dimension_numbers)
        return tuple(numbers.lhs_spec), tuple(numbers.rhs_spec), tuple(numbers.out_spec)

    @property
    def contracted(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The axes of each operand along which one scale is shared.

        A pixel is contracted by some outputs and not by others, so a scale per pixel does not factor out of the sum:
        all axes but the examples (lhs) and the filters (rhs).
        """
        lhs, rhs, _ = self.specs
        axes = range(len(lhs))
        return tuple(i for i in axes if i != lhs[0]), tuple(i for i in axes if i != rhs[0])

    @property
    def channels_last(self) -> bool:
        """Whether the operands are laid out as Flax does: N…C, …IO and N…C."""
        ndim = len(self.window_strides) + 2
        features_last = (0, ndim - 1, *range(1, ndim - 1))
        return self.specs == (features_last, (ndim - 1, ndim - 2, *range(ndim - 2)), features_last)

    def explicit(self, lhs_shape: tuple[int, ...], rhs_shape: tuple[int, ...]) -> Conv:
        """The same convolution with padding and dilations as numbers."""
        lhs, rhs, _ = self.specs
        spatial = range(len(self.window_strides))
        rhs_dilation = self.rhs_dilation or (1,) * len(spatial)
        padding = self.padding
        if isinstance(padding, str):
            windows = [(rhs_shape[rhs[2 + i]] - 1) * rhs_dilation[i] + 1 for i in spatial]
            padding = lax.padtype_to_pads(
                [lhs_shape[lhs[2 + i]] for i in spatial], windows, self.window_strides, padding
            )
        return dataclasses.replace(
            self,
            padding=tuple((int(low), int(high)) for low, high in padding),
            lhs_dilation=self.lhs_dilation or (1,) * len(spatial),
            rhs_dilation=rhs_dilation,
        )


Contraction = Dot | Conv
