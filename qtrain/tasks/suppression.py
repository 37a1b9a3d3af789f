"""From what a detector puts out to boxes with scores: decoding and non-maximum suppression, in one compiled program.

Compiled rather than on the host, for the evaluation is one program of fixed shapes for all bits, and on an accelerator
what leaves it are a hundred boxes an image instead of every anchor's scores.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from qtrain.tasks.boxes import decoded, overlaps

Array = jax.Array


class Detections(NamedTuple):
    """Boxes float32 ``[..., D, 4]``, scores ``[..., D]`` falling, classes int32 ``[..., D]``: −1, score 0: none."""

    boxes: Array
    scores: Array
    classes: Array


def kept(boxes: Array, classes: Array, valid: Array, threshold: float) -> Array:
    """Which of K boxes, the best first, greedy class-wise non-maximum suppression keeps: bool ``[K]``.

    A box goes if it overlaps a box of its class that stays and comes before it by more than `threshold`. Of that the
    greedy choice is the only solution; it is reached by repeating, for all boxes at once, "stays unless one that stays
    suppresses it" until nothing changes, at most K times, and a few times in practice: a box is right as soon as those
    before it in its chain are.

    Args:
      boxes: ``[K, 4]``.
      classes: int32 ``[K]``.
      valid: bool ``[K]``; the others stay out and suppress nothing.
      threshold: of the intersection over union.
    """
    before = jnp.arange(len(boxes))[:, None] < jnp.arange(len(boxes))[None, :]
    same = classes[:, None] == classes[None, :]
    suppresses = before & same & (overlaps(boxes, boxes) > threshold) & valid[:, None]

    def again(state: tuple[Array, Array]) -> tuple[Array, Array]:
        stays, _ = state
        new = valid & ~jnp.any(suppresses & stays[:, None], axis=0)
        return new, jnp.any(new != stays)

    stays, _ = jax.lax.while_loop(lambda state: state[1], again, (valid, jnp.array(True)))
    return stays


def detections(
    logits: Array,
    deltas: Array,
    anchors: Array,
    size: tuple[int, int],
    *,
    least_score: float = 0.05,
    candidates: int = 1000,
    threshold: float = 0.5,
    most: int = 100,
) -> Detections:
    """The boxes that a detector finds: scores above a threshold, decoded, cut off at the image's edges, suppressed.

    Args:
      logits: float32 ``[B, A, C]``; a score is the sigmoid of one.
      deltas: float32 ``[B, A, 4]``, as `encoded` makes them.
      anchors: ``[A, 4]``.
      size: height and width of the images, pixels.
      least_score: lower ones are not considered.
      candidates: so many of the best pairs of anchor and class an image are (RetinaNet takes 1000 of each level).
      threshold: of the suppression.
      most: D, boxes an image that are returned, of all classes; fewer if there are fewer candidates.
    """
    num_classes = logits.shape[-1]
    limits = jnp.array([*size, *size], jnp.float32)

    def of_image(arrays: tuple[Array, Array]) -> Detections:
        logits, deltas = arrays
        scores, index = jax.lax.top_k(jax.nn.sigmoid(logits).reshape(-1), min(candidates, logits.size))
        anchor, classes = index // num_classes, index % num_classes
        boxes = jnp.clip(decoded(deltas[anchor], anchors[anchor]), 0.0, limits)
        sides = boxes[:, 2:] - boxes[:, :2]
        valid = (scores > least_score) & jnp.all(sides > 0, axis=-1)
        stays = kept(boxes, classes, valid, threshold)
        # Stable: what stays keeps its order, which is that of the scores.
        chosen = jnp.argsort(~stays, stable=True)[:most]
        there = stays[chosen]
        return Detections(
            jnp.where(there[:, None], boxes[chosen], 0.0),
            jnp.where(there, scores[chosen], 0.0),
            jnp.where(there, classes[chosen], -1).astype(jnp.int32),
        )

    # Some images at a time: all pairs of candidates of a whole batch would take gigabytes.
    return jax.lax.map(of_image, (logits, deltas), batch_size=8)
