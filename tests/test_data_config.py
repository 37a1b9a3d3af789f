"""Every wrong value of the `data` section is one line that names the key, the value and what to do."""

import dataclasses

import ml_collections
import pytest

from qtrain import data
from qtrain.errors import UsageError

SYNTHETIC = {"name": "synthetic", "image_shape": (4, 4, 1), "num_train": 20, "num_test": 6, "batch_size": 4}

WRONG = [
    ("unknown key", {"batchsize": 4}, ["data.batchsize", "no such key", "Did you mean 'batch_size'?"]),
    ("unknown name", {"name": "digit"}, ["data.name", "'digit'", "Did you mean 'digits'?", "tfds:"]),
    ("empty tfds name", {"name": "tfds:"}, ["data.name", "'tfds:'"]),
    ("malformed tfds name", {"name": "tfds:../mnist"}, ["data.name", "'../mnist'", "mnist:3.0.1"]),
    ("name of a wrong type", {"name": 3}, ["data.name", "3", "string"]),
    ("batch of 0", {"batch_size": 0}, ["data.batch_size is 0", "at least 1"]),
    ("batch below 0", {"batch_size": -2}, ["data.batch_size is -2", "at least 1"]),
    ("fractional batch", {"batch_size": 4.5}, ["data.batch_size is 4.5", "whole number"]),
    ("batch in words", {"batch_size": "four"}, ["data.batch_size is 'four'", "whole number"]),
    ("boolean batch", {"batch_size": True}, ["data.batch_size is True", "whole number"]),
    ("batch larger than the data", {"batch_size": 21}, ["data.batch_size is 21", "20", "at most 20"]),
    ("seed below 0", {"seed": -1}, ["data.seed is -1", "at least 0"]),
    ("seed too large", {"seed": 2**32}, ["data.seed", str(2**32 - 1)]),
    ("augmentation misspelt", {"augment": ("crop", "flop")}, ["data.augment", "'flop'", "Did you mean 'flip'?"]),
    ("augmentation as a string", {"augment": "crop"}, ["data.augment", "'crop'", "tuple"]),
    ("augmentation twice", {"augment": ("flip", "flip")}, ["data.augment", "once"]),
    ("augmented text", {"name": "synthetic_text", "augment": ("flip",)}, ["data.augment", "only images"]),
    ("no padding", {"augment": ("crop",), "crop_padding": 0}, ["data.crop_padding is 0", "at least 1"]),
    ("flat image shape", {"image_shape": (28, 28)}, ["data.image_shape", "(28, 28)", "channels"]),
    ("empty image", {"image_shape": (28, 0, 1)}, ["data.image_shape is 0", "at least 1"]),
    ("in_memory as a number", {"in_memory": 1}, ["data.in_memory is 1", "True or False"]),
    ("path without text", {"path": "a.txt"}, ["data.path", "'a.txt'", "data.name='text'"]),
    ("text without path", {"name": "text"}, ["data.path is not set"]),
    ("text without its file", {"name": "text", "path": "no/such.txt"}, ["data.path", "'no/such.txt'", "no such file"]),
]


@pytest.mark.parametrize(("changes", "parts"), [case[1:] for case in WRONG], ids=[case[0] for case in WRONG])
def test_wrong_value(changes, parts):
    with pytest.raises(UsageError) as raised:
        data.load({**SYNTHETIC, **changes})
    message = str(raised.value)
    assert "\n" not in message
    for part in parts:
        assert part in message


@pytest.mark.parametrize(
    ("content", "length", "parts"),
    [
        (b"", 4, ["empty"]),
        (bytes(100), 5, ["data.length is 5", "validation", "5 bytes", "at most 4"]),
        (bytes(40), 64, ["data.length is 64", "train", "36 bytes"]),
    ],
    ids=["empty", "short validation part", "short text"],
)
def test_text_file_that_is_too_short(tmp_path, content, length, parts):
    path = tmp_path / "text.txt"
    path.write_bytes(content)
    with pytest.raises(UsageError) as raised:
        data.load({"name": "text", "path": str(path), "length": length, "batch_size": 1})
    for part in [str(path), *parts]:
        assert part in str(raised.value)
    data.load({"name": "text", "path": str(_write(tmp_path, bytes(100))), "length": 4, "batch_size": 1})


def test_text_path_that_is_a_folder(tmp_path):
    with pytest.raises(UsageError, match="must be a file"):
        data.load({"name": "text", "path": str(tmp_path)})


def test_batch_that_processes_cannot_share():
    dataset = data.load(SYNTHETIC)
    calls = [
        lambda: data.train_iterator(dataset, 4, seed=0, process_index=0, process_count=3),
        lambda: data.eval_batches(dataset, "test", 4, process_index=0, process_count=3),
    ]
    for call in calls:
        with pytest.raises(UsageError, match=r"data\.batch_size is 4, which 3 processes.*multiple of 3"):
            call()
    with pytest.raises(UsageError, match="process_index is 2"):
        data.train_iterator(dataset, 4, seed=0, process_index=2, process_count=2)


def test_batch_is_checked_again_by_the_iterator():
    dataset = data.load(SYNTHETIC)
    for batch_size in (0, 21, 2.0):
        with pytest.raises(UsageError, match=r"data\.batch_size"):
            data.train_iterator(dataset, batch_size, seed=0)
    with pytest.raises(UsageError, match=r"data\.seed"):
        data.train_iterator(dataset, 4, seed=-1)


def test_unknown_evaluation_split():
    with pytest.raises(UsageError, match=r"'tast'.*Did you mean 'test'\?"):
        data.eval_batches(data.load(SYNTHETIC), "tast", 4)


def test_config_dict_and_missing_values_give_the_defaults():
    config = ml_collections.ConfigDict({"name": "mnist", "augment": ("flip", "crop"), "dir": None})
    parsed = data.parse_config(config)
    assert parsed == data.DataConfig(name="mnist", augment=("crop", "flip"))
    assert data.parse_config(data.DEFAULTS) == data.DataConfig()
    assert set(data.DEFAULTS) == {field.name for field in dataclasses.fields(data.DataConfig)}


def _write(folder, content):
    path = folder / "long_enough.txt"
    path.write_bytes(content)
    return path
