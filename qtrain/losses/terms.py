"""The terms: what of quantized weights can be penalised."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from qtrain.inject import Weight
from qtrain.precision import Precision
from qtrain.quantizers import FLOAT_BITS

Array = jax.Array


def dampening(weights: Sequence[Weight], params: Any, quant: Any, precision: Precision) -> Array:
    """Σ (sg(ŵ) − clip(w))² over the quantized weights: draws each latent weight to the middle of its bin.

    The gradient of a weight inside its grid is 2·(w − ŵ); outside, where both are the grid's end, it is 0; scales get
    none. In squared units of the weights. Weights at 24 bits and above have no grid, and no part in it. Nagel et al.,
    "Overcoming Oscillations in Quantization-Aware Training", ICML 2022 (arXiv 2203.11086), eq. 5; their coefficient
    rises to 0.1 over the run: ``schedule="cosine_up"``.
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
