"""A pure piece of a model, traced, and run again with its products carried out otherwise.

Some layers have no field that takes another contraction: a transposed convolution, an einsum, a fused recurrent cell,
whatever function attention was given. What they compute is a function of their parameters and inputs. Traced, it is a
list of equations, of which the products can be replaced and the others are repeated as they are.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend import core

from qtrain.quantizers import Contraction, Conv, Dot

Array = jax.Array
Product = Callable[[Contraction, Array, Array, str | None], Array]
"""Carries out a contraction of activations and a weight (whose name is given) or other activations (None)."""

_PRODUCTS = ("dot_general", "conv_general_dilated")


class Node(NamedTuple):
    """A value, and where it comes from.

    Attributes:
      value: of the variable.
      data: whether it depends on the inputs.
      leaves: indices of the parameters it depends on.
      source, permutation: what it is the transpose of.
      pieces, axis: what it is the concatenation of.
    """

    value: Any
    data: bool = False
    leaves: frozenset[int] = frozenset()
    source: Node | None = None
    permutation: tuple[int, ...] = ()
    pieces: tuple[Node, ...] = ()
    axis: int = 0

    @property
    def weight(self) -> bool:
        """Whether it depends on parameters alone."""
        return bool(self.leaves) and not self.data


def split_arrays(tree: Any) -> tuple[list[Array], Callable[[Sequence[Array]], Any]]:
    """The arrays of a pytree, and a function that puts others in their places."""
    treedef: Any
    leaves, treedef = jax.tree.flatten(tree)
    arrays: list[Any] = [leaf for leaf in leaves if isinstance(leaf, jax.Array | np.ndarray)]

    def rebuild(others: Sequence[Array]) -> Any:
        remaining = iter(others)
        return treedef.unflatten([next(remaining) if isinstance(x, jax.Array | np.ndarray) else x for x in leaves])

    return arrays, rebuild


def replay(function: Callable[[Any, Any], Any], params: dict[str, Array], inputs: Any, product: Product) -> Any:
    """``function(params, inputs)`` with its products carried out by `product`.

    A product of a weight and activations is handed over with the activations on the left and the weight in the layout
    of the parameter, not of its transpose; one with several weights side by side (a fused cell's), one weight at a
    time. Products inside loops, branches and custom derivative rules stay as they are.

    Args:
      function: pure; what it closes over counts as an input.
      params: name → array; `product` is given the name of the one that a weight depends on.
      inputs: a pytree; what is no array in it is static.
      product: see `Product`.
    """
    names = tuple(params)
    arrays, rebuild = split_arrays(inputs)
    output_tree: Any = None

    def flat(values: Sequence[Array], arrays: Sequence[Array]) -> list[Any]:
        nonlocal output_tree
        outputs, output_tree = jax.tree.flatten(function(dict(zip(names, values, strict=True)), rebuild(arrays)))
        return outputs

    values = list(params.values())
    closed = jax.make_jaxpr(flat)(values, arrays)
    nodes = [Node(value, leaves=frozenset([index])) for index, value in enumerate(values)]
    nodes += [Node(array, data=True) for array in arrays]
    constants = [Node(value, data=True) for value in closed.consts]

    def named(op: Contraction, lhs: Array, rhs: Array, leaf: int | None) -> Array:
        return product(op, lhs, rhs, None if leaf is None else names[leaf])

    outputs = _evaluate(closed.jaxpr, constants, nodes, named)
    return output_tree.unflatten([node.value for node in outputs])


def _evaluate(jaxpr: Any, constants: Sequence[Node], inputs: Sequence[Node], product: Any) -> list[Node]:
    known: dict[Any, Node] = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*constants, *inputs], strict=True))

    def read(atom: Any) -> Node:
        return Node(atom.val) if isinstance(atom, core.Literal) else known[atom]

    for eqn in jaxpr.eqns:
        operands = [read(atom) for atom in eqn.invars]
        inner = eqn.params.get("jaxpr") if eqn.primitive.name in ("jit", "pjit") else None
        if inner is not None and _has_products(inner.jaxpr):
            consts = [Node(value, data=True) for value in inner.consts]
            outputs = _evaluate(inner.jaxpr, consts, operands, product)
        elif eqn.primitive.name in _PRODUCTS and any(node.data for node in operands):
            lhs, rhs = operands
            outputs = [Node(_product(eqn, lhs, rhs, product), data=True)]
        else:
            outputs = _repeated(eqn, operands, jaxpr.debug_info)
        known.update(zip(eqn.outvars, outputs, strict=True))
    return [read(atom) for atom in jaxpr.outvars]


def _has_products(jaxpr: Any) -> bool:
    return any(
        eqn.primitive.name in _PRODUCTS
        or (eqn.primitive.name in ("jit", "pjit") and _has_products(eqn.params["jaxpr"].jaxpr))
        for eqn in jaxpr.eqns
    )


def _repeated(eqn: Any, operands: Sequence[Node], debug: Any) -> list[Node]:
    """The equation as it is, on these operands."""
    known = {atom: node.value for atom, node in zip(eqn.invars, operands, strict=True) if isinstance(atom, core.Var)}
    # A program of this equation alone: how a primitive is bound to its parameters differs from one jax to another.
    alone = core.Jaxpr((), list(known), eqn.outvars, [eqn], eqn.effects, debug)
    results = core.jaxpr_as_fun(core.ClosedJaxpr(alone, ()))(*known.values())
    data = any(node.data for node in operands)
    leaves = frozenset().union(*(node.leaves for node in operands))
    outputs = [Node(value, data, leaves) for value in results]
    if data or not leaves:
        return outputs
    (node,) = operands[:1]
    if eqn.primitive.name == "transpose":
        permutation = tuple(eqn.params["permutation"])
        return [outputs[0]._replace(source=node, permutation=permutation)]
    if eqn.primitive.name == "concatenate":
        return [outputs[0]._replace(pieces=tuple(operands), axis=eqn.params["dimension"])]
    if eqn.primitive.name == "convert_element_type" and node.pieces:
        pieces = tuple(_repeated(eqn, [piece], debug)[0] for piece in node.pieces)
        return [outputs[0]._replace(pieces=pieces, axis=node.axis)]
    return outputs


def _product(eqn: Any, lhs: Node, rhs: Node, product: Any) -> Array:
    if eqn.primitive.name == "conv_general_dilated":
        if not rhs.weight:
            return product(_conv(eqn.params, eqn.params["dimension_numbers"]), lhs.value, rhs.value, None)
        numbers = eqn.params["dimension_numbers"]
        if rhs.source is not None:
            spec = tuple(rhs.permutation[axis] for axis in numbers.rhs_spec)
            numbers, rhs = numbers._replace(rhs_spec=spec), rhs.source
        return product(_conv(eqn.params, numbers), lhs.value, rhs.value, _leaf(rhs))
    (contracted, batch) = eqn.params["dimension_numbers"]
    rest = {name: eqn.params.get(name) for name in ("precision", "preferred_element_type", "out_sharding")}
    op = Dot((_tuples(contracted), _tuples(batch)), **rest)
    flipped = lhs.weight and rhs.data
    if flipped:
        lhs, rhs = rhs, lhs
        op = dataclasses.replace(op, dimension_numbers=(op.contracted[::-1], op.batch[::-1]))
    out = _with_weight(op, lhs, rhs, product) if rhs.weight else product(op, lhs.value, rhs.value, None)
    if flipped:
        # The result has the free axes of what is now the right operand last; they came first.
        first, free = len(op.batch[0]), op.free(lhs.value.ndim, rhs.value.ndim)
        middle = first + len(free[0])
        out = out.transpose(*range(first), *range(middle, out.ndim), *range(first, middle))
    return out


def _with_weight(op: Dot, lhs: Node, rhs: Node, product: Any) -> Array:
    """The product with a weight, in its parameter's layout, the pieces that it consists of one by one."""
    free = op.free(lhs.value.ndim, rhs.value.ndim)
    first = len(op.batch[0]) + len(free[0])
    if rhs.source is not None:
        moved = tuple(
            tuple(rhs.permutation[axis] for axis in axes) for axes in (op.contracted[1], op.batch[1], free[1])
        )
        numbers = ((op.contracted[0], moved[0]), (op.batch[0], moved[1]))
        out = _with_weight(dataclasses.replace(op, dimension_numbers=numbers), lhs, rhs.source, product)
        order = sorted(moved[2])
        return out.transpose(*range(first), *(first + order.index(axis) for axis in moved[2]))
    if rhs.axis in free[1] and len(rhs.pieces) > 1 and all(len(piece.leaves) == 1 for piece in rhs.pieces):
        parts = [_with_weight(op, lhs, piece, product) for piece in rhs.pieces]
        return jnp.concatenate(parts, axis=first + free[1].index(rhs.axis))
    return product(op, lhs.value, rhs.value, _leaf(rhs))


def _leaf(node: Node) -> int | None:
    return min(node.leaves)


def _conv(params: Any, numbers: lax.ConvDimensionNumbers) -> Conv:
    names = [field.name for field in dataclasses.fields(Conv)]
    static = {name: params[name] for name in names if name in params and name != "dimension_numbers"}
    static["padding"] = tuple(tuple(pair) for pair in static["padding"])
    return Conv(**static, dimension_numbers=numbers)


def _tuples(pair: Any) -> tuple[tuple[int, ...], tuple[int, ...]]:
    left, right = pair
    return tuple(left), tuple(right)
