"""Precision schedules: pure functions ``step -> bits``, like optax schedules.

A schedule takes a step (a Python int, or an integer array of any shape, traced or not) and returns float32 of the same
shape that holds whole numbers of bits: it works under ``jit`` and ``vmap``, and one compiled train step serves all its
steps. 24 bits and more leave a tensor as it is; 32 is written for "not quantized".

>>> s = cyclic("cosine", low=3, high=8, cycles=8, pattern="repeated", total_steps=64_000)
>>> s(4000)
Array(5., dtype=float32)

- `constant`, `linear`, `piecewise` (also called `step`), `rounds`;
- `cyclic`, and the ten schedules of Wolfe & Kyrillidis 2024: `suite`, `by_name`, in the `GROUPS` of what they save;
- `window` (a deficit), `delayed` (late quantization), `join`, `clip`, `shift`: schedules made of schedules or bits;
- `from_config`, `precisions_from_config`: from a config's plain mapping; `PrecisionSchedule`: ``step -> Precision``;
- `fractrain`, `muppet`, `budget_keeper`: a `Controller` each, which decides bits while training, from `Signals`;
  `controller_from_schedule`;
- `lowest_that_trains`: the precision range test (``qtrain range-test``);
- `relative_cost`, `saving`: what a schedule costs; `evaluate`: its bits at every step; `highest`: its q_max;
- `suite_table`, `draw_suite`, `draw`: to look at.

A wrong parameter raises `qtrain.errors.UsageError` when the schedule is built. Importing this imports no matplotlib.
"""

from qtrain.schedules.basic import Constant, Linear, Piecewise, Rounds, constant, linear, piecewise, rounds, step
from qtrain.schedules.budget_keeper import BudgetKeeper, budget_keeper
from qtrain.schedules.combinators import (
    Clipped,
    Delayed,
    Joined,
    Shifted,
    Window,
    clip,
    delayed,
    join,
    shift,
    window,
)
from qtrain.schedules.config import CONTROLLERS, from_config
from qtrain.schedules.controller import Controller, Decided, Signals
from qtrain.schedules.controllers import bounds, controller_from_schedule, without_decided
from qtrain.schedules.cycles import GROUPS, SUITE, Cyclic, by_name, cyclic, suite
from qtrain.schedules.fractrain import FracTrain, fractrain
from qtrain.schedules.muppet import Muppet, muppet
from qtrain.schedules.picture import draw, draw_suite, suite_table
from qtrain.schedules.precisions import PrecisionSchedule, precisions_from_config
from qtrain.schedules.range_law import Range, lowest_that_trains
from qtrain.schedules.savings import relative_cost, saving
from qtrain.schedules.schedule import FLOAT_BITS, Schedule, ScheduleLike, evaluate, highest

__all__ = [
    "CONTROLLERS",
    "FLOAT_BITS",
    "GROUPS",
    "SUITE",
    "BudgetKeeper",
    "Clipped",
    "Constant",
    "Controller",
    "Cyclic",
    "Decided",
    "Delayed",
    "FracTrain",
    "Joined",
    "Linear",
    "Muppet",
    "Piecewise",
    "PrecisionSchedule",
    "Range",
    "Rounds",
    "Schedule",
    "ScheduleLike",
    "Shifted",
    "Signals",
    "Window",
    "bounds",
    "budget_keeper",
    "by_name",
    "clip",
    "constant",
    "controller_from_schedule",
    "cyclic",
    "delayed",
    "draw",
    "draw_suite",
    "evaluate",
    "fractrain",
    "from_config",
    "highest",
    "join",
    "linear",
    "lowest_that_trains",
    "muppet",
    "piecewise",
    "precisions_from_config",
    "relative_cost",
    "rounds",
    "saving",
    "shift",
    "step",
    "suite",
    "suite_table",
    "window",
    "without_decided",
]
