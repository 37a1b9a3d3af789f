"""Injection: rules resolved against a model that nobody edits, and the model with quantizers inside.

`quantize(model, rules)` gives a `QuantizedModel`; its `plan` says what is quantized, how, and what is not.
"""

from qtrain.inject.execution import Choice
from qtrain.inject.linen import QuantizedModel, quantize
from qtrain.inject.plan import Plan, Row
from qtrain.inject.rows_in_use import RowInUse
from qtrain.inject.rules import Rule, default_rules, quantizer_from_config, rules_from_config
from qtrain.inject.weights import Weight

__all__ = [
    "Choice",
    "Plan",
    "QuantizedModel",
    "Row",
    "RowInUse",
    "Rule",
    "Weight",
    "default_rules",
    "quantize",
    "quantizer_from_config",
    "rules_from_config",
]
