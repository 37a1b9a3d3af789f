"""What a checkpoint remembers of its data, so that a resumed run cannot go on with other data unnoticed."""

from __future__ import annotations

import functools
import json
import zlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from qtrain.data.boxes import BoxSource
from qtrain.data.dataset import Dataset, Source, TokenSource
from qtrain.data.graphs import GraphSplit
from qtrain.data.randomness import epoch_order
from qtrain.errors import UsageError

_SAMPLED_EXAMPLES = 256


def fingerprint(dataset: Dataset, batch_size: int, seed: int, repeat: int = 1) -> dict[str, Any]:
    """All that determines the training stream and the evaluation, as a flat dictionary fit for JSON.

    Contents enter as a CRC-32: of all bytes of a text, and of 256 images and labels (boxes) evenly spaced over a split.
    `order` is the CRC-32 of the first epoch's permutation, so that a release that shuffled differently would be
    noticed. The numbers of processes, threads and batches read ahead, and decoding early or late, are absent: batches
    do not depend on them, and a run may be resumed with others.
    """
    result: dict[str, Any] = {
        "data.name": dataset.name,
        "data.seed": int(seed),
        "data.batch_size": int(batch_size),
        "input_shape": list(dataset.input_shape),
        "num_classes": dataset.num_classes,
        "train_examples": dataset.num_train,
        "train_content": _content(dataset.train),
        "eval_examples": {split: len(source) for split, source in dataset.eval.items()},
        "eval_content": {split: _content(source) for split, source in dataset.eval.items()},
        "order": zlib.crc32(epoch_order(dataset.num_train, seed, 0).astype("<i8").tobytes()),
    }
    if repeat != 1:  # absent otherwise, as from older runs
        result["data.repeat"] = int(repeat)
    if dataset.kind in ("image", "boxes"):
        result["normalization"] = [dataset.max_value, list(dataset.mean), list(dataset.std)]
        result["data.augment"] = list(dataset.augment)
        if "crop" in dataset.augment:
            result["data.crop_padding"] = dataset.crop_padding
        if "resized_crop" in dataset.augment:
            result["data.crop_area"] = dataset.crop_area
    return result


def check_fingerprint(saved: Mapping[str, Any], current: Mapping[str, Any]) -> None:
    """Passes if the two are equal, also when one of them has been through JSON.

    Raises:
      UsageError: they differ; the message names each differing key with both values.
    """
    before, now = (json.loads(json.dumps(dict(values))) for values in (saved, current))
    keys = [*now, *(key for key in before if key not in now)]
    absent = object()
    differing = [key for key in keys if before.get(key, absent) != now.get(key, absent)]
    if differing:
        changes = "; ".join(
            f"{key} was {json.dumps(before[key]) if key in before else 'absent'} "
            f"and is {json.dumps(now[key]) if key in now else 'absent'}"
            for key in differing
        )
        raise UsageError(
            f"the saved run used other data, so it cannot be continued: {changes}. "
            "Restore these values, or start in another --workdir"
        )


def _content(source: Source) -> int:
    if isinstance(source, GraphSplit):
        return functools.reduce(lambda code, array: zlib.crc32(array.data, code), source.batch.values(), 0)
    if isinstance(source, TokenSource):
        return zlib.crc32(source.tokens.data)
    count = min(len(source), _SAMPLED_EXAMPLES)
    examples = np.arange(count) * len(source) // count
    if isinstance(source, BoxSource):
        return functools.reduce(lambda code, array: zlib.crc32(array.data, code), source.scenes(examples), 0)
    images, labels = source.gather(examples)
    return zlib.crc32(labels.astype("<i4").tobytes(), zlib.crc32(images.data))
