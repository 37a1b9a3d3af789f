"""Arrays to and from the disk: the one file that calls Orbax."""

from __future__ import annotations

import functools
import logging
import math
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging as absl_logging
from orbax.checkpoint import v1 as ocp

from qtrain import manifest as manifests
from qtrain.errors import UsageError
from qtrain.manifest import Leaves, describe, differences, named_leaves, nested

_SHOWN_DIFFERENCES = 6
_ORBAX = threading.Lock()
"""Held while Orbax works: called from several threads at once (a sweep saves all its points at one step) it loses
callbacks between their event loops, so that saves hang until they time out (orbax-checkpoint 0.12.8)."""


def start_writing(folder: Path, named: Mapping[str, Any]) -> Callable[[], None]:
    """Take the arrays' present values and return what writes them, which may run in another thread."""
    named = {name: jax.random.key_data(leaf) if _is_key(leaf) else leaf for name, leaf in named.items()}
    # Orbax refuses arrays without elements; the manifest says all there is to say about them.
    named = {name: leaf for name, leaf in named.items() if leaf.size}
    if jax.process_count() > 1:  # every process writes its shards, and Orbax must be called from the main thread
        shared = {name: leaf for name, leaf in named.items() if isinstance(leaf, jax.Array) and _shares_memory(leaf)}
        if shared:  # where the host's memory is the device's, Orbax writes from what a donated step writes to
            where = {name: leaf.sharding for name, leaf in shared.items()}
            named |= jax.jit(_copied, out_shardings=where)(shared)
        return ocp.save_async(folder, nested(named), overwrite=True).result
    # Copied here and handed to a thread whole: Orbax's own asynchronous save keeps the caller for 10 ms (60 leaves),
    # mostly in Python code per leaf, these copies for 0.5 ms.
    hosted = zip(named, named.values(), jax.device_get(list(named.values())), strict=True)
    tree = nested({name: np.array(host) if _shares_memory(leaf) else host for name, leaf, host in hosted})
    return functools.partial(_save, folder, tree)


def _save(folder: Path, tree: Any) -> None:
    with _ORBAX:
        ocp.save(folder, tree, overwrite=True)


def load(folder: Path, abstract_state: Any, *, partial: bool) -> tuple[int, Any, dict[str, Any]]:
    """Step, state and metadata of a checkpoint of ours; `Damaged` if it is, `UsageError` if it does not fit."""
    manifest = manifests.read(folder)
    manifests.verify(folder, manifest)
    stored = nested({name: name for name, (shape, _) in manifest.leaves.items() if math.prod(shape)})
    state = _fill(folder, abstract_state, manifest.leaves, stored, partial=partial)
    return manifest.step, state, manifest.metadata


def load_foreign(folder: Path, abstract_state: Any, *, partial: bool) -> Any:
    """The state of another program's checkpoint, or None if it is none that Orbax knows; `UsageError` as in `load`."""
    try:
        tree = ocp.metadata(folder).metadata
    except ocp.errors.InvalidLayoutError:
        return None
    except Exception as error:
        raise UsageError(f"checkpoint {str(folder)!r} cannot be read: {reason(error)}") from error
    named = named_leaves(tree)
    if not named:  # what Orbax answers for some damaged checkpoints
        raise UsageError(f"checkpoint {str(folder)!r} cannot be read: Orbax finds no arrays in it")
    leaves = describe({name: leaf if hasattr(leaf, "shape") else np.array(leaf) for name, leaf in named.items()})
    stored = jax.tree.unflatten(jax.tree.structure(tree), list(named))
    return _fill(folder, abstract_state, leaves, stored, partial=partial)


