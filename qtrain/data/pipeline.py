"""The training stream: batch k is a function of (data, seed, k), whoever asks for it and whenever.

The stream is `shuffle → repeat → augment → batch → [pB/P : (p+1)B/P]`: each epoch is a new permutation of the training
examples, epochs follow one another without a gap, and process p of P makes the p-th of P equal blocks of rows of the
global batch. An example's order and its augmentation depend on the seed and on its position in the global stream alone;
so neither the number of processes nor of threads, nor prefetching, nor decoding early or late changes what is trained
on. Blocks, since a row's place in the batch decides its dropout and its stochastic rounding: the devices of process p
hold just these rows.

These steps are fused in one random-access source of whole batches, which grain reads ahead in background threads:
grain's own chain spends 10 µs of Python on every example (1.0–1.3 ms a batch of 64 or 128; a small network's step takes
4 ms), and its shuffles under seeds s and s + 1 are one another's, an epoch apart.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from typing import Any

import grain
import numpy as np

from qtrain.data.augment import augment, flips, normalize
from qtrain.data.boxes import BoxSource, Scenes, mirrored
from qtrain.data.dataset import Dataset, ImageSource, TokenSource, WindowedSource, check_batch_size, process_rows
from qtrain.data.graphs import GraphSplit
from qtrain.data.randomness import epoch_order, epoch_phase, example_draws
from qtrain.data.resize import random_crops
from qtrain.errors import UsageError


class _TrainBatches:
    """The stream as a random-access source; see the module's docstring."""

    def __init__(self, dataset: Dataset, batch_size: int, seed: int, process_index: int, process_count: int):
        self._dataset = dataset
        self._batch_size = batch_size
        self._seed = seed
        self._rows = process_rows(batch_size, process_index, process_count)

    def __len__(self) -> int:
        return sys.maxsize // self._batch_size

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        if isinstance(self._dataset.train, GraphSplit):
            return self._dataset.train.batch
        first = int(index) * self._batch_size
        epochs, offsets = np.divmod(first + self._rows, self._dataset.num_train)
        examples = np.empty_like(offsets)
        for epoch in range(epochs[0], epochs[-1] + 1):
            here = epochs == epoch
            examples[here] = epoch_order(self._dataset.num_train, self._seed, epoch)[offsets[here]]
        if isinstance(self._dataset.train, TokenSource):
            return self._tokens(self._dataset.train, examples, epochs)
        if isinstance(self._dataset.train, BoxSource):
            return self._boxes(self._dataset.train, examples, first)
        return self._images(self._dataset.train, examples, first)

    def _images(self, source: ImageSource, examples: np.ndarray, first: int) -> dict[str, np.ndarray]:
        dataset = self._dataset
        if not dataset.augment:
            images, labels = source.gather(examples)
        else:
            images, labels = self._augmented(source, examples, first)
        return {"image": normalize(images, dataset.max_value, dataset.mean, dataset.std), "label": labels}

    def _augmented(self, source: ImageSource, examples: np.ndarray, first: int) -> tuple[np.ndarray, np.ndarray]:
        dataset = self._dataset
        words = example_draws(self._seed, first, self._batch_size)[self._rows]
        windows = "resized_crop" in dataset.augment
        if windows and isinstance(source, WindowedSource):
            images, labels = source.gather_windows(examples, words, dataset.crop_area)
        else:
            images, labels = source.gather(examples)
            if windows:
                images = random_crops(images, words, dataset.crop_area)
        return augment(images, words, dataset.augment, dataset.crop_padding), labels

    def _boxes(self, source: BoxSource, examples: np.ndarray, first: int) -> dict[str, np.ndarray]:
        scenes = source.scenes(examples)
        if "flip" in self._dataset.augment:
            words = example_draws(self._seed, first, self._batch_size)[self._rows]
            scenes = mirrored(scenes, flips(words))
        return box_batch(scenes, self._dataset)

    def _tokens(self, source: TokenSource, examples: np.ndarray, epochs: np.ndarray) -> dict[str, np.ndarray]:
        starts = examples * source.length
        for epoch in range(epochs[0], epochs[-1] + 1):
            starts[epochs == epoch] += epoch_phase(self._seed, epoch, source.num_phases)
        tokens, targets = source.windows(starts)
        return {"tokens": tokens, "targets": targets}


def box_batch(scenes: Scenes, dataset: Dataset) -> dict[str, np.ndarray]:
    """Images with boxes as a batch, the images normalized."""
    images = normalize(scenes.images, dataset.max_value, dataset.mean, dataset.std)
    return {"image": images, "boxes": scenes.boxes, "label": scenes.labels, "ignored": scenes.ignored}


