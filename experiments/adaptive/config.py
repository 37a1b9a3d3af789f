"""Controllers against fixed schedules at equal bit operations, one family after the colon: mlp, digits_mlp, digits_cnn.

Command: qtrain sweep --config experiments/adaptive/config.py:digits_cnn --workdir runs/adaptive/digits_cnn \\
    --vectorized --separate
"""

import runpy
from pathlib import Path

from qtrain import sweep as points
from qtrain.config import base_config, finish

short = runpy.run_path(str(Path(__file__).parents[1] / "short_tasks.py"))["short"]

DIGITS = {
    # Small enough that 2 bits cost several points: the shipped networks are at the ceiling whatever the bits.
    "digits_cnn": {"model.features": (4, 8), "model.hidden": 16, "train.steps": 800},
    "digits_mlp": {"model.features": (16, 16), "train.steps": 800},
}
# The quantizers of `quant.recipe="cpt"` on every layer, the last one too: in float it would be half of the cost of the
# smallest networks, whatever the bits of the others.
EVERY = {
    "path": ".*",
    "weight_quantizer": "affine/channel",
    "act_quantizer": "affine/tensor",
    "grad_quantizer": "affine/tensor/stochastic",
}
LOW, HIGH = 2, 8
SEEDS = {"digits_mlp": range(5)}
BUDGETS = (0.4, 0.55, 0.7)  # shares of static 8 bits
CYCLIC = ("RR", "RTH", "CR", "CT", "LR", "ETV", "ER", "ETH")


def get_config(argument: str = "digits_cnn"):
    family, _, smoke = argument.partition(":")
    config = digits(family) if family in DIGITS else short(family)
    config.quant.update(recipe="default", rules=(EVERY,))
    config.schedule.update(name="CR", low=LOW, high=HIGH, cycles=8)
    config.schedule.grads.update(name="constant", bits=HIGH)
    return finish(config, smoke)


def digits(family: str):
    """The config of a small network on the digits, unlocked."""
    config = base_config(family)
    for key, value in DIGITS[family].items():
        *sections, name = key.split(".")
        section = config
        for part in sections:
            section = section[part]
        section[name] = value
    config.train.log_every_steps = 50
    config.eval.update(every_percent=0.0)
    config.checkpoint.update(every_percent=50.0, keep=1)
    return config


def published():
    """The two controllers of the literature."""
    for epsilon in (0.02, 0.05, 0.15):
        yield {"schedule.name": "fractrain", "schedule.values": (2, 3, 5, 8), "schedule.epsilon": epsilon}
    for margin in (0.05, 0.5, 1.5):
        yield {"schedule.name": "muppet", "schedule.values": (2, 3, 5, 8), "schedule.margin": margin}


def arms():
    """Static bits and schedules to interpolate between, then controllers, then what a signal has to beat."""
    yield from ({"schedule.name": "constant", "schedule.bits": bits} for bits in range(LOW, HIGH + 1))
    yield from ({"schedule.name": name} for name in CYCLIC)
    yield {"schedule.name": "linear"} | {"schedule.start_bits": LOW, "schedule.end_bits": HIGH}
    yield from published()
    for share in BUDGETS:
        keeper = {"schedule.name": "budget_keeper", "schedule.budget_share": share}
        for signal in ("loss", "grad_norm", "noise", "none"):
            yield {**keeper, "schedule.signal": signal}
        yield {**keeper, "schedule.signal": "loss", "schedule.gain": -0.5}
        yield {**keeper, "schedule.signal": "loss", "schedule.gain": 1.0}
    yield {"schedule.name": "budget_keeper", "schedule.budget_of": "CR", "schedule.signal": "loss"}
    yield {"schedule.name": "budget_keeper", "schedule.budget_of": "CR", "schedule.signal": "none"}


def sweep(argument: str = "digits_cnn"):
    family = argument.partition(":")[0]
    found = list(arms())
    seeds = {"seed": SEEDS.get(family, range(3))}
    if family != "mlp":
        return points.product(found, seeds)
    # 600 steps are 1.3 epochs of MNIST: where these decide once an epoch, as published, they never leave 2 bits.
    often = [arm | {"schedule.interval_steps": 20} for arm in published()]
    return points.chain(points.product(found, seeds), points.product(often, seeds))
