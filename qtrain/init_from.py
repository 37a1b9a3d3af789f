"""A run that starts from another one's parameters: ``config.init_from``."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from qtrain import checkpoint
from qtrain import manifest as manifests
from qtrain.errors import UsageError, did_you_mean
from qtrain.manifest import MANIFEST, Leaves
from qtrain.trees import leaf_name

_SHOWN_DIFFERENCES = 6
_OF_QUANTIZERS = ("quant", "quant_stats")


def load_float(
    path: str | os.PathLike[str],
    abstract_variables: Mapping[str, Any],
    *,
    per_width: Collection[tuple[str, ...]] = (),
    sharding: jax.sharding.Sharding | Callable[[tuple[int, ...]], jax.sharding.Sharding] | None = None,
    report: Callable[[str], None] | None = None,
) -> dict[str, Any]:
    """The parameters and the model's other collections (``batch_stats``) of an earlier run, for a new one to start at.

    Quantizers are injected without a change to the parameters, so those of a float run fit the quantized model, and the
    reverse. What belongs to the quantizers (``quant``, ``quant_stats``) or to the optimizer is not read. Nothing is
    compiled unless a dtype is to be changed, or rows are to be made.

    Args:
      path: a run's folder, whose newest finished checkpoint is meant; or one checkpoint, ``RUN/checkpoints/STEP``.
      abstract_variables: the new model's variables by collection, arrays or ``jax.ShapeDtypeStruct``, as from
        ``jax.eval_shape`` of ``QuantizedModel.init``. Paths and shapes must be those of the checkpoint; one floating
        dtype is cast to another.
      per_width: names, ``("batch_stats", "BatchNorm_0", "mean")``, of variables with a leading axis of rows for each
        width (``qmodel.held(variables).leaves``). Where the checkpoint has none, every row begins as what it has.
      sharding: where every array is placed, or a function that says so of a shape; None: where new arrays go.
      report: takes a one-line remark when the run has not finished; prints to stderr by default.

    Returns:
      Arrays in the structure and the dtypes of `abstract_variables`, without ``quant`` and ``quant_stats``.

    Raises:
      UsageError: no run or no finished checkpoint is there, the checkpoint is damaged, or it does not fit: up to six of
        the leaves that are missing, unexpected or of another shape, with both shapes, and how many more.

    >>> import tempfile
    >>> params = {"kernel": jnp.arange(3.0)}
    >>> with checkpoint.Checkpoints(tempfile.mkdtemp()) as checkpoints:
    ...     checkpoints.save(7, {"params": params, "opt_state": jnp.zeros(2)}, wait=True)
    ...     load_float(checkpoints.directory / "7", {"params": params, "quant": {"scale": jnp.ones(())}})
    {'params': {'kernel': Array([0., 1., 2.], dtype=float32)}}
    """
    folder = find_checkpoint(path, report=report)
    try:
        leaves = manifests.read(folder).leaves
    except manifests.Damaged as damage:
        raise UsageError(_damaged(path, folder, str(damage))) from damage
    wanted = {name: value for name, value in abstract_variables.items() if name not in _OF_QUANTIZERS}
    state = {"params": wanted.pop("params", {}), "collections": wanted}
    named = manifests.named_leaves(state)
    described = manifests.describe(named)
    stored = _of_the_model(leaves)
    held = {name if name[0] == "params" else ("collections", *name) for name in per_width}
    names = [leaf_name(way) for way, _ in jax.tree_util.tree_flatten_with_path(state)[0]]
    rows = _repeated(stored, described, [each for each, name in zip(named, names, strict=True) if name in held])
    _check(path, folder, stored, {name: _row(leaf) if name in rows else leaf for name, leaf in described.items()})

    # In the dtypes of the checkpoint, which Orbax would otherwise change its own way.
    def as_stored(name: str) -> jax.ShapeDtypeStruct:
        shape, dtype = stored[name]
        where = sharding(shape) if callable(sharding) else sharding
        return jax.ShapeDtypeStruct(shape, jnp.dtype(dtype), sharding=where)

    structure = jax.tree.structure(state)
    abstract = jax.tree.unflatten(structure, [as_stored(name) for name in named])
    try:
        loaded = checkpoint.restore(folder, abstract, partial=True).state
    except UsageError as error:
        raise UsageError(f"init_from={os.fspath(path)!r}: {error}") from error

    def as_wanted(name: str, array: jax.Array) -> jax.Array:
        leaf = named[name]
        array = array if array.dtype == leaf.dtype else array.astype(leaf.dtype)
        return jnp.broadcast_to(array[None], leaf.shape) if name in rows else array

    cast = jax.tree.unflatten(structure, map(as_wanted, named, jax.tree.leaves(loaded)))
    return {"params": cast["params"], **cast["collections"]}


def find_checkpoint(path: str | os.PathLike[str], *, report: Callable[[str], None] | None = None) -> Path:
    """The folder of the checkpoint that `path` means, as in `load_float`; reads no array.

    Raises:
      UsageError: there is no run, or no finished checkpoint.
    """
    shown = f"init_from={os.fspath(path)!r}"
    if not os.fspath(path):
        raise UsageError(f"{shown}: give a run's folder or one of its checkpoints, RUN/checkpoints/STEP; None for none")
    folder = Path(os.path.abspath(os.path.expanduser(path)))
    if not folder.is_dir():
        siblings = [each.name for each in folder.parent.iterdir()] if folder.parent.is_dir() else []
        near = did_you_mean(folder.name, siblings)
        raise UsageError(f"{shown}: there is no such folder; give a run's folder or RUN/checkpoints/STEP.{near}")
    if (folder / MANIFEST).exists():
        return folder
    directory = folder / "checkpoints" if (folder / "checkpoints").is_dir() else folder
    found = manifests.folders(directory)
    if not found:
        unfinished = directory != folder or _is_run(folder) or folder.name == "checkpoints"
        what = "has no finished checkpoint" if unfinished else "holds no run"
        if folder.name.isdigit():
            what = f"is no finished checkpoint (it has no {MANIFEST})"
        raise UsageError(f"{shown}: the folder {what}; give a run's folder or RUN/checkpoints/STEP")
    step = max(found)
    if _is_run(directory.parent) and not (directory.parent / "DONE").exists():
        remark = f"{shown}: the run has not finished; starting from its checkpoint {step}"
        (report or _print)(remark)
    return found[step]


def _is_run(folder: Path) -> bool:
    try:
        return isinstance(json.loads((folder / "config.json").read_bytes()), dict)
    except (OSError, ValueError):
        return False


def _of_the_model(leaves: Leaves) -> Leaves:
    """Of a train state's leaves, those that the model itself has."""
    others = tuple(f"collections/{name}/" for name in _OF_QUANTIZERS)
    mine = ("params/", "collections/")
    return {name: leaf for name, leaf in leaves.items() if name.startswith(mine) and not name.startswith(others)}


