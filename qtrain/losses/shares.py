"""The share of a rate that is in force as a run goes on."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

Array = jax.Array

SCHEDULES: dict[str, Callable[[Array], Array]] = {
    "constant": jnp.ones_like,
    "linear_up": lambda u: u,
    "linear_down": lambda u: 1 - u,
    "cosine_up": lambda u: 0.5 * (1 - jnp.cos(jnp.pi * u)),
    "cosine_down": lambda u: 0.5 * (1 + jnp.cos(jnp.pi * u)),
}
"""Name → the share that is in force at progress u = step / (steps of the run)."""
