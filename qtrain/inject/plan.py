"""The plan: what is quantized, how, and what share of the work it is."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Mapping
from typing import Any

from qtrain.cost.marker import OpBits
from qtrain.cost.ops import Ops
from qtrain.errors import UsageError
from qtrain.inject.execution import Choice
from qtrain.quantizers import FLOAT_BITS


@dataclasses.dataclass(frozen=True)
class Row:
    """One layer, or one operation outside any layer that can be quantized.

    Attributes:
      path: module path.
      module: type of the module, or "" for an operation found in the traced program alone.
      op: one of `qtrain.inject.rules.OPS`; "" for a layer without multiplications that is not quantized.
      bits: fixed bits, "schedule" or None (float) of weights, acts and grads.
      weights, acts, grads, bias: the quantizers in words, "float" where there is none.
      residuals: what the backward pass sees.
      execution: what its products are computed in: ``float``, ``int8``, ``int8 fwd, float dX, int8 dW``.
      execution_reason: who chose that if not its rule alone, and why a product is in float; "" where nobody was asked.
      macs: multiply-accumulates of the forward pass, for the batch the plan was made with.
      weight_scales: number of scales that storing the weights takes.
      note: why it is not quantized, or what made it an exception.
    """

    path: str
    module: str
    op: str
    bits: OpBits
    weights: str = "float"
    acts: str = "float"
    grads: str = "float"
    bias: str = "float"
    residuals: str = "quantized"
    macs: int = 0
    weight_scales: int = 0
    execution: str = "float"
    execution_reason: str = ""
    note: str = ""

    @property
    def quantized(self) -> bool:
        """Whether any operand is quantized."""
        return any(map(narrow, (self.bits.weights, self.bits.acts, self.bits.grads)))


@dataclasses.dataclass(frozen=True)
class Plan:
    """The resolved plan of a model for arguments of given shapes.

    Iterating gives its rows, in order of execution; ``str(plan)`` is a readable table; `ops` are the counted operations
    that `qtrain.cost` prices; `unused` are the paths of rules that are never used, because earlier ones cover all that
    they match; `choices` are, by path, those of the layers whose rule asks for more than float arithmetic; `per_width`
    are the widths for each of which norm layers have variables, and `norms`, by path, the layers whose weight bits say
    which are used (None: none does, the first are).
    """

    rows: tuple[Row, ...]
    ops: Ops
    unused: tuple[str, ...] = ()
    choices: Mapping[str, Choice] = dataclasses.field(default_factory=dict)
    per_width: tuple[int, ...] = ()
    norms: Mapping[str, str | None] = dataclasses.field(default_factory=dict)

    def __iter__(self) -> Iterator[Row]:
        return iter(self.rows)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, path: str) -> Row:
        """The row of a path."""
        for row in self.rows:
            if row.path == path:
                return row
        raise KeyError(path)

    @property
    def macs(self) -> int:
        """Forward multiply-accumulates, quantized or not."""
        return sum(row.macs for row in self.rows)

    @property
    def coverage(self) -> float:
        """Share of the forward multiply-accumulates whose operands are both quantized."""
        covered = sum(
            row.macs
            for row in self.rows
            if narrow(row.bits.acts) and (narrow(row.bits.weights) or row.op == "attention")
        )
        return covered / max(self.macs, 1)

    @property
    def followers(self) -> tuple[str, ...]:
        """Paths of the layers that follow the schedule with at least one operand."""
        return tuple(row.path for row in self.rows if "schedule" in (row.bits.weights, row.bits.acts, row.bits.grads))

    @property
    def weight_scales(self) -> dict[str, int]:
        """Path → number of weight scales."""
        return {row.path: row.weight_scales for row in self.rows if row.weight_scales}

    def with_choices(self, choices: Mapping[str, Choice]) -> Plan:
        """The plan with its layers carried out as `choices` says.

        Raises:
          UsageError: when they are for other layers than those that had a choice.
        """
        if self.choices and choices.keys() != self.choices.keys():
            differing = sorted(choices.keys() ^ self.choices.keys())
            raise UsageError(f"execution: {differing[:6]} are recorded and not in the plan, or the reverse")
        rows = [
            dataclasses.replace(row, execution=choice.describe(), execution_reason=choice.explain())
            if (choice := choices.get(row.path)) and row.bits != OpBits(row.path)
            else row
            for row in self.rows
        ]
        return dataclasses.replace(self, rows=tuple(rows), choices=dict(choices))

    def to_json(self) -> list[dict[str, Any]]:
        """The rows as plain data."""
        return [dataclasses.asdict(row) for row in self.rows]

    def __str__(self) -> str:
        # Float arithmetic throughout is the ordinary case, of which there is nothing to say.
        asked = bool(self.choices)
        execution = ("execution",) if asked else ()
        header = ("layer", "op", "weights", "acts", "gradients", *execution, "MACs", "share", "note")
        total = max(self.macs, 1)
        body = [
            (
                row.path or "(root)",
                row.op or "-",
                _cell(row.weights, row.bits.weights),
                _cell(row.acts, row.bits.acts),
                _cell(row.grads, row.bits.grads),
                *((row.execution,) if asked else ()),
                f"{row.macs:,}",
                f"{100 * row.macs / total:.1f} %",
                "; ".join(
                    filter(None, (row.note, row.execution_reason and self.choices[row.path].explain(short=True)))
                ),
            )
            for row in self.rows
        ]
        widths = [max(len(line[column]) for line in [header, *body]) for column in range(len(header))]
        right = {header.index("MACs"), header.index("share")}

        def line(cells: tuple[str, ...]) -> str:
            columns = enumerate(zip(cells, widths, strict=True))
            return "  ".join(cell.rjust(w) if i in right else cell.ljust(w) for i, (cell, w) in columns).rstrip()

        rule = "  ".join("-" * width for width in widths)
        summary = f"{100 * self.coverage:.1f} % of {self.macs:,} forward MACs have both operands quantized"
        unused = [f"rule path={path!r} is never used: earlier rules cover what it matches" for path in self.unused]
        reasons = dict.fromkeys(reason for choice in self.choices.values() for reason in choice.reasons.values())
        advice = [f"float: {reason}" for reason in reasons if "; " in reason]
        held = [self._norms_in_words()] if self.per_width else []
        return "\n".join([line(header), rule, *map(line, body), summary, *held, *advice, *unused])

    def _norms_in_words(self) -> str:
        widths = ", ".join(map(str, self.per_width))
        if not self.norms:
            return f"no norm layer has variables to hold for each of {widths} bits"
        examples = [f"{norm} by {layer or 'none'}" for norm, layer in self.norms.items()][:3]
        more = ", …" if len(self.norms) > len(examples) else ""
        layers = f"{len(self.norms)} norm layer{'s' if len(self.norms) > 1 else ''}"
        return f"{layers} held for each of {widths} bits, chosen by a layer's weight bits: {', '.join(examples)}{more}"

    def dumps(self) -> str:
        """The rows as JSON text."""
        return json.dumps(self.to_json(), indent=1)


def narrow(bits: int | str | None) -> bool:
    """Whether an operand with such bits in a plan is ever quantized: fixed ones of 24 and above leave it in float."""
    return bits == "schedule" or (isinstance(bits, int) and bits < FLOAT_BITS)


def _cell(quantizer: str, bits: int | str | None) -> str:
    if not narrow(bits):
        return "float"
    return f"{quantizer} @ {bits}" if bits == "schedule" else f"{quantizer} @ {bits} fixed"
