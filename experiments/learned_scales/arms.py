"""What the study compares: arms, each a config's overrides, in groups."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

DENSE = "configs/mnist_mlp_nested.py"
CONV = "configs/digits_cnn_static.py"
# Shortened: 3 epochs instead of 10.
DENSE_BASE = ("--config.train.steps=1404", "--config.losses.bin_count.rate=0.0")
# Smaller and shorter than the shipped network, which loses nothing.
CONV_BASE = (
    "--config.model.features=(8, 16)",
    "--config.model.hidden=32",
    "--config.train.steps=900",
    "--config.quant.acts=none",
    "--config.quant.grads=none",
)
FLOAT = (
    "--config.quant.weights=none",
    "--config.quant.bias=none",
    "--config.quant.ends=32",
    "--config.schedule.bits=32",
)
SEEDS = (0, 1, 2)
RANGE = (1e-7, 1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0)


@dataclasses.dataclass(frozen=True)
class Arm:
    """One setting.

    Attributes:
      group, name: of the arm; ``name`` is unique within the group.
      facts: what tells it from others, kept in its rows.
      overrides: of the command line.
      config: that they override.
      threshold: λ; what differs in it alone shares a compiled program.
      seeds: that it is run with.
      export: whether the file of each run is written and measured.
    """

    group: str
    name: str
    facts: dict[str, Any]
    overrides: tuple[str, ...]
    config: str = DENSE
    threshold: float | None = None
    seeds: tuple[int, ...] = SEEDS
    export: bool = False


def nested(per: str, threshold: float, rate: float, *, bias: bool = True, dense: str | None = None) -> tuple[str, ...]:
    """Overrides of "ratio": `per` of kernels (with `dense` of convolutions alone), λ, learning rate of the scales."""

    def rule(per: str) -> dict[str, Any]:
        return {
            "weight_quantizer": {"kind": "nested", "per": per, "threshold": threshold},
            "bias_quantizer": {"kind": "nested", "threshold": threshold} if bias else None,
            "act_quantizer": None,
        }

    rules = (rule(per),) if dense is None else ({"ops": ("dot",), **rule(dense)}, rule(per))
    return (f"--config.quant.rules={rules!r}", f"--config.optimizer.quant.learning_rate={rate:g}")


def by_loss(per: str, rate: float, **terms: float) -> tuple[str, ...]:
    """Overrides of "loss", whose scales the loss and `terms` (name → rate) train."""
    return (
        f"--config.quant.weights=nested/{per}/loss",
        "--config.quant.bias=nested/tensor/loss",
        f"--config.optimizer.quant.learning_rate={rate:g}",
        *(f"--config.losses.{name}.rate={value:g}" for name, value in terms.items()),
    )


def reference() -> Iterator[Arm]:
    """The float models."""
    yield Arm("float", "dense", {"method": "float", "network": "dense"}, (*DENSE_BASE, *FLOAT))
    yield Arm("float", "conv", {"method": "float", "network": "conv"}, (*CONV_BASE, *FLOAT), config=CONV)


def applicable_range(seeds: tuple[int, ...], per: str = "tensor") -> Iterator[Arm]:
    """λ over seven decades, at two learning rates of the scales."""
    for rate in (1e-4, 3e-4):
        for threshold in RANGE:
            facts = {"method": "ratio", "network": "dense", "per": per, "threshold": threshold, "rate": rate}
            name = f"{per} λ={threshold:g} rate={rate:g}"
            overrides = (*DENSE_BASE, *nested(per, threshold, rate))
            yield Arm("range", name, facts, overrides, threshold=threshold, seeds=seeds)


def with_terms(per: str, threshold: float, rate: float, seeds: tuple[int, ...], **terms: float) -> Arm:
    """ "ratio" with a loss term beside it."""
    facts = {"method": "ratio", "network": "dense", "per": per, "threshold": threshold, "rate": rate, "terms": terms}
    said = " ".join(f"{name}={value:g}" for name, value in terms.items())
    own = (f"--config.losses.{name}.rate={value:g}" for name, value in terms.items())
    overrides = (*DENSE_BASE, *nested(per, threshold, rate), *own)
    return Arm(
        "terms",
        f"{per} λ={threshold:g} rate={rate:g} {said}".strip(),
        facts,
        overrides,
        threshold=threshold,
        seeds=seeds,
    )


def losses(seeds: tuple[int, ...]) -> Iterator[Arm]:
    """Scales that the loss trains, with each term at a few rates."""
    settings: list[dict[str, float]] = [{}]
    settings += [{"inverse_scale": rate} for rate in (1e-4, 1e-3)]
    settings += [{"bin_count": rate} for rate in (1e-4, 1e-3)]
    settings += [{"bin_count": 1e-3, "deviation": 10.0}]
    for terms in settings:
        facts = {"method": "loss", "network": "dense", "per": "tensor", "rate": 3e-4, "terms": terms}
        said = " ".join(f"{name}={value:g}" for name, value in terms.items()) or "no term"
        yield Arm("losses", said, facts, (*DENSE_BASE, *by_loss("tensor", 3e-4, **terms)), seeds=seeds)


def competitors(seeds: tuple[int, ...]) -> Iterator[Arm]:
    """Weights by what is not nested; biases stay in float."""
    plain = (*DENSE_BASE, "--config.quant.bias=none")
    for bits in (2, 3, 4, 8):
        width = (f"--config.schedule.bits={bits}", f"--config.quant.ends={bits}")
        for method, words in (("lsq", "lsq/signed/tensor"), ("uniform", "symmetric/channel")):
            facts = {"method": method, "network": "dense", "bits": bits}
            overrides = (*plain, f"--config.quant.weights={words}", *width)
            yield Arm("competitors", f"{method} {bits}", facts, overrides, seeds=seeds)
    for target in (2.0, 3.0, 4.0):
        facts = {"method": "learned_width", "network": "dense", "per": "channel", "target": target}
        budget = ("--config.budget.unit=bits", f"--config.budget.target={target:g}")
        overrides = (*plain, "--config.quant.weights=learned_width/signed/channel", *budget)
        yield Arm("competitors", f"learned_width channel {target:g}", facts, overrides, seeds=seeds)


def by_descent(seeds: tuple[int, ...]) -> Iterator[Arm]:
    """λ under plain SGD, which keeps the size of a scale's gradient; Adam divides it out."""
    sgd = ("--config.optimizer.name=sgd", "--config.optimizer.learning_rate=0.05")
    yield Arm(
        "range_sgd", "float", {"method": "float", "network": "dense_sgd"}, (*DENSE_BASE, *FLOAT, *sgd), seeds=seeds
    )
    for threshold in RANGE:
        kernel = {"kind": "nested", "per": "tensor", "threshold": threshold, "reduce": "mean"}
        rules = ({"weight_quantizer": kernel, "bias_quantizer": kernel, "act_quantizer": None},)
        facts = {"method": "ratio", "network": "dense_sgd", "per": "tensor", "threshold": threshold, "rate": 3e-5}
        own = (f"--config.quant.rules={rules!r}", "--config.optimizer.quant.learning_rate=3e-05")
        yield Arm("range_sgd", f"λ={threshold:g}", facts, (*DENSE_BASE, *sgd, *own), threshold=threshold, seeds=seeds)


