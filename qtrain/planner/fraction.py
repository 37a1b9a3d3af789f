"""What share of training to quantize (Dremov et al. 2025, "Compute-Optimal Quantization-Aware Training")."""

from __future__ import annotations

import dataclasses
import math

from qtrain.errors import UsageError

CONSTANT = 6.7297
"""The one constant of the law, without a unit."""
LOWEST, HIGHEST = 20.0, 1.3e5
"""Tokens per parameter byte between which the authors' runs lie, about."""
WIDTHS = (1, 2, 4, 6)


@dataclasses.dataclass(frozen=True)
class FractionLaw:
    """``f* = exp(−a/ln S)``, ``S = D/(N·b/8)``: the share of the tokens to train quantized, the last of them.

    Attributes:
      constant: a, above 0.
      low, high: S between which the law is supported; below, S is clipped to `low`, above it is extrapolated.
      params: parameters, and widths: bits, of the runs it was fitted to; empty where not known.
      name: what reports call it; source: where its constant is from.
      doubts: what its runs do not identify, a line each, which every plan warns of.
    """

    constant: float = CONSTANT
    low: float = LOWEST
    high: float = HIGHEST
    params: tuple[float, float] | tuple[()] = (86e6, 2.2e9)
    widths: tuple[int, ...] = WIDTHS
    name: str = "Dremov"
    source: str = "Dremov et al. 2025, arXiv 2509.22935"
    doubts: tuple[str, ...] = ()

    @property
    def equation(self) -> str:
        """With its constant."""
        return f"f* = exp(-{self.constant:.5g}/ln S), S = tokens/(params*bits/8)"

    def __call__(self, tokens_per_byte: float) -> float:
        """f*, S clipped from below."""
        return optimal_fraction(max(tokens_per_byte, self.low), self.constant)

    def warnings(self, tokens_per_byte: float, params: float, bits: int) -> list[str]:
        """A line for each way in which a plan is outside the law's range, and for each of its doubts."""
        found = list(self.doubts)
        if tokens_per_byte < self.low:
            found.append(
                f"S = {tokens_per_byte:.4g} tokens per parameter byte is below {self.low:.6g}, from where the fraction "
                f"law ({self.name}) is supported: clipped to {self.low:.6g}"
            )
        if tokens_per_byte > self.high:
            found.append(
                f"S = {tokens_per_byte:.4g} tokens per parameter byte is above {self.high:.6g}, up to where the "
                f"fraction law ({self.name}) is supported: extrapolated"
            )
        if self.params and not self.params[0] <= params <= self.params[1]:
            found.append(
                f"params {params:.4g} is outside {self.params[0]:.4g} to {self.params[1]:.4g}, the sizes of the "
                f"fraction law's runs ({self.name}): extrapolated"
            )
        if self.widths and bits not in self.widths:
            inside = min(self.widths) < bits < max(self.widths)
            found.append(
                f"{bits} bits is none of the widths of the fraction law's runs ({self.name}: "
                f"{', '.join(map(str, self.widths))}): {'interpolated' if inside else 'extrapolated'}"
            )
        return found


def tokens_per_parameter_byte(params: float, tokens: float, bits: float) -> float:
    """``S = D/(N·b/8)``: training tokens per byte of quantized weights.

    Args:
      params: N, the parameters, above 0.
      tokens: D, those of the whole training, float and quantized together, above 0. For images: examples.
      bits: b, of a weight, above 0.

    >>> tokens_per_parameter_byte(params=1e8, tokens=2e9, bits=4)
    40.0
    """
    if not (params > 0 and tokens > 0 and bits > 0):
        raise UsageError(f"params={params!r}, tokens={tokens!r}, bits={bits!r}: give numbers above 0")
    return tokens / (params * bits / 8)


def optimal_fraction(tokens_per_byte: float, constant: float = CONSTANT) -> float:
    """``f* = exp(−a/ln S)``, the loss-optimal share of quantized training (Dremov et al. 2025, arXiv 2509.22935).

    The rest comes first, in float. f* grows with S: the longer a model is trained, and the fewer bytes it has, the
    larger the share. From runs of language models of 86M to 2.2B parameters at 1 to 6 bits. That the logarithm is
    natural is our reading, under which the constant gives the paper's fractions.

    Args:
      tokens_per_byte: S, above 1, where the law has a value; supported from about 20 to 1.3e5. Not clipped here:
        `FractionLaw` does.
      constant: a.

    Raises:
      UsageError: S of 1 or less.

    >>> [round(optimal_fraction(S), 3) for S in (20, 100, 1e3, 1e4, 1e5)]
    [0.106, 0.232, 0.377, 0.482, 0.557]
    """
    if not tokens_per_byte > 1:
        raise UsageError(f"tokens_per_byte={tokens_per_byte!r}: the fraction law has a value above 1 alone")
    return math.exp(-constant / math.log(tokens_per_byte))
