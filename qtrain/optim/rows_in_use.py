"""Of parameters with a row for each width, an optimizer moves the row that the step has used."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from qtrain.errors import UsageError
from qtrain.quantizers.parameters import RowInUse
from qtrain.trees import leaf_name

Array = jax.Array


def only_rows_in_use(inner: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    """`inner` for the rows in use; other rows keep their value and their optimizer state, bit for bit.

    ::

        (u, s') = inner(g, s, p)      u_r ← u_r, s_r ← s'_r   for the row in use
                                      u_r ← −0,  s_r ← s_r    for the others

    A row that was not used has no gradient, and yet momentum, Adam's averages and weight decay would move it: rows
    would drift towards what other widths need. With this each row is optimized as if it had an optimizer of its own,
    for every transform that works element by element. What such a transform counts is shared: Adam's step count, whose
    bias correction is that of the step and not of how often the row was used, and that of a learning rate. So is a
    number for a whole tensor, rows and all: the trust ratios of lars and lamb, the second moment of novograd.

    Put it outside a chain, so that nothing scales or adds afterwards. State belongs to a parameter when its path ends
    in the parameter's and its shape is the same: also under ``optax.partition`` and ``optax.chain``.

    Args:
      inner: what moves the parameters.

    Returns:
      The transform; ``update(updates, state, params, *, rows, **extra)`` with `rows` from `QuantizedModel.rows`: name
      of a leaf of `updates`, such as ``("params", "BatchNorm_0", "scale")``, → `RowInUse`. Leaves that are not named
      are all in use. State: that of `inner`.

    Raises:
      UsageError: in an update without `rows`, or with rows that a leaf does not have.

    >>> import jax.numpy as jnp, optax
    >>> from qtrain.inject import RowInUse
    >>> transform = only_rows_in_use(optax.sgd(0.5, momentum=0.9))
    >>> params = {"scale": jnp.array([[1.0, 1.0], [2.0, 2.0]])}
    >>> state = transform.init(params)
    >>> for row in (0, 1):
    ...     grads = {"scale": jnp.zeros((2, 2)).at[row].set(1.0)}
    ...     rows = {("scale",): RowInUse(axis=0, index=jnp.int32(row))}
    ...     updates, state = transform.update(grads, state, params, rows=rows)
    ...     params = optax.apply_updates(params, updates)
    >>> params["scale"].tolist()
    [[0.5, 0.5], [1.5, 1.5]]
    """
    transform = optax.with_extra_args_support(inner)

    def update_fn(
        updates: Any,
        state: Any,
        params: Any = None,
        *,
        rows: Mapping[tuple[str, ...], RowInUse] | None = None,
        **extra: Any,
    ) -> tuple[Any, Any]:
        if rows is None:
            raise UsageError("only_rows_in_use: update needs rows=, which qmodel.rows(bits, variables) gives")
        leaves = {leaf_name(path): leaf for path, leaf in jax.tree_util.tree_flatten_with_path(updates)[0]}
        used = {name: _used(name, leaves[name], row) for name, row in rows.items() if name in leaves}
        moved, new_state = transform.update(updates, state, params, **extra)

        def still(path: Any, update: Array) -> Array:
            mask = used.get(leaf_name(path))
            # −0 and not 0: −0 + 0 is 0, which is equal and yet another number.
            return update if mask is None else jnp.where(mask, update, jnp.asarray(-0.0, update.dtype))

        def kept(path: Any, new: Any, old: Any) -> Any:
            name = _parameter(leaf_name(path), leaves)
            mask = used.get(name)
            return new if mask is None or jnp.shape(new) != leaves[name].shape else jnp.where(mask, new, old)

        moved = jax.tree_util.tree_map_with_path(still, moved)
        return moved, jax.tree_util.tree_map_with_path(kept, new_state, state)

    return optax.GradientTransformationExtraArgs(transform.init, update_fn)


def _used(name: tuple[str, ...], leaf: Array, row: RowInUse) -> Array:
    """bool, broadcasts against `leaf`: whether an element is in the row in use."""
    if not 0 <= row.axis < leaf.ndim:
        raise UsageError(f"only_rows_in_use: {'/'.join(name)!r} has shape {leaf.shape} and no axis {row.axis} of rows")
    shape = [1] * leaf.ndim
    shape[row.axis] = leaf.shape[row.axis]
    return jnp.reshape(jnp.arange(leaf.shape[row.axis]) == row.index, shape)


def _parameter(name: tuple[str, ...], leaves: Mapping[tuple[str, ...], Any]) -> tuple[str, ...]:
    """The parameter that a leaf of the state belongs to: the longest whose name `name` ends in, or ()."""
    endings = (name[start:] for start in range(len(name)))
    return next((ending for ending in endings if ending in leaves), ())
