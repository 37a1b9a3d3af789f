"""The points that every family of this study has: when quantization is switched on, and what the learning rate does."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from qtrain import sweep

FRACTIONS = (0.0, 0.05, 0.1, 0.2, 0.4, 0.6, 0.8, 1.0)
WARMUP = 2.0
"""Percent of the run, also of the second warm-up."""
COOLDOWN = 20.0
"""Percent of the run: the decay in float, before quantization, or of a run that is never trained quantized."""
ARMS = ("fused", "cooldown")
FLOAT = 32
"""Bits that are no quantization."""


def switched(fraction: float, bits: int, arm: str, steps: int) -> dict[str, Any]:
    """The overrides of a run of `steps` whose last `fraction` is quantized to `bits`.

    fused: no decay in float; the learning rate is constant until the switch and decays from there on. cooldown: it
    decays before the switch, is warmed up anew at it, and decays again. With fraction 0 the last step alone is
    quantized, at a learning rate of next to nothing, so that the loss at the bits of the last step is that of rounding
    after training; with 1 there is no float part. Both arms are the same then.
    """
    start = steps - 1 if fraction == 0 else round(steps * (1 - fraction))
    rate = {"optimizer.restart_percent": 0.0, "optimizer.decay_percent": COOLDOWN}
    if 0 < fraction < 1 and arm == "cooldown":
        cooldown = min(COOLDOWN / (1 - fraction), 100.0)  # percents are those of the part
        rate = {
            "optimizer.restart_percent": 100 * (1 - fraction),
            "optimizer.cooldown_percent": cooldown,
            "optimizer.decay_percent": 100.0,
        }
    elif fraction > 0:
        rate["optimizer.decay_percent"] = 100 * fraction
    return {"schedule.weights.bits": bits, "schedule.weights.start_steps": float(start), **rate}


def points(
    bits: Sequence[int], steps: int, seeds: Iterable[int], arms: Sequence[str] = ARMS
) -> Iterator[dict[str, Any]]:
    """Every fraction with every width and seed, each arm where it differs."""
    for seed in seeds:
        for width in bits:
            for fraction in FRACTIONS:
                for arm in arms if 0 < fraction < 1 else arms[:1]:
                    yield {**switched(fraction, width, arm, steps), "seed": seed, "train.steps": steps}


def lengths(bits: Sequence[int], steps: Sequence[int], seeds: Sequence[int]) -> Iterator[dict[str, Any]]:
    """Both arms at the first length; at the others the fused one alone, for the dependence on tokens."""
    first, *others = steps
    more = (points(bits, other, seeds, arms=("fused",)) for other in others)
    return sweep.chain(points(bits, first, seeds), *more)


def controls(bits: Sequence[int], steps: int, seeds: Iterable[int]) -> Iterator[dict[str, Any]]:
    """What the decay of the fused arm, as long as its quantized part, does by itself.

    fixed: the same quantized parts under one decay, of `COOLDOWN` percent. float: the decays of the fused arm, never
    quantized. A part of COOLDOWN percent is in the fused arm already.
    """
    for seed in seeds:
        for fraction in FRACTIONS[1:]:
            own = {"seed": seed, "train.steps": steps}
            yield {**switched(fraction, FLOAT, "fused", steps), **own}
            for width in bits if round(100 * fraction) != COOLDOWN else ():
                yield {**switched(fraction, width, "fused", steps), "optimizer.decay_percent": COOLDOWN, **own}


def settings(config: Any) -> None:
    """What the families share: weights quantized per output channel, all layers, everything else in float."""
    config.quant.update(acts="none", grads="none")
    config.quant.rules = ({"path": ".*", "weight_quantizer": "symmetric/channel", "act_quantizer": "none"},)
    config.schedule.update(name="float")
    config.schedule.weights.update(name="delayed", start_steps=0.0, bits=4)
    config.optimizer.update(
        schedule="wsd", warmup_percent=WARMUP, cooldown_percent=COOLDOWN, decay_percent=COOLDOWN, restart_percent=0.0
    )
    config.eval.update(every_percent=0.0, splits=("test",))
    config.checkpoint.update(every_percent=50.0)
