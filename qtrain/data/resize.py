"""Images of one size out of images of any size: the centre for evaluation, random windows for training.

Pillow resamples, bilinearly and with antialiasing where it shrinks; no window reaches beyond the image.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from qtrain.data.randomness import below, unit

Box = tuple[float, float, float, float]

ASPECT_RATIOS = (3 / 4, 4 / 3)  # width over height of a random window


def central_box(size: tuple[int, int], shape: tuple[int, int], share: float) -> Box:
    """The window (left, top, right, bottom) that evaluation resizes: the largest of the right proportions, central.

    Its sides are then multiplied by `share`: 0.875 is what resizing the shorter side to 256 pixels and cutting 224×224
    out of the middle comes to.

    Args:
      size: the image's height and width.
      shape: the wanted height and width.
      share: above 0, at most 1.

    >>> central_box((200, 400), (100, 100), 0.875)
    (112.5, 12.5, 287.5, 187.5)
    """
    (height, width), (rows, columns) = size, shape
    scale = share * min(height / rows, width / columns)
    tall, wide = scale * rows, scale * columns
    left, top = max((width - wide) / 2, 0.0), max((height - tall) / 2, 0.0)
    return left, top, min(left + wide, float(width)), min(top + tall, float(height))


def random_box(size: tuple[int, int], words: np.ndarray, least_area: float) -> Box:
    """A random window of whole pixels, for training.

    Its area is uniform from `least_area` to 1 of the image's, the logarithm of its width over its height uniform
    between those of 3/4 and 4/3, its place uniform; a side longer than the image's is shortened to it (others draw such
    a window again, up to ten times). Szegedy et al., "Going deeper with convolutions", 2015 (arXiv 1409.4842), section
    6.

    Args:
      size: the image's height and width.
      words: uint64 `[≥2]`; of the first the upper half is the place from above and the lower half the area, of the
        second the place from the left and the ratio.
      least_area: above 0, at most 1.
    """
    height, width = size
    share, position = unit(words[:2])
    area = (least_area + (1.0 - least_area) * share) * height * width
    low, high = (math.log(ratio) for ratio in ASPECT_RATIOS)
    ratio = math.exp(low + (high - low) * position)
    wide = min(max(round(math.sqrt(area * ratio)), 1), width)
    tall = min(max(round(math.sqrt(area / ratio)), 1), height)
    top, left = int(below(words[0], height - tall + 1)), int(below(words[1], width - wide + 1))
    return left, top, left + wide, top + tall


def resized(image: np.ndarray, box: Box, shape: Sequence[int]) -> np.ndarray:
    """The window `box` of one image, uint8 `[h, w, C]`, at `shape` (height, width): uint8 `[height, width, C]`."""
    from PIL import Image

    def resample(pixels: Any) -> np.ndarray:
        size = (shape[1], shape[0])
        return np.asarray(Image.fromarray(pixels).resize(size, Image.Resampling.BILINEAR, box=box))

    if image.shape[-1] == 3:
        return resample(image)
    # Channel by channel: Pillow would weigh four channels by the last, as colours by their opacity.
    return np.stack([resample(np.ascontiguousarray(image[..., c])) for c in range(image.shape[-1])], axis=-1)


def random_crops(images: np.ndarray, words: np.ndarray, least_area: float) -> np.ndarray:
    """A window of each image by `random_box`, at the size of the image: uint8 `[B, H, W, C]`, as `images`.

    Args:
      images: uint8 `[B, H, W, C]`.
      words: uint64 `[B, ≥2]`.
      least_area: above 0, at most 1.
    """
    shape = images.shape[1:3]
    result = np.empty_like(images)
    for row, (image, draws) in enumerate(zip(images, words, strict=True)):
        result[row] = resized(image, random_box(shape, draws, least_area), shape)
    return result
