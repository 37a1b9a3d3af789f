"""Data parallelism over all devices: the batch is split, everything else is everywhere."""

from __future__ import annotations

from collections.abc import Mapping

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from qtrain.errors import UsageError

AXIS = "data"


def make_mesh() -> Mesh:
    """One axis over every device. Its type is Auto: linen models know nothing of explicit shardings."""
    return jax.make_mesh((jax.device_count(),), (AXIS,), axis_types=(AxisType.Auto,))


def replicated(mesh: Mesh) -> NamedSharding:
    """The same value on every device."""
    return NamedSharding(mesh, PartitionSpec())


def split(mesh: Mesh, axis: int = 0) -> NamedSharding:
    """Split evenly along `axis`."""
    return NamedSharding(mesh, PartitionSpec(*(None,) * axis, AXIS))


def check_batch_size(batch_size: int, mesh: Mesh, key: str) -> None:
    """Refuse a batch that the devices cannot share evenly.

    Raises:
      UsageError: naming `key`.
    """
    if batch_size % mesh.size:
        devices = f"{mesh.size} devices; give a multiple of {mesh.size}"
        raise UsageError(f"{key}={batch_size}: does not divide evenly among {devices}")


def shard_batch(batch: Mapping[str, np.ndarray], mesh: Mesh, axis: int = 0) -> dict[str, jax.Array]:
    """This process's rows of a global batch as global arrays, split along `axis`; a graph is whole on every device."""
    sharding = replicated(mesh) if "nodes" in batch else split(mesh, axis)
    if jax.process_count() == 1:
        return dict(jax.device_put(dict(batch), sharding))
    return {name: jax.make_array_from_process_local_data(sharding, value) for name, value in batch.items()}
