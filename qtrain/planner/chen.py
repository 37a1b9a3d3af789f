"""What W4A4 with groups costs (Chen et al. 2025, "Scaling Law for Quantization-Aware Training")."""

from __future__ import annotations

import math

from qtrain.errors import UsageError

K, GAMMA_D, GAMMA_G, GAMMA_N = 0.1582, 0.0745, 0.7779, 0.2186
A, B, E = 237.7042, 596.249, 1.9279
ALPHA = BETA = 0.3022


def chen_excess(params: float, tokens: float, group_size: float) -> float:
    """``δ = 0.1582·D^0.0745·(log2 G)^0.7779 / N^0.2186``: nats a token above bfloat16 (arXiv 2505.14302).

    4-bit weights and activations, trained quantized from the start. Llama-like models of 74M to 595M parameters, 10e9
    to 100e9 tokens, groups of 32 to 256 (validated at 973M and 200e9).

    Args:
      params: N. tokens: D. group_size: G, elements that share a scale; 2 and more.

    Raises:
      UsageError: a group of fewer than 2.

    >>> round(chen_excess(594e6, 1e11, 128), 4)
    0.0573
    """
    if not group_size >= 2:
        raise UsageError(f"group_size={group_size!r}: Chen's law needs groups of at least 2 elements, such as 128")
    return K * tokens**GAMMA_D * math.log2(group_size) ** GAMMA_G / params**GAMMA_N


def chen_loss(params: float, tokens: float, group_size: float) -> float:
    """``L = 237.7042/N^0.3022 + 596.249/D^0.3022 + 1.9279 + δ``, in nats a token, at W4A4; `chen_excess` is δ.

    >>> round(chen_loss(594e6, 1e11, 128), 3)
    2.798
    """
    return A / params**ALPHA + B / tokens**BETA + E + chen_excess(params, tokens, group_size)
