"""The keys of a config's `data` section: defaults, types, and the errors of a wrong value."""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Mapping
from typing import Any

from qtrain.data.augment import AUGMENTATIONS
from qtrain.errors import UsageError, did_you_mean

# Each integer key's smallest and largest value; a seed is one word of a counter-based generator's key.
_RANGES: dict[str, tuple[int, int]] = {
    "seed": (0, 2**32 - 1),
    "batch_size": (1, 2**31 - 1),
    "repeat": (1, 1024),
    "crop_padding": (1, 1024),
    "length": (1, 2**31 - 1),
    "num_classes": (1, 2**31 - 1),
    "num_train": (1, 2**31 - 1),
    "num_test": (1, 2**31 - 1),
    "workers": (0, 1024),
    "prefetch": (0, 4096),
    "max_boxes": (1, 1024),
}


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """One checked `data` section. Keys that a dataset has no use for are left at their defaults."""

    name: str = "digits"  # one of `qtrain.data.DATASETS`, or "tfds:<name>[/<config>][:<version>]" for an image set
    dir: str = ""  # where prepared TFDS sets lie; "" means $TFDS_DATA_DIR, else ~/tensorflow_datasets
    # The file that name="text", "graph" or "cora" reads; the folder of "ogbn_arxiv"; "" for every other set.
    path: str = ""
    normalize_rows: bool = True  # name="graph": divide the features of each node by their sum
    seed: int = 0  # order and augmentation, 0 … 2³²−1; the content of a set never depends on it
    batch_size: int = 64  # global: the sum over all processes
    repeat: int = 1  # successive training steps that take the same batch
    augment: tuple[str, ...] = ()  # names out of "crop" or "resized_crop", and "flip"; images only
    crop_padding: int = 4  # pixels of zeros on each side before a random "crop"
    crop_area: float = 0.08  # the smallest share of an image that "resized_crop" leaves, above 0 … 1
    central_crop: float = 1.0  # what evaluation sees of an image that is resized: a share of its sides, above 0 … 1
    length: int = 128  # tokens per window; text only
    # (height, width, channels) of name="synthetic", () for (32, 32, 3); and what a TFDS image set is resized to, () for
    # the size they are stored in, if it is one size. The digits have theirs, and text has no use for it.
    image_shape: tuple[int, ...] = ()
    num_classes: int = 10  # of name="synthetic"
    num_train: int = 1024  # examples (windows, for text) of the sets that are generated
    num_test: int = 256  # likewise
    max_boxes: int = 5  # boxes that an example has room for; of name="digit_scenes" the most digits of a scene
    overlap: float = 0.1  # name="digit_scenes": the largest intersection over union of two boxes, above 0 … 1
    in_memory: bool = True  # decode a TFDS image set once; False decodes each example whenever it is used
    workers: int = 1  # background threads that make batches; 0 makes them in the calling thread
    prefetch: int = 2  # batches made ahead, at least `workers`; 0 makes them in the calling thread


DEFAULTS: dict[str, Any] = dataclasses.asdict(DataConfig())


def parse_config(config: Mapping[str, Any] | Any) -> DataConfig:
    """Checks a `data` section and fills in the defaults.

    Args:
      config: a mapping or an `ml_collections.ConfigDict`; missing keys take their defaults, ``None`` counts as missing.

    Raises:
      UsageError: an unknown key, a wrong type, a number out of range, an unknown augmentation.

    >>> parse_config({"name": "cifar10", "augment": ["crop", "flip"]}).augment
    ('crop', 'flip')
    """
    values: dict[str, Any] = {}
    for key, value in config.items():
        if key not in DEFAULTS:
            raise UsageError(
                f"data.{key}: no such key; allowed are {', '.join(sorted(DEFAULTS))}.{did_you_mean(key, DEFAULTS)}"
            )
        if value is not None:
            values[key] = _checked(key, value, DEFAULTS[key])
    return DataConfig(**values)


def _checked(key: str, value: Any, default: Any) -> Any:
    if isinstance(default, bool):
        if not isinstance(value, bool):
            raise UsageError(f"data.{key} is {value!r}; it must be True or False")
        return value
    if isinstance(default, int):
        return _whole_number(key, value, *_RANGES[key])
    if isinstance(default, float):
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= 1:
            raise UsageError(f"data.{key} is {value!r}; it must be a number above 0 and at most 1")
        return float(value)
    if isinstance(default, str):
        if not isinstance(value, str):
            raise UsageError(f"data.{key} is {value!r}; it must be a string")
        return value
    if isinstance(value, str) or not isinstance(value, (tuple, list)):
        example = "('crop',)" if key == "augment" else "(32, 32, 3)"
        raise UsageError(f"data.{key} is {value!r}; it must be a tuple, for example {example}")
    if key == "image_shape":
        if len(value) not in (0, 3):
            raise UsageError(f"data.image_shape is {tuple(value)}; it must be (height, width, channels)")
        return tuple(_whole_number(key, size, 1, 2**15) for size in value)
    return _augmentations(tuple(value))


def _whole_number(key: str, value: Any, low: int, high: int) -> int:
    try:
        if isinstance(value, bool):
            raise TypeError
        number = operator.index(value)
    except TypeError:
        raise UsageError(f"data.{key} is {value!r}; it must be a whole number") from None
    if not low <= number <= high:
        raise UsageError(f"data.{key} is {number}; it must be at least {low} and at most {high}")
    return number


def _augmentations(names: tuple[Any, ...]) -> tuple[str, ...]:
    for name in names:
        if name not in AUGMENTATIONS:
            raise UsageError(
                f"data.augment has {name!r}; allowed are {', '.join(map(repr, AUGMENTATIONS))}."
                f"{did_you_mean(name, AUGMENTATIONS)}"
            )
    if len(set(names)) != len(names):
        raise UsageError(f"data.augment is {names}; name each augmentation once")
    if {"crop", "resized_crop"} <= set(names):
        raise UsageError(f"data.augment is {names}; choose one of 'crop' and 'resized_crop'")
    # One canonical order: cropping and flipping commute in distribution, and a reordered tuple is then the same data.
    return tuple(name for name in AUGMENTATIONS if name in names)