def granularity(seeds: tuple[int, ...]) -> Iterator[Arm]:
    """What shares a scale, biases or not, and the L2 coefficient, without a loss term."""
    for per, bias in (("tensor", True), ("tensor", False), ("row", True), ("column", True)):
        facts = {"method": "ratio", "network": "dense", "per": per, "threshold": 0.1, "rate": 1e-4, "bias": bias}
        overrides = (*DENSE_BASE, *nested(per, 0.1, 1e-4, bias=bias))
        name = f"{per} {'with' if bias else 'without'} biases"
        yield Arm("granularity", name, facts, overrides, threshold=0.1, seeds=seeds)
    facts = {"method": "ratio", "network": "dense", "per": "tensor", "threshold": 0.1, "rate": 1e-4, "decay": 1e-4}
    overrides = (*DENSE_BASE, *nested("tensor", 0.1, 1e-4), "--config.optimizer.weight_decay=0.0001")
    yield Arm("granularity", "tensor with biases L2=1e-4", facts, overrides, threshold=0.1, seeds=seeds)


def convolution(seeds: tuple[int, ...]) -> Iterator[Arm]:
    """The digits CNN: what shares a scale of a convolution's kernel, λ, and competitors."""
    for per in ("tensor", "spatial", "channel", "filter"):
        for rate in (3e-4, 1e-3) if per == "tensor" else (3e-4,):
            for threshold in (1e-5, 1e-3, 1e-1, 1.0):
                facts = {"method": "ratio", "network": "conv", "per": per, "threshold": threshold, "rate": rate}
                dense = "tensor" if per == "tensor" else "column"
                overrides = (*CONV_BASE, *nested(per, threshold, rate, dense=dense))
                name = f"{per} λ={threshold:g} rate={rate:g}"
                yield Arm("conv", name, facts, overrides, config=CONV, threshold=threshold, seeds=seeds)
    for count in (1e-3, 1e-2):
        facts = {
            "method": "ratio",
            "network": "conv",
            "per": "tensor",
            "threshold": 0.1,
            "rate": 3e-4,
            "terms": {"bin_count": count},
        }
        overrides = (
            *CONV_BASE,
            *nested("tensor", 0.1, 3e-4, dense="tensor"),
            f"--config.losses.bin_count.rate={count:g}",
        )
        yield Arm("conv", f"tensor bin_count={count:g}", facts, overrides, config=CONV, threshold=0.1, seeds=seeds)
    for bits in (2, 3, 4):
        width = (f"--config.schedule.bits={bits}", f"--config.quant.ends={bits}")
        overrides = (*CONV_BASE, "--config.quant.weights=lsq/signed/tensor", *width)
        yield Arm(
            "conv", f"lsq {bits}", {"method": "lsq", "network": "conv", "bits": bits}, overrides, CONV, None, seeds
        )


