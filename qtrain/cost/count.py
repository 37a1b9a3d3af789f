"""Counting: every dot and convolution of a function's forward pass, read from its traced program."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from qtrain.cost.ops import Ops, merge
from qtrain.cost.walk import Context, Dependency, Leaves, walk
from qtrain.precision import Precision
from qtrain.trees import leaf_name

DIFFERENTIATED = ("params", "quant")
"""The collections of Flax variables that a training step differentiates."""


def count(fn: Callable[..., Any], variables: Any, *args: Any, **kwargs: Any) -> Ops:
    """The dots and convolutions of ``fn(variables, *args, **kwargs)``, and of the gradients a training step adds.

    The function is traced on shapes alone; nothing is executed, so arrays and ``jax.ShapeDtypeStruct`` serve alike. Per
    op, with M the MACs of the forward product Y = X·W: the input gradient dX = G·Wᵀ and the weight gradient dW = Xᵀ·G
    have M each, where the operand needs one.

    - *Operands.* A ``weight`` depends on `variables` and on no argument, an ``act`` on an argument, a ``const`` on
      neither. Bits and randomness are settings, not arguments: what is inside a `Precision`, a typed PRNG key, or the
      keyword ``rngs`` makes no activation of a weight.
    - *Gradients.* When `variables` is a mapping with a ``params`` key, its collections ``params`` and ``quant`` are
      differentiated, else all of it. An operand needs a gradient when it depends on those through floating-point
      numbers: so the first layer has no input gradient, nor has anything behind ``argmax`` or ``stop_gradient``. A
      product of two activations has one input gradient per operand that needs one. Inside a custom derivative rule the
      integers that a float was encoded to keep its gradient. Rematerialised forward passes are not counted again.
    - *MACs* are the conventional ones: a convolution is output elements × kernel taps × input channels / groups,
      padding included; a transposed one is input elements × taps (`qtrain.cost.macs`).
    - *Control flow.* A scan's body counts once per iteration; a ``while`` body once, flagged ``trip_count_unknown``; of
      a ``cond`` the branch with most MACs, flagged ``largest_branch`` when the branches differ; the body of a
      ``shard_map`` once per device, a Pallas kernel's once per grid cell. Equal products at one path are one record
      with `executions`.
    - *Path.* The marker's, for an op that was injected; else the module that owns the weight, from the names in
      `variables`; else (two activations) the scopes the product was called in, without the root's name.

    Not counted, because they are neither dots nor convolutions: element-wise operations, pooling, gathers (embedding
    look-ups), FFTs, linear solvers, and library calls that are opaque to the tracer.

    >>> import jax, jax.numpy as jnp
    >>> ops = count(lambda w, x: jnp.tanh(x @ w["a"]) @ w["b"], {"a": jnp.ones((3, 5)), "b": jnp.ones((5, 2))},
    ...             jax.ShapeDtypeStruct((4, 3), "float32"))
    >>> [(op.forward, op.input_gradient, op.weight_gradient) for op in ops]
    [(60, 0, 60), (40, 40, 40)]
    """
    treedef: Any
    nodes, treedef = jax.tree_util.tree_flatten_with_path((args, kwargs), is_leaf=lambda x: isinstance(x, Precision))
    leaves: list[Any] = []
    data: list[bool] = []
    rebuild: list[tuple[list[Any], list[bool], Any]] = []
    for path, node in nodes:
        setting = isinstance(node, Precision) or getattr(path[1], "key", None) == "rngs"
        inner, inner_treedef = jax.tree_util.tree_flatten(node)
        arrays = [hasattr(leaf, "shape") and hasattr(leaf, "dtype") for leaf in inner]
        traced = [leaf for leaf, is_array in zip(inner, arrays, strict=True) if is_array]
        leaves += traced
        data += [not (setting or jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)) for leaf in traced]
        rebuild.append((inner, arrays, inner_treedef))

    def function(variables: Any, arrays: Sequence[Any]) -> Any:
        remaining = iter(arrays)
        nodes = [
            inner_treedef.unflatten(
                [next(remaining) if is_array else leaf for leaf, is_array in zip(inner, mask, strict=True)]
            )
            for inner, mask, inner_treedef in rebuild
        ]
        positional, named = treedef.unflatten(nodes)
        return fn(variables, *positional, **named)

    closed = jax.make_jaxpr(function)(variables, leaves)
    named_leaves = [(leaf_name(path), leaf) for path, leaf in jax.tree_util.tree_flatten_with_path(variables)[0]]
    collections = isinstance(variables, Mapping) and "params" in variables
    names = Leaves(
        names=tuple(name for name, _ in named_leaves),
        sizes=tuple(math.prod(jnp.shape(leaf)) for _, leaf in named_leaves),
        collections=collections,
    )
    inputs = []
    for index, (name, leaf) in enumerate(named_leaves):
        inexact = jnp.issubdtype(jnp.result_type(leaf), jnp.inexact)
        inputs.append(Dependency(False, 1 << index, inexact and (not collections or name[0] in DIFFERENTIATED)))
    inputs += [Dependency(is_data) for is_data in data]
    _, ops = walk(closed.jaxpr, inputs, Context(names))
    return merge(ops)
