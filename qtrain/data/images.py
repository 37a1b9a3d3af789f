"""Image sets prepared by TFDS: decoded once into memory, or example by example."""

from __future__ import annotations

import dataclasses
import io
from collections.abc import Callable
from typing import Any

import numpy as np

from qtrain.data.augment import channel_statistics
from qtrain.data.dataset import ImageArrays, ImageSource
from qtrain.data.prepared import PreparedSet
from qtrain.errors import UsageError

MAX_VALUE = 255.0
IN_MEMORY_LIMIT = 8 * 2**30  # bytes of decoded pixels that `in_memory=True` accepts
STATISTICS_EXAMPLES = 1024  # evenly spaced over the training images; for sets that `STATISTICS` does not list

# Mean and standard deviation per channel of the training images over 255, as the field quotes them.
STATISTICS: dict[str, tuple[tuple[float, ...], tuple[float, ...]]] = {
    "mnist": ((0.1307,), (0.3081,)),
    "cifar10": ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    "cifar100": ((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
}

_MODES = {1: "L", 3: "RGB", 4: "RGBA"}


@dataclasses.dataclass(frozen=True, eq=False)
class StreamedImages:
    """Images decoded at each use, from TFDS records. Slow but small; batches decode in the pipeline's threads."""

    records: Any
    shape: tuple[int, int, int]
    unreadable: Callable[[Exception], UsageError]

    def __len__(self) -> int:
        return len(self.records)

    def gather(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Decodes the examples `indices`; a damaged record is a `UsageError`."""
        try:
            return self._gather(indices)
        except Exception as error:
            raise self.unreadable(error) from error

    def _gather(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        from PIL import Image

        images = np.empty((len(indices), *self.shape), np.uint8)
        labels = np.empty(len(indices), np.int32)
        mode = _MODES[self.shape[2]]
        for row, record in enumerate(self.records.__getitems__([int(index) for index in indices])):
            with Image.open(io.BytesIO(record["image"])) as image:
                pixels = np.asarray(image if image.mode == mode else image.convert(mode))
            images[row] = pixels.reshape(self.shape)
            labels[row] = record["label"]
        return images, labels

    def decode(self) -> ImageArrays:
        """All examples at once: about 3 s for 60,000 images of 28x28. Threads do not help: the work holds the GIL."""
        images = np.empty((len(self), *self.shape), np.uint8)
        labels = np.empty(len(self), np.int32)
        for first in range(0, len(self), 1000):
            rows = np.arange(first, min(first + 1000, len(self)))
            images[rows], labels[rows] = self.gather(rows)
        return ImageArrays(images, labels)


@dataclasses.dataclass(frozen=True, eq=False)
class ImageSet:
    """The splits of one image set with what a `Dataset` needs to know about them."""

    shape: tuple[int, int, int]
    num_classes: int
    train: ImageSource
    eval: dict[str, ImageSource]
    mean: tuple[float, ...]
    std: tuple[float, ...]


def open_set(name: str, configured_dir: str) -> PreparedSet:
    """Opens a prepared set and checks that it holds labelled images that this file can read.

    Raises:
      UsageError: as `PreparedSet`; no `image` of fixed shape and uint8 or no class `label`; no split to evaluate on.
    """
    prepared = PreparedSet(name, configured_dir)
    features = prepared.features
    keys = list(features.keys()) if hasattr(features, "keys") else []
    if "image" not in keys or "label" not in keys or not hasattr(features["label"], "num_classes"):
        raise UsageError(
            f"data.name: {name!r} has features {', '.join(keys) or features}; "
            "an image set needs an 'image' and a class 'label'"
        )
    shape, dtype = features["image"].shape, np.dtype(features["image"].np_dtype)
    if len(shape) != 3 or None in shape or dtype != np.uint8 or shape[2] not in _MODES:
        raise UsageError(
            f"data.name: {name!r} has images {shape} of {dtype}; only one fixed size, uint8, with 1, 3 or 4 channels "
            "can be batched"
        )
    if "train" not in prepared.splits or not {"test", "validation"} & set(prepared.splits):
        raise UsageError(
            f"data.name: {name!r} has the splits {', '.join(prepared.splits)}; "
            "'train' is needed, and 'test' or 'validation'"
        )
    return prepared


def load(prepared: PreparedSet, in_memory: bool) -> ImageSet:
    """The train, validation and test splits of a set that `open_set` accepted, decoded now or at each use.

    Both give the same batches, bit for bit. A set without a test split is tested on its validation split.

    Raises:
      UsageError: `in_memory` for a set of more than `IN_MEMORY_LIMIT` bytes; unreadable records.
    """
    shape = tuple(prepared.features["image"].shape)
    splits = [split for split in ("train", "validation", "test") if split in prepared.splits]
    size = sum(prepared.splits[split] for split in splits) * int(np.prod(shape))
    if in_memory and size > IN_MEMORY_LIMIT:
        raise UsageError(
            f"data.in_memory is True, but {prepared.name!r} decodes to {size / 2**30:.1f} GiB "
            f"(limit {IN_MEMORY_LIMIT / 2**30:g}); use data.in_memory=False with data.workers=8 or so"
        )
    streamed = {split: StreamedImages(prepared.records(split), shape, prepared.unreadable) for split in splits}
    # The statistics come before the choice of path, so that it cannot change them.
    mean, std = STATISTICS.get(prepared.name.split(":")[0]) or _estimate(streamed["train"])
    sources: dict[str, ImageSource] = {s: source.decode() if in_memory else source for s, source in streamed.items()}
    train = sources.pop("train")
    if "test" not in sources:
        sources["test"] = sources["validation"]
    return ImageSet(shape, int(prepared.features["label"].num_classes), train, sources, mean, std)


def _estimate(train: StreamedImages) -> tuple[tuple[float, ...], tuple[float, ...]]:
    count = min(len(train), STATISTICS_EXAMPLES)
    images, _ = train.gather(np.arange(count) * len(train) // count)
    return channel_statistics(images, MAX_VALUE)
