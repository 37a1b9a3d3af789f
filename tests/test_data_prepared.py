"""Prepared TFDS folders: a small one written here, read without TensorFlow or network, and every way to be broken."""

import socket
import time

import numpy as np
import pytest
from prepared_set import write_set

from qtrain import data
from qtrain.data import images as image_sets
from qtrain.errors import UsageError

SHAPE = (5, 4, 3)


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("the network was asked")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


def snapshot(root):
    return {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in root.rglob("*") if path.is_file()}


def load(root, name="tfds:tiny", **changes):
    return data.load({"name": name, "dir": str(root), "batch_size": 4, **changes})


@pytest.mark.parametrize("shape", [(5, 4, 3), (6, 3, 1)])
def test_pixels_and_labels_arrive_either_way(tmp_path, shape):
    contents = write_set(tmp_path / "tiny" / "1.0.0", {"train": 30, "validation": 5, "test": 9}, shape)
    before = snapshot(tmp_path)
    memory, streamed = (load(tmp_path, in_memory=in_memory, augment=("crop", "flip")) for in_memory in (True, False))
    assert memory.input_shape == shape and memory.num_classes == 3
    assert list(memory.eval) == ["validation", "test"] == list(streamed.eval)
    for dataset in (memory, streamed):
        for split, source in {"train": dataset.train, **dataset.eval}.items():
            pixels, labels = source.gather(np.arange(len(source))[::-1])
            np.testing.assert_array_equal(pixels, contents[split][0][::-1])
            np.testing.assert_array_equal(labels, contents[split][1][::-1])
    assert data.fingerprint(memory, 4, 0) == data.fingerprint(streamed, 4, 0)
    expected = data.train_batches(memory, 4, seed=0)
    with data.train_iterator(streamed, 4, seed=0) as iterator:
        for k in range(10):  # over the end of an epoch
            batch = next(iterator)
            np.testing.assert_array_equal(batch["image"], expected[k]["image"])
            np.testing.assert_array_equal(batch["label"], expected[k]["label"])
    assert snapshot(tmp_path) == before


def test_threads_that_decode_give_the_same_batches(tmp_path):
    write_set(tmp_path / "tiny" / "1.0.0", {"train": 30, "test": 3})
    one, four = (load(tmp_path, in_memory=False, workers=workers, prefetch=8) for workers in (0, 4))
    expected = data.train_batches(one, 7, seed=0)
    with data.train_iterator(four, 7, seed=0) as iterator:
        for k in range(40):
            np.testing.assert_array_equal(next(iterator)["image"], expected[k]["image"])


def test_statistics_are_those_of_the_training_images(tmp_path):
    contents = write_set(tmp_path / "tiny" / "1.0.0", {"train": 30, "test": 3})
    scaled = contents["train"][0].astype(np.float64) / 255
    dataset = load(tmp_path)
    np.testing.assert_allclose(dataset.mean, scaled.mean(axis=(0, 1, 2)), atol=1e-4)
    np.testing.assert_allclose(dataset.std, scaled.std(axis=(0, 1, 2)), atol=1e-4)


def test_newest_version_config_and_environment(tmp_path, monkeypatch):
    for version, count in {"2.0.0": 8, "10.0.0": 9, "9.1.0": 7}.items():
        write_set(tmp_path / "tiny" / version, {"train": count, "test": 4})
    write_set(tmp_path / "other" / "small" / "1.0.0", {"train": 6, "test": 4})
    assert load(tmp_path).num_train == 9
    assert load(tmp_path, "tfds:tiny:9.1.0").num_train == 7
    assert load(tmp_path, "tfds:other/small").num_train == 6
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
    assert load("", "tfds:tiny:2.0.0").num_train == 8
    with pytest.raises(UsageError, match=r"no version 3.0.0, only .*10\.0\.0"):
        load(tmp_path, "tfds:tiny:3.0.0")
    with pytest.raises(UsageError, match="configs; give one, for example 'tfds:other/small'"):
        load(tmp_path, "tfds:other")


def test_validation_stands_in_for_a_missing_test_split(tmp_path):
    contents = write_set(tmp_path / "tiny" / "1.0.0", {"train": 6, "validation": 5})
    dataset = load(tmp_path)
    for split in ("validation", "test"):
        np.testing.assert_array_equal(dataset.eval[split].gather(np.arange(5))[0], contents["validation"][0])


def test_a_test_split_without_labels_counts_as_missing(tmp_path):
    """ImageNet's in TFDS, where its archive was there when the set was prepared: every label is -1."""
    splits = {"train": 6, "validation": 5, "test": 4}
    contents = write_set(tmp_path / "tiny" / "1.0.0", splits, unlabelled=("test",))
    dataset = load(tmp_path)
    np.testing.assert_array_equal(dataset.eval["test"].gather(np.arange(5))[1], contents["validation"][1])
    write_set(tmp_path / "other" / "1.0.0", {"train": 6, "test": 4}, unlabelled=("test",))
    with pytest.raises(UsageError, match="'other' has a test split without labels, and no 'validation'"):
        load(tmp_path, "tfds:other")


