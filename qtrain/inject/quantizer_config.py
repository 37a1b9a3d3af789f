"""Quantizers from a config: a few words, or a mapping of fields."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from qtrain.errors import UsageError, did_you_mean
from qtrain.quantizers import (
    EWGS,
    FORMATS,
    GRIDS,
    LSQ,
    PACT,
    TRS,
    DoReFa,
    DoubleRounding,
    Float,
    LearnedWidth,
    Nested,
    Quantizer,
    Uniform,
)

# Kind → class, and what the words after it are, in order.
_KINDS: dict[str, tuple[type[Quantizer], tuple[str, ...]]] = {
    "uniform": (Uniform, ("grid", "per", "rounding")),
    "float": (Float, ("format", "per", "rounding")),
    "lsq": (LSQ, ("signed", "per", "across_bits")),
    "lsq+": (LSQ, ("signed", "per", "across_bits")),
    "trs": (TRS, ("signed", "per", "normalised")),
    "pact": (PACT, ("per",)),
    "dorefa": (DoReFa, ("kind", "per")),
    "double_rounding": (DoubleRounding, ("per",)),
    "ewgs": (EWGS, ()),
    "nested": (Nested, ("per", "scale_gradient")),
    "learned_width": (LearnedWidth, ("signed", "per")),
}
KINDS = tuple(_KINDS)
_FLAGS = {"signed": {"signed": True, "unsigned": False}, "normalised": {"normalised": True}}


def quantizer_from_config(spec: Any, key: str) -> Quantizer | None:
    """A quantizer from a config's value: None, some words, or a mapping.

    ================================  =================================================================================
    ``grid/per/rounding``             `Uniform`; with a small float's format for the grid (``e4m3/tensor``) `Float`
    ``lsq/signed/tensor/rescale``     `LSQ`: signed or unsigned, per, across_bits
    ``lsq+/unsigned/tensor``          LSQ+: with an offset for unsigned, as in the paper without one for signed
    ``trs/signed/tensor/normalised``  `TRS`, with or without the last word
    ``pact/tensor``                   `PACT`
    ``dorefa/acts``                   `DoReFa`: weights or acts, per
    ``double_rounding/tensor``        `DoubleRounding`: per; ``high`` in a mapping
    ``ewgs/…``                        `EWGS` around what follows
    ``nested/row/loss``               `Nested`: per, scale_gradient
    ``learned_width/signed/channel``  `LearnedWidth`: signed or unsigned, per
    ================================  =================================================================================

    Only the first word is needed. A mapping holds `Uniform`'s fields, or with the key ``format`` `Float`'s; with the
    key ``kind``, such words (``"lsq"``, ``"dorefa/acts"``), those of what they name: ``{"kind": "lsq", "signed":
    False}``; for ``"ewgs"`` its field ``quantizer`` is given like any other. ``"none"`` is None too: the command line
    can give a key that holds a string nothing else.

    >>> quantizer_from_config("affine/tensor", "quant.rules[0].act_quantizer").describe()
    'affine/tensor'
    >>> quantizer_from_config({"kind": "lsq+/unsigned", "across_bits": "keep"}, "quant.acts").describe()
    'lsq+/unsigned/tensor keep'

    Raises:
      UsageError: naming `key`.
    """
    if spec is None or isinstance(spec, Quantizer):
        return spec
    if isinstance(spec, str) and spec.lower() == "none":
        return None
    if hasattr(spec, "to_dict"):
        spec = spec.to_dict()
    fields: dict[str, Any]
    if isinstance(spec, str):
        name, fields = _parse(spec, key)
    elif not isinstance(spec, Mapping):
        raise UsageError(
            f"{key}={spec!r}: give 'grid/per/rounding' such as 'affine/tensor' or 'e4m3/tensor', words such as "
            "'lsq/unsigned' or 'dorefa/acts', a mapping of Uniform's or Float's fields (of others with 'kind'), or None"
        )
    elif "kind" in spec:
        given = {field: value for field, value in spec.items() if field != "kind"}
        name, fields = _parse(spec["kind"], f"{key}.kind", kinds_only=True)
        fields |= given
    else:
        name, fields = ("float" if "format" in spec else "uniform"), dict(spec)
    return _built(name, fields, key)


def _parse(spec: Any, key: str, kinds_only: bool = False) -> tuple[str, dict[str, Any]]:
    """The kind that words name, and the fields they give."""
    words = spec.split("/") if isinstance(spec, str) else [spec]
    name = words[0]
    if name == "ewgs" and len(words) > 1:
        return name, {"quantizer": "/".join(words[1:])}
    if name in KINDS:
        words = words[1:]
    elif kinds_only:
        hint = did_you_mean(str(name), KINDS)
        raise UsageError(f"{key}={name!r}: give one of {KINDS}, and words after it as in 'dorefa/acts'.{hint}")
    else:
        name = "float" if name in FORMATS else "uniform"
    slots = _KINDS[name][1]
    if len(words) > len(slots):
        form = "/".join(slots if name in ("uniform", "float") else (name, *slots))
        form = "grid/per/rounding" if name == "float" else form
        raise UsageError(f"{key}={spec!r}: give {form!r}, each but the first optional")
    fields: dict[str, Any] = dict(zip(slots, words, strict=False))
    for slot, allowed in _FLAGS.items():
        if slot in fields:
            if fields[slot] not in allowed:
                hint = did_you_mean(fields[slot], allowed)
                raise UsageError(f"{key}={spec!r}: {fields[slot]!r} is none of {tuple(allowed)}.{hint}")
            fields[slot] = allowed[fields[slot]]
    if str(fields.get("per", "")).isdecimal():
        fields["per"] = int(fields["per"])
    return name, fields


def _built(name: str, fields: dict[str, Any], key: str) -> Quantizer:
    kind: Any = _KINDS[name][0]
    allowed = {field.name for field in dataclasses.fields(kind)}
    for field in fields:
        if field not in allowed:
            hint = did_you_mean(field, allowed)
            raise UsageError(f"{key}.{field}: {kind.__name__} has no such field; it takes {sorted(allowed)}{hint}")
    if kind is Uniform and fields.get("grid", "symmetric") not in GRIDS:
        hint = did_you_mean(fields["grid"], (*GRIDS, *FORMATS, *KINDS))
        raise UsageError(
            f"{key}.grid={fields['grid']!r}: give a grid of {GRIDS}, or a small float of {FORMATS}, or one of {KINDS}."
            f"{hint}"
        )
    values = {field: tuple(value) if isinstance(value, list) else value for field, value in fields.items()}
    if name == "lsq+":
        values = {"initial": "lsq+", "offset": not values.get("signed", True), **values}
    if kind is EWGS:
        if values.get("quantizer") is None:
            raise UsageError(f"{key}.quantizer: EWGS needs one to wrap; give 'ewgs/lsq/signed', or the key 'quantizer'")
        values["quantizer"] = quantizer_from_config(values["quantizer"], f"{key}.quantizer")
    try:
        return kind(**values)
    except (UsageError, TypeError) as error:
        raise UsageError(f"{key}.{error}") from None
