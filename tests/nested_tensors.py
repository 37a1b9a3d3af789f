"""What the tests of the nested quantizer share: a matrix, and compiling in a hurry."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

quickly = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
MATRIX = jnp.asarray(np.random.default_rng(5).standard_normal((6, 8)), jnp.float32)
