"""What the train step, the evaluation and the trainer ask of a task."""

from __future__ import annotations

import abc
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import jax
import numpy as np

Array = jax.Array
Batch = Mapping[str, Array]


class Task(abc.ABC):
    """What a batch holds and what is made of a model's outputs.

    `inputs`, `loss`, `measure` and `evaluate` are pure and may be traced; `summary` is not traced.
    """

    metric: ClassVar[str]
    """The number of `summary` that is to be large: by it the best checkpoint is kept."""
    measured: ClassVar[tuple[str, ...]]
    """The numbers of `measure`."""
    classifies: ClassVar[bool]
    """Whether the outputs are logits, classes on the last axis, and `metric` is their accuracy."""

    @abc.abstractmethod
    def inputs(self, batch: Batch) -> Any:
        """What the model takes of a batch."""

    @abc.abstractmethod
    def loss(self, outputs: Any, batch: Batch) -> Array:
        """The loss of a batch, a float32 scalar."""

    @abc.abstractmethod
    def measure(self, outputs: Any, batch: Batch) -> dict[str, Array]:
        """Scalars by the names of `measured`, which training averages beside the loss."""

    @abc.abstractmethod
    def evaluate(self, outputs: Any, batch: Batch) -> dict[str, Array]:
        """What a batch with a ``mask`` of its examples contributes to `summary`; ``loss`` is a sum, of ``count``."""

    @abc.abstractmethod
    def summary(self, parts: Sequence[Mapping[str, np.ndarray]]) -> dict[str, float]:
        """``loss``, `metric` and what else there is of a split, from what `evaluate` made of each of its batches."""


def added_up(parts: Sequence[Mapping[str, np.ndarray]], name: str) -> float:
    """The sum of a scalar over `parts`, from the first on, in float64."""
    total = 0.0
    for part in parts:  # not by `sum`, which compensates rounding from Python 3.12 on
        total += float(part[name])
    return total