def over_training(seeds: tuple[int, ...]) -> Iterator[Arm]:
    """λ that rises or falls over a run, against λ that stands (SGD, where λ counts); a budget that tightens slowly."""
    sgd = ("--config.optimizer.name=sgd", "--config.optimizer.learning_rate=0.05")
    kernel = {"kind": "nested", "per": "tensor", "threshold": 0.1, "reduce": "mean"}
    rules = ({"weight_quantizer": kernel, "bias_quantizer": kernel, "act_quantizer": None},)
    for schedule in ("constant", "linear_up", "linear_down"):
        own = (f"--config.quant.rules={rules!r}", "--config.optimizer.quant.learning_rate=3e-05")
        own += (f"--config.quant.threshold.schedule={schedule}",)
        own += () if schedule == "constant" else ("--config.quant.threshold.final_factor=0.001",)
        facts = {"method": "ratio", "network": "dense_sgd", "per": "tensor", "rate": 3e-5, "schedule": schedule}
        yield Arm("schedules", f"λ=0.1 {schedule}", facts, (*DENSE_BASE, *sgd, *own), seeds=seeds)
    plain = (*DENSE_BASE, "--config.quant.bias=none", "--config.quant.weights=learned_width/signed/channel")
    for start in (None, 8.0):
        budget = ("--config.budget.unit=bits", "--config.budget.target=2.5")
        budget += () if start is None else (f"--config.budget.start={start:g}", "--config.budget.schedule=linear_down")
        facts = {"method": "learned_width", "network": "dense", "per": "channel", "target": 2.5, "start": start}
        name = "budget 2.5 bits " + ("throughout" if start is None else f"from {start:g}")
        yield Arm("schedules", name, facts, (*plain, *budget), seeds=seeds)


