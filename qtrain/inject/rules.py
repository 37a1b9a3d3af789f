"""Rules: which layers are quantized, by which quantizers, at fixed bits or at those of the step."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

from qtrain.errors import UsageError, did_you_mean
from qtrain.inject.quantizer_config import quantizer_from_config
from qtrain.quantizers import RESIDUALS, Nested, Quantizer, Uniform
from qtrain.quantizers.base import static_bits

WEIGHTED = ("dot", "conv", "conv_transpose", "einsum", "recurrent", "attend")
"""Products of activations and weights: what a rule covers unless it says otherwise."""
OPS = (*WEIGHTED, "attention", "embed", "param", "output")
PARTS = ("attend", "attention", "param", "output")
"""Operations that are parts of a module: their path is the module's with a name of their own behind it."""

# Operation → the fields of a rule that mean nothing for it.
_VOID = {
    "attention": ("weight_quantizer", "bias_quantizer"),
    "output": ("weight_quantizer", "bias_quantizer"),
    "embed": ("act_quantizer", "grad_quantizer", "bias_quantizer"),
    "param": ("act_quantizer", "grad_quantizer", "bias_quantizer"),
}
POSITIONS = ("any", "first", "last", "ends")
EXECUTIONS = ("fake", "native", "auto")

_DEFAULT = Uniform("symmetric", per="channel")


@dataclasses.dataclass(frozen=True)
class Rule:
    """What happens to the layers whose module path fully matches `path`; of several rules the first match wins.

    The quantizers say how an operand is quantized (None: it stays in float); `weights`, `acts` and `grads` say to how
    many bits: a number is fixed, None follows the ``bits=`` of the step.

    Raises:
      UsageError: for a field that holds something it does not allow.
    """

    path: str = ".*"
    """Regular expression on the whole ``/``-joined module path; the root module's path is ``""``."""
    weights: int | None = None
    """Fixed bits of the kernel (and bias); None follows the schedule."""
    acts: int | None = None
    """Fixed bits of the input; None follows the schedule."""
    grads: int | None = None
    """Fixed bits of the output's cotangent; None follows the schedule."""
    weight_quantizer: Quantizer | None = _DEFAULT
    """Quantizer of the kernel."""
    act_quantizer: Quantizer | None = _DEFAULT
    """Quantizer of the input."""
    grad_quantizer: Quantizer | None = None
    """Quantizer of the cotangent of the layer's product, which feeds input and weight gradient alike."""
    bias_quantizer: Quantizer | None = None
    """Quantizer of the bias, at the bits of the weights."""
    ops: tuple[str, ...] = WEIGHTED
    """The operations it applies to. By default the products of activations and weights: "dot" (Dense, DenseGeneral),
    "conv", "conv_transpose", "einsum" (nn.Einsum), "recurrent" (the gates of a fused cell, each by itself, with the
    paths they have in an unfused one), "attend" (an embedding as output layer, ``embed/attend``). Only where asked for:
    "attention" (the products ``attention/qk`` and ``attention/pv``, both operands by `act_quantizer`), "embed" (the
    table that is looked up, by `weight_quantizer`, a row being a channel), "param" (a parameter outside these layers,
    ``module/name``, by `weight_quantizer`), "output" (what a module returns, ``module/output``, by `act_quantizer`, an
    example being a channel, and its cotangent by `grad_quantizer`). "weighted": those of the
    default; "all": all but "param" and "output". A part, ``module/part``, is matched by its module's path, too."""
    residuals: Literal["quantized", "original", "folded", "requantized"] = "quantized"
    """What the backward pass multiplies with: the "quantized" operands; the "original" ones; "folded": their codes,
    both scales being folded into the cotangent before it is quantized; or "requantized": an operand whose scale varies
    along a backward contraction is put on a grid that is shared along it, at the same bits."""
    execution: Literal["fake", "native", "auto"] = "fake"
    """"fake": float arithmetic on quantized values. "native": products on codes (int8; fp8 for small floats), up to 8
    bits; the forward product must be able to, a backward one that cannot is computed in float. "auto": each product on
    codes where that can be and is not slower on this backend. The plan shows what came of it, and why."""
    position: str = "any"
    """"first", "last" or "ends" restricts the rule to the first, last or both of the model's quantizable layers."""

    def __post_init__(self) -> None:
        try:
            re.compile(self.path)
        except (re.error, TypeError) as error:
            raise UsageError(f"rule path={self.path!r}: not a regular expression ({error})") from None
        for name in ("weights", "acts", "grads"):
            if getattr(self, name) is not None:
                object.__setattr__(self, name, _fixed_bits(self.path, name, getattr(self, name)))
        for name in ("weight_quantizer", "act_quantizer", "grad_quantizer", "bias_quantizer"):
            if not isinstance(getattr(self, name), Quantizer | None):
                raise UsageError(
                    f"rule {self.path!r}: {name}={getattr(self, name)!r} is not a quantizer; give one of "
                    "qtrain.quantizers, or None"
                )
        if self.grad_quantizer is not None and self.grad_quantizer.learns:
            raise UsageError(
                f"rule {self.path!r}: grad_quantizer={self.grad_quantizer.describe()!r} has parameters, and a backward "
                "pass keeps none; give a Uniform or a Float"
            )
        if isinstance(self.act_quantizer, Nested):
            raise UsageError(
                f"rule {self.path!r}: act_quantizer={self.act_quantizer.describe()!r} is for weights and biases, whose "
                "gradients it compares them with; give a Uniform, an LSQ, a LearnedWidth, or None"
            )
        if not isinstance(self.ops, str | Sequence):
            raise UsageError(f"rule {self.path!r}: ops={self.ops!r}; give a tuple of {OPS}")
        ops = (self.ops,) if isinstance(self.ops, str) else tuple(self.ops)
        every = {"weighted": WEIGHTED, "all": tuple(op for op in OPS if op not in ("param", "output"))}
        for op in ops:
            _one_of(self.path, "ops", op, (*OPS, *every))
        object.__setattr__(self, "ops", tuple(dict.fromkeys(op for name in ops for op in every.get(name, (name,)))))
        _one_of(self.path, "residuals", self.residuals, RESIDUALS)
        _one_of(self.path, "execution", self.execution, EXECUTIONS)
        _one_of(self.path, "position", self.position, POSITIONS)

    def matches(self, path: str) -> bool:
        """Whether `path` is fully matched."""
        return re.fullmatch(self.path, path) is not None

    def covers(self, path: str, op: str) -> bool:
        """Whether it applies to `op` at `path`, wherever that stands in the model."""
        return op in self.ops and (self.matches(path) or (op in PARTS and self.matches(path.rpartition("/")[0])))


