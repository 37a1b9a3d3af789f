"""What a loaded data set is: its sources, shapes and transforms."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Protocol, runtime_checkable

import numpy as np

from qtrain.data.boxes import BoxSource
from qtrain.data.graphs import GraphSplit
from qtrain.errors import UsageError


@runtime_checkable
class ImageSource(Protocol):
    """Labelled images by index. `gather` may be called from several threads at once."""

    def __len__(self) -> int:
        """The number of examples."""
        ...

    def gather(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Examples `indices` `[B]`: images uint8 `[B, H, W, C]`, labels int32 `[B]`, both free to be written."""
        ...


@runtime_checkable
class WindowedSource(ImageSource, Protocol):
    """Images that are stored larger than they are used, so that a random window is to be cut out of what is stored."""

    def gather_windows(
        self, indices: np.ndarray, words: np.ndarray, least_area: float
    ) -> tuple[np.ndarray, np.ndarray]:
        """As `gather`, with a random window of each example in place of its middle; `qtrain.data.resize.random_box`."""
        ...


@dataclasses.dataclass(frozen=True, eq=False)
class ImageArrays:
    """Images held in memory: uint8 `[N, H, W, C]`, labels int32 `[N]`."""

    images: np.ndarray
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.images)

    def gather(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Copies of the examples `indices`."""
        return self.images[indices], self.labels[indices]


@dataclasses.dataclass(frozen=True, eq=False)
class TokenSource:
    """Bytes of text, uint8 `[n]`, read in windows of `length + 1` that overlap in one token.

    A window's first `length` tokens are inputs, its last `length` targets: window i begins at `phase + i·length`, so
    that no target appears twice in a pass. At phase 0 there are `⌊(n − 1) / length⌋` of them, which is what evaluation
    reads. Training draws a new phase each epoch, so that window borders fall elsewhere; `num_windows` is then what
    every phase leaves room for, `max(1, ⌊n / length⌋ − 1)`, so that each epoch has the same number of steps.
    """

    tokens: np.ndarray
    length: int

    def __len__(self) -> int:
        """Windows of a pass at phase 0."""
        return (len(self.tokens) - 1) // self.length

    @property
    def num_windows(self) -> int:
        """Windows of a training epoch, whatever its phase."""
        return max(1, len(self.tokens) // self.length - 1)

    @property
    def num_phases(self) -> int:
        """Phases are 0 … num_phases − 1: `length` of them, or fewer in a text of less than two windows."""
        return min(self.length, len(self.tokens) - self.num_windows * self.length)

    def windows(self, starts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Inputs and targets, int32 `[B, length]` each, of the windows that begin at tokens `starts` `[B]`."""
        window = self.tokens[starts[:, None] + np.arange(self.length + 1)].astype(np.int32)
        return np.ascontiguousarray(window[:, :-1]), np.ascontiguousarray(window[:, 1:])


Source = ImageSource | TokenSource | GraphSplit | BoxSource


@dataclasses.dataclass(frozen=True, eq=False)
class Dataset:
    """A loaded data set. Everything but the seed and the batch size that the training stream depends on is in here."""

    name: str
    kind: str  # "image" | "tokens" | "graph" | "boxes"
    input_shape: tuple[int, ...]  # of one example: (height, width, channels), (length,), or (nodes, features)
    num_classes: int  # for tokens, the vocabulary
    train: Source
    eval: Mapping[str, Source]  # "test" at least
    max_value: float = 255.0  # the raw pixel value that becomes 1
    mean: tuple[float, ...] = ()  # per channel, of the training images over `max_value`
    std: tuple[float, ...] = ()
    augment: tuple[str, ...] = ()
    crop_padding: int = 4  # pixels
    crop_area: float = 0.08  # the smallest share of an image that `resized_crop` leaves
    max_boxes: int = 0  # of kind "boxes": room for so many in an example
    workers: int = 1  # background threads; neither these nor `prefetch` change a batch
    prefetch: int = 2  # batches

    @property
    def num_train(self) -> int:
        """Training examples (windows, for tokens) of one epoch."""
        return self.train.num_windows if isinstance(self.train, TokenSource) else len(self.train)

    @property
    def vocab(self) -> int:
        """The number of distinct tokens; an alias of `num_classes`."""
        return self.num_classes

    def steps_per_epoch(self, batch_size: int) -> int:
        """Whole batches in one pass. The stream runs on across the end of an epoch, so that no example is dropped."""
        check_batch_size(batch_size, self.num_train, self.name)
        return self.num_train // batch_size

    def describe(self) -> str:
        """One line: size, shape, normalisation, augmentation.

        >>> from qtrain import data
        >>> data.load({"name": "digits", "augment": ("crop",), "crop_padding": 1}).describe()
        'digits: 1437 train, 360 test images 8x8x1, 10 classes; (x/16 − 0.3054)/0.3761; augment crop(1)'
        """
        sizes = ", ".join(f"{len(source)} {split}" for split, source in self.eval.items())
        if isinstance(self.train, GraphSplit):
            return self.train.describe(self.name)
        if self.kind == "tokens":
            windows = f"windows of {self.input_shape[0]} tokens, vocabulary {self.vocab}"
            return f"{self.name}: {self.num_train} train, {sizes} {windows}"
        shape = "x".join(map(str, self.input_shape))
        mean, std = (", ".join(f"{v:g}" for v in values) for values in (self.mean, self.std))
        if len(self.mean) > 1:
            mean, std = f"({mean})", f"({std})"
        settings = {"crop": f"crop({self.crop_padding})", "resized_crop": f"resized_crop({self.crop_area:g})"}
        boxes = f"; up to {self.max_boxes} boxes" if self.kind == "boxes" else ""
        augment = ", ".join(settings.get(name, name) for name in self.augment) or "none"
        return (
            f"{self.name}: {self.num_train} train, {sizes} images {shape}, {self.num_classes} classes; "
            f"(x/{self.max_value:g} − {mean})/{std}; augment {augment}{boxes}"
        )


def check_batch_size(
    batch_size: int, num_train: int, name: str, process_index: int = 0, process_count: int = 1
) -> None:
    """Refuses a batch that the data or the processes cannot supply, with a `UsageError`."""
    if isinstance(batch_size, bool) or not isinstance(batch_size, (int, np.integer)) or batch_size < 1:
        raise UsageError(f"data.batch_size is {batch_size!r}; it must be a whole number, at least 1")
    if batch_size > num_train:
        raise UsageError(
            f"data.batch_size is {batch_size}, more than the {num_train} training examples of {name!r}; "
            f"choose at most {num_train}"
        )
    check_processes(batch_size, process_index, process_count)


def check_processes(batch_size: int, process_index: int, process_count: int) -> None:
    """Refuses a batch that does not divide over the processes, with a `UsageError`."""
    if not 0 <= process_index < process_count:
        raise UsageError(f"process_index is {process_index}; it must be in 0 … {process_count - 1}")
    if batch_size % process_count:
        raise UsageError(
            f"data.batch_size is {batch_size}, which {process_count} processes cannot share equally; "
            f"choose a multiple of {process_count}"
        )


def process_rows(batch_size: int, process_index: int, process_count: int) -> np.ndarray:
    """The rows of a global batch that a process makes: one of as many equal blocks as there are processes."""
    size = batch_size // process_count
    return np.arange(process_index * size, (process_index + 1) * size)
