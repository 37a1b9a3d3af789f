"""The mark that an injected op leaves in the traced program, so that the count knows the op's path and bits."""

from __future__ import annotations

import dataclasses
import re
import urllib.parse
from typing import Literal, TypeAlias

Bits: TypeAlias = int | Literal["schedule"] | None
"""A whole number: fixed. ``"schedule"``: follows the `Precision` of the step. ``None``: the operand stays as it is."""

_MARKER = re.compile(
    r"quantized-w(?P<weights>\d+|s|n)-a(?P<acts>\d+|s|n)-g(?P<grads>\d+|s|n)-r(?P<residuals>[qofr])(?P<pair>p?)-(?P<path>[\w.%~-]*)"
)
Residuals: TypeAlias = Literal["quantized", "original", "folded", "requantized"]
_RESIDUALS: dict[str, Residuals] = {"q": "quantized", "o": "original", "f": "folded", "r": "requantized"}


@dataclasses.dataclass(frozen=True)
class OpBits:
    """What an injected op quantizes: its module path and, per kind of operand, the bits it is quantized to.

    A product of two activations uses `acts` for both of its operands; `pair` says that it is one, though an operand (a
    learned query) may depend on the variables alone. `residuals` says which operands the backward pass
    multiplies the cotangent with: the ``"original"`` ones, which count their dtype's bits, or the ``"quantized"`` ones,
    of which ``"folded"`` and ``"requantized"`` are forms: they have the bits of the forward pass.
    """

    path: str
    weights: Bits = None
    acts: Bits = None
    grads: Bits = None
    residuals: Residuals = "quantized"
    pair: bool = False


def encode(op: OpBits) -> str:
    """The name of the `jax.named_scope` that surrounds the dot or convolution of a quantized op.

    One element of jax's name stack, made of letters, digits and ``_ . % ~ -`` alone: ``/`` would split it, parentheses
    stand for transformations, and ``:``, ``;`` and quotes have a meaning of their own in compiled programs' metadata
    and in profiles.

    >>> encode(OpBits("Block_0/Dense_1", weights=8, acts="schedule"))
    'quantized-w8-as-gn-rq-Block_0.Dense_1'
    """
    path = ".".join(urllib.parse.quote(name, safe="").replace(".", "%2E") for name in op.path.split("/"))
    bits = f"w{_letter(op.weights)}-a{_letter(op.acts)}-g{_letter(op.grads)}"
    return f"quantized-{bits}-r{op.residuals[0]}{'p' * op.pair}-{path}"


def decode(name: str) -> OpBits | None:
    """The `OpBits` that `encode` wrote, or ``None`` when `name` is an ordinary scope.

    >>> decode("quantized-w8-as-gn-rq-Block_0.Dense_1")
    OpBits(path='Block_0/Dense_1', weights=8, acts='schedule', grads=None, residuals='quantized', pair=False)
    >>> decode("Dense_1") is None
    True
    """
    match = _MARKER.fullmatch(name)
    if match is None:
        return None
    path = "/".join(urllib.parse.unquote(part) for part in match["path"].split("."))
    weights, acts, grads = (_bits(match[role]) for role in ("weights", "acts", "grads"))
    return OpBits(path, weights, acts, grads, _RESIDUALS[match["residuals"]], bool(match["pair"]))


def _letter(bits: Bits) -> str:
    if bits is None:
        return "n"
    return "s" if bits == "schedule" else str(int(bits))


def _bits(letter: str) -> Bits:
    if letter == "n":
        return None
    return "schedule" if letter == "s" else int(letter)
