"""Mean average precision as COCO defines it, in numpy."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

THRESHOLDS = np.linspace(0.5, 0.95, 10)
"""Intersections over union that a detection is to reach."""
RECALLS = np.linspace(0.0, 1.0, 101)
"""Where precision is read off."""
MOST = 100
"""Detections of an image and class that count, the best first."""


class AveragePrecision(NamedTuple):
    """Of a set of images.

    Attributes:
      map: the mean over `THRESHOLDS` and over the classes that there are boxes of; nan where there are none.
      map50: that at 0.5.
      of_classes: ``[10, C]``, thresholds and classes; nan for a class without boxes.
    """

    map: float
    map50: float
    of_classes: np.ndarray


def mean_average_precision(
    boxes: np.ndarray,
    scores: np.ndarray,
    classes: np.ndarray,
    true_boxes: np.ndarray,
    true_classes: np.ndarray,
    ignored: np.ndarray,
) -> AveragePrecision:
    """COCO's mAP@[.5:.95] and mAP@.5, area "all", of N images.

    In each image the detections of a class, by falling score (of equals the first; `MOST` of them), take in turn the
    box of that class which they overlap most among those not yet taken, if by the threshold or more; an ignored box
    only if there is no other. Those that do are right, the others wrong, but those on an ignored box, which do not
    count. Over all images by falling score that gives precision p_k at recall r_k, and

      AP = 1/101 Σ_{r = 0, 0.01 … 1} max {p_k : r_k ≥ r}, 0 where no r_k is.

    Lin et al. 2014, arXiv 1405.0312, and that data set's own evaluation, with which this agrees but for its regions of
    crowds, which it does not know. Boxes are half-open: no pixel is added to their sides.

    Args:
      boxes: of the detections, ``[N, D, 4]``.
      scores: ``[N, D]``.
      classes: whole numbers ``[N, D]``, negative where there is none.
      true_boxes: ``[N, M, 4]``.
      true_classes: ``[N, M]``, negative where there is none.
      ignored: bool ``[N, M]``.

    >>> there = np.array([[[0.0, 0.0, 10.0, 10.0]]])
    >>> one, no = np.zeros((1, 1), int), np.zeros((1, 1), bool)
    >>> mean_average_precision(there, np.array([[0.9]]), one, there, one, no).map
    1.0
    """
    classes, true_classes = np.asarray(classes), np.asarray(true_classes)
    ignored = np.asarray(ignored, bool)
    count = 1 + max(int(np.max(values, initial=-1)) for values in (classes, true_classes))
    found = np.full((len(THRESHOLDS), count), np.nan)
    for label in range(count):
        asked = int(np.sum((true_classes == label) & ~ignored))
        if asked:
            mine = classes == label
            ranked, truth = _by_score(boxes, scores, mine), _packed(true_boxes, ignored, true_classes == label)
            right, counts = _matched(*ranked[:2], *truth)
            found[:, label] = _average_precision(ranked[2], right, counts, asked)
    there = ~np.isnan(found).all(axis=0)
    if not there.any():
        return AveragePrecision(float("nan"), float("nan"), found)
    return AveragePrecision(float(found[:, there].mean()), float(found[0, there].mean()), found)


def _by_score(boxes: np.ndarray, scores: np.ndarray, mine: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Boxes ``[N, D, 4]``, whether there is one ``[N, D]``, and scores, those of the class first by falling score."""
    order = np.argsort(np.where(mine, -np.asarray(scores, np.float64), np.inf), axis=1, kind="stable")
    width = min(MOST, int(mine.sum(axis=1).max(initial=0)))
    order = order[:, :width]
    ranked = np.take_along_axis(np.asarray(boxes, np.float64), order[..., None], axis=1)
    return ranked, np.take_along_axis(mine, order, axis=1), np.take_along_axis(np.asarray(scores), order, axis=1)


def _packed(boxes: np.ndarray, ignored: np.ndarray, mine: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Boxes ``[N, M, 4]``, whether there is one, and whether it is ignored; of each image ignored ones last."""
    order = np.argsort(np.where(mine, ignored.astype(int), 2), axis=1, kind="stable")[:, : mine.sum(axis=1).max()]
    packed = np.take_along_axis(np.asarray(boxes, np.float64), order[..., None], axis=1)
    return packed, np.take_along_axis(mine, order, axis=1), np.take_along_axis(ignored, order, axis=1)


def _matched(
    boxes: np.ndarray, there: np.ndarray, true_boxes: np.ndarray, true_there: np.ndarray, ignored: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Whether a detection is right, and whether it counts: bool ``[T, N, D]`` each, for one class."""
    shape = (len(THRESHOLDS), *there.shape)
    right, counts = np.zeros(shape, bool), np.broadcast_to(there, shape).copy()
    numbers = there.sum(axis=1)
    # One rank of all images at a time; few images have many detections, and those come first.
    images = np.argsort(-numbers, kind="stable")[: np.count_nonzero(numbers)]
    overlap = np.where(true_there[images, None], _overlaps(boxes[images], true_boxes[images]), -1.0)  # [n, D, M]
    free = np.broadcast_to(true_there[images], (len(THRESHOLDS), *true_there[images].shape)).copy()
    for rank in range(there.shape[1]):
        rows = images[: np.count_nonzero(numbers > rank)]
        here, left, passing = overlap[: len(rows), rank], free[:, : len(rows)], ignored[rows]
        possible = left & (here >= THRESHOLDS[:, None, None] - 1e-10)
        ordinary = possible & ~passing
        possible = np.where(ordinary.any(axis=-1, keepdims=True), ordinary, possible)
        # Of equal overlaps the last one, as COCO's own evaluation has it.
        backwards = np.where(possible, here, -1.0)[..., ::-1]
        chosen = here.shape[-1] - 1 - np.argmax(backwards, axis=-1)
        taken = possible & (np.arange(here.shape[-1]) == chosen[..., None])
        left &= ~taken
        right[:, rows, rank] = (taken & ~passing).any(axis=-1)
        counts[:, rows, rank] = ~(taken & passing).any(axis=-1)
    return right, counts


def _overlaps(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """``[n, D, 4]`` and ``[n, M, 4]`` to ``[n, D, M]``."""
    near = np.maximum(first[:, :, None, :2], second[:, None, :, :2])
    far = np.minimum(first[:, :, None, 2:], second[:, None, :, 2:])
    inside = np.prod(np.maximum(far - near, 0.0), axis=-1)
    areas = [np.prod(boxes[..., 2:] - boxes[..., :2], axis=-1) for boxes in (first, second)]
    union = areas[0][:, :, None] + areas[1][:, None, :] - inside
    return np.divide(inside, union, out=np.zeros_like(inside), where=union > 0)


def _average_precision(scores: np.ndarray, right: np.ndarray, counts: np.ndarray, asked: int) -> np.ndarray:
    """Average precision at each threshold, ``[T]``."""
    found = np.zeros(len(THRESHOLDS))
    flat = scores.reshape(-1)
    for index in range(len(THRESHOLDS)):
        mine = counts[index].reshape(-1)
        order = np.argsort(-flat[mine], kind="stable")
        hits = right[index].reshape(-1)[mine][order]
        if not len(hits):
            continue
        correct = np.cumsum(hits)
        precision, recall = correct / np.arange(1, len(hits) + 1), correct / asked
        envelope = np.maximum.accumulate(precision[::-1])[::-1]
        position = np.searchsorted(recall, RECALLS, side="left")
        read = np.where(position < len(hits), envelope[np.minimum(position, len(hits) - 1)], 0.0)
        found[index] = read.mean()
    return found
