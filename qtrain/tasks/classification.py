"""A class for each image, token or node: cross-entropy and accuracy."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import jax.numpy as jnp
import numpy as np

from qtrain.metrics import cross_entropy
from qtrain.models.gcn import KEYS
from qtrain.tasks.base import Array, Batch, Task, added_up


@dataclasses.dataclass(frozen=True)
class Classification(Task):
    """The mean of −log softmax(outputs)[label], and the share of labels that are the largest output.

    Where a training batch has a ``mask``, of the labels that it keeps.

    Attributes:
      input: the batch's key of what the model takes.
      label: the key of the classes, int32, one for each row of the outputs.
    """

    metric: ClassVar[str] = "accuracy"
    measured: ClassVar[tuple[str, ...]] = ("accuracy",)
    classifies: ClassVar[bool] = True

    input: str = "image"
    label: str = "label"

    def inputs(self, batch: Batch) -> Any:
        """The array under `input`."""
        return batch[self.input]

    def loss(self, outputs: Any, batch: Batch) -> Array:
        """The mean cross-entropy; natural logarithm."""
        return masked_mean(cross_entropy(outputs, batch[self.label]), batch)

    def indices(self, batch: Batch, count: int | None = None) -> Array:
        """What tells the examples of a batch apart, int32 [count]: the first `count` of them, or all."""
        return jnp.arange(batch[self.input].shape[0])[:count]

    def example(self, batch: Batch, index: Array) -> Any:
        """What the model takes of a single example: a batch of one."""
        return jnp.asarray(batch[self.input])[index][None]

    def prediction(self, outputs: Any, index: Array) -> Array:
        """The logits of the example among what the model makes of `example`."""
        return outputs[0]

    def measure(self, outputs: Any, batch: Batch) -> dict[str, Array]:
        """``accuracy``."""
        return {"accuracy": masked_mean(jnp.argmax(outputs, -1) == batch[self.label], batch)}

    def evaluate(self, outputs: Any, batch: Batch) -> dict[str, Array]:
        """Sums of ``loss`` and of ``correct`` predictions over the examples (tokens) that the mask keeps; ``count``."""
        labels = batch[self.label]
        weights = jnp.broadcast_to(batch["mask"].reshape(-1, *(1,) * (labels.ndim - 1)), labels.shape)
        return {
            "loss": jnp.sum(weights * cross_entropy(outputs, labels)),
            "correct": jnp.sum(weights * (jnp.argmax(outputs, -1) == labels)),
            "count": jnp.sum(weights),
        }

    def summary(self, parts: Sequence[Mapping[str, np.ndarray]]) -> dict[str, float]:
        """``loss`` and ``accuracy``."""
        loss, correct, count = (added_up(parts, name) for name in ("loss", "correct", "count"))
        return {"loss": loss / count, "accuracy": correct / count}


@dataclasses.dataclass(frozen=True)
class NodeClassification(Classification):
    """`Classification` of the nodes of a graph, which the model takes whole."""

    def inputs(self, batch: Batch) -> Any:
        """The graph: nodes, senders and receivers by name."""
        return {name: batch[name] for name in KEYS}

    def indices(self, batch: Batch, count: int | None = None) -> Array:
        """The nodes that the mask keeps; without a `count`, not to be traced."""
        return jnp.flatnonzero(batch["mask"], size=count)

    def example(self, batch: Batch, index: Array) -> Any:
        """The whole graph, of which a node's logits are made."""
        return self.inputs(batch)

    def prediction(self, outputs: Any, index: Array) -> Array:
        """The logits of the node."""
        return outputs[index]


IMAGES = Classification("image", "label")
TOKENS = Classification("tokens", "targets")
NODES = NodeClassification("nodes", "label")


def masked_mean(values: Array, batch: Batch) -> Array:
    """The mean of a value for each label; of those alone that the batch's ``mask`` keeps, where it has one."""
    if "mask" not in batch:
        return jnp.mean(values)
    return jnp.sum(batch["mask"] * values) / jnp.sum(batch["mask"])
