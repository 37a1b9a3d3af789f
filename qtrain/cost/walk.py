"""The walk over a traced program: what every value depends on, and the dots and convolutions on the way."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax.extend import core

from qtrain.cost.macs import macs_of
from qtrain.cost.ops import Op, Operand, merge
from qtrain.cost.paths import module_path, parent, read_marker, scope_names

_CUSTOM_RULES = ("custom_jvp_call", "custom_vjp_call")
_ZERO_DERIVATIVE = frozenset({"stop_gradient", "sign", "floor", "ceil", "round"})


class Dependency(NamedTuple):
    """What a value depends on.

    data: on an argument. leaves: on which leaves of the variables, a bit mask. gradient: on a differentiated leaf,
    through floating-point numbers alone.
    """

    data: bool = False
    leaves: int = 0
    gradient: bool = False

    def __or__(self, other: Any) -> Dependency:
        return Dependency(self.data or other.data, self.leaves | other.leaves, self.gradient or other.gradient)


@dataclasses.dataclass(frozen=True)
class Leaves:
    """The leaves of the variables: their names, numbers of elements, and whether the first name is a collection."""

    names: tuple[tuple[str, ...], ...]
    sizes: tuple[int, ...]
    collections: bool

    def parameters(self, leaves: int) -> list[int]:
        """Indices of the leaves in a mask: those in ``params`` where there are any, else all."""
        indices = [i for i in range(len(self.names)) if leaves >> i & 1]
        params = [i for i in indices if self.collections and self.names[i][0] == "params"]
        return params or indices


@dataclasses.dataclass(frozen=True)
class Context:
    """Where a jaxpr stands in the whole program."""

    leaves: Leaves
    scopes: tuple[str, ...] = ()
    executions: int = 1
    flags: tuple[str, ...] = ()
    custom_rule: bool = False

    def flagged(self, flag: str) -> Context:
        """With one more flag on every op."""
        return dataclasses.replace(self, flags=(*self.flags, flag) if flag not in self.flags else self.flags)

    def repeated(self, times: int) -> Context:
        """With every op executed so many times more."""
        return dataclasses.replace(self, executions=self.executions * times)


def _union(dependencies: Sequence[Dependency]) -> Dependency:
    return functools.reduce(Dependency.__or__, dependencies, Dependency())


def walk(jaxpr: core.Jaxpr, inputs: Sequence[Dependency], context: Context) -> tuple[list[Dependency], list[Op]]:
    """The dependencies of a jaxpr's outputs, and its ops."""
    known: dict[Any, Dependency] = dict(zip(jaxpr.invars, inputs, strict=True))

    def read(atom: Any) -> Dependency:
        return Dependency() if isinstance(atom, core.Literal) else known.get(atom, Dependency())

    ops: list[Op] = []
    for eqn in jaxpr.eqns:
        operands = [read(atom) for atom in eqn.invars]
        inside = dataclasses.replace(context, scopes=(*context.scopes, *scope_names(str(eqn.source_info.name_stack))))
        name = eqn.primitive.name
        if name in ("dot_general", "conv_general_dilated"):
            ops.append(_record(eqn, operands, inside))
        handler = _CONTROL_FLOW.get(name, _call if any(_bodies(eqn)) else _elementwise)
        outputs, found = handler(eqn, operands, inside)
        ops += found
        for var, output in zip(eqn.outvars, outputs, strict=True):
            inexact = jnp.issubdtype(getattr(var.aval, "dtype", jnp.int32), jnp.inexact)
            known[var] = output._replace(gradient=output.gradient and (inexact or context.custom_rule))
    return [read(atom) for atom in jaxpr.outvars], ops


_Result = tuple[list[Dependency], list[Op]]


def _elementwise(eqn: core.JaxprEqn, operands: list[Dependency], context: Context) -> _Result:
    joint = _union(operands)
    if eqn.primitive.name in _ZERO_DERIVATIVE and not context.custom_rule:
        joint = joint._replace(gradient=False)
    return [joint] * len(eqn.outvars), []


def _call(eqn: core.JaxprEqn, operands: list[Dependency], context: Context) -> _Result:
    """Any other equation with jaxprs among its parameters: jit, checkpoint, custom rules, shard_map, Pallas, ..."""
    bodies = list(_bodies(eqn))
    if len(bodies) > 1:
        context = context.flagged("trip_count_unknown")
    if eqn.primitive.name in _CUSTOM_RULES:
        context = dataclasses.replace(context, custom_rule=True)
    if eqn.primitive.name == "shard_map":
        mesh = eqn.params["mesh"]
        axes = eqn.params.get("newly_manual_axes", eqn.params.get("manual_axes", mesh.axis_names))
        context = context.repeated(math.prod(mesh.shape[axis] for axis in axes))
    grid = getattr(eqn.params.get("grid_mapping"), "grid", ())
    if all(isinstance(size, int) for size in grid):
        context = context.repeated(math.prod(grid))
    else:
        context = context.flagged("trip_count_unknown")
    joint = _union(operands)
    results = []
    ops: list[Op] = []
    for body in bodies:
        # A kernel also takes references to its outputs and scratch, which come after the operands.
        matched = [*operands, *[joint] * (len(body.invars) - len(operands))][: len(body.invars)]
        outputs, found = walk(body, matched, context)
        results.append(outputs)
        ops += found
    if len(results) == 1 and len(results[0]) == len(eqn.outvars):
        if eqn.primitive.name in _CUSTOM_RULES:
            # The rule may send the gradient to an operand that the value does not depend on: straight_through(x, q).
            return [output._replace(gradient=joint.gradient) for output in results[0]], ops
        return results[0], ops
    return [joint] * len(eqn.outvars), ops


