"""What a user may give as bits, looked at before anything is compiled."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence

import jax
import numpy as np

from qtrain.errors import UsageError, did_you_mean
from qtrain.inject.resolve import Resolved
from qtrain.inject.rules import Rule
from qtrain.inject.trace import op_bits
from qtrain.precision import Precision
from qtrain.quantizers.base import static_bits

Bits = Precision | Mapping[str, Precision]


def limits(name: str, value: Precision | int | None) -> Precision:
    """The range of traced bits, a Python int or None for each kind."""
    fields = vars(value) if isinstance(value, Precision) else dict.fromkeys(("weights", "acts", "grads"), value)
    limits: dict[str, int | None] = dict.fromkeys(fields)
    for kind, bits in fields.items():
        with contextlib.suppress(UsageError):
            limits[kind] = None if bits is None else static_bits(bits)
        if bits is not None and limits[kind] is None:
            raise UsageError(f"quantize: {name}={bits!r}: give a whole number of bits, a Precision of them, or None")
    return Precision(**limits)


def check_bits(bits: Bits) -> None:
    """Refuse bits that are no `Precision`, or hold what is no width."""
    for precision in bits.values() if isinstance(bits, Mapping) else (bits,):
        if not isinstance(precision, Precision):
            raise UsageError(f"bits={precision!r}: give a qtrain.Precision, or a mapping from layer path to one")
        for value in (precision.weights, precision.acts, precision.grads):
            if isinstance(value, jax.Array) and not isinstance(value, jax.core.Tracer) and value.is_fully_addressable:
                value = np.asarray(value)
            if value is not None:
                static_bits(value)


def check_paths(bits: Bits, resolved: Resolved, rules: Sequence[Rule]) -> None:
    """Refuse a mapping of bits that leaves a layer out, or names one that does not follow it."""
    if not isinstance(bits, Mapping):
        return
    known = {path: op_bits(path, rules[index]) for path, index in resolved.assigned.items()}
    elsewhere = {path for path in resolved.skipped if any(rule.matches(path) for rule in rules)}
    for path in bits:
        if path not in known and path not in elsewhere:
            raise UsageError(f"bits[{path!r}]: no layer of that path is quantized.{did_you_mean(path, known)}")
    followers = [path for path, b in known.items() if "schedule" in (b.weights, b.acts, b.grads)]
    missing = [path for path in followers if path not in bits]
    if missing:
        raise UsageError(f"bits has no entry for {missing[:6]}, which follow the schedule; give a Precision for each")
