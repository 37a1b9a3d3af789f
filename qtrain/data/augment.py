"""Augmentation and normalisation of whole image batches, in numpy."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from qtrain.data.randomness import below

AUGMENTATIONS = ("crop", "resized_crop", "flip")


def augment(images: np.ndarray, words: np.ndarray, names: Sequence[str], padding: int) -> np.ndarray:
    """Applies `crop` and `flip` where they are named, each example with random words of its own.

    `crop` pads `padding` zeros on each side and cuts the original size out at a uniform offset; `flip` mirrors left and
    right with probability ½. An example's result depends on its pixels and its words alone, so a batch may be sliced
    over processes before or after. `resized_crop` has been done when images have one size (`qtrain.data.resize`), and
    its name has no effect here; it takes the words that `crop` would.

    Args:
      images: uint8 `[B, H, W, C]`, not written.
      words: uint64 `[B, ≥3]`: the crop's vertical and horizontal offset, the flip.
      names: of `AUGMENTATIONS`.
      padding: pixels, ≥ 1.

    Returns:
      uint8 `[B, H, W, C]`; `images` itself where nothing is named.
    """
    if "crop" in names:
        images = _crop(images, below(words[:, 0], 2 * padding + 1), below(words[:, 1], 2 * padding + 1), padding)
    if "flip" in names:
        images = _flip(images, flips(words), in_place="crop" in names)
    return images


def flips(words: np.ndarray) -> np.ndarray:
    """Which examples `flip` mirrors: bool `[B]`, from the third of each one's words."""
    return below(words[:, 2], 2).astype(bool)


def _crop(images: np.ndarray, top: np.ndarray, left: np.ndarray, padding: int) -> np.ndarray:
    batch, height, width, channels = images.shape
    padded = np.zeros((batch, height + 2 * padding, width + 2 * padding, channels), images.dtype)
    padded[:, padding : padding + height, padding : padding + width] = images
    # Indexing windows copies whole images: 35 µs for 128 of 32x32x3, where an index per pixel takes 1.3 ms.
    windows = np.lib.stride_tricks.sliding_window_view(padded, (height, width, channels), axis=(1, 2, 3))
    return windows[np.arange(batch), top, left, 0]


def _flip(images: np.ndarray, mirrored: np.ndarray, in_place: bool) -> np.ndarray:
    images = images if in_place else images.copy()
    images[mirrored] = images[mirrored][:, :, ::-1]
    return images


def normalize(images: np.ndarray, max_value: float, mean: Sequence[float], std: Sequence[float]) -> np.ndarray:
    """`(x / max_value − mean) / std` per channel: uint8 `[B, H, W, C]` to float32 of the same shape.

    `mean` and `std` hold one number per channel, in units of `max_value`.
    """
    batch, height, width, channels = images.shape
    scale = 1.0 / (max_value * np.asarray(std, np.float64))
    offset = -np.asarray(mean, np.float64) / np.asarray(std, np.float64)
    # Long rows: numpy's inner loop over three channels alone would be six times slower.
    rows = images.reshape(batch * height, width * channels).astype(np.float32)
    rows *= np.tile(scale.astype(np.float32), width)
    rows += np.tile(offset.astype(np.float32), width)
    return rows.reshape(images.shape)


def channel_statistics(images: np.ndarray, max_value: float) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation per channel of `images / max_value`, to 4 digits; a constant channel's is 1."""
    scaled = images.astype(np.float64) / max_value
    mean = tuple(round(float(value), 4) for value in scaled.mean(axis=(0, 1, 2)))
    std = tuple(round(float(value), 4) or 1.0 for value in scaled.std(axis=(0, 1, 2)))
    return mean, std
