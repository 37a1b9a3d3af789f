"""Generated data of a given shape: deterministic, a little learnable, no data set needed."""

from __future__ import annotations

import numpy as np

from qtrain.data.boxes import BoxArrays, Scenes, padded
from qtrain.data.dataset import ImageArrays, TokenSource

VOCAB = 256
STRIDE = 17  # odd, so that repeated steps visit all 256 bytes
RESTART = 0.2
MOST_BOXES = 5


def images(shape: tuple[int, ...], num_classes: int, num_examples: int, seed: int, split: int) -> ImageArrays:
    """`num_examples` noisy copies of one random pattern per class, classes balanced.

    `x = clip(pattern[label] + noise, 0, 255)`, pattern uniform in 64 … 191 (fixed by `seed`), noise of standard
    deviation 48 and the labels' order fixed by `seed` and `split`.
    """
    patterns = np.random.default_rng([seed, 0]).integers(64, 192, size=(num_classes, *shape), dtype=np.int16)
    rng = np.random.default_rng([seed, 1 + split])
    labels = rng.permutation(np.arange(num_examples, dtype=np.int32) % num_classes)
    pixels = np.empty((num_examples, *shape), np.uint8)
    for first in range(0, num_examples, 256):  # in pieces: the float noise is four times the size of the pixels
        rows = slice(first, first + 256)
        noise = rng.standard_normal((len(labels[rows]), *shape), dtype=np.float32) * 48
        pixels[rows] = np.clip(patterns[labels[rows]] + noise, 0, 255).astype(np.uint8)
    return ImageArrays(pixels, labels)


def scenes(shape: tuple[int, ...], num_classes: int, num_examples: int, room: int, seed: int, split: int) -> BoxArrays:
    """Images of noise with 1 to 5 rectangles (or `room`), each filled with the one colour of its class.

    Sides are uniform from a sixteenth to a half of the image's, at least 2 pixels; later rectangles cover earlier ones.
    """
    colours = np.random.default_rng([seed, 0]).integers(64, 256, size=(num_classes, shape[2]), dtype=np.uint8)
    rng = np.random.default_rng([seed, 1 + split])
    images = rng.integers(0, 64, size=(num_examples, *shape), dtype=np.uint8)
    boxes, labels = [], []
    for image in images:
        count = int(rng.integers(1, min(room, MOST_BOXES) + 1))
        sides = np.stack([rng.integers(max(2, size // 16), max(3, size // 2 + 1), count) for size in shape[:2]], 1)
        near = rng.integers(0, np.array(shape[:2]) - sides + 1)
        own = rng.integers(0, num_classes, count)
        for (y, x), (tall, wide), label in zip(near, sides, own, strict=True):
            image[y : y + tall, x : x + wide] = colours[label]
        boxes.append(np.concatenate([near, near + sides], axis=1))
        labels.append(own)
    ignored = [np.zeros(len(own), bool) for own in labels]
    return BoxArrays(Scenes(images, *padded(boxes, labels, ignored, room, "a synthetic scene")))


def tokens(length: int, num_windows: int, seed: int, split: int) -> TokenSource:
    """Bytes of a chain that goes on with `x + 17 (mod 256)` four times out of five, and else jumps anywhere.

    Its entropy is 1.60 nats a byte, against `log 256` = 5.55 for noise.
    It holds `num_windows` windows of `length`, for training and for evaluation alike.
    """
    size = (num_windows + 1) * length
    rng = np.random.default_rng([seed, 1 + split])
    restart = rng.random(size) < RESTART
    restart[0] = True
    position = np.arange(size)
    since = position - np.maximum.accumulate(np.where(restart, position, 0))
    start = rng.integers(0, VOCAB, size=size)[position - since]
    return TokenSource(((start + STRIDE * since) % VOCAB).astype(np.uint8), length)
