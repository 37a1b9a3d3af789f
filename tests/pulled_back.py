"""Small arrays, bits of a step, and the gradients of a compiled function."""

import functools

import jax
import numpy as np

from qtrain.precision import Precision
from qtrain.quantizers import Uniform

KEY = jax.random.key(0)
CHANNEL, TENSOR = Uniform("symmetric", per="channel"), Uniform("symmetric", per="tensor")
jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


def normal(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def bits(width):
    return Precision(weights=width, acts=width, grads=width)


def pulled_back(function, x):
    """The value at `x`, a cotangent, and what it is pulled back to; compiled."""
    cotangent = normal(5, *jax.eval_shape(function, x).shape)

    def both(x):
        out, back = jax.vjp(function, x)
        return out, back(cotangent)[0]

    out, gradient = jit(both)(x)
    return out, cotangent, gradient
