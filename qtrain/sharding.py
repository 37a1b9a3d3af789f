"""Where arrays lie: batches split over a mesh of devices, parameters on each of them or in parts (FSDP)."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from qtrain.errors import UsageError

AXES = ("data", "fsdp")
"""Both split a batch; along ``fsdp`` parameters and what goes with them are split, too."""
DEFAULTS = {"data": -1, "fsdp": 1, "fsdp_min_size": 1 << 16}
"""The section ``mesh`` unless a config says otherwise."""


def check_mesh(config: Mapping[str, Any]) -> None:
    """Refuse a section ``mesh`` that fits no number of devices.

    Raises:
      UsageError: a size that is neither -1 nor at least 1, or -1 twice; a threshold below 0.
    """
    for axis in AXES:
        size = config[axis]
        if isinstance(size, bool) or not isinstance(size, int) or not (size == -1 or size >= 1):
            raise UsageError(f"mesh.{axis}={size!r}: give a whole number of devices, or -1 for all that are left")
    if config["data"] == config["fsdp"] == -1:
        raise UsageError("mesh.data=-1, mesh.fsdp=-1: only one axis can take all that are left; give the other's size")
    if config["fsdp_min_size"] < 0:
        raise UsageError(f"mesh.fsdp_min_size={config['fsdp_min_size']}: give a number of elements, 0 to split all")


def make_mesh(config: Mapping[str, Any] | None = None) -> Mesh:
    """The devices of all processes in a grid of ``data`` × ``fsdp``, the first so many of them in a single process.

    Its axes are of type Auto: linen models know nothing of explicit shardings, and what is reduced over a batch or a
    tensor, the maximum behind a quantizer's scale among it, stays that of the whole however it is split.

    Args:
      config: the section ``mesh``: sizes, of which one may be -1, "all that are left"; None: all along ``data``.

    Raises:
      UsageError: as `check_mesh`; or sizes that do not fit the devices.
    """
    config = DEFAULTS if config is None else config
    check_mesh(config)
    count, sizes = jax.device_count(), [config[axis] for axis in AXES]
    shown = " x ".join(f"mesh.{axis}={config[axis]}" for axis in AXES)
    known = math.prod(size for size in sizes if size != -1)
    if count % known:
        raise UsageError(
            f"{shown}: {known} does not divide the {count} device{'s' * (count > 1)}; give sizes whose product does"
        )
    shape = tuple(count // known if size == -1 else size for size in sizes)
    if jax.process_count() == 1:
        devices = jax.devices()[: math.prod(shape)]
        return jax.make_mesh(shape, AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=devices)
    if math.prod(shape) != count:
        raise UsageError(f"{shown}: several processes use all of their {count} devices; set one of the axes to -1")
    # By process, so that each has one block of the batch's rows: the part that it reads.
    ordered = sorted(jax.devices(), key=lambda device: (device.process_index, device.id))
    return Mesh(np.array(ordered).reshape(shape), AXES, axis_types=(AxisType.Auto,) * len(AXES))


def mesh_for(batch_size: int | None) -> Mesh:
    """As many of this process's devices along ``data`` as share a batch evenly; None: a batch that is not split."""
    count = jax.device_count() if batch_size is None else math.gcd(jax.device_count(), batch_size)
    return make_mesh({**DEFAULTS, "data": count})


def replicated(mesh: Mesh) -> NamedSharding:
    """The same value on every device."""
    return NamedSharding(mesh, PartitionSpec())


def split(mesh: Mesh, axis: int = 0) -> NamedSharding:
    """Split evenly along `axis` over all devices."""
    return NamedSharding(mesh, PartitionSpec(*(None,) * axis, AXES))


def placed(mesh: Mesh, shape: tuple[int, ...], min_size: int) -> NamedSharding:
    """Fully sharded: split along the largest axis (the first of equals) that ``fsdp`` divides, else replicated.

    Args:
      mesh: of `make_mesh`.
      shape: of a parameter, its gradient, or what an optimizer or a quantizer keeps for it: alike where their shapes
        are.
      min_size: elements below which an array is replicated; a gather of a few bytes costs more than it saves.
    """
    devices = mesh.shape["fsdp"]
    axes = [axis for axis, length in enumerate(shape) if length and length % devices == 0]
    if devices == 1 or not axes or math.prod(shape) < min_size:
        return replicated(mesh)
    longest = max(axes, key=lambda axis: shape[axis])
    return NamedSharding(mesh, PartitionSpec(*(None,) * longest, "fsdp"))


def placed_tree(mesh: Mesh, tree: Any, min_size: int) -> Any:
    """`placed` for every array, concrete or abstract, of a tree."""
    return jax.tree.map(lambda leaf: placed(mesh, leaf.shape, min_size), tree)


def gather(mesh: Mesh, min_size: int) -> Callable[[Any], Any]:
    """What a model is applied to: a function of a tree whose arrays are `placed`, that makes them whole everywhere.

    Its gradient is placed again: summed over the batch into the part that a device keeps. Without it XLA is free to
    gather the batch instead, and to split layers: less traffic for small batches, and far more for a convolution's.
    """
    if mesh.shape["fsdp"] == 1:
        return lambda tree: tree

    @jax.custom_vjp
    def gathered(tree: Any) -> Any:
        return jax.lax.with_sharding_constraint(tree, replicated(mesh))

    def backward(_: None, cotangents: Any) -> tuple[Any]:
        return (jax.lax.with_sharding_constraint(cotangents, placed_tree(mesh, cotangents, min_size)),)

    gathered.defvjp(lambda tree: (gathered(tree), None), backward)
    return gathered


def check_batch_size(batch_size: int, mesh: Mesh, key: str) -> None:
    """Refuse a batch that the devices cannot share evenly.

    Raises:
      UsageError: naming `key`.
    """
    if batch_size % mesh.size:
        devices = f"{mesh.size} devices (mesh.data x mesh.fsdp); give a multiple of {mesh.size}"
        raise UsageError(f"{key}={batch_size}: does not divide evenly among {devices}")


def shard_batch(batch: Mapping[str, np.ndarray], mesh: Mesh, axis: int = 0) -> dict[str, jax.Array]:
    """This process's rows of a global batch as global arrays, split along `axis`; a graph is whole on every device."""
    sharding = replicated(mesh) if "nodes" in batch else split(mesh, axis)
    if jax.process_count() == 1:
        return dict(jax.device_put(dict(batch), sharding))
    return {name: jax.make_array_from_process_local_data(sharding, value) for name, value in batch.items()}


def to_host(tree: Any) -> Any:
    """The whole arrays of a tree as NumPy's, on every process; all processes have to call it."""
    if jax.process_count() == 1:
        return jax.device_get(tree)
    return jax.tree.map(lambda leaf: multihost_utils.process_allgather(leaf, tiled=True), tree)
