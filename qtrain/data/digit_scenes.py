"""Scenes of several handwritten digits, each with its box: real digits in random places and sizes, made when asked for.

A scene is a function of its split and its index, so that it needs no memory and is the same in every epoch; its digits
are those of the split: no digit of a test scene is in a training scene.
"""

from __future__ import annotations

import dataclasses
import functools

import numpy as np

from qtrain.data import digits
from qtrain.data.boxes import Scenes, padded
from qtrain.data.dataset import ImageArrays
from qtrain.data.randomness import below, scene_words
from qtrain.errors import UsageError

SHAPE = (64, 64, 1)
"""Height, width and channels unless a config says otherwise."""
SIDES = (8, 24)
"""Of the square that holds a digit, pixels: from the digits' own size to three times that."""
INK = 32
"""A digit's box holds its pixels of at least so much of 255; the rest of a square is blank."""

_TRIES = 16
_WORDS_PER_DIGIT = 2 + 2 * _TRIES  # which one, its size, places


@dataclasses.dataclass(frozen=True, eq=False)
class DigitScenes:
    """Scenes of 1 to `most` digits on black, uint8 with 255 for full ink; of each one the tight box of its ink.

    The number of digits is uniform; each is any of `source`, scaled bilinearly to a square whose side is uniform in
    `SIDES`, at a uniform place among those where it fits into the image. A place where its box overlaps an earlier one
    by more than `overlap` is drawn again, and after 16 draws the digit is left out (never the first).

    Attributes:
      source: the digits, of `qtrain.data.digits`.
      shape: (height, width, 1).
      most: digits of a scene, and room for boxes.
      overlap: the largest intersection over union of two boxes, 0 … 1.
      num_scenes: how many there are.
      seed: of all scenes; a scene is a function of it and its index.
    """

    source: ImageArrays
    shape: tuple[int, ...]
    most: int
    overlap: float
    num_scenes: int
    seed: int

    def __len__(self) -> int:
        return self.num_scenes

    def scenes(self, indices: np.ndarray) -> Scenes:
        """Draws the scenes `indices`; about 0.2 ms each."""
        images = np.zeros((len(indices), *self.shape), np.uint8)
        boxes, labels = [], []
        for image, index in zip(images, indices, strict=True):
            own_boxes, own_labels = self._draw(image[..., 0], int(index))
            boxes.append(own_boxes)
            labels.append(own_labels)
        ignored = [np.zeros(len(own), bool) for own in labels]
        return Scenes(images, *padded(boxes, labels, ignored, self.most, "a scene"))

    def _draw(self, canvas: np.ndarray, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Draws one scene on `canvas`, zeros `[H, W]`; its boxes `[n, 4]` and labels `[n]`."""
        words = scene_words(self.seed, index, 1 + self.most * _WORDS_PER_DIGIT)
        count = 1 + int(below(words[:1], self.most)[0])
        boxes: list[tuple[int, int, int, int]] = []
        labels = []
        for draws in words[1:].reshape(self.most, _WORDS_PER_DIGIT)[:count]:
            digit = int(below(draws[:1], len(self.source))[0])
            side = SIDES[0] + int(below(draws[1:2], SIDES[1] - SIDES[0] + 1)[0])
            ink = _scaled(self.source.images[digit, ..., 0], side)
            tall, wide = ink.shape
            rows = below(draws[2::2], canvas.shape[0] - tall + 1)
            columns = below(draws[3::2], canvas.shape[1] - wide + 1)
            for y, x in zip(rows.tolist(), columns.tolist(), strict=True):
                box = (y, x, y + tall, x + wide)
                if all(_overlap(box, other) <= self.overlap for other in boxes):
                    region = canvas[y : y + tall, x : x + wide]
                    np.maximum(region, ink, out=region)
                    boxes.append(box)
                    labels.append(int(self.source.labels[digit]))
                    break
        return np.array(boxes, np.float32), np.array(labels, np.int32)


def load(
    shape: tuple[int, ...], most: int, overlap: float, num_train: int, num_test: int
) -> tuple[DigitScenes, DigitScenes]:
    """Training scenes of the training digits, and test scenes of the test digits.

    Raises:
      UsageError: a shape that the largest digit does not fit into, or of several channels.
    """
    if len(shape) != 3 or min(shape[:2]) < SIDES[1] or shape[2] != 1:
        raise UsageError(
            f"data.image_shape is {shape}, but scenes of digits are (height, width, 1) with sides of at least "
            f"{SIDES[1]} pixels, such as {SHAPE}"
        )
    train, test = digits.load()
    return (
        DigitScenes(train, shape, most, overlap, num_train, seed=0),
        DigitScenes(test, shape, most, overlap, num_test, seed=1),
    )


def _scaled(digit: np.ndarray, side: int) -> np.ndarray:
    """The ink of a digit, uint8 0 … 16 `[8, 8]`, at `side` pixels a side: uint8 0 … 255, cut to its box."""
    weights = _interpolation(side)
    square = np.rint(weights @ (digit * (255.0 / digits.MAX_VALUE)) @ weights.T).astype(np.uint8)
    rows, columns = (np.flatnonzero((square >= INK).any(axis=axis)) for axis in (1, 0))
    return square[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]


@functools.cache
def _interpolation(side: int) -> np.ndarray:
    """Bilinear weights `[side, 8]`, pixels' centres aligned, the edge repeated."""
    size = digits.SHAPE[0]
    positions = np.clip((np.arange(side) + 0.5) * size / side - 0.5, 0, size - 1)
    return np.maximum(0.0, 1.0 - np.abs(positions[:, None] - np.arange(size)))


def _overlap(first: tuple[int, int, int, int], second: tuple[int, int, int, int]) -> float:
    """Intersection over union."""
    tall = min(first[2], second[2]) - max(first[0], second[0])
    wide = min(first[3], second[3]) - max(first[1], second[1])
    inside = max(tall, 0) * max(wide, 0)
    areas = sum((box[2] - box[0]) * (box[3] - box[1]) for box in (first, second))
    return inside / (areas - inside)
