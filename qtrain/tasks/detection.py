"""Boxes with classes: the focal loss, smooth L1, and mean average precision."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from qtrain.tasks.average_precision import mean_average_precision
from qtrain.tasks.base import Array, Batch, Task, added_up
from qtrain.tasks.boxes import encoded, matched
from qtrain.tasks.suppression import detections

_COLLECTED = ("boxes", "scores", "classes", "true_boxes", "true_classes", "ignored", "mask")


def focal_loss(logits: Array, targets: Array, alpha: float = 0.25, gamma: float = 2.0) -> Array:
    """−α_t·(1 − p_t)^γ·log p_t elementwise, float32; p = sigmoid(logit), and p_t = p, α_t = α where the target is 1.

    Where it is 0 they are 1 − p and 1 − α. Computed as α_t·exp(−γ·softplus(z))·softplus(−z), z the logit with the sign
    of the target, which is finite for all logits, and so is its gradient.

    Lin et al. 2017, arXiv 1708.02002, equation 5.

    >>> print(f"{focal_loss(jnp.array(0.0), jnp.array(1.0)):.4f}")  # 0.25 · 0.5² · log 2
    0.0433
    """
    z = jnp.where(targets > 0, 1.0, -1.0) * logits.astype(jnp.float32)
    weight = jnp.where(targets > 0, alpha, 1.0 - alpha)
    return weight * jnp.exp(-gamma * jax.nn.softplus(z)) * jax.nn.softplus(-z)


def smooth_l1(error: Array, beta: float = 1 / 9) -> Array:
    """e²/(2β) where |e| < β, and |e| − β/2 beyond; elementwise."""
    size = jnp.abs(error)
    return jnp.where(size < beta, 0.5 * size * size / beta, size - 0.5 * beta)


@dataclasses.dataclass(frozen=True, eq=False)
class Detection(Task):
    """Find the boxes of an image and tell their classes, by anchors; mean average precision as of COCO.

    The model puts out ``{"logits": [B, A, C], "deltas": [B, A, 4]}`` for A anchors. An image's loss is

      (Σ over anchors and classes of `focal_loss` + Σ over positive anchors of `smooth_l1` of the four offsets) / N

    with N its positive anchors, at least 1, and which they are by `qtrain.tasks.boxes.matched`; that of a batch is the
    mean over its images. A batch has ``image``, ``boxes`` ``[B, M, 4]`` in pixels (y0, x0, y1, x1), ``label`` int32
    ``[B, M]``, −1 where there is no box, and ``ignored`` bool ``[B, M]``: a box to be neither learned nor asked for.

    Lin et al. 2017, arXiv 1708.02002; β = 1/9 is their code's.

    Attributes:
      anchors: ``[A, 4]``.
      num_classes: C.
      size: height and width of the images, pixels.
    """

    metric: ClassVar[str] = "map50"
    measured: ClassVar[tuple[str, ...]] = ("class_loss", "box_loss")
    classifies: ClassVar[bool] = False

    anchors: np.ndarray
    num_classes: int
    size: tuple[int, int]

    def inputs(self, batch: Batch) -> Any:
        """The images."""
        return batch["image"]

    def loss(self, outputs: Any, batch: Batch) -> Array:
        """The mean of both parts over the images."""
        classes, boxes = self._losses(outputs, batch)
        return jnp.mean(classes + boxes)

    def measure(self, outputs: Any, batch: Batch) -> dict[str, Array]:
        """The two parts of the loss, ``class_loss`` and ``box_loss``."""
        classes, boxes = self._losses(outputs, batch)
        return {"class_loss": jnp.mean(classes), "box_loss": jnp.mean(boxes)}

    def evaluate(self, outputs: Any, batch: Batch) -> dict[str, Array]:
        """Sums of ``loss`` and ``count`` over the images that the mask keeps; what is found and what there is."""
        classes, boxes = self._losses(outputs, batch)
        found = detections(outputs["logits"], outputs["deltas"], jnp.asarray(self.anchors), self.size)
        return {
            "loss": jnp.sum(batch["mask"] * (classes + boxes)),
            "count": jnp.sum(batch["mask"]),
            **found._asdict(),
            "true_boxes": batch["boxes"],
            "true_classes": batch["label"],
            "ignored": batch["ignored"],
            "mask": batch["mask"],
        }

    def summary(self, parts: Sequence[Mapping[str, np.ndarray]]) -> dict[str, float]:
        """``loss``, ``map50`` and ``map``: see `mean_average_precision`."""
        rows = {name: np.concatenate([part[name] for part in parts]) for name in _COLLECTED}
        real = rows.pop("mask") > 0
        found = mean_average_precision(**{name: values[real] for name, values in rows.items()})
        loss, count = added_up(parts, "loss"), added_up(parts, "count")
        return {"loss": loss / count, "map50": found.map50, "map": found.map}

    def _losses(self, outputs: Any, batch: Batch) -> tuple[Array, Array]:
        """Of classes and of boxes, float32 ``[B]`` each."""
        anchors = jnp.asarray(self.anchors)
        labels = batch["label"]
        match = matched(anchors, batch["boxes"], labels, batch["ignored"])
        own = jnp.take_along_axis(labels, match.box, axis=-1)
        targets = jax.nn.one_hot(jnp.where(match.positive, own, -1), self.num_classes)
        counts = (match.positive | match.negative)[..., None]
        classes = jnp.sum(counts * focal_loss(outputs["logits"], targets), axis=(1, 2))
        boxes = jnp.take_along_axis(batch["boxes"], match.box[..., None], axis=1)
        # An anchor that stands for nothing gets itself, whose offsets are finite: else their gradient would be NaN.
        wanted = encoded(jnp.where(match.positive[..., None], boxes, anchors), anchors)
        errors = smooth_l1(outputs["deltas"].astype(jnp.float32) - wanted)
        offsets = jnp.sum(match.positive[..., None] * errors, axis=(1, 2))
        positives = jnp.maximum(jnp.sum(match.positive, axis=-1), 1)
        return classes / positives, offsets / positives
