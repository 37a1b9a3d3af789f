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
SCOUT = (0,)
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


def applicable_range(per: str = "tensor", seeds: tuple[int, ...] = SCOUT) -> Iterator[Arm]:
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
        "dense",
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
    for per in ("channel",):
        for target in (2.0, 3.0, 4.0):
            facts = {"method": "learned_width", "network": "dense", "per": per, "target": target}
            overrides = (
                *plain,
                f"--config.quant.weights=learned_width/signed/{per}",
                "--config.budget.unit=bits",
                f"--config.budget.target={target:g}",
            )
            yield Arm("competitors", f"learned_width {per} {target:g}", facts, overrides, seeds=seeds)


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
    for per in ("tensor", "row", "column"):
        for rate in (1e-4, 3e-4):
            for bias in (True, False):
                facts = {
                    "method": "ratio",
                    "network": "dense",
                    "per": per,
                    "threshold": 0.1,
                    "rate": rate,
                    "bias": bias,
                }
                name = f"{per} rate={rate:g} {'with' if bias else 'without'} biases"
                overrides = (*DENSE_BASE, *nested(per, 0.1, rate, bias=bias))
                yield Arm("granularity", name, facts, overrides, threshold=0.1, seeds=seeds)
    for decay in (1e-5, 1e-4):
        facts = {"method": "ratio", "network": "dense", "per": "tensor", "threshold": 0.1, "rate": 3e-4, "decay": decay}
        overrides = (*DENSE_BASE, *nested("tensor", 0.1, 3e-4), f"--config.optimizer.weight_decay={decay:g}")
        yield Arm("granularity", f"tensor L2={decay:g}", facts, overrides, threshold=0.1, seeds=seeds)


def convolution(seeds: tuple[int, ...]) -> Iterator[Arm]:
    """The digits CNN: what shares a scale of a convolution's kernel, λ, and competitors."""
    for per in ("tensor", "spatial", "channel", "filter"):
        for rate in (3e-4, 1e-3):
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
    for bits in (2, 3, 4, 8):
        width = (f"--config.schedule.bits={bits}", f"--config.quant.ends={bits}")
        for method, words in (("lsq", "lsq/signed/tensor"), ("uniform", "symmetric/channel")):
            facts = {"method": method, "network": "conv", "bits": bits}
            overrides = (*CONV_BASE, f"--config.quant.weights={words}", *width)
            yield Arm("conv", f"{method} {bits}", facts, overrides, config=CONV, seeds=seeds)
    for target in (2.0, 3.0, 4.0):
        facts = {"method": "learned_width", "network": "conv", "per": "tensor", "target": target}
        overrides = (
            *CONV_BASE,
            "--config.quant.weights=learned_width/signed/tensor",
            "--config.budget.unit=bits",
            f"--config.budget.target={target:g}",
        )
        yield Arm("conv", f"learned_width {target:g}", facts, overrides, config=CONV, seeds=seeds)


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
            facts = {"method": "loss", "rate": 1e-4, **said}
            name = f"loss from {bits} bits bin_count={count:g}"
            yield Arm("initial", name, facts, (*DENSE_BASE, *by_loss("tensor", 1e-4), *own), seeds=seeds)


def target(seeds: tuple[int, ...]) -> Iterator[Arm]:
    """The shipped config in full, 10 epochs, and what is smaller; each file is written and measured."""
    long = ("--config.losses.bin_count.rate=0.0", *FLOAT)
    yield Arm("target", "float", {"method": "float", "network": "dense_long"}, long, seeds=seeds)
    for per, count, rate in (("tensor", 1e-5, 1e-4), ("tensor", 1e-4, 1e-4), ("column", 1e-5, 1e-4)):
        facts = {"method": "ratio", "network": "dense_long", "per": per, "threshold": 0.1, "rate": rate}
        facts["terms"] = {"bin_count": count}
        overrides = (
            f"--config.quant.weights=nested/{per}",
            f"--config.optimizer.quant.learning_rate={rate:g}",
            f"--config.losses.bin_count.rate={count:g}",
        )
        yield Arm("target", f"{per} rate={rate:g} bin_count={count:g}", facts, overrides, seeds=seeds, export=True)


GROUPS = {
    "target": lambda: target(SEEDS),
    "float": reference,
    "initial": lambda: initial(SCOUT),
    "range": applicable_range,
    "terms": lambda: (
        with_terms("tensor", 0.1, rate, SCOUT, bin_count=count) for rate in (1e-4, 3e-4) for count in (1e-5, 1e-4, 1e-3)
    ),
    "losses": lambda: losses(SEEDS),
    "competitors": lambda: competitors(SEEDS),
    "range_sgd": lambda: by_descent(SCOUT),
    "granularity": lambda: granularity(SCOUT),
    "conv": lambda: convolution(SEEDS),
}
"""Name → its arms."""