def _check(path: Any, folder: Path, stored: Leaves, wanted: Leaves) -> None:
    shown = f"init_from={os.fspath(path)!r}"
    if not any(name.startswith("params/") for name in stored):
        raise UsageError(f"{shown}: {str(folder)!r} is not the checkpoint of a training run; it has no params")
    castable = {name: _castable(leaf, wanted.get(name)) for name, leaf in stored.items()}
    found = manifests.differences(castable, wanted, partial=False)
    if found:
        # People know the collections by their own names.
        lines = [line.removeprefix("collections/") for line in found]
        listed = "; ".join(lines[:_SHOWN_DIFFERENCES])
        more = f"; and {len(lines) - _SHOWN_DIFFERENCES} more" if len(lines) > _SHOWN_DIFFERENCES else ""
        raise UsageError(
            f"{shown}: checkpoint {folder.name} does not fit this model: {listed}{more}; give a run of the same model, "
            "or change model.*"
        )


def _repeated(stored: Leaves, wanted: Leaves, per_width: Iterable[str]) -> set[str]:
    """Names of the leaves with a row for each width, of which there is one alone in the checkpoint."""
    return {name for name in per_width if name in stored and stored[name][0] == _row(wanted[name])[0]}


def _row(leaf: tuple[tuple[int, ...], str]) -> tuple[tuple[int, ...], str]:
    return leaf[0][1:], leaf[1]


def _castable(stored: tuple[tuple[int, ...], str], wanted: tuple[tuple[int, ...], str] | None) -> Any:
    """`stored`, in the wanted dtype where one floating dtype is to become another of the same shape."""
    if wanted is None or stored[0] != wanted[0]:
        return stored
    floating = all(jnp.issubdtype(jnp.dtype(dtype), jnp.floating) for _, dtype in (stored, wanted))
    return wanted if floating else stored


def _damaged(path: Any, folder: Path, reason: str) -> str:
    others = sorted(step for step in manifests.folders(folder.parent) if str(step) != folder.name)
    older = f"name another, such as {str(folder.parent / str(others[-1]))!r}" if others else "it has no other"
    return f"init_from={os.fspath(path)!r}: checkpoint {str(folder)!r} is damaged ({reason}); {older}"


def _print(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