@pytest.mark.parametrize("name", ["mnist", "cifar10", "tiny_shakespeare", "tfds:imagenet2012", "tfds:emnist/balanced"])
@pytest.mark.parametrize("folder_exists", [False, True])
def test_missing_set_fails_fast_and_says_what_to_do(tmp_path, name, folder_exists):
    root = tmp_path / "sets"
    if folder_exists:
        root.mkdir()
    start = time.monotonic()
    with pytest.raises(UsageError) as raised:
        load(root, name)
    assert time.monotonic() - start < 2
    message = str(raised.value)
    plain = name.removeprefix("tfds:")
    for part in ("data.dir", repr(plain), str(root), "qtrain[tf]", f"tfds.data_source({plain!r}", "TFDS_DATA_DIR"):
        assert part in message
    assert "\n" not in message
    assert list(tmp_path.iterdir()) == ([root] if folder_exists else [])


def test_missing_set_suggests_its_neighbour(tmp_path):
    (tmp_path / "tiny" / "1.0.0").mkdir(parents=True)
    with pytest.raises(UsageError, match=r"Did you mean 'tiny'\?"):
        load(tmp_path, "tfds:tinny")
    with pytest.raises(UsageError, match="no finished version of 'tiny'"):  # the folder alone is not a set
        load(tmp_path)


def truncate(folder):
    path = folder / "tiny-train.array_record-00000-of-00001"
    path.write_bytes(path.read_bytes()[:100])


def damage_in_the_middle(folder):
    path = folder / "tiny-train.array_record-00000-of-00001"
    before, *images = path.read_bytes().split(b"\x89PNG")
    images[2] = bytes(40) + images[2][40:]  # the third image; the first and the last stay readable
    path.write_bytes(b"\x89PNG".join([before, *images]))


BROKEN = [
    ("tfrecord", {"file_format": "tfrecord"}, None, "prepared as tfrecord, which has no random access"),
    ("missing shard", {}, lambda f: (f / "tiny-test.array_record-00000-of-00001").unlink(), "is missing"),
    ("truncated shard", {}, truncate, "cannot be read"),
    ("damaged record", {}, damage_in_the_middle, "cannot be read"),
    ("damaged info", {}, lambda f: (f / "dataset_info.json").write_text("{"), "dataset_info.json cannot be read"),
    ("size varies", {"stored_shape": (-1, -1, 3)}, None, r"data\.image_shape is not set.*for example \(224, 224, 3\)"),
    (
        "channels vary",
        {"stored_shape": (-1, -1, -1)},
        None,
        r"images \(None, None, None\) of uint8; only uint8 with 1, 3",
    ),
    ("another size than told", {"stored_shape": (6, 4, 3)}, None, r"an image of shape \(5, 4, 3\) among"),
    ("no label", {"label": False}, None, "has features image; an image set needs"),
    ("no test split", {"splits": {"train": 6}}, None, "has the splits train; 'train' is needed, and 'test'"),
    ("batch too large", {"splits": {"train": 3, "test": 3}}, None, "data.batch_size is 4, more than the 3"),
]


@pytest.mark.parametrize(("kwargs", "damage", "message"), [b[1:] for b in BROKEN], ids=[b[0] for b in BROKEN])
def test_broken_set(tmp_path, kwargs, damage, message):
    folder = tmp_path / "tiny" / "1.0.0"
    write_set(folder, **{"splits": {"train": 6, "test": 4}, **kwargs})
    if damage:
        damage(folder)
    with pytest.raises(UsageError, match=message) as raised:
        load(tmp_path)
    assert "\n" not in str(raised.value)


def test_damaged_record_in_a_stream(tmp_path):
    folder = tmp_path / "tiny" / "1.0.0"
    write_set(folder, {"train": 6, "test": 4})
    damage_in_the_middle(folder)
    with pytest.raises(UsageError, match="cannot be read"):
        load(tmp_path, in_memory=False).train.gather(np.arange(6))


def test_set_too_large_for_memory(tmp_path, monkeypatch):
    write_set(tmp_path / "tiny" / "1.0.0", {"train": 6, "test": 4})
    monkeypatch.setattr(image_sets, "IN_MEMORY_LIMIT", 10 * 60 - 1)
    with pytest.raises(UsageError, match=r"data\.in_memory is True.*data\.in_memory=False"):
        load(tmp_path)
    assert load(tmp_path, in_memory=False).num_train == 6
    monkeypatch.setattr(image_sets, "IN_MEMORY_LIMIT", 10 * 60)
    assert load(tmp_path).num_train == 6
