"""Evaluation batches: fixed order, one shape, a mask for the padding."""

from __future__ import annotations

from collections.abc import Iterator

import grain
import numpy as np

from qtrain.data.augment import normalize
from qtrain.data.boxes import BoxSource
from qtrain.data.dataset import Dataset, Source, TokenSource, check_processes, process_rows
from qtrain.data.graphs import GraphSplit
from qtrain.data.pipeline import box_batch, read_ahead
from qtrain.errors import UsageError, did_you_mean


def num_eval_batches(dataset: Dataset, split: str, batch_size: int) -> int:
    """`⌈examples / batch_size⌉`, which is what `eval_batches` yields on every process."""
    return -(-len(_split(dataset, split)) // batch_size)


def eval_batches(
    dataset: Dataset, split: str, batch_size: int, process_index: int = 0, process_count: int = 1
) -> Iterator[dict[str, np.ndarray]]:
    """Every example of a split once, in order, unaugmented, in batches of one shape.

    The last batch is filled up with copies of the last example whose `mask` is 0, so that a compiled evaluation serves
    all batches: weigh each example's loss by `mask`, and divide by the masks' sum.

    Args:
      dataset: as `qtrain.data.load` returns it.
      split: a key of `dataset.eval`.
      batch_size: global; process p of P gets the p-th of P equal blocks of each batch. It may exceed the split.
      process_index: p.
      process_count: P.

    Returns:
      An iterator over `num_eval_batches` batches: those of `train_batches` with `"mask"`, float32 `[B/P]` of 1 and 0.

    Raises:
      UsageError: an unknown split, a batch below 1 or not divisible by the number of processes.
    """
    source = _split(dataset, split)
    if batch_size < 1:
        raise UsageError(f"eval batch_size is {batch_size}; it must be at least 1")
    check_processes(batch_size, process_index, process_count)
    batches = grain.MapDataset.source(_EvalBatches(dataset, source, batch_size, process_index, process_count))
    return _closing(read_ahead(batches, dataset.workers, dataset.prefetch))


def _closing(iterator: grain.DatasetIterator) -> Iterator[dict[str, np.ndarray]]:
    try:
        yield from iterator
    finally:
        iterator.close()


def _split(dataset: Dataset, split: str) -> Source:
    if split not in dataset.eval:
        raise UsageError(
            f"eval split is {split!r}; {dataset.name!r} has {', '.join(map(repr, dataset.eval))}."
            f"{did_you_mean(split, dataset.eval)}"
        )
    return dataset.eval[split]


class _EvalBatches:
    """A split's padded batches as a random-access source."""

    def __init__(
        self,
        dataset: Dataset,
        source: Source,
        batch_size: int,
        process_index: int,
        process_count: int,
    ):
        self._dataset = dataset
        self._source = source
        self._batch_size = batch_size
        self._rows = process_rows(batch_size, process_index, process_count)

    def __len__(self) -> int:
        return -(-len(self._source) // self._batch_size)

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        if isinstance(self._source, GraphSplit):
            return self._source.batch
        positions = int(index) * self._batch_size + self._rows
        mask = (positions < len(self._source)).astype(np.float32)
        examples = np.minimum(positions, len(self._source) - 1)
        if isinstance(self._source, TokenSource):
            tokens, targets = self._source.windows(examples * self._source.length)
            return {"tokens": tokens, "targets": targets, "mask": mask}
        if isinstance(self._source, BoxSource):
            return {**box_batch(self._source.scenes(examples), self._dataset), "mask": mask}
        images, labels = self._source.gather(examples)
        dataset = self._dataset
        return {"image": normalize(images, dataset.max_value, dataset.mean, dataset.std), "label": labels, "mask": mask}
