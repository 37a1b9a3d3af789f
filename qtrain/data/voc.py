"""Sets of images with boxes that TFDS has prepared: PASCAL VOC 2007."""

from __future__ import annotations

import dataclasses
import io
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from qtrain.data.boxes import BoxArrays, BoxSource, Scenes, check_boxes, padded
from qtrain.data.images import IN_MEMORY_LIMIT
from qtrain.data.prepared import PreparedSet
from qtrain.data.resize import resized
from qtrain.errors import UsageError

NAME = "voc/2007"
SHAPE = (320, 320, 3)
NUM_CLASSES = 20
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # those of ImageNet, as for other photographs
TRAIN = ("train", "validation")
"""The splits that are trained on, as is usual; "test" is what is tested on."""

_FIELDS = ("bbox", "label", "is_difficult")


@dataclasses.dataclass(frozen=True, eq=False)
class StreamedScenes:
    """Images decoded and resized at each use, one split of records after the other.

    An image is resized to `shape` whole, whatever its proportions, and its boxes with it. Objects that are marked as
    difficult are ignored.

    Attributes:
      records: of the splits.
      names: of the splits.
      shape: (height, width, 3).
      max_boxes: room for boxes.
      num_classes: labels are below it.
      unreadable: from an error to what is raised in its place.
    """

    records: tuple[Any, ...]
    names: tuple[str, ...]
    shape: tuple[int, ...]
    max_boxes: int
    num_classes: int
    unreadable: Callable[[Exception], UsageError]

    def __len__(self) -> int:
        return sum(map(len, self.records))

    def scenes(self, indices: np.ndarray) -> Scenes:
        """Decodes the examples `indices`; a damaged record or a box that is none is a `UsageError`."""
        images = np.empty((len(indices), *self.shape), np.uint8)
        boxes, labels, ignored = [], [], []
        for row, index in enumerate(indices.tolist()):
            part, within = self._place(index)
            what = f"example {within} of {self.names[part]!r} in {NAME!r}"
            try:
                record = self.records[part][within]
                images[row] = self._decoded(record["image"])
                edges, own_labels, difficult = (np.asarray(record["objects"][field]) for field in _FIELDS)
                edges = edges.reshape(-1, 4).astype(np.float64)
            except Exception as error:
                raise self.unreadable(error) from error
            size = self.shape[0], self.shape[1]
            pixels = edges * (*size, *size)
            check_boxes(pixels, own_labels, size, self.num_classes, what)
            boxes.append(np.clip(pixels, 0, (*size, *size)))
            labels.append(own_labels)
            ignored.append(difficult.astype(bool))
        return Scenes(images, *padded(boxes, labels, ignored, self.max_boxes, repr(NAME)))

    def _place(self, index: int) -> tuple[int, int]:
        part = 0
        while index >= len(self.records[part]):
            index -= len(self.records[part])
            part += 1
        return part, index

    def _decoded(self, encoded: bytes) -> np.ndarray:
        from PIL import Image

        with Image.open(io.BytesIO(encoded)) as image:
            pixels = np.asarray(image if image.mode == "RGB" else image.convert("RGB"))
        return resized(pixels, (0, 0, pixels.shape[1], pixels.shape[0]), self.shape[:2])

    def decode(self) -> BoxArrays:
        """All examples at once."""
        return BoxArrays(self.scenes(np.arange(len(self))))


def open_set(configured_dir: str) -> PreparedSet:
    """VOC 2007 as TFDS prepared it.

    Raises:
      UsageError: as `PreparedSet`; a set without a split that is needed, or without boxes.
    """
    prepared = PreparedSet(NAME, configured_dir)
    for split in (*TRAIN, "test"):
        if split not in prepared.splits:
            raise UsageError(f"data.name: {NAME!r} has the splits {', '.join(prepared.splits)}; {split!r} is needed")
    features = prepared.features
    objects = getattr(features["objects"], "feature", {}) if "objects" in features else {}
    missing = [field for field in _FIELDS if field not in objects]
    if missing or "image" not in features:
        raise UsageError(
            f"data.name: {NAME!r} has features {', '.join(features)}; images with boxes need an 'image' and 'objects' "
            f"with {', '.join(_FIELDS)}"
        )
    return prepared


def load(prepared: PreparedSet, in_memory: bool, shape: tuple[int, ...], max_boxes: int) -> Mapping[str, BoxSource]:
    """The sources "train" (of `TRAIN`) and "test".

    Raises:
      UsageError: `in_memory` for more than `IN_MEMORY_LIMIT` bytes; unreadable records; more boxes than `max_boxes`.
    """
    size = sum(prepared.splits[split] for split in (*TRAIN, "test")) * int(np.prod(shape))
    if in_memory and size > IN_MEMORY_LIMIT:
        raise UsageError(
            f"data.in_memory is True, but {NAME!r} decodes to {size / 2**30:.1f} GiB (limit "
            f"{IN_MEMORY_LIMIT / 2**30:g}); use data.in_memory=False with data.workers=8 or so"
        )
    num_classes = int(prepared.features["objects"].feature["label"].num_classes)
    sources: dict[str, BoxSource] = {}
    for name, splits in (("train", TRAIN), ("test", ("test",))):
        records = tuple(prepared.records(split) for split in splits)
        source = StreamedScenes(records, splits, shape, max_boxes, num_classes, prepared.unreadable)
        sources[name] = source.decode() if in_memory else source
    return sources