def expanded(rules: Sequence[Rule]) -> tuple[Rule, ...]:
    """`rules`, then for each kind of operation that some quantizers mean nothing for, the same without these.

    Of n rules, that of index i stands at ``offset(op) * n + i`` as it applies to `op`.
    """
    found = list(rules)
    for fields in dict.fromkeys(_VOID.values()):
        without: dict[str, Any] = dict.fromkeys(fields)
        found += [dataclasses.replace(rule, **without) for rule in rules]
    return tuple(found)


def offset(op: str) -> int:
    """See `expanded`."""
    kinds = list(dict.fromkeys(_VOID.values()))
    return kinds.index(_VOID[op]) + 1 if op in _VOID else 0


def default_rules(
    *,
    weight_quantizer: Quantizer | None = _DEFAULT,
    act_quantizer: Quantizer | None = _DEFAULT,
    grad_quantizer: Quantizer | None = None,
    bias_quantizer: Quantizer | None = None,
    ends: int = 8,
) -> tuple[Rule, ...]:
    """Every layer follows the schedule, but the first and the last stay at `ends` bits.

    The two ends hold a small share of the operations and lose most from few bits, which is why quantized networks
    commonly keep them at 8 (Zhou et al. 2016, DoReFa, left them in float).
    """
    quantizers: dict[str, Any] = {
        "weight_quantizer": weight_quantizer,
        "act_quantizer": act_quantizer,
        "grad_quantizer": grad_quantizer,
        "bias_quantizer": bias_quantizer,
    }
    return (Rule(position="ends", weights=ends, acts=ends, **quantizers), Rule(**quantizers))


def rules_from_config(specs: Sequence[Rule | Mapping[str, Any]], key: str = "quant.rules") -> tuple[Rule, ...]:
    """Rules from a config: a sequence of mappings of `Rule`'s fields, quantizers as `quantizer_from_config` takes them.

    Raises:
      UsageError: naming the rule by its index.
    """
    if isinstance(specs, str | Mapping) or not isinstance(specs, Iterable):
        raise UsageError(f"{key}={specs!r}: give a sequence of mappings, one a rule")
    fields = {field.name for field in dataclasses.fields(Rule)}
    rules: list[Rule] = []
    for index, spec in enumerate(specs):
        if isinstance(spec, Rule):
            rules.append(spec)
            continue
        here = f"{key}[{index}]"
        spec = spec.to_dict() if hasattr(spec, "to_dict") else spec
        if not isinstance(spec, Mapping):
            raise UsageError(f"{here}={spec!r}: give a mapping with keys of {sorted(fields)}")
        values: dict[str, Any] = {}
        for name, value in spec.items():
            if name not in fields:
                raise UsageError(
                    f"{here}.{name}: a rule has no such field; it takes {sorted(fields)}{did_you_mean(name, fields)}"
                )
            values[name] = quantizer_from_config(value, f"{here}.{name}") if name.endswith("_quantizer") else value
        try:
            rules.append(Rule(**values))
        except UsageError as error:
            raise UsageError(f"{here}: {error}") from None
    if not rules:
        raise UsageError(f"{key} is empty: give at least one rule")
    return tuple(rules)


def _fixed_bits(path: str, name: str, value: Any) -> int:
    try:
        number = static_bits(value)
    except UsageError:
        number = None
    if number is None:
        raise UsageError(
            f"rule {path!r}: {name}={value!r} is not a width; give a whole number of at least 1, or None to follow the "
            "schedule"
        )
    return number


def _one_of(path: str, name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise UsageError(f"rule {path!r}: {name}={value!r}; give one of {allowed}{did_you_mean(value, allowed)}")
