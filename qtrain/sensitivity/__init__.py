"""How sharply the loss bends along each layer's weights, and how far they move what the model says.

Traces of the Hessian's blocks (`hessian_trace`, `weight_traces`) and of the Fisher information's (`fisher_trace`,
`model_fisher_trace`), neither of which is ever formed.
"""

from __future__ import annotations

from qtrain.sensitivity.fisher import Fisher, FisherSettings, fisher_from_config, fisher_trace, model_fisher_trace
from qtrain.sensitivity.hessian import DRAWS, TOLERANCE, Trace, hessian_draw, hessian_trace, weight_traces

__all__ = [
    "DRAWS",
    "TOLERANCE",
    "Fisher",
    "FisherSettings",
    "Trace",
    "fisher_from_config",
    "fisher_trace",
    "hessian_draw",
    "hessian_trace",
    "model_fisher_trace",
    "weight_traces",
]