def train_batches(
    dataset: Dataset, batch_size: int, seed: int, process_index: int = 0, process_count: int = 1
) -> grain.MapDataset:
    """The training stream as an endless `grain.MapDataset`: `train_batches(...)[k]` is batch k.

    Args:
      dataset: as `qtrain.data.load` returns it; its augmentation and windows are part of the stream.
      batch_size: global, the sum over all processes.
      seed: order, augmentation and the phase of text windows, 0 … 2³² − 1.
      process_index: p; this process makes rows p·B/P … (p + 1)·B/P − 1 of the global batch.
      process_count: P.

    Returns:
      Batches `{"image": float32 [B/P, H, W, C], "label": int32 [B/P]}` or `{"tokens": int32 [B/P, L], "targets": int32
      [B/P, L]}`; with boxes, `{"image", "boxes": float32 [B/P, M, 4], "label": int32 [B/P, M], "ignored": bool [B/P,
      M]}`, see `qtrain.data.boxes.Scenes`.

    Raises:
      UsageError: a batch larger than the data, below 1, or not divisible by the number of processes.
    """
    processes = (0, 1) if isinstance(dataset.train, GraphSplit) else (process_index, process_count)  # each has it all
    check_batch_size(batch_size, dataset.num_train, dataset.name, *processes)
    if not 0 <= seed < 2**32:
        raise UsageError(f"data.seed is {seed}; it must be at least 0 and at most {2**32 - 1}")
    return grain.MapDataset.source(_TrainBatches(dataset, batch_size, seed, process_index, process_count))


def read_ahead(batches: grain.MapDataset, workers: int, prefetch: int) -> grain.DatasetIterator:
    """Iterates with `workers` background threads, `prefetch` batches ahead; in the calling thread where either is 0."""
    buffer = max(prefetch, workers) if workers and prefetch else 0
    options = grain.ReadOptions(num_threads=workers if buffer else 0, prefetch_buffer_size=buffer)
    return iter(batches.to_iter_dataset(options))


class TrainIterator(Iterator[dict[str, np.ndarray]]):
    """The batches of the steps `start_step`, `start_step + 1`, …, made in the background: batch ⌊k/repeat⌋ at step k.

    Steps that take the same batch get the same object, which is made once. Its state is the number of the next step,
    whatever has been read ahead. Close it, or use it in a `with` statement, to end its threads.
    """

    def __init__(self, batches: grain.MapDataset, start_step: int, workers: int, prefetch: int, repeat: int = 1):
        self._batches = batches
        self._repeat = repeat
        self._current: dict[str, np.ndarray] | None = None
        self._workers = workers
        self._prefetch = prefetch
        self._iterator: grain.DatasetIterator | None = None
        self._step = 0
        self.set_state({"next_step": start_step})

    def __next__(self) -> dict[str, np.ndarray]:
        if self._iterator is None:
            raise ValueError("this TrainIterator is closed")
        if self._current is None or self._step % self._repeat == 0:
            self._current = next(self._iterator)
        self._step += 1
        return self._current

    def get_state(self) -> dict[str, int]:
        """`{"next_step": k}`, fit for JSON: the next call of `next` returns the batch of step k."""
        return {"next_step": self._step}

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Continues at step `state["next_step"]`, at no cost however far that is."""
        step = state.get("next_step")
        if isinstance(step, bool) or not isinstance(step, (int, np.integer)) or step < 0:
            raise UsageError(f"the data iterator's state is {dict(state)!r}; it must be {{'next_step': k}} with k >= 0")
        self.close()
        self._step = int(step)
        self._iterator = read_ahead(self._batches[self._step // self._repeat :], self._workers, self._prefetch)

    def close(self) -> None:
        """Ends the background threads; what was read ahead is dropped."""
        if self._iterator is not None:
            self._iterator.close()
            self._iterator = self._current = None

    def __enter__(self) -> TrainIterator:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def train_iterator(
    dataset: Dataset,
    batch_size: int,
    seed: int,
    process_index: int = 0,
    process_count: int = 1,
    start_step: int = 0,
    repeat: int = 1,
) -> TrainIterator:
    """Iterates over `train_batches(...)`, each `repeat` times in a row, from step `start_step` on, reading ahead.

    The other arguments, the batches and the errors are those of `train_batches`. The number of threads and how far they
    read ahead are the dataset's `workers` and `prefetch`.
    """
    batches = train_batches(dataset, batch_size, seed, process_index, process_count)
    return TrainIterator(batches, start_step, dataset.workers, dataset.prefetch, repeat)
