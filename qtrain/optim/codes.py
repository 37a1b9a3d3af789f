"""Trees of integer codes beside a tree of parameters: what every transform that watches codes does with them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from qtrain.errors import UsageError
from qtrain.quantizers.base import FLOAT_BITS

Array = jax.Array
Codes = Callable[..., Any]
"""``codes(params, bits=None, **extra)``: a tree like `params` with an integer array of the leaf's shape for each
quantized leaf and None elsewhere.

`bits` has the form in which the caller passes it to ``update`` (a number, or a tree of them), `extra` are update's
extra arguments (frozen scales, say). ``init`` asks for shapes and dtypes only and gives neither. Where a wrapper such
as `optax.masked` has taken parameters out, `params` holds `optax.MaskedNode`, for which None or the node itself is the
answer; `codes_per_leaf` makes such a function from one for a single leaf.
"""


def absent(node: Any) -> bool:
    """Whether a place in a tree holds no parameter."""
    return node is None or isinstance(node, optax.MaskedNode)


def named_leaves(tree: Any) -> tuple[list[tuple[str, Any]], Any]:
    """``(path, leaf)`` of every place, ``Dense_0/kernel``; places without a parameter too; the treedef."""
    leaves, treedef = jax.tree_util.tree_flatten_with_path(tree, is_leaf=absent)
    return [(jax.tree_util.keystr(path, simple=True, separator="/"), leaf) for path, leaf in leaves], treedef


def by_path(tree: Any) -> dict[str, Any]:
    """Path to leaf, where there is one."""
    return {path: leaf for path, leaf in named_leaves(tree)[0] if not absent(leaf)}


def place(params: Any, values: Mapping[str, Any]) -> Any:
    """A tree like `params` with `values` at their paths and None elsewhere."""
    places, treedef = named_leaves(params)
    return jax.tree.unflatten(treedef, [values.get(path) for path, _ in places])


def codes_per_leaf(function: Callable[..., Any]) -> Codes:
    """A `Codes` function from ``function(path, weight, bits, **extra) -> integer codes or None`` of one leaf.

    `path` is the leaf's, ``Dense_0/kernel``; `bits` its own number, also where a tree of them is given, or None.

    >>> from qtrain.quantizers import Uniform
    >>> def encode(path, weight, bits):
    ...     if weight.ndim > 1:
    ...         return Uniform("symmetric", "tensor").encode(weight, 4 if bits is None else bits)[0]
    >>> codes = codes_per_leaf(encode)
    >>> codes({"kernel": jnp.array([[-1.0, 0.2, 1.0]]), "bias": jnp.zeros(3)}, bits=3)["kernel"].tolist()
    [[-3, 1, 3]]
    """

    def codes(params: Any, bits: Any = None, **extra: Any) -> Any:
        places, treedef = named_leaves(params)
        given = [] if bits is None else named_leaves(bits)[0]
        found = []
        for path, leaf in places:
            own = _covering(given, path)
            found.append(None if absent(leaf) else function(path, leaf, own, **extra))
        return jax.tree.unflatten(treedef, found)

    return codes


def compute(codes: Codes, params: Any, bits: Any, extra: Mapping[str, Any]) -> dict[str, Array]:
    """The codes of the quantized leaves of `params`, by path, checked.

    Raises:
      UsageError: a leaf that `params` does not have, of another shape, or that is not integer.
    """
    # Without bits the argument is left out, so that a function of the parameters alone serves as well.
    tree = codes(params, **extra) if bits is None else codes(params, bits=bits, **extra)
    weights, found = by_path(params), by_path(tree)
    for path, leaf in found.items():
        if path not in weights:
            raise UsageError(f"codes: {path!r} is no leaf of the parameters; they have {_some(weights)}")
        dtype = getattr(leaf, "dtype", None)
        if dtype is None or not jnp.issubdtype(dtype, jnp.integer):
            given = type(leaf).__name__ if dtype is None else dtype
            raise UsageError(f"codes: {path!r} is {given}; give an integer array, such as round(w/s).astype(int32)")
        if leaf.shape != weights[path].shape:
            raise UsageError(f"codes: {path!r} has shape {leaf.shape}; give the parameter's, {weights[path].shape}")
    return found


def quantized_leaves(codes: Codes, params: Any) -> dict[str, Any]:
    """The parameters that have codes, by path; nothing is computed.

    Raises:
      UsageError: as `compute`; or no leaf has codes.
    """
    found = jax.eval_shape(lambda tree: compute(codes, tree, None, {}), params)
    weights = by_path(params)
    if not found:
        raise UsageError(f"codes: no leaf has any; give integer codes for at least one of {_some(weights)}")
    return {path: leaf for path, leaf in weights.items() if path in found}


def low_byte(codes: Array) -> Array:
    """Codes as the int8 that the state keeps: the low byte, which tells all codes that are less than 256 apart."""
    return codes.astype(jnp.int8)


def bits_per_leaf(bits: Any, paths: Iterable[str]) -> dict[str, Array]:
    """The number of bits of each path, float32: from one number, or from a tree with a number at or above each.

    Raises:
      UsageError: a leaf without bits, or bits that are no number.
    """
    given, found = named_leaves(bits)[0], {}
    for path in paths:
        own = _covering(given, path)
        if own is None:
            raise UsageError(f"bits: there is none for {path!r}; give a number, or a tree with one for each such leaf")
        if jnp.ndim(own):
            raise UsageError(f"bits: {path!r} has an array of shape {jnp.shape(own)}; give one number a leaf")
        found[path] = jnp.asarray(own, jnp.float32)
    return found


class Seen(NamedTuple):
    """What `observe` finds; codes by path, and numbers of all leaves as vectors in the order of the paths.

    Attributes:
      old: codes of the parameters as they are, on the grid of the update before: what to compare with the codes then.
      new: their codes on this update's grid.
      bits: what to keep for the next update, float32: this update's bits; 0 for a leaf that has not been on a grid yet.
      begins: first update on a grid: there is nothing to compare with.
      active: neither this update nor the one before is at `FLOAT_BITS` or above, where there is no grid.
      width: this update's bits, or None.
    """

    old: dict[str, Array]
    new: dict[str, Array]
    bits: Array
    begins: Array
    active: Array
    width: Array | None


def observe(
    codes: Codes, params: Any, bits: Any, extra: Mapping[str, Any], count: Array, paths: Sequence[str], last: Array
) -> Seen:
    """The codes of `params` on this update's grid and on that of the one before, so that no change of precision counts.

    Args:
      codes, params, bits, extra: as given to the transform.
      count: updates so far.
      paths: the leaves that had codes in init.
      last: `Seen.bits` of the update before.
    """
    new = compute(codes, params, bits, extra)
    if different := set(new) ^ set(paths):
        raise UsageError(f"codes: {min(different)!r} had codes either in init or now; decide by the path alone")
    if bits is None:
        return Seen(new, new, jnp.zeros_like(last), (count == 0) | (last > 0), jnp.ones_like(last, bool), None)
    own = bits_per_leaf(bits, paths)
    width = jnp.stack([own[path] for path in paths])
    # Two evaluations, as two widths may be met. They read the same weights and become parts of the same loops, which is
    # cheaper than a branch: a branch keeps codes from being fused with what is done with them.
    before = jnp.where(last > 0, last, width)
    old = compute(codes, params, bits_in_form(bits, dict(zip(paths, before, strict=True))), extra)
    on_grid, started = width < FLOAT_BITS, last > 0
    kept = jnp.where(started | on_grid, width, 0.0)
    return Seen(old, new, kept, ~started & on_grid, on_grid & (last < FLOAT_BITS), width)


def bits_in_form(bits: Any, values: Mapping[str, Array]) -> Any:
    """`values` (bits by path) in the form, and the dtypes, of `bits`."""
    places, treedef = named_leaves(bits)
    leaves = []
    for prefix, own in places:
        value = next((value for path, value in values.items() if _covers(prefix, path)), own)
        leaves.append(own if absent(own) else jnp.asarray(value, jnp.asarray(own).dtype))
    return jax.tree.unflatten(treedef, leaves)


def _covering(given: list[tuple[str, Any]], path: str) -> Any:
    return next((value for prefix, value in given if not absent(value) and _covers(prefix, path)), None)


def _covers(prefix: str, path: str) -> bool:
    return prefix in ("", path) or path.startswith(prefix + "/")


def _some(leaves: Mapping[str, Any]) -> str:
    names = list(leaves)
    return ", ".join(names[:6]) + (f" and {len(names) - 6} more" if len(names) > 6 else "") if names else "none"
