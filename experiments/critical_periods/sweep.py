"""Critical periods of quantization (Achille et al. 2018; Wolfe & Kyrillidis 2024, arXiv 2403.02243): the runs.

    qtrain sweep --config experiments/critical_periods/sweep.py:FAMILY-PART --workdir runs/critical/FAMILY-PART \
        --vectorized --separate --share interleave

FAMILY: mnist_mlp, digits_cnn, digits_gcn, sequential_digits_s5. PART: removal, window, patterns, fisher; calibration
finds the bits of a deficit. FAMILY-PART-smoke is each in a few steps on generated arrays. The quantizers are those of
`qtrain.methods.cpt` (the last layer in float); a deficit is the forward pass at `low` bits, gradients have 8 bits
throughout, and what is compared is the accuracy at 8 bits at the end. One run of a sweep by itself:
qtrain train --config experiments/critical_periods/sweep.py:mnist_mlp-window --workdir runs/one
"""

import dataclasses
from typing import Any

import numpy as np

from qtrain import schedules
from qtrain.config import base_config, finish
from qtrain.errors import UsageError, did_you_mean

HIGH = 8
SMOKE_STEPS = 40
KINDS = {"weights": ("weights",), "acts": ("acts",), "both": ("weights", "acts")}


@dataclasses.dataclass(frozen=True)
class Family:
    """task: of `base_config`. steps: of a normal run. low: bits of a deficit. blurs: whether it reads images."""

    task: str
    steps: int
    low: int
    blurs: bool
    seeds: int = 3
    model: tuple[tuple[str, Any], ...] = ()
    batch_size: int | None = None


FAMILIES = {
    "mnist_mlp": Family("mnist_mlp", 400, 2, True, model=(("features", (128, 64)),), batch_size=64),
    "digits_cnn": Family("digits_cnn", 400, 2, True, model=(("features", (16, 32)), ("hidden", 64))),
    "digits_gcn": Family("digits_gcn", 200, 1, False),
    "sequential_digits_s5": Family("sequential_digits_s5", 300, 2, False),
}
REMOVALS = (0.25, 0.5, 1.0)  # of the normal run
LENGTH, ONSETS = 0.25, (0.0, 0.15, 0.3, 0.45, 0.6, 0.75)  # of the run: the last window ends with it
EARLY, PIECES = 0.2, 10  # where patterns differ, and in how many pieces the random ones are drawn
PATTERNS = ("high", "low", "increasing", "decreasing", "cyclic", "random")
FISHER_EXAMPLES = 64


def get_config(argument: str = "mnist_mlp-window"):
    """The config of a family for one part of the study."""
    name, part, smoke = _parsed(argument)
    family = FAMILIES[name]
    config = base_config(family.task)
    config.quant.recipe = "cpt"
    config.model.update(dict(family.model))
    config.data.batch_size = family.batch_size or config.data.batch_size
    config.optimizer.update(schedule="cosine")
    config.schedule.update(name="constant", high=HIGH, low=family.low)
    config.train.steps = family.steps
    config.train.log_every_steps = family.steps // 20
    config.eval.update(every_percent=0.0, splits=("test",))
    config.checkpoint.update(every_percent=0.0, keep=1)
    if family.blurs and part != "patterns":
        config.deficit.name = "blur"
    if part in ("patterns", "fisher"):
        config.train.layer_norms = True
    if part == "fisher":
        config.fisher.update(examples=FISHER_EXAMPLES, at=("step", "q_max"))
    finish(config, "smoke" if smoke else "")
    if smoke:
        config = config.copy_and_resolve_references().unlock()
        config.train.update(steps=SMOKE_STEPS, log_every_steps=10)
        config.eval.every_steps = config.checkpoint.every_steps = 0
    return config.lock()


def sweep(argument: str = "mnist_mlp-window"):
    """The points' overrides."""
    return [overrides for _, overrides in labelled(argument)]


def labelled(argument: str) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """What each point is called in the results, and its overrides, in the order of the sweep."""
    name, part, smoke = _parsed(argument)
    family = FAMILIES[name]
    steps = SMOKE_STEPS if smoke else family.steps
    seeds = range(1 if smoke or part == "calibration" else family.seeds)
    points = PARTS[part](family, steps)
    return [({**label, "seed": seed}, {**point, "seed": seed}) for label, point in points for seed in seeds]


def _deficit(kind: str, start: int, length: int, low: int | None = None) -> dict[str, Any]:
    if kind == "none" or not length:
        return {}
    if kind == "blur":
        return {"deficit.start_steps": start, "deficit.length_steps": length}
    found: dict[str, Any] = {}
    for each in KINDS[kind]:
        key = f"schedule.{each}"
        found |= {f"{key}.name": "window", f"{key}.start_steps": start, f"{key}.length_steps": length}
        if low is not None:
            found[f"{key}.low"] = low
    return found


def _kinds(family: Family) -> list[str]:
    return [*KINDS, *["blur"] * family.blurs]


