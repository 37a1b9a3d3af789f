"""What the study compares: arms, each a config's overrides, in groups that are run one after another."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np

# Small enough that 2 bits cost several points; the quantized layers are Conv_1 and Dense_0, 800 weights.
NETWORK = ("--config.model.features=(4, 8)", "--config.model.hidden=16", "--config.train.steps=2000")
FLOAT = ("--config.schedule.bits=32", "--config.optimizer.name=adam")
# Plain optimizer → its transition-rate counterpart, and what both have besides the learning rate.
PAIRS = {"sgd": "sgdt", "adam": "adamt", "adamw": "adamwt"}
EXTRA = {
    "sgd": ("--config.optimizer.weight_decay=1e-4", "--config.optimizer.quant.learning_rate=0.01"),
    "adam": ("--config.optimizer.weight_decay=1e-4",),
    "adamw": ("--config.optimizer.weight_decay=1e-2",),
}
LEARNING_RATES = {"sgd": (0.003, 0.01, 0.03, 0.1, 0.3, 1.0), "adam": (3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1)}
TUNED_AS = {"adamw": "adam", "adamwt": "adamt"}  # differ in weight decay alone
FACTORS = (1e-3, 2.5e-3, 5e-3, 1e-2, 2e-2, 4e-2)  # λ that are tuned over; as many as learning rates
SWEEP = (5e-4, 1e-3, 2.5e-3, 5e-3, 1e-2, 2e-2, 4e-2)  # λ
TUNING_SEEDS = (0, 1)
SEEDS = tuple(range(2, 12))
FEWER = tuple(range(2, 7))


@dataclasses.dataclass(frozen=True)
class Arm:
    """One setting.

    Attributes:
      group, name: of the arm; ``name`` is unique within the group.
      facts: what tells it from others, kept in its rows.
      overrides: of the command line.
      seeds: that it is run with.
      curves: whether the course over the steps is kept.
    """

    group: str
    name: str
    facts: dict[str, Any]
    overrides: tuple[str, ...]
    seeds: tuple[int, ...]
    curves: bool = False


def tuning(optimizers: Iterable[str]) -> Iterator[Arm]:
    """Learning rates of the plain optimizers at 2 bits."""
    for plain in (name for name in optimizers if name in LEARNING_RATES):
        for rate in LEARNING_RATES[plain]:
            facts = {"optimizer": plain, "bits": 2, "learning_rate": rate}
            yield Arm("tune", f"{plain} lr={rate:g}", facts, _plain(plain, 2, rate), TUNING_SEEDS)


def tuning_rates(optimizers: Iterable[str], rows: list[dict[str, Any]]) -> Iterator[Arm]:
    """λ of the transition-rate optimizers at 2 bits, at the learning rate that is best for the plain one."""
    for plain in (name for name in optimizers if name in LEARNING_RATES):
        rate = best(rows, plain)["learning_rate"]
        for factor in FACTORS:
            facts = {"optimizer": PAIRS[plain], "bits": 2, "learning_rate": rate, "factor": factor}
            yield Arm("tune", f"{PAIRS[plain]} λ={factor:g}", facts, _rated(plain, 2, rate, factor), TUNING_SEEDS)


def comparison(optimizers: Iterable[str], rows: list[dict[str, Any]]) -> Iterator[Arm]:
    """Each pair at 2, 3 and 4 bits, as tuned at 2."""
    for plain in optimizers:
        rate, factor = best(rows, plain)["learning_rate"], best(rows, PAIRS[plain])["factor"]
        for bits in (2, 3, 4):
            facts = {"bits": bits, "learning_rate": rate}
            seeds, curves = (SEEDS if bits == 2 else FEWER), bits == 2
            yield Arm("main", f"{plain} {bits}", facts | {"optimizer": plain}, _plain(plain, bits, rate), seeds, curves)
            facts |= {"optimizer": PAIRS[plain], "factor": factor, "rule": "additive"}
            yield Arm("main", f"{PAIRS[plain]} {bits}", facts, _rated(plain, bits, rate, factor), seeds, curves)


def lower(optimizers: Iterable[str], rows: list[dict[str, Any]]) -> Iterator[Arm]:
    """Each pair at 2 bits at the next lower learning rate of the grid: whether the outcome hangs on the one chosen."""
    for plain in (name for name in optimizers if name in LEARNING_RATES):
        rates = LEARNING_RATES[plain]
        rate = rates[max(rates.index(best(rows, plain)["learning_rate"]) - 1, 0)]
        factor = best(rows, PAIRS[plain])["factor"]
        facts = {"bits": 2, "learning_rate": rate}
        yield Arm("main", f"{plain} 2 lower", facts | {"optimizer": plain}, _plain(plain, 2, rate), FEWER)
        facts |= {"optimizer": PAIRS[plain], "factor": factor, "rule": "additive"}
        yield Arm("main", f"{PAIRS[plain]} 2 lower", facts, _rated(plain, 2, rate, factor), FEWER)


def rules(rows: list[dict[str, Any]]) -> Iterator[Arm]:
    """The other two rules, AdamT at 2 bits, all else as tuned for the additive one."""
    rate, factor = best(rows, "adam")["learning_rate"], best(rows, "adamt")["factor"]
    for rule in ("multiplicative", "proportional"):
        facts = {"optimizer": "adamt", "bits": 2, "learning_rate": rate, "factor": factor, "rule": rule}
        overrides = (*_rated("adam", 2, rate, factor), f"--config.optimizer.transition.rule={rule}")
        yield Arm("main", f"adamt 2 {rule}", facts, overrides, SEEDS, True)


def sweep(optimizers: Iterable[str], rows: list[dict[str, Any]]) -> Iterator[Arm]:
    """λ at 2 bits."""
    for plain in optimizers:
        rate = best(rows, plain)["learning_rate"]
        for factor in SWEEP:
            facts = {"optimizer": PAIRS[plain], "bits": 2, "learning_rate": rate, "factor": factor}
            yield Arm("sweep", f"{PAIRS[plain]} λ={factor:g}", facts, _rated(plain, 2, rate, factor), FEWER)


def neighbours(rows: list[dict[str, Any]]) -> Iterator[Arm]:
    """Dampening and freezing with Adam at 2 bits, with the settings of their paper (Nagel et al. 2022), not tuned."""
    rate = best(rows, "adam")["learning_rate"]
    settings = {
        "dampening": ("--config.losses.dampening.rate=0.1", "--config.losses.dampening.schedule=cosine_up"),
        "freezing": ("--config.optimizer.oscillation.freeze=true",),
    }
    for name, own in settings.items():
        facts = {"optimizer": f"adam+{name}", "bits": 2, "learning_rate": rate}
        yield Arm("main", f"adam+{name} 2", facts, (*_plain("adam", 2, rate), *own), FEWER)


def best(rows: list[dict[str, Any]], optimizer: str) -> dict[str, Any]:
    """The facts of the tuning arm with the lowest training loss, averaged over its seeds; test images play no part."""
    optimizer = TUNED_AS.get(optimizer, optimizer)
    losses: dict[str, list[float]] = {}
    facts = {}
    for row in rows:
        if row["group"] == "tune" and row["optimizer"] == optimizer:
            losses.setdefault(row["name"], []).append(row["train_loss"])
            facts[row["name"]] = row
    return facts[min(losses, key=lambda name: float(np.mean(losses[name])))]


def _plain(name: str, bits: int, rate: float) -> tuple[str, ...]:
    return (
        f"--config.schedule.bits={bits}",
        f"--config.optimizer.name={name}",
        f"--config.optimizer.learning_rate={rate}",
        *EXTRA[name],
    )


def _rated(plain: str, bits: int, rate: float, factor: float) -> tuple[str, ...]:
    return (
        *_plain(plain, bits, rate),
        f"--config.optimizer.name={PAIRS[plain]}",
        f"--config.optimizer.transition.factor={factor}",
    )