def initial(seeds: tuple[int, ...]) -> Iterator[Arm]:
    """Scales that begin as coarse as they are to end, so that weights form on the grid that they are stored on."""
    for bits in (3, 2):
        for count in (0.0, 1e-3):
            own = (f"--config.schedule.bits={bits}", f"--config.losses.bin_count.rate={count:g}")
            said = {"network": "dense", "per": "tensor", "initial_bits": bits, "terms": {"bin_count": count}}
            facts = {"method": "ratio", "threshold": 0.1, "rate": 3e-5, **said}
            name = f"ratio from {bits} bits bin_count={count:g}"
            overrides = (*DENSE_BASE, *nested("tensor", 0.1, 3e-5), *own)
            yield Arm("initial", name, facts, overrides, threshold=0.1, seeds=seeds)


def target(seeds: tuple[int, ...]) -> Iterator[Arm]:
    """The shipped config in full, 10 epochs, and what is smaller; each file is written and measured."""
    long = ("--config.losses.bin_count.rate=0.0", *FLOAT)
    yield Arm("target", "float", {"method": "float", "network": "dense_long"}, long, seeds=seeds)
    # As the next with a weaker term, which is too weak: two of three seeds keep outliers that cost a bit.
    facts = {"method": "ratio", "network": "dense_long", "per": "tensor", "threshold": 0.1, "rate": 1e-4}
    facts |= {"terms": {"bin_count": 1e-5}}
    own = ("--config.quant.weights=nested/tensor", "--config.optimizer.quant.learning_rate=0.0001")
    overrides = (*own, "--config.losses.bin_count.rate=1e-05")
    yield Arm("target", "tensor rate=0.0001 bin_count=1e-05", facts, overrides, seeds=seeds, export=True)
    width = ("--config.schedule.bits=2", "--config.quant.ends=2", "--config.losses.bin_count.rate=0.0")
    lsq = ("--config.quant.weights=lsq/signed/tensor", "--config.quant.bias=none", *width)
    yield Arm("target", "lsq 2", {"method": "lsq", "network": "dense_long", "bits": 2}, lsq, seeds=seeds, export=True)
    facts = {"method": "ratio", "network": "dense_long", "per": "tensor", "threshold": 0.1, "rate": 1e-4}
    facts |= {"terms": {"bin_count": 1e-4}}
    overrides = (own[0], "--config.schedule.bits=8", own[1], "--config.losses.bin_count.rate=0.0001")
    yield Arm("target", "tensor from 8 bits rate=0.0001 bin_count=0.0001", facts, overrides, seeds=seeds, export=True)
    facts = {"method": "ratio", "network": "dense_long", "per": "column", "threshold": 0.1, "rate": 1e-4}
    facts |= {"terms": {"bin_count": 1e-5}}
    overrides = (
        "--config.quant.weights=nested/column",
        "--config.schedule.bits=8",
        own[1],
        "--config.losses.bin_count.rate=1e-05",
    )
    name = "column from 8 bits rate=0.0001 bin_count=1e-05"
    yield Arm("target", name, facts, overrides, seeds=SEEDS, export=True)


GROUPS = {
    "target": lambda: target(SEEDS),
    "float": reference,
    "schedules": lambda: over_training(SEEDS),
    "initial": lambda: initial(SEEDS),
    "range": lambda: applicable_range(SEEDS),
    "terms": lambda: (
        with_terms("tensor", 0.1, rate, SEEDS, bin_count=count) for rate in (1e-4, 3e-4) for count in (1e-5, 1e-4, 1e-3)
    ),
    "losses": lambda: losses(SEEDS),
    "competitors": lambda: competitors(SEEDS),
    "range_sgd": lambda: by_descent(SEEDS),
    "granularity": lambda: granularity(SEEDS),
    "conv": lambda: convolution(SEEDS),
}
"""Name → its arms."""
