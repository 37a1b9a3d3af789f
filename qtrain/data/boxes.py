"""Images with boxes on them: what a source of such gives, and what a box has to be."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np

from qtrain.errors import UsageError

NO_BOX = -1
"""The label where there is no box."""


class Scenes(NamedTuple):
    """B images with room for M boxes each, all free to be written.

    Attributes:
      images: uint8 `[B, H, W, C]`.
      boxes: float32 `[B, M, 4]`: (y0, x0, y1, x1) in pixels, the far edges exclusive; 0 where there is none.
      labels: int32 `[B, M]`, `NO_BOX` where there is none.
      ignored: bool `[B, M]`: boxes that are neither to be learned nor to be found.
    """

    images: np.ndarray
    boxes: np.ndarray
    labels: np.ndarray
    ignored: np.ndarray


@runtime_checkable
class BoxSource(Protocol):
    """Images with boxes by index. `scenes` may be called from several threads at once."""

    def __len__(self) -> int:
        """The number of examples."""
        ...

    def scenes(self, indices: np.ndarray) -> Scenes:
        """Examples `indices` `[B]`."""
        ...


@dataclasses.dataclass(frozen=True, eq=False)
class BoxArrays:
    """Images and boxes held in memory."""

    held: Scenes

    def __len__(self) -> int:
        return len(self.held.images)

    def scenes(self, indices: np.ndarray) -> Scenes:
        """Copies of the examples `indices`."""
        return Scenes(*(values[indices] for values in self.held))


def padded(
    boxes: Sequence[np.ndarray], labels: Sequence[np.ndarray], ignored: Sequence[np.ndarray], room: int, what: str
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The boxes of B images, `[n, 4]` each, as arrays with room for `room`, as `Scenes` has them.

    Raises:
      UsageError: more boxes than there is room for; `what` says of which data.
    """
    most = max(map(len, boxes), default=0)
    if most > room:
        raise UsageError(f"data.max_boxes is {room}, but {what} has an image with {most} boxes; give at least {most}")
    result = (
        np.zeros((len(boxes), room, 4), np.float32),
        np.full((len(boxes), room), NO_BOX, np.int32),
        np.zeros((len(boxes), room), bool),
    )
    for row, values in enumerate(zip(boxes, labels, ignored, strict=True)):
        for array, value in zip(result, values, strict=True):
            array[row, : len(value)] = value
    return result


def check_boxes(boxes: np.ndarray, labels: np.ndarray, size: tuple[int, int], num_classes: int, what: str) -> None:
    """Refuses boxes `[n, 4]` in pixels that leave their image of height and width `size`, are empty or of no class.

    Raises:
      UsageError: naming the box; `what` is how the message begins.
    """
    slack = 1e-3  # pixels that float32 may be off by
    for index, (box, label) in enumerate(zip(boxes, labels, strict=True)):
        shown = f"box {index} of {what}, ({', '.join(f'{edge:.6g}' for edge in box)}) as y0, x0, y1, x1 in pixels,"
        if not np.isfinite(box).all():
            raise UsageError(f"{shown} is not finite")
        if not (box[2] > box[0] and box[3] > box[1]):
            raise UsageError(f"{shown} is empty: y1 must be above y0, and x1 above x0")
        if min(box[0], box[1]) < -slack or box[2] > size[0] + slack or box[3] > size[1] + slack:
            raise UsageError(f"{shown} reaches beyond the image of {size[0]}x{size[1]}")
        if not 0 <= label < num_classes:
            raise UsageError(f"{shown} has the label {label}; allowed are 0 … {num_classes - 1}")


def mirrored(scenes: Scenes, rows: np.ndarray) -> Scenes:
    """`scenes`, left and right exchanged where `rows`, bool `[B]`, says so: pixels, and boxes with them."""
    width = scenes.images.shape[2]
    images, boxes = scenes.images.copy(), scenes.boxes.copy()
    images[rows] = images[rows][:, :, ::-1]
    there = rows[:, None] & (scenes.labels != NO_BOX)
    boxes[there] = np.stack([boxes[there, 0], width - boxes[there, 3], boxes[there, 2], width - boxes[there, 1]], -1)
    return scenes._replace(images=images, boxes=boxes)