def _scan(eqn: core.JaxprEqn, operands: list[Dependency], context: Context) -> _Result:
    body = eqn.params["jaxpr"].jaxpr
    constants, carried = eqn.params["num_consts"], eqn.params["num_carry"]
    fixed, carry = operands[:constants], operands[constants : constants + carried]
    slices = operands[constants + carried :]
    carry = _fixpoint(lambda carry: walk(body, [*fixed, *carry, *slices], context)[0][:carried], carry)
    return walk(body, [*fixed, *carry, *slices], context.repeated(eqn.params["length"]))


def _while(eqn: core.JaxprEqn, operands: list[Dependency], context: Context) -> _Result:
    test, body = eqn.params["cond_jaxpr"].jaxpr, eqn.params["body_jaxpr"].jaxpr
    n_test, n_body = eqn.params["cond_nconsts"], eqn.params["body_nconsts"]
    of_test, of_body, carry = operands[:n_test], operands[n_test : n_test + n_body], operands[n_test + n_body :]
    context = context.flagged("trip_count_unknown")
    carry = _fixpoint(lambda carry: walk(body, [*of_body, *carry], context)[0], carry)
    (predicate,), test_ops = walk(test, [*of_test, *carry], context)
    outputs, body_ops = walk(body, [*of_body, *carry], context)
    return [old | new | predicate for old, new in zip(carry, outputs, strict=True)], [*test_ops, *body_ops]


def _cond(eqn: core.JaxprEqn, operands: list[Dependency], context: Context) -> _Result:
    index, arguments = operands[0], operands[1:]
    results = [walk(branch.jaxpr, arguments, context) for branch in eqn.params["branches"]]
    ops = max((found for _, found in results), key=lambda found: sum(op.forward for op in found))
    if any(merge(found) != merge(ops) for _, found in results):
        ops = [dataclasses.replace(op, flags=tuple(dict.fromkeys((*op.flags, "largest_branch")))) for op in ops]
    return [_union([index, *column]) for column in zip(*(outputs for outputs, _ in results), strict=True)], ops


_CONTROL_FLOW = {"scan": _scan, "while": _while, "cond": _cond}


def _fixpoint(step: Callable[[list[Dependency]], list[Dependency]], carry: list[Dependency]) -> list[Dependency]:
    while True:
        joined = [old | new for old, new in zip(carry, step(carry), strict=True)]
        if joined == carry:
            return carry
        carry = joined


def _bodies(eqn: core.JaxprEqn) -> Iterator[core.Jaxpr]:
    for value in eqn.params.values():
        for item in value if isinstance(value, tuple | list) else (value,):
            if isinstance(item, core.ClosedJaxpr):
                yield item.jaxpr
            elif isinstance(item, core.Jaxpr):
                yield item


def _record(eqn: Any, operands: list[Dependency], context: Context) -> Op:
    kind, macs, contraction = macs_of(eqn)
    lhs, rhs = (_operand(v.aval, d, context.leaves) for v, d in zip(eqn.invars[:2], operands[:2], strict=True))
    marker = read_marker(context.scopes)
    weight = rhs if rhs.kind == "weight" else lhs if lhs.kind == "weight" else None
    path = module_path(context.scopes, drop_root=context.leaves.collections) if marker is None else marker.path
    if marker is None and weight is not None:
        mask = (operands[1] if weight is rhs else operands[0]).leaves
        owners = {parent(context.leaves.names[i], context.leaves.collections) for i in context.leaves.parameters(mask)}
        path = owners.pop() if len(owners) == 1 else path
    out = eqn.outvars[0].aval
    return Op(
        path=path,
        kind=kind,
        lhs=lhs,
        rhs=rhs,
        output_shape=tuple(out.shape),
        output_dtype=str(out.dtype),
        macs=macs,
        contraction=contraction,
        channels=0 if weight is None else math.prod(weight.shape) // contraction,
        executions=context.executions,
        marker=marker,
        flags=context.flags,
    )


def _operand(aval: Any, dependency: Dependency, names: Leaves) -> Operand:
    kind = "act" if dependency.data else "weight" if dependency.leaves else "const"
    parameter, size = "", 0
    if kind == "weight":
        largest = max(names.parameters(dependency.leaves), key=lambda i: names.sizes[i])
        parameter, size = "/".join(names.names[largest]), names.sizes[largest]
    return Operand(kind, tuple(aval.shape), str(aval.dtype), dependency.gradient, parameter, size)  # type: ignore[arg-type]
