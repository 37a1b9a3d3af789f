"""Loss against size, tokens and width (Panferov et al. 2025, "QuEST: Stable Training of LLMs with 1-Bit Weights …")."""

from __future__ import annotations

from qtrain.errors import UsageError

A, ALPHA = 8.134, 0.06273
B, BETA = 86.41, 0.24129
E = 0.00142
EFFICIENCY = {1: 0.0205, 2: 0.152, 3: 0.433, 4: 0.692, 8: 1.016}
"""Bits of weights and of activations → eff(b): so many float parameters is one of them worth."""


def quest_loss(params: float, tokens: float, bits: int) -> float:
    """``L = A/(N·eff(b))^α + B/D^β + E``, in nats a token (arXiv 2502.05003).

    A = 8.134, α = 0.06273, B = 86.41, β = 0.24129, E = 0.00142; eff(1, 2, 3, 4, 8) = .0205, .152, .433, .692, 1.016.
    Llama-like models of 30M to 1.6B parameters on C4, about 100 tokens a parameter, weights and activations at b bits,
    the QuEST estimator (Hadamard transforms, trust gradients). E is so small that the law has no floor to speak of:
    nothing is said far outside those sizes.

    Args:
      params: N. tokens: D. bits: b, one of `EFFICIENCY`.

    Raises:
      UsageError: a width that has no published efficiency.

    >>> round(quest_loss(1e8, 2e9, 4), 3)
    3.115
    """
    if bits not in EFFICIENCY:
        raise UsageError(f"bits={bits}: QuEST's law has constants for {', '.join(map(str, EFFICIENCY))} bits alone")
    return A / (params * EFFICIENCY[bits]) ** ALPHA + B / tokens**BETA + E
