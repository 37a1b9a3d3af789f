"""Names of the leaves of a pytree."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax


def leaf_name(path: Sequence[Any]) -> tuple[str, ...]:
    """The names along a pytree path, without the ``value`` of a box such as ``nn.Partitioned``."""
    keys = [key for key in path if not (isinstance(key, jax.tree_util.GetAttrKey) and key.name == "value")]
    return tuple(jax.tree_util.keystr((key,), simple=True) for key in keys)
