"""The records of a count: one dot or convolution each, with its path, operands, multiply-accumulates and marker."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Literal

import jax.numpy as jnp

from qtrain.cost.marker import OpBits
from qtrain.errors import UsageError, did_you_mean

PASSES = ("forward", "input_gradient", "weight_gradient")
"""The products of a training step that one op stands for; each has the forward's number of MACs, or none."""


@dataclasses.dataclass(frozen=True)
class Operand:
    """One operand of an op.

    kind: ``"weight"`` depends on the variables and on no argument, ``"act"`` on an argument, ``"const"`` on neither.
    shape, dtype: as the op sees them, after casts; inside a scanned body, of one iteration.
    needs_gradient: whether it depends, through floating point, on a differentiated variable.
    parameter, parameter_size: of a weight, the name of the largest leaf of the variables behind it and its number of
        elements; ``""`` and 0 otherwise. A leaf stacked for a scan has the elements of all iterations.
    """

    kind: Literal["weight", "act", "const"]
    shape: tuple[int, ...]
    dtype: str
    needs_gradient: bool
    parameter: str = ""
    parameter_size: int = 0

    @property
    def native_bits(self) -> int:
        """Bits of its dtype, at most 32: what the operand counts when nothing quantizes it."""
        return native_bits(self.dtype)


@dataclasses.dataclass(frozen=True)
class Op:
    """One ``dot_general`` or ``conv_general_dilated`` of the forward pass and the gradients that follow from it.

    path: module path, ``/``-joined; the root module's is ``""``.
    macs: multiply-accumulates of one execution of the forward product.
    executions: how often it runs: trip counts of scans, and equal products at one path, which are kept as one record.
    contraction: number of products summed into one output element.
    channels: output channels of the weight, its elements (of one iteration) divided by `contraction`; 0 without one.
    marker: what an injected quantizer wrote; ``None`` for an op that nothing quantizes.
    flags: ``"trip_count_unknown"`` (in a ``while``: counted once), ``"largest_branch"`` (of a ``cond`` whose branches
        differ: the one with most MACs is counted).
    """

    path: str
    kind: Literal["dot", "conv"]
    lhs: Operand
    rhs: Operand
    output_shape: tuple[int, ...]
    output_dtype: str
    macs: int
    contraction: int
    channels: int = 0
    executions: int = 1
    marker: OpBits | None = None
    flags: tuple[str, ...] = ()

    @property
    def forward(self) -> int:
        """MACs of the forward product, over all executions."""
        return self.macs * self.executions

    @property
    def input_gradient(self) -> int:
        """MACs of the gradients with respect to activations: none for the first layer, two products for QKᵀ."""
        return self.forward * sum(x.needs_gradient and x.kind != "weight" for x in (self.lhs, self.rhs))

    @property
    def weight_gradient(self) -> int:
        """MACs of the gradients with respect to weights."""
        return self.forward * sum(x.needs_gradient and x.kind == "weight" for x in (self.lhs, self.rhs))

    def roles(self) -> tuple[Literal["weights", "acts"], Literal["weights", "acts"]]:
        """Which bits of a `Precision` the left and the right operand take: the weight ``weights``, the rest ``acts``.

        When neither operand depends on an argument (a layer applied to learned positions), the left one is the layer's
        input, as Flax writes its products. Both operands of a marked pair are activations, whatever they depend on.
        """
        if self.marker is not None and self.marker.pair:
            return "acts", "acts"
        if self.rhs.kind == "weight":
            return "acts", "weights"
        return ("weights" if self.lhs.kind == "weight" else "acts"), "acts"


class Ops(tuple[Op, ...]):
    """The ops of one forward pass, in order of first execution."""

    __slots__ = ()

    @property
    def forward(self) -> int:
        """MACs of the forward pass."""
        return sum(op.forward for op in self)

    @property
    def input_gradient(self) -> int:
        """MACs of the gradients with respect to activations."""
        return sum(op.input_gradient for op in self)

    @property
    def weight_gradient(self) -> int:
        """MACs of the gradients with respect to weights."""
        return sum(op.weight_gradient for op in self)

    @property
    def weights(self) -> int:
        """Number of weights that enter the ops; a leaf that several ops share counts once."""
        operands = (operand for op in self for operand in (op.lhs, op.rhs))
        return sum({x.parameter: x.parameter_size for x in operands if x.kind == "weight"}.values())

    def by_path(self) -> dict[str, Ops]:
        """The ops of each path, in order of first execution."""
        groups: dict[str, list[Op]] = {}
        for op in self:
            groups.setdefault(op.path, []).append(op)
        return {path: Ops(group) for path, group in groups.items()}


def merge(ops: Iterable[Op]) -> Ops:
    """Records that are equal but for `executions` become one, their executions added."""
    executions: dict[Op, int] = {}
    for op in ops:
        key = dataclasses.replace(op, executions=1)
        executions[key] = executions.get(key, 0) + op.executions
    return Ops(dataclasses.replace(op, executions=times) for op, times in executions.items() if times)


def native_bits(dtype: str) -> int:
    """Bits of one number of `dtype`, at most 32; of one real part for complex numbers."""
    kind = jnp.dtype(dtype)
    if jnp.issubdtype(kind, jnp.bool_):
        return 1
    bits = jnp.finfo(kind).bits if jnp.issubdtype(kind, jnp.inexact) else jnp.iinfo(kind).bits
    return min(int(bits), 32)


def check_passes(passes: Iterable[str]) -> tuple[str, ...]:
    """`passes` as a tuple; `UsageError` for a name that is not one of `PASSES`."""
    names = (passes,) if isinstance(passes, str) else tuple(passes)
    for name in names:
        if name not in PASSES:
            raise UsageError(f"passes={name!r} is not one of {', '.join(PASSES)}.{did_you_mean(name, PASSES)}")
    return names
