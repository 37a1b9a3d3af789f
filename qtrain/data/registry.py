"""Data sets by name."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from qtrain.data import digit_scenes, digits, graph_sets, images, sequences, synthetic, text, voc
from qtrain.data.augment import channel_statistics
from qtrain.data.boxes import BoxSource
from qtrain.data.config import DEFAULTS, DataConfig, parse_config
from qtrain.data.dataset import Dataset, ImageSource, TokenSource, check_batch_size
from qtrain.data.graphs import SPLITS, Graph, GraphSplit
from qtrain.errors import UsageError, did_you_mean

# Shape and classes of each image set, which `smoke` needs before (and without) any file. Images of Imagenette, whose
# shorter side is 160 pixels, differ in size.
_IMAGE_SHAPES: dict[str, tuple[tuple[int, ...], int]] = {
    "digits": (digits.SHAPE, 10),
    "mnist": ((28, 28, 1), 10),
    "cifar10": ((32, 32, 3), 10),
    "cifar100": ((32, 32, 3), 100),
    "imagenette": ((128, 128, 3), 10),
    "digit_scenes": (digit_scenes.SHAPE, 10),
    "voc": (voc.SHAPE, voc.NUM_CLASSES),
    "sequential_digits": ((64, 1, 1), 10),
    "sequential_mnist": ((784, 1, 1), 10),
    "sequential_cifar10": ((1024, 1, 3), 10),
    "cylinder_bell_funnel": ((128, 1, 1), 3),
}
_TFDS_NAMES = {"imagenette": "imagenette/160px-v2"}  # where TFDS has it under another
_SEQUENCES = ("sequential_digits", "sequential_mnist", "sequential_cifar10", "cylinder_bell_funnel")
_PREPARED_TEXTS = ("tiny_shakespeare", "lm1b")
_TEXTS = (*_PREPARED_TEXTS, "python_reference", "text", "synthetic_text")
_NEVER_RESIZED = ("digits", "synthetic")
_BOXES = ("digit_scenes", "voc", "synthetic_boxes")
_GRAPHS = ("cora", "digits_graph", "graph", "ogbn_arxiv")
_FILES = ("text", "cora", "graph", "ogbn_arxiv")
_SYNTHETIC_SHAPE = (32, 32, 3)
_SMOKE_EXAMPLES = 512
_SMOKE_BOXES = 16  # test examples of the smoke form of a set with boxes
_STATISTICS_SCENES = 256


def load(config_data: Mapping[str, Any] | Any, *, smoke: bool = False) -> Dataset:
    """Loads the data set that a config's `data` section names.

    Args:
      config_data: a mapping or `ConfigDict` with keys of `qtrain.data.DEFAULTS`.
      smoke: generated arrays of the same shapes instead, few, so that no data set need be there. A set
        `tfds:<name>` takes `image_shape` and `num_classes` from the config, for its own are not known without it.

    Raises:
      UsageError: a wrong key or value, an unknown or missing data set, a batch larger than the data.

    >>> load({"name": "mnist", "batch_size": 32}, smoke=True).input_shape
    (28, 28, 1)
    """
    config = parse_config(config_data)
    _check(config)
    loader = _smoke if smoke else _load_tfds if config.name.startswith("tfds:") else DATASETS[config.name]
    dataset = loader(config)
    check_batch_size(config.batch_size, dataset.num_train, dataset.name)
    return dataset


def _check(config: DataConfig) -> None:
    """What can be said before anything is read."""
    if config.name not in DATASETS and not (config.name.startswith("tfds:") and len(config.name) > len("tfds:")):
        raise UsageError(
            f"data.name is {config.name!r}; known are {', '.join(map(repr, DATASETS))}, and 'tfds:<name>' for any "
            f"prepared TFDS image set.{did_you_mean(config.name, DATASETS)}"
        )
    if config.path and config.name not in _FILES:
        raise UsageError(
            f"data.path is {config.path!r}, but only data.name={', '.join(map(repr, _FILES))} read one, not "
            f"{config.name!r}"
        )
    if not config.normalize_rows and config.name != "graph":
        raise UsageError(f"data.normalize_rows is False, which is for data.name='graph', not {config.name!r}")
    if config.augment and _is_text(config.name):
        raise UsageError(f"data.augment is {config.augment}, but {config.name!r} is text; only images are augmented")
    if config.name in _SEQUENCES + _GRAPHS:
        for key, unset in (("augment", ()), ("image_shape", ()), ("central_crop", 1.0)):
            if getattr(config, key) != unset:
                raise UsageError(
                    f"data.{key} is {getattr(config, key)}, but {config.name!r} has no images; leave it at {unset}"
                )
    if config.name in _BOXES:
        if set(config.augment) - {"flip"}:
            raise UsageError(f"data.augment is {config.augment}, but {config.name!r} has boxes; only 'flip' moves them")
        if config.central_crop != 1.0:
            raise UsageError(
                f"data.central_crop is {config.central_crop:g}, but {config.name!r} has boxes; leave it at 1"
            )
    for key, readers in (("max_boxes", _BOXES), ("overlap", ("digit_scenes",))):
        if getattr(config, key) != DEFAULTS[key] and config.name not in readers:
            raise UsageError(
                f"data.{key} is {getattr(config, key)}, which is for data.name={', '.join(map(repr, readers))}, not "
                f"{config.name!r}"
            )
    if config.name == "digits" and config.image_shape not in ((), digits.SHAPE):
        raise UsageError(f"data.image_shape is {config.image_shape}, but 'digits' are not resized; leave it at ()")
    stored = _IMAGE_SHAPES.get(config.name)
    if config.image_shape and stored and config.image_shape[2] != stored[0][2]:
        raise UsageError(
            f"data.image_shape is {config.image_shape}, but {config.name!r} has images of {stored[0][2]} channels; "
            f"give {(*config.image_shape[:2], stored[0][2])}"
        )
    if config.central_crop != 1.0 and (config.name in _NEVER_RESIZED or _is_text(config.name)):
        raise UsageError(
            f"data.central_crop is {config.central_crop:g}, but {config.name!r} has no images to resize; leave it at 1"
        )


def _is_text(name: str) -> bool:
    return name in _TEXTS


def _image_dataset(
    config: DataConfig,
    name: str,
    train: ImageSource,
    evaluation: Mapping[str, ImageSource],
    shape: tuple[int, ...],
    num_classes: int,
    max_value: float,
    statistics: tuple[tuple[float, ...], tuple[float, ...]],
) -> Dataset:
    return Dataset(
        name=name,
        kind="image",
        input_shape=shape,
        num_classes=num_classes,
        train=train,
        eval=dict(evaluation),
        max_value=max_value,
        mean=statistics[0],
        std=statistics[1],
        augment=config.augment,
        crop_padding=config.crop_padding,
        crop_area=config.crop_area,
        workers=config.workers,
        prefetch=config.prefetch,
    )


def _box_dataset(
    config: DataConfig,
    name: str,
    sources: Mapping[str, BoxSource],
    shape: tuple[int, ...],
    num_classes: int,
    statistics: tuple[tuple[float, ...], tuple[float, ...]] | None = None,
) -> Dataset:
    """Of "train" and other sources; `statistics` by default those of some training images."""
    train = sources["train"]
    if statistics is None:
        some = train.scenes(np.arange(min(len(train), _STATISTICS_SCENES))).images
        statistics = channel_statistics(some, images.MAX_VALUE)
    return Dataset(
        name=name,
        kind="boxes",
        input_shape=shape,
        num_classes=num_classes,
        train=train,
        eval={split: source for split, source in sources.items() if split != "train"},
        max_value=images.MAX_VALUE,
        mean=statistics[0],
        std=statistics[1],
        augment=config.augment,
        max_boxes=config.max_boxes,
        workers=config.workers,
        prefetch=config.prefetch,
    )


def _text_dataset(config: DataConfig, name: str, sources: Mapping[str, TokenSource]) -> Dataset:
    return Dataset(
        name=name,
        kind="tokens",
        input_shape=(config.length,),
        num_classes=text.VOCAB,
        train=sources["train"],
        eval={split: source for split, source in sources.items() if split != "train"},
        workers=config.workers,
        prefetch=config.prefetch,
    )


def _load_digits(config: DataConfig) -> Dataset:
    train, test = digits.load()
    statistics = (digits.MEAN, digits.STD)
    return _image_dataset(
        config, "digits", train, {"test": test}, digits.SHAPE, digits.NUM_CLASSES, digits.MAX_VALUE, statistics
    )


def _load_tfds(config: DataConfig) -> Dataset:
    name = _TFDS_NAMES.get(config.name, config.name.removeprefix("tfds:"))
    shape = config.image_shape or (_IMAGE_SHAPES[config.name][0] if config.name in _TFDS_NAMES else ())
    prepared = images.open_set(name, config.dir, shape)
    check_batch_size(config.batch_size, prepared.splits["train"], config.name)  # before seconds of decoding
    found = images.load(prepared, config.in_memory, shape, config.central_crop, "resized_crop" in config.augment)
    return _image_dataset(
        config,
        prepared.name,
        found.train,
        found.eval,
        found.shape,
        found.num_classes,
        images.MAX_VALUE,
        (found.mean, found.std),
    )


def _load_sequential(config: DataConfig) -> Dataset:
    name = config.name.removeprefix(sequences.PREFIX)
    return sequences.sequential(DATASETS[name](dataclasses.replace(config, name=name)))


def _load_cylinder_bell_funnel(config: DataConfig) -> Dataset:
    return sequences.load_cylinder_bell_funnel(config.num_train, config.num_test, config.workers, config.prefetch)


def _graph_dataset(config: DataConfig, name: str, graph: Graph) -> Dataset:
    sources = {split: GraphSplit(graph, split) for split in SPLITS}
    return Dataset(
        name=name,
        kind="graph",
        input_shape=graph.nodes.shape,
        num_classes=graph.num_classes,
        train=sources["train"],
        eval={split: source for split, source in sources.items() if split != "train"},
        workers=config.workers,
        prefetch=config.prefetch,
    )


def _load_graph(config: DataConfig) -> Dataset:
    if config.name == "graph" and not config.path:
        raise UsageError("data.path is not set; data.name='graph' reads the npz file that it names")
    loaders: dict[str, Callable[[], Graph]] = {
        "cora": lambda: graph_sets.load_cora(config.path),
        "digits_graph": graph_sets.load_digits,
        "graph": lambda: graph_sets.load_file(config.path, normalize_rows=config.normalize_rows),
        "ogbn_arxiv": lambda: graph_sets.load_arxiv(config.path),
    }
    return _graph_dataset(config, config.name, loaders[config.name]())


def _load_digit_scenes(config: DataConfig) -> Dataset:
    shape = config.image_shape or digit_scenes.SHAPE
    train, test = digit_scenes.load(shape, config.max_boxes, config.overlap, config.num_train, config.num_test)
    return _box_dataset(config, config.name, {"train": train, "test": test}, shape, digits.NUM_CLASSES)


def _load_voc(config: DataConfig) -> Dataset:
    shape = config.image_shape or voc.SHAPE
    prepared = voc.open_set(config.dir)
    sources = voc.load(prepared, config.in_memory, shape, config.max_boxes)
    return _box_dataset(config, prepared.name, sources, shape, voc.NUM_CLASSES, (voc.MEAN, voc.STD))


def _load_synthetic_boxes(config: DataConfig) -> Dataset:
    shape = config.image_shape or _SYNTHETIC_SHAPE
    return _synthetic_boxes(config, config.name, shape, config.num_classes, config.num_train, config.num_test)


def _synthetic_boxes(
    config: DataConfig, name: str, shape: tuple[int, ...], num_classes: int, num_train: int, num_test: int
) -> Dataset:
    sources = {
        split: synthetic.scenes(shape, num_classes, size, config.max_boxes, seed=0, split=index)
        for index, (split, size) in enumerate({"train": num_train, "test": num_test}.items())
    }
    return _box_dataset(config, name, sources, shape, num_classes)


def _load_text(config: DataConfig) -> Dataset:
    if config.name in _PREPARED_TEXTS:
        sources = text.load_prepared(config.name, config.dir, config.length)
    elif config.name == "python_reference":
        sources = text.load_python_reference(config.length)
    else:
        sources = text.load_file(config.path, config.length)
    return _text_dataset(config, config.name, sources)


def _load_synthetic(config: DataConfig) -> Dataset:
    shape, num_classes = config.image_shape or _SYNTHETIC_SHAPE, config.num_classes
    return _synthetic_images(config, config.name, shape, num_classes, config.num_train, config.num_test)


def _load_synthetic_text(config: DataConfig) -> Dataset:
    return _synthetic_text(config, config.name, config.num_train, config.num_test)


def _synthetic_images(
    config: DataConfig, name: str, shape: tuple[int, ...], num_classes: int, num_train: int, num_test: int
) -> Dataset:
    train = synthetic.images(shape, num_classes, num_train, seed=0, split=0)
    test = synthetic.images(shape, num_classes, num_test, seed=0, split=1)
    statistics = channel_statistics(train.images[: images.STATISTICS_EXAMPLES], images.MAX_VALUE)
    return _image_dataset(config, name, train, {"test": test}, shape, num_classes, images.MAX_VALUE, statistics)


def _synthetic_text(config: DataConfig, name: str, num_train: int, num_test: int) -> Dataset:
    sizes = {"train": num_train, "validation": num_test, "test": num_test}
    sources = {
        split: synthetic.tokens(config.length, size, seed=0, split=index)
        for index, (split, size) in enumerate(sizes.items())
    }
    return _text_dataset(config, name, sources)


def _smoke(config: DataConfig) -> Dataset:
    name = f"smoke:{config.name}"  # never to be taken for the real set, by a reader or by the fingerprint
    num_train = max(_SMOKE_EXAMPLES, 2 * config.batch_size)
    if config.name in _GRAPHS:
        return _graph_dataset(config, name, graph_sets.generated(num_nodes=60, features=16, num_classes=4))
    if _is_text(config.name):
        return _synthetic_text(config, name, num_train, _SMOKE_EXAMPLES // 4)
    shape, num_classes = _IMAGE_SHAPES.get(config.name, (_SYNTHETIC_SHAPE, config.num_classes))
    shape = config.image_shape or shape
    if config.name in _BOXES:
        return _synthetic_boxes(config, name, shape, num_classes, max(64, 2 * config.batch_size), _SMOKE_BOXES)
    return _synthetic_images(config, name, shape, num_classes, num_train, _SMOKE_EXAMPLES // 4)


DATASETS: dict[str, Callable[[DataConfig], Dataset]] = {
    "digits": _load_digits,
    "mnist": _load_tfds,
    "cifar10": _load_tfds,
    "cifar100": _load_tfds,
    "imagenette": _load_tfds,
    "cora": _load_graph,
    "digits_graph": _load_graph,
    "graph": _load_graph,
    "ogbn_arxiv": _load_graph,
    "digit_scenes": _load_digit_scenes,
    "voc": _load_voc,
    "tiny_shakespeare": _load_text,
    "lm1b": _load_text,
    "python_reference": _load_text,
    "text": _load_text,
    "sequential_digits": _load_sequential,
    "sequential_mnist": _load_sequential,
    "sequential_cifar10": _load_sequential,
    "cylinder_bell_funnel": _load_cylinder_bell_funnel,
    "synthetic": _load_synthetic,
    "synthetic_text": _load_synthetic_text,
    "synthetic_boxes": _load_synthetic_boxes,
}
