"""Packed trees: what goes in comes out, on the host, traced and under vmap, and it is few buffers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qtrain.packing import pack, unpack

TREE = {
    "count": np.int32(3),
    "levels": np.float32([2, 3, 8]),
    "matrix": np.arange(6, dtype=np.float32).reshape(2, 3),
    "seed": np.uint32(7),
    "none": np.zeros(0, np.float32),
    "scale": np.float32(0.1),
}


def assert_same(found, expected):
    jax.tree.map(np.testing.assert_array_equal, found, expected)
    assert jax.tree.map(lambda x: (x.dtype, x.shape), found) == jax.tree.map(lambda x: (x.dtype, x.shape), expected)


def test_round_trip_on_the_host():
    packed = pack(TREE)
    assert all(type(leaf) is np.ndarray for leaf in jax.tree.leaves(packed))
    assert {name: vector.tolist() for name, vector in packed["numbers"].items()} == {
        "int32": [3],
        "float32": pytest.approx([2, 3, 8, 0.1]),
        "uint32": [7],
    }
    assert_same(unpack(packed, TREE), TREE)


def test_round_trip_traced_and_mapped():
    trees = [TREE, jax.tree.map(lambda leaf: leaf + leaf.dtype.type(1), TREE)]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *map(pack, trees))

    @jax.jit
    def again(packed):
        return jax.vmap(lambda one: pack(unpack(one, jax.eval_shape(lambda: TREE))))(packed)

    for index, tree in enumerate(trees):
        assert_same(unpack(jax.tree.map(lambda leaf, index=index: leaf[index], again(stacked)), tree), tree)
