"""The terms: what of quantized weights can be penalised."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from qtrain.inject import Weight
from qtrain.precision import Precision
from qtrain.quantizers import FLOAT_BITS, Nested, layout_of
from qtrain.quantizers.nested import extremes

Array = jax.Array


def dampening(weights: Sequence[Weight], params: Any, quant: Any, precision: Precision) -> Array:
    """Σ (sg(ŵ) − clip(w))² over the quantized weights: draws each latent weight to the middle of its bin.

    The gradient of a weight inside its grid is 2·(w − ŵ); outside, where both are the grid's end, it is 0; scales get
    none. In squared units of the weights. Weights at 24 bits and above have no grid, and no part in it. Nagel et al.,
    "Overcoming Oscillations in Quantization-Aware Training", ICML 2022 (arXiv 2203.11086), eq. 5; their coefficient
    rises to 0.1 over the run: ``schedule="cosine_up"``. Not for quantizers that choose their width (`unsuited`): the
    levels of `Nested` are the edges of its bins, and the ends of `LearnedWidth` move; nor for small floats, nor for
    stochastic rounding, which has no bins.
    """
    total = jnp.zeros(())
    held = jax.lax.stop_gradient({"params": params, "quant": quant})
    for weight in weights:
        bits = weight.bits(precision)
        if bits is None:
            continue
        grid = jnp.minimum(jnp.asarray(bits), FLOAT_BITS - 1)
        quantized = weight.apply("__call__", held["params"], held["quant"], grid)
        position = weight.apply("position", held["params"], held["quant"], grid)
        first, last = weight.quantizer.transitions(grid)  # type: ignore[attr-defined]
        inside = (position >= first - 0.5) & (position <= last + 0.5) & (jnp.asarray(bits) < FLOAT_BITS)
        away = (quantized - weight.value(params)).astype(jnp.float32)
        total += jnp.sum(jnp.where(inside, jnp.square(away), 0.0))
    return total


def inverse_scale(weights: Sequence[Weight], params: Any, quant: Any, precision: Precision) -> Array:
    """Σ 1/s over every scale s of the weights and biases that learn one: draws steps to be coarse.

    Differentiable to the scales, −1/s² each, and to nothing else. s is the step in force, in units of the weights: of
    `LearnedWidth` s = r/2^(b̄−1) (to r and not to b), of `LSQ` with its own factor on the gradient. A scale that a stack
    of layers shares counts once for each of them. Weights at 24 bits and above have no part in it.
    """
    total = jnp.zeros(())
    held = jax.lax.stop_gradient(params)
    for weight in _with_learned_scale(weights):
        bits = weight.bits(precision)
        if bits is not None:
            total += _total(1.0 / _scale(weight, held, quant, bits), bits)
    return total


def bin_count(weights: Sequence[Weight], params: Any, quant: Any, precision: Precision) -> Array:
    """Σ (max P − min P)/s over the groups that share a learned scale s: a bound on levels beyond the first.

    Differentiable to the scales, −(max P − min P)/s², and to the largest and the smallest element of each group, ±1/s
    (shared by equal ones): it draws in outliers and makes steps coarse. For a quantizer that clips it counts the bins
    that P spans, not those that are left. Scales and stacks as for `inverse_scale`. Weights at 24 bits and above have
    no part in it.
    """
    total = jnp.zeros(())
    held = jax.lax.stop_gradient(params)
    for weight in _with_learned_scale(weights):
        bits = weight.bits(precision)
        if bits is None or not weight.size:
            continue
        leading, own = weight.shape[: weight.stacked], weight.shape[weight.stacked :]
        view = layout_of(weight.quantizer, own, weight.axes)
        values = weight.value(params).astype(jnp.float32).reshape(leading + view.shape)
        axes = tuple(axis + weight.stacked for axis in view.axes)
        total += _total(_span(axes, values) / _scale(weight, held, quant, bits), bits)
    return total


def deviation(weights: Sequence[Weight], params: Any, quant: Any, precision: Precision) -> Array:
    """Σ mean|P − P_r|² over the tensors that learn a scale: holds steps fine where the other terms make them coarse.

    The mean is over a tensor (each layer of a stack is one), so that a bias counts as a kernel does; in squared units
    of the weights. Differentiable as the quantizer itself is, straight through. To the scales: of `Nested` whatever its
    `scale_gradient`, 2·s·(P/s − ⌊P/s⌋)² a mean, never negative, which descent makes finer. To P where the quantizer
    clips it, 2·(P − P_r); inside the grid nothing, since P and P_r move together (`dampening` is what draws them). Of
    `LearnedWidth` to r and b. Weights at 24 bits and above do not deviate.
    """
    total = jnp.zeros(())
    for weight in _with_learned_scale(weights):
        bits = weight.bits(precision)
        if bits is None or not weight.size:
            continue
        # A ratio of the term's own gradient to P would say nothing of the loss.
        method = "by_loss" if isinstance(weight.quantizer, Nested) else "__call__"
        away = weight.value(params) - weight.apply(method, params, quant, bits)
        total += jnp.sum(jnp.square(away.astype(jnp.float32))) / math.prod(weight.shape[weight.stacked :])
    return total


def unscaled(weights: Sequence[Weight]) -> str | None:
    """Why terms of learned scales cannot be had; None where they can."""
    if _with_learned_scale(weights):
        return None
    return "no quantizer of a weight learns a scale; quantize weights by 'nested/tensor', 'learned_width' or 'lsq'"


def unsuited(weights: Sequence[Weight]) -> str | None:
    """Why `dampening` cannot be had; None where it can."""
    for weight in weights:
        quantizer = weight.quantizer
        if quantizer.chooses_width or quantizer.stochastic or not hasattr(quantizer, "position"):
            return f"{weight.name!r} is quantized by {quantizer.describe()!r}, whose bins it has no middle of"
    return None


def _with_learned_scale(weights: Sequence[Weight]) -> list[Weight]:
    return [weight for weight in weights if _learns_scale(weight)]


def _learns_scale(weight: Weight) -> bool:
    quantizer = weight.quantizer
    if not quantizer.learns or "scale" in quantizer.frozen:
        return False
    own = jax.ShapeDtypeStruct(weight.shape[weight.stacked :], jnp.float32)
    return "scale" in jax.eval_shape(lambda x: quantizer.init(x, axes=weight.axes), own)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _span(axes: tuple[int, ...], values: Array) -> Array:
    """max − min over `axes`, kept. Its gradient, in reverse mode only, is theirs, in fewer passes over the values."""
    lowest, highest = extremes(values, axes)
    return highest - lowest


def _span_forward(axes: tuple[int, ...], values: Array) -> tuple[Array, Array]:
    return _span(axes, values), values


def _span_backward(axes: tuple[int, ...], values: Array, g: Array) -> tuple[Array]:
    lowest, highest = extremes(values, axes)
    # 1 at the largest, −1 at the smallest, and 0 where all are equal.
    end = (values == highest).astype(jnp.float32) - (values == lowest).astype(jnp.float32)
    both, more = (jnp.sum(part, axis=axes, keepdims=True) for part in (end * end, end))
    above, below = (g / jnp.maximum(0.5 * (both + sign * more), 1.0) for sign in (1, -1))
    return (end * jnp.where(end > 0, above, below),)


_span.defvjp(_span_forward, _span_backward)


def _scale(weight: Weight, params: Any, quant: Any, bits: Any) -> Array:
    return weight.apply("scale", params, quant, jnp.minimum(jnp.asarray(bits), FLOAT_BITS - 1))


def _total(values: Array, bits: Any) -> Array:
    return jnp.sum(jnp.where(jnp.asarray(bits) < FLOAT_BITS, values, 0.0))
