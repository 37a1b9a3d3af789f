"""The runs of the study: one network at several widths, and what it is compared with."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

SEEDS = (0, 1, 2)
WIDTHS = (8, 6, 4, 2)


@dataclasses.dataclass(frozen=True)
class Arm:
    """A run, but for its seed.

    Attributes:
      group, name: what it is called in the rows.
      task: "digits_cnn", "digits_resnet" or "mnist_cnn".
      widths: that are trained together.
      overrides: of the config.
      seeds: that it is run with.
    """

    group: str
    name: str
    task: str
    widths: tuple[int, ...]
    overrides: tuple[str, ...] = ()
    seeds: tuple[int, ...] = SEEDS

    @property
    def config(self) -> str:
        """Its file."""
        return f"configs/{self.task}_multi_precision.py"

    def arguments(self, seed: int) -> list[str]:
        """Of ``qtrain train``, but for its folders."""
        number = len(self.widths)
        shown = ", ".join(map(str, self.widths)) + ("," if number == 1 else "")
        own = (
            f"--config.multi_precision.widths=({shown})",
            f"--config.data.repeat={number}",
            f"--config.seed={seed}",
            f"--config.data.seed={seed}",
        )
        return ["--config", self.config, *own, *self.overrides]


SLOW = "--config.optimizer.quant.learning_rate=0.0001"
"""Of the scales where Adam moves them: as fast as the weights (0.002) would be half a step of 8 bits an update."""


def _alrs(reading: str) -> str:
    return f"--config.multi_precision.alrs={reading}"


def separate(task: str, widths: tuple[int, ...] = WIDTHS) -> Iterator[Arm]:
    """A model for each width, by the same quantizers, loop and learning rates."""
    for width in widths:
        yield Arm("separate", f"{width} bits alone", task, (width,), (_alrs("none"), SLOW))


def joint(task: str) -> Iterator[Arm]:
    """The config as it is."""
    yield Arm("joint", "joint", task, WIDTHS)


def variants(task: str) -> Iterator[Arm]:
    """Readings of ALRS, the conventional step, distillation, another set of widths."""
    yield Arm("alrs", "no ALRS", task, WIDTHS, (_alrs("none"), SLOW))
    yield Arm("alrs", "no ALRS, fast", task, WIDTHS, (_alrs("none"),))
    for reading in ("clamp", "signed"):  # "one_minus" is the config's
        yield Arm("alrs", f"ALRS {reading}", task, WIDTHS, (_alrs(reading),))
    accumulated = ("--config.multi_precision.updates=accumulated", _alrs("none"), SLOW)
    yield Arm("update", "accumulated", task, WIDTHS, accumulated)
    yield Arm("distillation", "distilled", task, WIDTHS, ("--config.multi_precision.distill.rate=1.0",))
    yield Arm("widths", "4/3/2 bits", task, (4, 3, 2))


def mixed(task: str) -> Iterator[Arm]:
    """Layers that switch width by their sensitivity in training."""
    yield Arm("hasb", "HASB σ=0.5", task, WIDTHS, ("--config.multi_precision.hasb.sigma=0.5",))


GROUPS = {
    "digits_apart": lambda: separate("digits_cnn", (8, 6, 4, 3, 2)),
    "digits": lambda: joint("digits_cnn"),
    "variants": lambda: variants("digits_cnn"),
    "search": lambda: (*joint("digits_resnet"), *mixed("digits_resnet")),
    "mnist_apart": lambda: separate("mnist_cnn"),
    "mnist": lambda: joint("mnist_cnn"),
}
"""Name → its arms."""
