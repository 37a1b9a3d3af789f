"""Loss against size, tokens and precision (Kumar et al. 2024, "Scaling Laws for Precision")."""

from __future__ import annotations

import math

from qtrain.errors import UsageError

GAMMA = {"weights": 2.6745, "acts": 2.2102, "kv": 0.9578}
"""γ of ``1 − e^(−P/γ + n)``, in bits."""
OFFSET = {"weights": 0.3037, "acts": 1.4072, "kv": 2.4185}
"""n of the same."""
A, B, E = 4299.0, 18060.0, 2.7648
ALPHA = BETA = 0.4965


def effective_parameters(params: float, weights: float, acts: float, kv: float) -> float:
    """``N_eff = N·Π(1 − e^(−P/γ + n))`` over weights, activations and the key-value cache (arXiv 2411.04330).

    γ = 2.6745, 2.2102, 0.9578 and n = 0.3037, 1.4072, 2.4185 in that order.

    Args:
      params: N. weights, acts, kv: P, bits of integers while training.

    Raises:
      UsageError: so few bits that a factor is not above 0, as 2 of the key-value cache: nothing is left.
    """
    product = 1.0
    for kind, bits in (("weights", weights), ("acts", acts), ("kv", kv)):
        factor = 1 - math.exp(-bits / GAMMA[kind] + OFFSET[kind])
        if factor <= 0:
            raise UsageError(f"{kind}={bits:g} bits: Kumar's law leaves no effective parameters there; give more bits")
        product *= factor
    return params * product


def kumar_loss(params: float, tokens: float, bits: float, acts: float | None = None) -> float:
    """``L = A/N_eff^α + B/D^β + E``, in nats a token; A = 4299, B = 18060, α = β = 0.4965, E = 2.7648.

    Transformers of 30M to 220M parameters, 1.5e9 to 26e9 tokens of Dolma, 3 to 12 bits; validated up to 1.7B.

    Args:
      params: N. tokens: D. bits: of the weights. acts: of activations and key-value cache; None: those of the weights.

    >>> round(kumar_loss(1e8, 2e9, 4), 3)
    4.243
    """
    other = bits if acts is None else acts
    return A / effective_parameters(params, bits, other, other) ** ALPHA + B / tokens**BETA + E


def compute_optimal_width() -> float:
    """The width that weights, activations and cache share for the least loss, where compute is proportional to N·D·P.

    With α = β the loss at the best N and D for a compute C depends on P through ``P/(N_eff/N)`` alone: whatever C is,
    the best P maximises ``Π(1 − e^(−P/γ + n))/P``. Kumar et al., section 4.3, say 7 to 8 bits.

    >>> round(compute_optimal_width(), 2)
    7.0
    """
    from scipy.optimize import minimize_scalar

    def worth(bits: float) -> float:
        return -effective_parameters(1.0, bits, bits, bits) / bits

    return float(minimize_scalar(worth, bounds=(4, 16), method="bounded").x)
