"""Quantizers as JSON, and back."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from qtrain import quantizers
from qtrain.errors import UsageError
from qtrain.quantizers import Quantizer


def to_json(quantizer: Quantizer) -> dict[str, Any]:
    """The type of a quantizer and the fields that are not at their defaults.

    >>> to_json(quantizers.Uniform("affine", per="tensor"))
    {'type': 'Uniform', 'grid': 'affine', 'per': 'tensor'}

    Raises:
      UsageError: for one that is not of `qtrain.quantizers`: nobody could make it again from its name.
    """
    name = type(quantizer).__name__
    if getattr(quantizers, name, None) is not type(quantizer):
        raise UsageError(
            f"export: {quantizer.describe()!r} is a {type(quantizer).__module__}.{name}, and only the quantizers of "
            "qtrain.quantizers can be stored"
        )
    fields = {}
    for field in dataclasses.fields(quantizer):  # type: ignore[arg-type]
        value = getattr(quantizer, field.name)
        if value != field.default:
            fields[field.name] = to_json(value) if isinstance(value, Quantizer) else value
    return {"type": name, **fields}


def from_json(value: Mapping[str, Any]) -> Quantizer:
    """The quantizer that `to_json` wrote.

    Raises:
      UsageError: for a type that this version does not have, or fields it does not allow.
    """
    kind: Any = getattr(quantizers, value["type"], None)
    if not isinstance(kind, type) or not issubclass(kind, Quantizer):
        raise UsageError(f"load: there is no quantizer {value['type']!r} in this version of qtrain")

    def field(given: Any) -> Any:
        if isinstance(given, Mapping):
            return from_json(given)
        return tuple(given) if isinstance(given, list) else given

    try:
        return kind(**{name: field(given) for name, given in value.items() if name != "type"})
    except TypeError as error:
        raise UsageError(f"load: quantizer {dict(value)!r}: {error}") from None
