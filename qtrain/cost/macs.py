"""Multiply-accumulates of one dot or convolution equation."""

from __future__ import annotations

import math
from typing import Any, Literal

import jax.numpy as jnp


def macs_of(eqn: Any) -> tuple[Literal["dot", "conv"], int, int]:
    """Kind, MACs of one execution, and contraction length (products summed per output element).

    A product of complex numbers is four real MACs.
    """
    kind: Literal["dot", "conv"] = "dot" if eqn.primitive.name == "dot_general" else "conv"
    macs, contraction = (_dot if kind == "dot" else _conv)(eqn)
    complex_product = all(jnp.issubdtype(v.aval.dtype, jnp.complexfloating) for v in eqn.invars[:2])
    return kind, macs * (4 if complex_product else 1), contraction


def _dot(eqn: Any) -> tuple[int, int]:
    (contracted, _), _ = eqn.params["dimension_numbers"]
    contraction = math.prod(eqn.invars[0].aval.shape[axis] for axis in contracted)
    return math.prod(eqn.outvars[0].aval.shape) * contraction, contraction


def _conv(eqn: Any) -> tuple[int, int]:
    """Output elements × taps × input channels per group: every tap counts, on padding too, as the field counts.

    The kernel's input-feature axis is already divided by ``feature_group_count``, and the output's elements by
    ``batch_group_count``. Along an axis of a transposed convolution (``lhs_dilation`` > 1) most taps meet inserted
    zeros; there each input element meets each tap once (per stride): the conventional count of a deconvolution.
    """
    lhs, kernel, out = eqn.invars[0].aval.shape, eqn.invars[1].aval.shape, eqn.outvars[0].aval.shape
    numbers = eqn.params["dimension_numbers"]
    batch, features, *spatial = numbers.out_spec
    macs = out[batch] * out[features] * kernel[numbers.rhs_spec[1]]
    for out_axis, lhs_axis, kernel_axis, dilation, stride in zip(
        spatial,
        numbers.lhs_spec[2:],
        numbers.rhs_spec[2:],
        eqn.params["lhs_dilation"],
        eqn.params["window_strides"],
        strict=True,
    ):
        if dilation > 1:
            macs *= -(-lhs[lhs_axis] * kernel[kernel_axis] // stride)
        else:
            macs *= out[out_axis] * kernel[kernel_axis]
    return macs, math.prod(kernel) // kernel[numbers.rhs_spec[0]]
