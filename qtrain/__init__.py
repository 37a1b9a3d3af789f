"""qtrain: precision as data. What precision should each tensor have at each step of training?

Importing this module imports nothing heavy: every name below is loaded when it is first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from qtrain import cost, optim, quantizers, schedules
    from qtrain.inject import Rule, default_rules, quantize
    from qtrain.precision import Precision

__version__ = "0.1.0"

_MODULES = (
    "cost",
    "data",
    "export",
    "inject",
    "losses",
    "methods",
    "models",
    "optim",
    "planner",
    "quantizers",
    "schedules",
)
_NAMES = {
    "Precision": "qtrain.precision",
    "Rule": "qtrain.inject",
    "default_rules": "qtrain.inject",
    "quantize": "qtrain.inject",
}

__all__ = ["Precision", "Rule", "cost", "default_rules", "optim", "quantize", "quantizers", "schedules"]


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return importlib.import_module(f"qtrain.{name}")
    if name in _NAMES:
        return getattr(importlib.import_module(_NAMES[name]), name)
    raise AttributeError(f"module 'qtrain' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_MODULES, *_NAMES})
