"""Static widths of weights and of activations, and schedules of either or both, one family after the colon.

Families: resnet, mobilenet, transformer, s5. Gradients have 8 bits throughout. Command:
qtrain sweep --config experiments/pareto/config.py:resnet --workdir runs/pareto/resnet --vectorized --separate
"""

import itertools
import runpy
from pathlib import Path

from qtrain import sweep as points
from qtrain.config import finish

short = runpy.run_path(str(Path(__file__).parents[1] / "short_tasks.py"))["short"]
# Another width of the model: what other model costs as much as this one at other bits? Half of it, but twice for
# MobileNet: its channels come in eights, and on the digits most have eight already.
WIDTHS = {
    "resnet": {"model.width": 0.25},
    "transformer": {"model.width": 32},
    "s5": {"model.width": 16, "model.state_size": 16},
    "mobilenet": {"model.width": 0.5},
}
BITS = (2, 3, 4, 8)


def get_config(argument: str = "resnet"):
    family, _, smoke = argument.partition(":")
    config = short(family)
    config.schedule.update(name="constant", low=3, high=8, cycles=8)
    config.schedule.grads.update(name="constant", bits=8)
    return finish(config, smoke)


def sweep(argument: str = "resnet"):
    family = argument.partition(":")[0]
    grid = [_static(weights, acts) for weights, acts in itertools.product(BITS, BITS)]
    grid += [_static(5, 5), _static(6, 6)]
    scheduled = [
        _both("CR", 3),
        _both("CR", 4),
        _both("RR", 3),
        {"schedule.weights.name": "CR"},  # activations 8 bits
        {"schedule.acts.name": "CR"},  # weights 8 bits
        # One rises while the other falls, so that their product is about constant; and both, for comparison.
        *[_linear(weights, acts) for weights, acts in itertools.product(((3, 8), (8, 3)), repeat=2)],
    ]
    other = [WIDTHS[family] | one for one in (*[_static(b, b) for b in BITS], _both("CR", 3))]
    return points.product(points.chain(grid, scheduled, other), {"seed": range(3)})


def _static(weights: int, acts: int):
    return {"schedule.weights.bits": weights, "schedule.acts.bits": acts}


def _both(name: str, low: int):
    return {"schedule.name": name, "schedule.low": low}


def _linear(weights: tuple[int, int], acts: tuple[int, int]):
    """From one width to another over the run."""
    ends = {"weights": weights, "acts": acts}
    return {"schedule.name": "linear"} | {
        f"schedule.{kind}.{end}_bits": bits
        for kind, pair in ends.items()
        for end, bits in zip(("start", "end"), pair, strict=True)
    }
