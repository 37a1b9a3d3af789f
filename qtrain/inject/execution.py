"""Execution: which of a layer's three products run on integer codes, as its rule demands or as is faster here."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any, Literal

from qtrain.errors import UsageError, did_you_mean
from qtrain.inject.rules import Rule
from qtrain.inject.trace import Record
from qtrain.precision import Precision
from qtrain.quantizers import Operands, Quantizer, native
from qtrain.quantizers.base import static_bits
from qtrain.quantizers.native import Paths

UNITS = ("float", "int8", "fp8")
"""What a product is computed in."""

# Product → the kinds of its two operands, and its name in the plan.
_OPERANDS = {"forward": ("acts", "weights"), "dlhs": ("grads", "weights"), "drhs": ("grads", "acts")}
_SHOWN = {"forward": "fwd", "dlhs": "dX", "drhs": "dW"}
_KINDS = {
    "acts": ("activations", "act_quantizer"),
    "weights": ("weights", "weight_quantizer"),
    "grads": ("gradients", "grad_quantizer"),
}


@dataclasses.dataclass(frozen=True)
class Choice:
    """How the three products of one layer are carried out, and why.

    Attributes:
      paths: for the forward product, the input gradient (``dlhs``) and the weight gradient (``drhs``) one of `UNITS`.
      reasons: product → why it is computed in float.
      chosen_by: "rule" (it demands so), "auto" (found faster, or not), "recorded" (as the run was started).
    """

    paths: Paths = dataclasses.field(default_factory=Paths)
    reasons: Mapping[str, str] = dataclasses.field(default_factory=dict)
    chosen_by: Literal["rule", "auto", "recorded"] = "rule"

    def describe(self) -> str:
        """The units in words: ``int8``, or ``int8 fwd, float dX, int8 dW`` where they differ."""
        units = {name: getattr(self.paths, product) for product, name in _SHOWN.items()}
        alike = len(set(units.values())) == 1
        return self.paths.forward if alike else ", ".join(f"{unit} {name}" for name, unit in units.items())

    def explain(self, short: bool = False) -> str:
        """Who chose, and why not all of it runs on codes: ``auto; dX, dW float: …``; "" where a rule had its way.

        `short`: the reasons without what they advise, which follows a semicolon.
        """
        grouped: dict[str, list[str]] = {}
        for product, name in _SHOWN.items():
            if product in self.reasons:
                reason = self.reasons[product]
                grouped.setdefault(reason.split("; ")[0] if short else reason, []).append(name)
        words: list[str] = [] if self.chosen_by == "rule" else [self.chosen_by]
        if self.chosen_by == "auto" and not grouped:
            words = ["auto: nothing is faster in float"]
        for reason, names in grouped.items():
            words.append(f"{'' if len(names) == len(_SHOWN) else ', '.join(names) + ' '}float: {reason}")
        if self.paths.switch:
            words.append(f"float above {native.WIDEST} bits")
        return "; ".join(words)

    def to_json(self) -> dict[str, Any]:
        """Plain data, for the record of a run."""
        return {**dataclasses.asdict(self.paths), "reasons": dict(self.reasons), "chosen_by": self.chosen_by}

    @classmethod
    def from_json(cls, path: str, value: Any) -> Choice:
        """The choice that `to_json` wrote for the layer of `path`, now "recorded".

        Raises:
          UsageError: for what `to_json` does not write.
        """
        entries = dict(value) if isinstance(value, Mapping) else {}
        for product in _OPERANDS:
            unit = entries.get(product)
            if unit not in UNITS:
                near = did_you_mean(str(unit), UNITS)
                raise UsageError(f"execution[{path!r}].{product}={unit!r}: give one of {UNITS}.{near}")
        units = {product: entries[product] for product in _OPERANDS}
        paths = Paths(**units, switch=bool(entries.get("switch", False)))
        return cls(paths, dict(entries.get("reasons", {})), "recorded")


def choose(
    rule: Rule,
    record: Record,
    widest: Precision,
    backend: str,
    *,
    narrowest: Precision | None = None,
    bits: Precision | None = None,
    recorded: Choice | None = None,
) -> Choice:
    """How a layer's products are carried out under its rule.

    "fake": all in float. "native": on codes wherever that is possible; the forward product must be. "auto": on codes
    where that is possible and not slower on `backend`. Where traced bits may exceed 8, and may also not,
    ``paths.switch`` asks for both programs.

    Args:
      rule, record: of the layer; the shapes are those of one pass.
      widest, narrowest: per kind, the most and the fewest bits that traced ones take, Python ints; None: not known.
      backend: as ``jax.default_backend()`` names it.
      bits: those of this call (`trace.effective_bits`): Python numbers are exact, arrays lie in the range above, None
        leaves an operand in float. Without it (the plan) everything that follows the schedule is in the range.
      recorded: an earlier choice that decides in place of "auto" and of the shapes, as far as that can run.

    Raises:
      UsageError: for "native" where the forward product cannot run on codes; it names the layer and the reason.
    """
    narrowest = narrowest or Precision()
    if record.op == "attention":  # both operands are activations: the right one has their quantizer and bits
        rule = dataclasses.replace(rule, weight_quantizer=rule.act_quantizer, weights=rule.acts)
        widest, narrowest = (dataclasses.replace(ends, weights=ends.acts) for ends in (widest, narrowest))
        bits = None if bits is None else dataclasses.replace(bits, weights=bits.acts)
    if rule.execution == "fake" or _left_in_float(rule, bits):
        return Choice()
    widths = {kind: _width(kind, rule, widest, narrowest, bits) for kind in _KINDS}
    absent = _absent(rule, bits)
    quantizers = {kind: None if kind in absent else getattr(rule, field) for kind, (_, field) in _KINDS.items()}
    operands = Operands(quantizers["acts"], quantizers["weights"], quantizers["grads"], rule.residuals)
    limits = (widths["acts"], widths["weights"], widths["grads"])
    layer: tuple[Any, Any, Any, Any] = record.contraction, operands, record.lhs, record.rhs  # no None: it is a product
    reasons = dict(native.obstacles(*layer, limits))
    for product, kinds in _OPERANDS.items():
        for kind in filter(absent.__contains__, reversed(kinds)):
            reasons[product] = absent[kind]
    if rule.execution == "native" and "forward" in reasons:
        raise UsageError(_refusal(record.path, reasons["forward"], absent, widths))
    if recorded is not None:
        floats = [product for product in _OPERANDS if getattr(recorded.paths, product) == "float"]
        reasons.update({product: recorded.reasons.get(product, "as recorded") for product in floats})
    elif rule.execution == "auto":
        reasons = {**native.slower(*layer, backend), **reasons}
    units = {
        product: "float" if product in reasons else _unit(quantizers[kind] for kind in kinds)
        for product, kinds in _OPERANDS.items()
    }
    # A width that is not known may be any, and codes do not hold every one. The cotangent's counts in float products
    # too: where the forward one runs on codes, the backward pass encodes it once for both.
    quantized = (widths[kind] for kind, quantizer in quantizers.items() if quantizer is not None)
    switch = len(reasons) < len(_OPERANDS) and any(width is None or width > native.WIDEST for width in quantized)
    by: Any = recorded.chosen_by if recorded is not None else "auto" if rule.execution == "auto" else "rule"
    return Choice(Paths(**units, switch=switch), {p: reasons[p] for p in _OPERANDS if p in reasons}, by)


def _left_in_float(rule: Rule, bits: Precision | None) -> bool:
    """Whether this call quantizes neither operand of a layer whose rule would: it is the float model that is asked."""
    asked = rule.act_quantizer is not None or rule.weight_quantizer is not None
    return asked and bits is not None and bits.acts is None and bits.weights is None


def _absent(rule: Rule, bits: Precision | None) -> dict[str, str]:
    """Kind → why an operand is not quantized."""
    absent = {}
    for kind, (name, field) in _KINDS.items():
        if getattr(rule, field) is None:
            absent[kind] = f"its {name} are not quantized ({field}=None)"
        elif bits is not None and getattr(bits, kind) is None:
            absent[kind] = f"its {name} are not quantized (bits have {kind}=None)"
    return absent


def _width(kind: str, rule: Rule, widest: Precision, narrowest: Precision, bits: Precision | None) -> int | None:
    """The most bits that codes must hold: 8 at most, or more than 8 always; None where it may be either."""
    exact = getattr(rule, kind)
    if exact is None and bits is not None and getattr(bits, kind) is not None:
        exact = static_bits(getattr(bits, kind))
    if exact is not None:
        return exact
    most, fewest = getattr(widest, kind), getattr(narrowest, kind)
    if most is not None and most <= native.WIDEST:
        return most
    return fewest if fewest is not None and fewest > native.WIDEST else None


def _unit(quantizers: Iterable[Quantizer | None]) -> str:
    return "int8" if {q.code_dtype for q in quantizers if q is not None} == {"int8"} else "fp8"


def _refusal(path: str, reason: str, absent: Mapping[str, str], widths: Mapping[str, int | None]) -> str:
    kinds, remedy = _OPERANDS["forward"], ""
    if any(kind in absent for kind in kinds):
        remedy = "quantize them, or "
    elif any((widths[kind] or 0) > native.WIDEST for kind in kinds):
        remedy = f"give at most {native.WIDEST} bits, or "
    return f"layer {path!r}: execution='native' cannot run: {reason}; {remedy}use execution='auto' or 'fake'"
