"""Tensors and the key of their noise: what the tests of the small floats share."""

import jax
import numpy as np

KEY = jax.random.key(3)


def normal(shape, seed=0, scale=1.0):
    return (scale * np.random.default_rng(seed).standard_normal(shape)).astype(np.float32)


SHAPE = (4, 6, 8)


def tensor(seed=0):
    """Entries of both signs, some on a coarse grid, a row of zeros and one of a constant."""
    x = normal(SHAPE, seed)
    x[0] = np.round(4 * x[0]) / 4
    x[1, 0] = 0.0
    x[1, 1] = 0.7
    return x
