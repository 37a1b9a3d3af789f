"""Transition-rate scheduling (Lee et al., ICCV 2025, arXiv 2404.19248): its recipe.

The optimizers are `qtrain.optim.sgdt`, `adamt` and `adamwt`; this is what the authors quantize, and how.
"""

from __future__ import annotations

from qtrain.inject import Rule
from qtrain.quantizers import TRS


def trs_rules() -> tuple[Rule, ...]:
    """The authors' quantizers on every layer but the first and the last, which stay in float, as do norms and biases.

    x_q = (s/γ)·round(clip(γx/s, α, β)): weights signed, γ = 2^(b−1), with s frozen at three standard deviations, so
    that codes change through updates alone; activations unsigned, γ = 2^b, with a learned s; one s a tensor. The
    cotangent is not quantized.

    Layers must follow a ReLU: an unsigned grid makes negative activations 0. The authors leave out the factor s behind
    each quantizer, which a norm layer makes up for; see `TRS` on why ours keeps it, and what that leaves the same.
    """
    return (
        Rule(position="ends", weight_quantizer=None, act_quantizer=None),
        Rule(weight_quantizer=TRS(signed=True), act_quantizer=TRS(signed=False)),
    )
