"""Sequences to classify: images read pixel by pixel, and generated time series.

A sequence is an image of width 1, ``[B, length, 1, channels]``, so that the pipeline, the evaluation and the
fingerprint treat it as any image.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from qtrain.data.boxes import BoxSource
from qtrain.data.dataset import Dataset, ImageArrays, ImageSource, TokenSource
from qtrain.data.graphs import GraphSplit
from qtrain.errors import UsageError

PREFIX = "sequential_"
_NOT_IMAGES = TokenSource | GraphSplit | BoxSource

CYLINDER_BELL_FUNNEL_SHAPE = (128, 1, 1)
CYLINDER_BELL_FUNNEL_CLASSES = 3
# Of a million generated values, by `cylinder_bell_funnel`.
CYLINDER_BELL_FUNNEL_MEAN, CYLINDER_BELL_FUNNEL_STD = (2.03,), (2.71,)


@dataclasses.dataclass(frozen=True, eq=False)
class PixelSequences:
    """The images of `source`, row by row as sequences of pixels."""

    source: ImageSource

    def __len__(self) -> int:
        return len(self.source)

    def gather(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Examples `indices` `[B]`: pixels `[B, H·W, 1, C]`, labels int32 `[B]`."""
        images, labels = self.source.gather(indices)
        return images.reshape(len(images), -1, 1, images.shape[-1]), labels


def sequential(dataset: Dataset) -> Dataset:
    """The data set of images as one of pixel sequences: sequential MNIST, CIFAR and digits.

    A pixel is one step; the order is row by row (Le et al. 2015, arXiv 1504.00941, section 4.2), so that neighbours of
    a column are a row's width apart. Split, pixels, classes and normalisation stay as they are, and shapes become
    ``(height·width, 1, channels)``: 64, 784 and 1024 steps.

    Args:
      dataset: of images, unaugmented.

    Raises:
      UsageError: a data set of text, or one that augments: a crop or a flip of a column of pixels is another thing.

    >>> from qtrain import data
    >>> sequential(data.load({"name": "digits"})).input_shape
    (64, 1, 1)
    """
    train = dataset.train
    if dataset.kind != "image" or isinstance(train, _NOT_IMAGES):
        raise UsageError(f"data.name is {dataset.name!r}, which has no images with one class each; give an image set")
    if dataset.augment:
        raise UsageError(
            f"data.augment is {dataset.augment}, but {PREFIX + dataset.name!r} has sequences of pixels, not images; "
            "leave it at ()"
        )
    height, width, channels = dataset.input_shape
    evaluation = {
        s: PixelSequences(source) for s, source in dataset.eval.items() if not isinstance(source, _NOT_IMAGES)
    }
    return dataclasses.replace(
        dataset,
        name=PREFIX + dataset.name,
        input_shape=(height * width, 1, channels),
        train=PixelSequences(train),
        eval=evaluation,
    )


def cylinder_bell_funnel(num_examples: int, seed: int, split: int) -> ImageArrays:
    """Noisy plateaus, ramps up and ramps down of length 128, to be told apart: classes 0, 1, 2, balanced.

    With a ~ U{16, …, 32}, b − a ~ U{32, …, 96}, η and ε(t) ~ N(0, 1), t = 1 … 128, and χ = 1 for a ≤ t ≤ b, else 0:
    cylinder (6 + η)·χ + ε(t), bell (6 + η)·χ·(t − a)/(b − a) + ε(t), funnel (6 + η)·χ·(b − t)/(b − a) + ε(t).

    Saito, "Local feature extraction and its application using a library of bases", 1994, as the time series
    classification archives generate it. Values are float32, which the pipeline treats as it does pixels.

    Args:
      num_examples: N.
      seed, split: of the generator; different splits share nothing.

    Returns:
      float32 `[N, 128, 1, 1]`, labels int32 `[N]`.
    """
    rng = np.random.default_rng([seed, split])
    length = CYLINDER_BELL_FUNNEL_SHAPE[0]
    labels = rng.permutation(np.arange(num_examples, dtype=np.int32) % CYLINDER_BELL_FUNNEL_CLASSES)
    start = rng.integers(16, 33, size=(num_examples, 1))
    duration = rng.integers(32, 97, size=(num_examples, 1))
    height = 6.0 + rng.standard_normal((num_examples, 1))
    elapsed = np.arange(1, length + 1) - start
    ramp = elapsed / duration
    shape = np.choose(labels[:, None], [np.ones_like(ramp), ramp, 1.0 - ramp])
    series = height * shape * ((elapsed >= 0) & (elapsed <= duration))
    series += rng.standard_normal((num_examples, length))
    return ImageArrays(series.astype(np.float32)[:, :, None, None], labels)


def load_cylinder_bell_funnel(num_train: int, num_test: int, workers: int = 1, prefetch: int = 2) -> Dataset:
    """`cylinder_bell_funnel` as a data set: `num_train` series to train on and `num_test` others to test on.

    The content is one for all seeds, as it is of the other sets; values are standardised as pixels are.

    >>> load_cylinder_bell_funnel(num_train=300, num_test=900).describe()
    'cylinder_bell_funnel: 300 train, 900 test images 128x1x1, 3 classes; (x/1 − 2.03)/2.71; augment none'
    """
    return Dataset(
        name="cylinder_bell_funnel",
        kind="image",
        input_shape=CYLINDER_BELL_FUNNEL_SHAPE,
        num_classes=CYLINDER_BELL_FUNNEL_CLASSES,
        train=cylinder_bell_funnel(num_train, seed=0, split=0),
        eval={"test": cylinder_bell_funnel(num_test, seed=0, split=1)},
        max_value=1.0,
        mean=CYLINDER_BELL_FUNNEL_MEAN,
        std=CYLINDER_BELL_FUNNEL_STD,
        workers=workers,
        prefetch=prefetch,
    )
