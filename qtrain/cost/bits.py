"""The bits that each operand of an op counts: from its marker, the precision of the step, and its dtype."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple, TypeAlias

import jax.numpy as jnp
import numpy as np

from qtrain.cost.ops import Op, Ops
from qtrain.errors import UsageError, did_you_mean
from qtrain.precision import Precision

Precisions: TypeAlias = Precision | Mapping[str, Precision] | None
"""One `Precision` for all ops, or one for each path that follows the schedule; ``None``: the plain float model."""

Role: TypeAlias = Literal["weights", "acts", "grads"]

FLOAT_FROM = 24
"""From this many bits on a tensor is left as it is and counts the bits of its dtype."""


class ArrayBits(NamedTuple):
    """Bits that are an array: field `role` of the precision of `path`, for an operand whose dtype has `native` bits."""

    role: Role
    path: str
    native: int

    def value(self, precision: Precisions) -> Any:
        """The bits as float32, `native` from `FLOAT_FROM` on."""
        array = jnp.asarray(getattr(_of_path(precision, self.path), self.role), jnp.float32)
        return jnp.where(array >= FLOAT_FROM, float(self.native), array)


def operand_bits(op: Op, precision: Precisions, role: Role, native: int) -> int | ArrayBits:
    """The bits of one operand, or of the cotangent (``"grads"``), of `op`; `precision` is from `validated`."""
    bits = requested_bits(op, precision, role)
    if bits is None:
        return native
    if isinstance(bits, int):
        return bits if bits < FLOAT_FROM else native
    return ArrayBits(role, op.path if isinstance(precision, Mapping) else "", native)


def requested_bits(op: Op, precision: Precisions, role: Role) -> Any:
    """The bits a quantizer is asked for: an int, an array, or ``None`` where nothing is quantized."""
    if op.marker is None or precision is None:
        return None
    bits = getattr(op.marker, role)
    return getattr(_of_path(precision, op.path), role) if bits == "schedule" else bits


def validated(ops: Ops, precision: Precisions) -> Precisions:
    """`precision` with its Python and NumPy numbers as ints; `UsageError` for an illegal one or a missing path."""
    if precision is None:
        return None
    if isinstance(precision, Precision):
        return _validated(precision, "precision")
    for op in ops:
        marked = op.marker is not None and "schedule" in (op.marker.weights, op.marker.acts, op.marker.grads)
        if marked and op.path not in precision:
            raise UsageError(
                f"precision has no entry for {op.path!r}, which follows the schedule; its paths are"
                f" {', '.join(map(repr, precision))}.{did_you_mean(op.path, precision)}"
            )
    return {path: _validated(p, f"precision[{path!r}]") for path, p in precision.items()}


def _of_path(precision: Precisions, path: str) -> Precision:
    return precision if isinstance(precision, Precision) else precision[path]  # type: ignore[index]


def _validated(precision: Precision, name: str) -> Precision:
    def number(field: str) -> Any:
        bits = getattr(precision, field)
        if isinstance(bits, np.ndarray) and bits.ndim == 0:
            bits = bits.item()
        if not isinstance(bits, int | float | np.number | str):
            return bits
        whole = not isinstance(bits, str | bool) and bits >= 1 and float(bits).is_integer()
        if not whole:
            raise UsageError(f"{name}.{field}={bits!r} is not a number of bits: a whole number of at least 1")
        return int(float(bits))

    return Precision(**{field.name: number(field.name) for field in dataclasses.fields(Precision)})
