"""Cyclic precision training (Fu et al. 2021, arXiv 2101.09868; Wolfe & Kyrillidis 2024, arXiv 2403.02243): its recipe.

The schedule itself is `qtrain.schedules.cyclic`; this is what the authors quantize, and how.
"""

from __future__ import annotations

from qtrain.inject import Rule
from qtrain.quantizers import Uniform


def cpt_rules() -> tuple[Rule, ...]:
    """The authors' quantizers on every layer but the last, as in their CIFAR networks.

    x̂ = round(clip((x − min)/s, 0, 2^b − 1))·s + min with s = (max − min)/(2^b − 1): weights per output channel,
    activations per tensor (a running min and max, momentum 0.9, serves evaluation), the cotangent of a layer's output
    per tensor with stochastic rounding, the same for input and weight gradient. No mask in the straight-through
    gradient. The final dense layer stays in float, as do norms and biases. Their floor under s, 1e-8, is not kept: it
    would flatten small gradients (see `Uniform`).
    """
    weights = Uniform("affine", per="channel")
    acts = Uniform("affine", per="tensor", statistics=0.9)
    grads = Uniform("affine", per="tensor", rounding="stochastic")
    return (
        Rule(position="last", weight_quantizer=None, act_quantizer=None),
        Rule(weight_quantizer=weights, act_quantizer=acts, grad_quantizer=grads),
    )
