"""A state with every kind of leaf, and checkpoints of it: what the tests of checkpoints share."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax


class State(NamedTuple):
    params: Any
    opt_state: Any
    quant: Any
    key: Any
    step: Any


def make_state(seed: int = 0, width: int = 64) -> State:
    keys = jax.random.split(jax.random.key(seed), 2)
    params = {"Dense_0": {"kernel": jax.random.normal(keys[0], (width, 10)), "bias": jnp.full(10, -0.0)}}
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3))
    odd = {
        "": {"scale": jnp.float32(np.nan)},  # the root module's path
        "a.b": {"c": jnp.arange(3)},  # Orbax would write these two to one place
        "a": {"b.c": jnp.arange(3) + 7},
        "Block/Dense": jax.random.normal(keys[1], (5,)).astype(jnp.bfloat16),
        "100%": np.arange(4, dtype=np.int64),
        "absent": None,
        "empty": jnp.zeros((0, 3)),
        "codes": jnp.arange(-8, 8, dtype=jnp.int8).astype(jnp.int4),
        "mask": jnp.array([True, False]),
    }
    rng = (
        jax.random.key(seed + 1),
        jax.random.split(jax.random.key(seed), 0),
        jax.random.split(jax.random.key(seed, impl="rbg"), 3),
    )
    return State(params, optimizer.init(params), odd, rng, jnp.int32(seed))


def assert_identical(left: Any, right: Any) -> None:
    assert jax.tree.structure(left) == jax.tree.structure(right)
    for one, other in zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True):
        assert type(one) is type(other)
        assert one.dtype == other.dtype and one.shape == other.shape
        if jnp.issubdtype(one.dtype, jax.dtypes.prng_key):
            one, other = jax.random.key_data(one), jax.random.key_data(other)
        assert np.asarray(one).tobytes() == np.asarray(other).tobytes()


def fill(checkpoints, steps=(10, 20, 30)):
    for step in steps:
        checkpoints.save(step, make_state(step), {"step": step})
    checkpoints.wait()


def data_file(folder):
    """The file that holds the arrays' bytes."""
    return max((path for path in folder.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)


def flip(folder):
    path = data_file(folder)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    return path.relative_to(folder).as_posix()