def _removal(family: Family, steps: int):
    """A deficit for the first R steps, then a normal run. Rates are held, or decay over it all, or begin anew."""
    yield {"kind": "none", "rate": "held", "removal": 0}, {}
    for share in REMOVALS:
        removal = round(share * steps)
        longer = {"train.steps": removal + steps}
        rates = {
            "held": {"optimizer.hold_steps": removal},
            "decayed": {},
            "restarted": {"optimizer.restart_steps": removal},
        }
        for rate, keys in rates.items():
            for kind in ["none", *(_kinds(family) if rate == "held" else ["both"])]:
                yield {"kind": kind, "rate": rate, "removal": removal}, {**longer, **keys, **_deficit(kind, 0, removal)}


def _window(family: Family, steps: int):
    """A deficit of fixed length at an onset, in a run of fixed length, under each `_rate`.

    What has one rate whatever the onset has one run without a deficit. The order is that in which the arms were added:
    a sweep that is there may grow at its end.
    """
    length, onsets = round(LENGTH * steps), [round(share * steps) for share in ONSETS]
    single = [kind for kind in _kinds(family) if kind != "both"]

    def at(rate: str, onset: int, kind: str):
        return {"kind": kind, "rate": rate, "onset": onset}, {
            **_rate(rate, onset, length),
            **_deficit(kind, onset, length),
        }

    for rate, kinds in (("decayed", _kinds(family)), ("constant", ["both"])):
        yield {"kind": "none", "rate": rate, "onset": None}, _rate(rate, 0, length)
        yield from (at(rate, onset, kind) for kind in kinds for onset in onsets)
    yield from (at("held", onset, kind) for onset in onsets for kind in ("none", "both"))
    yield from (at(rate, onset, kind) for rate in ("constant", "held") for kind in single for onset in onsets)


def _rate(rate: str, onset: int, length: int) -> dict[str, Any]:
    """It decays throughout; is constant; or stands still in the window, and decays as far as ever outside it."""
    if rate == "held":
        return {"optimizer.hold_steps": length, **({"optimizer.hold_start_steps": onset} if onset else {})}
    return {"optimizer.schedule": "constant"} if rate == "constant" else {}


def _patterns(family: Family, steps: int):
    """Bits of the first steps by different patterns between low and high, then high; weights and activations alike."""
    early = round(EARLY * steps)
    for pattern in PATTERNS:
        bits = [*pattern_bits(pattern, family.low, early), HIGH]
        firsts = [0, *(t for t in range(1, early + 1) if bits[t] != bits[t - 1])]
        yield (
            {"pattern": pattern},
            {
                "schedule.name": "piecewise",
                "schedule.boundaries_steps": tuple(firsts[1:]) or (1,),
                "schedule.values": tuple(bits[t] for t in firsts) if firsts[1:] else (HIGH, HIGH),
                "schedule.grads.name": "constant",
            },
        )


def pattern_bits(pattern: str, low: int, steps: int) -> list[int]:
    """The bits of the first `steps` steps."""
    if pattern in ("high", "low"):
        return [HIGH if pattern == "high" else low] * steps
    if pattern == "random":  # the same for all seeds: one pattern, as the others are
        drawn = np.random.default_rng(0).integers(low, HIGH + 1, PIECES)
        return [int(drawn[min(t * PIECES // steps, PIECES - 1)]) for t in range(steps)]
    made = {
        "increasing": schedules.linear(low, HIGH, steps),
        "decreasing": schedules.linear(HIGH, low, steps),
        "cyclic": schedules.cyclic("cosine", low=low, high=HIGH, cycles=2, total_steps=steps),
    }
    return [int(bits) for bits in schedules.evaluate(made[pattern], steps)]


def _fisher(family: Family, steps: int):
    """Fisher traces over training: without a deficit, with one at the beginning, and later; of a small net, exactly."""
    length = round(0.4 * steps)
    for samples in (1, 0) if family.task == "mnist_mlp" else (1,):
        for kind, onset in (("none", 0), ("both", 0), ("both", length), *[("blur", 0)] * family.blurs):
            label = {"kind": kind, "onset": onset if kind != "none" else None, "samples": samples}
            yield label, {"fisher.samples": samples, **_deficit(kind, onset, length)}


def _calibration(family: Family, steps: int):
    """How many bits a deficit has to have to matter: one of each, over the last and the first quarter of the run."""
    length = round(LENGTH * steps)
    yield {"kind": "none", "low": HIGH, "onset": None}, {}
    for onset in (0, steps - length):
        for low in (1, 2, 3, 4):
            for kind in KINDS:
                yield {"kind": kind, "low": low, "onset": onset}, _deficit(kind, onset, length, low)
        if family.blurs:
            yield {"kind": "blur", "low": None, "onset": onset}, _deficit("blur", onset, length)


PARTS = {
    "removal": _removal,
    "window": _window,
    "patterns": _patterns,
    "fisher": _fisher,
    "calibration": _calibration,
}


def _parsed(argument: str) -> tuple[str, str, bool]:
    name, _, rest = argument.partition("-")
    part, _, smoke = rest.partition("-")
    for what, value, allowed in (("family", name, FAMILIES), ("part", part, PARTS), ("form", smoke, ("", "smoke"))):
        if value not in allowed:
            raise UsageError(
                f"config argument {argument!r}: {what} {value!r}; give FAMILY-PART, FAMILY out of "
                f"{', '.join(FAMILIES)}, PART out of {', '.join(PARTS)}, and -smoke for the small form."
                f"{did_you_mean(value, allowed)}"
            )
    return name, part, bool(smoke)
