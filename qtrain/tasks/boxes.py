"""Boxes as arrays: overlap, offsets from anchors, and which anchors stand for which box.

A box is (y0, x0, y1, x1) in pixels, the far edges exclusive: its height is y1 − y0.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

Array = jax.Array

LARGEST_GROWTH = math.log(1000 / 16)
"""The most that a logarithm of a side's growth is taken for, so that no wild output overflows."""


def overlaps(first: Array, second: Array) -> Array:
    """Intersection over union of each pair: ``[..., A, 4]`` and ``[..., B, 4]`` to ``[..., A, B]``, 0 … 1.

    A box without an area overlaps nothing.
    """
    first, second = first[..., :, None, :], second[..., None, :, :]
    near = jnp.maximum(first[..., :2], second[..., :2])
    far = jnp.minimum(first[..., 2:], second[..., 2:])
    inside = jnp.prod(jnp.maximum(far - near, 0.0), axis=-1)
    union = _areas(first) + _areas(second) - inside
    return jnp.where(inside > 0, inside / jnp.where(union > 0, union, 1.0), 0.0)


def _areas(boxes: Array) -> Array:
    return jnp.prod(jnp.maximum(boxes[..., 2:] - boxes[..., :2], 0.0), axis=-1)


def encoded(boxes: Array, anchors: Array) -> Array:
    """((c − c_a)/s_a, log(s/s_a)): centres and sides of `boxes` relative to `anchors`, ``[..., 4]`` each; no scaling.

    Girshick et al. 2014, arXiv 1311.2524, appendix C, y before x. The sides of `boxes` must be above 0.
    """
    sides, own = (b[..., 2:] - b[..., :2] for b in (boxes, anchors))
    centres, own_centres = ((b[..., 2:] + b[..., :2]) / 2 for b in (boxes, anchors))
    return jnp.concatenate([(centres - own_centres) / own, jnp.log(sides / own)], axis=-1)


def decoded(deltas: Array, anchors: Array) -> Array:
    """The inverse of `encoded`; growth beyond `LARGEST_GROWTH` is cut off."""
    own, own_centres = anchors[..., 2:] - anchors[..., :2], (anchors[..., 2:] + anchors[..., :2]) / 2
    centres = own_centres + deltas[..., :2] * own
    half = own * jnp.exp(jnp.minimum(deltas[..., 2:], LARGEST_GROWTH)) / 2
    return jnp.concatenate([centres - half, centres + half], axis=-1)


class Matches(NamedTuple):
    """For each anchor the box it stands for, int32 ``[..., A]``, and whether it does, is background, or neither."""

    box: Array
    positive: Array
    negative: Array


def matched(
    anchors: Array, boxes: Array, labels: Array, ignored: Array, *, foreground: float = 0.5, background: float = 0.4
) -> Matches:
    """Which anchors are to find which boxes.

    An anchor stands for the box that it overlaps most, if by `foreground` or more, and is background if by less than
    `background`; between them it counts for nothing. The anchors that overlap a box most stand for it however little
    that is, so that every box is found by one. An anchor of an ignored box counts for nothing.

    Args:
      anchors: ``[A, 4]``.
      boxes: ``[B, M, 4]``.
      labels: int32 ``[B, M]``, negative where there is no box.
      ignored: bool ``[B, M]``.

    Lin et al. 2017, arXiv 1708.02002, section 4; that each box keeps its best anchor is the authors' code.
    """
    there = labels >= 0
    found = jnp.where(there[:, None, :], overlaps(anchors, boxes), -1.0)  # [B, A, M]
    best_of_box = jnp.max(found, axis=1, keepdims=True)
    forced = (found == best_of_box) & (best_of_box > 0)
    box = jnp.argmax(jnp.where(forced, 2.0 + found, found), axis=-1)
    most = jnp.max(found, axis=-1, initial=-1.0)
    positive = (most >= foreground) | jnp.any(forced, axis=-1)
    counts = ~jnp.take_along_axis(ignored, box, axis=-1)
    return Matches(box, positive & counts, ~positive & (most < background))
