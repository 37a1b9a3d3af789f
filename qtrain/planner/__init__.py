"""The planner: when to switch quantization on, at which width, by laws with published constants or ones of your own.

>>> plan = plan_budget(params=1e8, tokens=2e9, memory=50e6)
>>> plan.chosen.bits, round(plan.chosen.fraction, 3)
(4, 0.161)

- `optimal_fraction`, `tokens_per_parameter_byte`, `FractionLaw`: the share of training to quantize;
- `quest_loss`, `kumar_loss`, `chen_loss`, `effective_parameters`, `compute_optimal_width`: losses; `LAWS`;
- `plan_budget`: a `Plan`; `weight_bytes`, `params_that_fit`: memory;
- `fit`: laws fitted to one's own runs (`Row`, `read_runs`: from folders or a table); `load`, `save`: as a file.

Whatever is outside the range of a law's runs is a warning of the plan. No JAX, and SciPy for `fit` alone.
"""

from qtrain.planner.chen import chen_excess, chen_loss
from qtrain.planner.file import load, save
from qtrain.planner.fit import Fitted, fit
from qtrain.planner.fraction import FractionLaw, optimal_fraction, tokens_per_parameter_byte
from qtrain.planner.kumar import compute_optimal_width, effective_parameters, kumar_loss
from qtrain.planner.laws import LAWS, LossLaw, Setting, loss_law
from qtrain.planner.memory import params_that_fit, weight_bytes
from qtrain.planner.plan import Option, Plan, plan_budget
from qtrain.planner.quest import quest_loss
from qtrain.planner.runs import Row, read_runs

__all__ = [
    "LAWS",
    "Fitted",
    "FractionLaw",
    "LossLaw",
    "Option",
    "Plan",
    "Row",
    "Setting",
    "chen_excess",
    "chen_loss",
    "compute_optimal_width",
    "effective_parameters",
    "fit",
    "kumar_loss",
    "load",
    "loss_law",
    "optimal_fraction",
    "params_that_fit",
    "plan_budget",
    "quest_loss",
    "read_runs",
    "save",
    "tokens_per_parameter_byte",
    "weight_bytes",
]
