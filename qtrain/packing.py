"""Trees of many small arrays as a few: each array that a step takes and leaves costs its dispatch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

Packed = dict[str, Any]
"""``numbers``: dtype → what is joined of it, [n]; ``arrays``: the other leaves, as they are."""


def pack(tree: Any, joined: Sequence[bool] | None = None) -> Packed:
    """A tree of arrays packed; what is joined is so in NumPy where all of it is NumPy's.

    Args:
      tree: of arrays.
      joined: which leaves are, in order; None: the scalars and vectors.

    >>> pack({"bits": np.float32([3, 4]), "scale": np.float32(0.5)})["numbers"]
    {'float32': array([3. , 4. , 0.5], dtype=float32)}
    """
    leaves = jax.tree.leaves(tree)
    flags = _flags(leaves, joined)
    chosen = [leaf for leaf, flag in zip(leaves, flags, strict=True) if flag]
    module: Any = jnp if any(isinstance(leaf, jax.Array) for leaf in chosen) else np
    numbers: dict[str, list[Any]] = {}
    for leaf in chosen:
        numbers.setdefault(str(leaf.dtype), []).append(module.ravel(leaf))
    vectors = {dtype: module.concatenate(parts) for dtype, parts in numbers.items()}
    return {"numbers": vectors, "arrays": [leaf for leaf, flag in zip(leaves, flags, strict=True) if not flag]}


def unpack(packed: Packed, template: Any, joined: Sequence[bool] | None = None) -> Any:
    """The inverse of `pack`.

    Args:
      packed: of one tree, or of several that were stacked: vectors [..., n] then, and leaves with those axes in front.
      template: a tree of the same structure, shapes and dtypes.
      joined: as `pack` was given it.
    """
    leaves, structure = jax.tree.flatten(template)
    arrays, used, found = iter(packed["arrays"]), dict.fromkeys(packed["numbers"], 0), []
    for leaf, flag in zip(leaves, _flags(leaves, joined), strict=True):
        if not flag:
            found.append(next(arrays))
            continue
        dtype = str(leaf.dtype)
        vector, start = packed["numbers"][dtype], used[dtype]
        used[dtype] += leaf.size
        found.append(vector[..., start : used[dtype]].reshape(vector.shape[:-1] + leaf.shape))
    return jax.tree.unflatten(structure, found)


def _flags(leaves: Sequence[Any], joined: Sequence[bool] | None) -> Sequence[bool]:
    return [len(leaf.shape) <= 1 for leaf in leaves] if joined is None else joined
