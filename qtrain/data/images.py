"""Image sets prepared by TFDS: decoded once into memory, or example by example; resized where a shape is asked for."""

from __future__ import annotations

import dataclasses
import io
import re
from collections.abc import Callable
from typing import Any

import numpy as np

from qtrain.data.augment import channel_statistics
from qtrain.data.dataset import ImageArrays, ImageSource
from qtrain.data.prepared import PreparedSet
from qtrain.data.resize import Box, central_box, random_box, resized
from qtrain.errors import UsageError

MAX_VALUE = 255.0
IN_MEMORY_LIMIT = 8 * 2**30  # bytes of decoded pixels that `in_memory=True` accepts
STATISTICS_EXAMPLES = 1024  # evenly spaced over the training images; for sets that `STATISTICS` does not list

# Mean and standard deviation per channel of the training images over 255, as the field quotes them, by TFDS's name
# without config and version. Imagenette is ten classes of ImageNet.
_IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
STATISTICS: dict[str, tuple[tuple[float, ...], tuple[float, ...]]] = {
    "mnist": ((0.1307,), (0.3081,)),
    "cifar10": ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    "cifar100": ((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
    "imagenet2012": _IMAGENET,
    "imagenette": _IMAGENET,
}

_MODES = {1: "L", 3: "RGB", 4: "RGBA"}
_Boxes = Callable[[int, tuple[int, int]], Box]  # from a row of a batch, and the height and width stored, to its window


@dataclasses.dataclass(frozen=True, eq=False)
class StreamedImages:
    """Images decoded at each use, from TFDS records. Slow but small; batches decode in the pipeline's threads.

    Attributes:
      records: of the split, `[i]["image"]` encoded.
      shape: (height, width, channels) of what is gathered.
      unreadable: from an error to what is raised in its place.
      central_crop: None where all are stored in `shape`; else they are resized to it, and `gather` sees this share of
        the sides (`central_box`).
    """

    records: Any
    shape: tuple[int, ...]
    unreadable: Callable[[Exception], UsageError]
    central_crop: float | None = None

    def __len__(self) -> int:
        return len(self.records)

    def gather(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Decodes the examples `indices`; a damaged record is a `UsageError`."""
        share = self.central_crop
        if share is None:
            return self._gather(indices, None)
        wanted = (self.shape[0], self.shape[1])
        return self._gather(indices, lambda row, size: central_box(size, wanted, share))

    def gather_windows(
        self, indices: np.ndarray, words: np.ndarray, least_area: float
    ) -> tuple[np.ndarray, np.ndarray]:
        """As `gather`, of each example a random window of what is stored, resized (`random_box`)."""
        return self._gather(indices, lambda row, size: random_box(size, words[row], least_area))

    def _gather(self, indices: np.ndarray, box: _Boxes | None) -> tuple[np.ndarray, np.ndarray]:
        images = np.empty((len(indices), *self.shape), np.uint8)
        labels = np.empty(len(indices), np.int32)
        try:
            for row, record in enumerate(self.records.__getitems__([int(index) for index in indices])):
                pixels = self._decoded(record["image"])
                if box is not None:
                    pixels = resized(pixels, box(row, (pixels.shape[0], pixels.shape[1])), self.shape[:2])
                if pixels.shape != self.shape:
                    raise ValueError(f"an image of shape {pixels.shape} among those of {self.shape}")
                images[row] = pixels
                labels[row] = record["label"]
        except Exception as error:
            raise self.unreadable(error) from error
        return images, labels

    def _decoded(self, encoded: bytes) -> np.ndarray:
        from PIL import Image

        mode = _MODES[self.shape[2]]
        with Image.open(io.BytesIO(encoded)) as image:
            pixels = np.asarray(image if image.mode == mode else image.convert(mode))
        return pixels.reshape((*pixels.shape[:2], self.shape[2]))

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

    shape: tuple[int, ...]
    num_classes: int
    train: ImageSource
    eval: dict[str, ImageSource]
    mean: tuple[float, ...]
    std: tuple[float, ...]


def open_set(name: str, configured_dir: str, image_shape: tuple[int, ...] = ()) -> PreparedSet:
    """Opens a prepared set and checks that it holds labelled images that this file can read.

    Args:
      name: as `PreparedSet` takes it.
      configured_dir: likewise.
      image_shape: (height, width, channels) that images are resized to; () leaves them as they are stored.

    Raises:
      UsageError: as `PreparedSet`; no `image` of uint8 or no class `label`; images of different sizes without an
        `image_shape`, or one with another number of channels; no split to evaluate on.
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
    if len(shape) != 3 or dtype != np.uint8 or shape[2] not in _MODES:
        raise UsageError(
            f"data.name: {name!r} has images {shape} of {dtype}; only uint8 with 1, 3 or 4 channels can be read"
        )
    if image_shape and image_shape[2] != shape[2]:
        raise UsageError(
            f"data.image_shape is {image_shape}, but {name!r} has images of {shape[2]} channels; "
            f"give {(*image_shape[:2], shape[2])}"
        )
    if None in shape and not image_shape:
        raise UsageError(
            f"data.image_shape is not set, but {name!r} has images of different sizes; "
            f"give the size to resize them to, for example (224, 224, {shape[2]})"
        )
    if "train" not in prepared.splits or not {"test", "validation"} & set(prepared.splits):
        raise UsageError(
            f"data.name: {name!r} has the splits {', '.join(prepared.splits)}; "
            "'train' is needed, and 'test' or 'validation'"
        )
    return prepared


def load(
    prepared: PreparedSet,
    in_memory: bool,
    image_shape: tuple[int, ...] = (),
    central_crop: float = 1.0,
    windows: bool = False,
) -> ImageSet:
    """The train, validation and test splits of a set that `open_set` accepted, decoded now or at each use.

    Both give the same batches, bit for bit. A set without a test split is tested on its validation split, and so is one
    whose test split has no labels (-1, as ImageNet's in TFDS).

    Args:
      prepared: the set.
      in_memory: decode now; what is held is what evaluation sees.
      image_shape: as `open_set` took it.
      central_crop: the share of the sides of an image that is resized which evaluation sees.
      windows: whether training will cut random windows out.

    Raises:
      UsageError: `in_memory` for a set of more than `IN_MEMORY_LIMIT` bytes, or where windows are to be cut out of
        images larger than those held; a `central_crop` of images that keep their size; unreadable records; no labels
        to test on.
    """
    stored = tuple(prepared.features["image"].shape)
    shape = image_shape or stored
    resizes = stored != shape
    if central_crop != 1.0 and not resizes:
        raise UsageError(
            f"data.central_crop is {central_crop:g}, but the images of {prepared.name!r} keep their size "
            f"{stored}; leave it at 1, or give another data.image_shape"
        )
    if in_memory and resizes and windows:
        raise UsageError(
            "data.in_memory is True, but 'resized_crop' needs the images in the size they are stored in; "
            "use data.in_memory=False with data.workers=8 or so"
        )
    splits = [split for split in ("train", "validation", "test") if split in prepared.splits]
    size = sum(prepared.splits[split] for split in splits) * int(np.prod(shape))
    if in_memory and size > IN_MEMORY_LIMIT:
        raise UsageError(
            f"data.in_memory is True, but {prepared.name!r} decodes to {size / 2**30:.1f} GiB "
            f"(limit {IN_MEMORY_LIMIT / 2**30:g}); use data.in_memory=False with data.workers=8 or so"
        )
    share = central_crop if resizes else None
    streamed = {split: StreamedImages(prepared.records(split), shape, prepared.unreadable, share) for split in splits}
    if prepared.splits.get("test") and streamed["test"].gather(np.arange(1))[1][0] < 0:
        del streamed["test"]
        if "validation" not in streamed:
            raise UsageError(f"data.name: {prepared.name!r} has a test split without labels, and no 'validation'")
    # The statistics come before the choice of path, so that it cannot change them.
    mean, std = STATISTICS.get(re.split("[/:]", prepared.name)[0]) or _estimate(streamed["train"])
    sources: dict[str, ImageSource] = {s: source.decode() if in_memory else source for s, source in streamed.items()}
    train = sources.pop("train")
    if "test" not in sources:
        sources["test"] = sources["validation"]
    return ImageSet(shape, int(prepared.features["label"].num_classes), train, sources, mean, std)


def _estimate(train: StreamedImages) -> tuple[tuple[float, ...], tuple[float, ...]]:
    count = min(len(train), STATISTICS_EXAMPLES)
    images, _ = train.gather(np.arange(count) * len(train) // count)
    return channel_statistics(images, MAX_VALUE)