def _fill(folder: Path, abstract_state: Any, leaves: Leaves, stored: Any, *, partial: bool) -> Any:
    """`abstract_state` with a checkpoint's arrays: `leaves` are all it has, `stored` is Orbax's tree of their names."""
    wanted = named_leaves(abstract_state)
    if found := differences(leaves, describe(wanted), partial=partial):
        shown = "; ".join(found[:_SHOWN_DIFFERENCES])
        more = len(found) - _SHOWN_DIFFERENCES
        raise UsageError(
            f"checkpoint {str(folder)!r} does not fit this model and optimizer: {shown}"
            + (f"; and {more} more" if more > 0 else "")
        )
    names = jax.tree.leaves(stored)
    target = jax.tree.map(lambda name: _target(wanted[name]) if name in wanted else ocp.PLACEHOLDER, stored)
    arrays: dict[str, Any] = {}
    if any(name in wanted for name in names):
        try:
            with _ORBAX:
                loaded = ocp.load(folder, target)
            arrays = dict(zip(names, jax.tree.leaves(loaded), strict=True))
        except Exception as error:  # not damage: ours have just been verified
            raise UsageError(f"checkpoint {str(folder)!r} could not be loaded: {reason(error)}") from error
    filled = [_placed(arrays.get(name), leaf) for name, leaf in wanted.items()]
    return jax.tree.unflatten(jax.tree.structure(abstract_state), filled)


def _copied(leaves: dict[str, jax.Array]) -> dict[str, jax.Array]:
    return jax.tree.map(jnp.copy, leaves)


def _shares_memory(leaf: Any) -> bool:
    """Whether `jax.device_get` may give a view of memory that a donated step, or the caller, will write to."""
    return not isinstance(leaf, jax.Array) or any(device.platform == "cpu" for device in leaf.devices())


def _is_key(leaf: Any) -> bool:
    return jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _sharding(leaf: Any) -> jax.sharding.Sharding | None:
    """The placement a leaf asks for; an array that JAX placed by default asks for none."""
    if isinstance(leaf, jax.Array) and not getattr(leaf, "committed", True):
        return None
    return getattr(leaf, "sharding", None)


def _target(leaf: Any) -> Any:
    """What Orbax is asked for: a sharded array where the placement is given, else a NumPy array (of one element)."""
    stored = _as_stored(leaf)
    if (sharding := _sharding(leaf)) is not None:  # a key's serves its data too, whose further axis it leaves whole
        return jax.ShapeDtypeStruct(stored.shape, stored.dtype, sharding=sharding)
    return np.broadcast_to(np.zeros((), stored.dtype), stored.shape)


def _as_stored(leaf: Any) -> jax.ShapeDtypeStruct:
    abstract = jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)
    return jax.eval_shape(jax.random.key_data, abstract) if _is_key(leaf) else abstract


def _placed(array: Any, leaf: Any) -> Any:
    """A loaded array (None: it has no elements) as `leaf` wants it."""
    if array is None:
        array = np.zeros(_as_stored(leaf).shape, _as_stored(leaf).dtype)
    if _is_key(leaf):
        return jax.random.wrap_key_data(jnp.asarray(array), impl=_key_implementation(leaf))
    if isinstance(leaf, np.ndarray | np.generic) or isinstance(array, jax.Array):
        return array
    return jnp.array(array) if _sharding(leaf) is None else jax.device_put(array, _sharding(leaf))


def _key_implementation(leaf: Any) -> Any:
    found = []
    jax.eval_shape(lambda key: found.append(jax.random.key_impl(key)), jax.ShapeDtypeStruct(leaf.shape, leaf.dtype))
    return found[0]


def reason(error: BaseException) -> str:
    """One line for an Orbax error: the first cause, which it hides in ``__cause__``, without TensorStore's spec."""
    while error.__cause__ is not None:
        error = error.__cause__
    line = " ".join(str(error).split(" [tensorstore_spec")[0].split()) or type(error).__name__
    return line if len(line) <= 300 else line[:297] + "..."


class _NotOrbax(logging.Filter):
    """Drops what Orbax logs, and asyncio about it: its errors reach us as exceptions. All of it shows at DEBUG."""

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether to let `record` through."""
        ours = "/orbax/" not in record.pathname and "tensorstore" not in record.getMessage()
        return ours or absl_logging.get_verbosity() >= absl_logging.DEBUG


for _name in ("absl", "asyncio"):
    logging.getLogger(_name).addFilter(_NotOrbax())
