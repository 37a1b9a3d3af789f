"""Trees of many small arrays as a few: each buffer that a dispatch hands on costs about a microsecond."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

Packed = dict[str, Any]
"""``numbers``: dtype → all scalars and vectors of it, joined, [n]; ``arrays``: the others, as they are."""


def pack(tree: Any) -> Packed:
    """A tree of arrays packed; of NumPy arrays alone in NumPy.

    >>> pack({"bits": np.float32([3, 4]), "scale": np.float32(0.5)})["numbers"]
    {'float32': array([3. , 4. , 0.5], dtype=float32)}
    """
    leaves = jax.tree.leaves(tree)
    on_host = not any(isinstance(leaf, jax.Array) for leaf in leaves)
    module: Any = np if on_host else jnp
    numbers: dict[str, list[Any]] = {}
    for leaf in leaves:
        if jnp.ndim(leaf) <= 1:
            numbers.setdefault(str(leaf.dtype), []).append(module.atleast_1d(leaf))
    vectors = {dtype: module.concatenate(parts) for dtype, parts in numbers.items()}
    return {"numbers": vectors, "arrays": [leaf for leaf in leaves if jnp.ndim(leaf) > 1]}


def unpack(packed: Packed, template: Any) -> Any:
    """The inverse of `pack`; `template` is a tree of the same structure, shapes and dtypes."""
    leaves, structure = jax.tree.flatten(template)
    arrays, used, found = iter(packed["arrays"]), dict.fromkeys(packed["numbers"], 0), []
    for leaf in leaves:
        if len(leaf.shape) > 1:
            found.append(next(arrays))
            continue
        dtype, start = str(leaf.dtype), used[str(leaf.dtype)]
        used[dtype] += leaf.size
        found.append(packed["numbers"][dtype][start : start + leaf.size].reshape(leaf.shape))
    return jax.tree.unflatten(structure, found)
