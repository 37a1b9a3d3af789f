"""The sources: digits, synthetic sets, text files, and the real TFDS sets where they are prepared."""

import doctest
import importlib
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from prepared_set import write_text_set

from qtrain import data
from qtrain.data import digits, images, synthetic
from qtrain.data.augment import channel_statistics
from qtrain.errors import UsageError

PREPARED = Path(os.environ.get("TFDS_DATA_DIR") or Path(__file__).parents[2] / "shared" / "data" / "tfds")


def require(name):
    if not (PREPARED / name).is_dir():
        pytest.skip(f"{name} is not prepared in {PREPARED}; set TFDS_DATA_DIR to a folder that has it")
    return {"name": name, "dir": str(PREPARED)}


@pytest.fixture(scope="module")
def real_mnist():
    return data.load(require("mnist"))


@pytest.fixture(scope="module")
def real_cifar10():
    return data.load({**require("cifar10"), "augment": ("crop", "flip"), "batch_size": 128})


def test_digits_split():
    train, test = digits.load()
    assert (len(train), len(test)) == (1437, 360)
    assert train.images.shape == (1437, 8, 8, 1) and train.images.dtype == np.uint8 and train.images.max() == 16
    assert train.labels.dtype == np.int32
    # Stratified: every class within one example of 360/1797 of its size.
    sizes = np.bincount(np.concatenate([train.labels, test.labels]))
    assert np.all(np.abs(np.bincount(test.labels) - sizes * 360 / 1797) <= 1)
    # The split of random_state=0, drawn on row numbers: the same rows in the same order.
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    bundle = load_digits()
    _, rows = train_test_split(np.arange(1797), test_size=360, stratify=bundle.target, random_state=0)
    np.testing.assert_array_equal(test.images[..., 0], bundle.images[rows])
    np.testing.assert_array_equal(test.labels, bundle.target[rows])


def test_digits_constants_are_the_training_statistics():
    train, _ = digits.load()
    assert channel_statistics(train.images, digits.MAX_VALUE) == (digits.MEAN, digits.STD)


def test_digits_batches_are_standardised():
    dataset = data.load({"name": "digits"})
    image = data.train_batches(dataset, 1437, seed=0)[0]["image"]
    assert abs(image.mean()) < 1e-3 and abs(image.std() - 1) < 1e-3
    assert dataset.describe() == (
        "digits: 1437 train, 360 test images 8x8x1, 10 classes; (x/16 − 0.3054)/0.3761; augment none"
    )


def test_the_seed_changes_no_content():
    first, second = (data.load({"name": "digits", "seed": seed}) for seed in (0, 1))
    np.testing.assert_array_equal(first.train.images, second.train.images)


def test_synthetic_images_are_deterministic_balanced_and_learnable():
    train, again = (synthetic.images((6, 6, 1), 4, 400, seed=0, split=0) for _ in range(2))
    test = synthetic.images((6, 6, 1), 4, 100, seed=0, split=1)
    np.testing.assert_array_equal(train.images, again.images)
    np.testing.assert_array_equal(np.bincount(train.labels), 100)
    assert not np.array_equal(train.images[:100], test.images)
    # The nearest class mean of the training images tells the test images apart, though not without error on one pixel.
    means = np.stack([train.images[train.labels == label].mean(axis=0) for label in range(4)])
    distance = ((test.images[:, None].astype(float) - means[None]) ** 2).sum(axis=(2, 3, 4))
    assert np.mean(distance.argmin(axis=1) == test.labels) > 0.95


def test_synthetic_tokens_are_deterministic_and_learnable():
    source, again = (synthetic.tokens(16, 500, seed=0, split=0) for _ in range(2))
    np.testing.assert_array_equal(source.tokens, again.tokens)
    assert len(source) == source.num_windows == 500
    continued = np.mean((source.tokens[:-1].astype(int) + synthetic.STRIDE) % 256 == source.tokens[1:])
    assert abs(continued - (0.8 + 0.2 / 256)) < 0.02
    assert not np.array_equal(source.tokens, synthetic.tokens(16, 500, seed=0, split=1).tokens)


@pytest.mark.parametrize(
    ("name", "shape", "classes"),
    [
        ("digits", (8, 8, 1), 10),
        ("mnist", (28, 28, 1), 10),
        ("cifar10", (32, 32, 3), 10),
        ("cifar100", (32, 32, 3), 100),
        ("imagenette", (40, 50, 3), 10),
        ("tiny_shakespeare", (16,), 256),
        ("lm1b", (16,), 256),
        ("python_reference", (16,), 256),
        ("text", (16,), 256),
        ("synthetic", (4, 6, 2), 7),
        ("synthetic_text", (16,), 256),
        ("tfds:anything", (4, 6, 2), 7),
    ],
)
def test_smoke_needs_no_data_set(name, shape, classes, tmp_path):
    config = {"name": name, "dir": str(tmp_path / "nowhere"), "length": 16, "num_classes": 7}
    config |= {"image_shape": shape} if len(shape) == 3 and name not in ("mnist", "cifar10", "cifar100") else {}
    dataset = data.load({**config, "batch_size": 600}, smoke=True)  # more than the real digits' test set: never too few
    assert dataset.input_shape == shape and dataset.num_classes == dataset.vocab == classes
    assert dataset.name == f"smoke:{name}"
    batch = data.train_batches(dataset, 600, seed=0)[0]
    assert next(iter(batch.values())).shape == (600, *shape)
    assert "test" in dataset.eval and len(list(data.eval_batches(dataset, "test", 100))) == 2


def test_text_file_is_split_in_order(tmp_path):
    content = bytes(range(200)) * 2
    path = tmp_path / "text.txt"
    path.write_bytes(content)
    dataset = data.load({"name": "text", "path": str(path), "length": 4, "batch_size": 2})
    parts = [dataset.train, dataset.eval["validation"], dataset.eval["test"]]
    assert [len(part.tokens) for part in parts] == [360, 20, 20]
    assert b"".join(part.tokens.tobytes() for part in parts) == content
    assert dataset.kind == "tokens" and dataset.vocab == 256


def test_prepared_text_without_a_validation_split(tmp_path):
    write_text_set(tmp_path / "lm1b" / "1.1.0", {"train": [b"The first .", b"A second ."], "test": [b"The last one ."]})
    dataset = data.load({"name": "lm1b", "dir": str(tmp_path), "length": 4, "batch_size": 2})
    assert dataset.train.tokens.tobytes() == b"The first .\nA second ."
    assert list(dataset.eval) == ["test"] and dataset.eval["test"].tokens.tobytes() == b"The last one ."


def test_python_reference(monkeypatch):
    dataset = data.load({"name": "python_reference", "length": 64})
    parts = [dataset.train.tokens, *(source.tokens for source in dataset.eval.values())]
    text = b"".join(part.tobytes() for part in parts)
    assert len(text) > 300_000 and b'The "assert" statement' in text
    assert abs(len(parts[0]) / len(text) - 0.9) < 1e-4
    monkeypatch.setitem(sys.modules, "pydoc_data", None)
    monkeypatch.setitem(sys.modules, "pydoc_data.topics", None)
    with pytest.raises(UsageError, match="no module pydoc_data"):
        data.load({"name": "python_reference"})


def test_digits_need_neither_tfds_nor_tensorflow():
    code = (
        "import sys; from qtrain import data; next(data.train_iterator(data.load({'name': 'digits'}), 8, 0)); "
        "print([m for m in ('tensorflow', 'tensorflow_datasets') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout.strip(), done.stderr) == (0, "[]", "")


@pytest.mark.parametrize("name", ["", ".config", ".dataset", ".registry"])
def test_docstring_examples(name):
    module = importlib.import_module(f"qtrain.data{name}")
    result = doctest.testmod(module)
    assert result.attempted > 0 and result.failed == 0


def test_real_mnist(real_mnist):
    assert (len(real_mnist.train), len(real_mnist.eval["test"])) == (60_000, 10_000)
    assert real_mnist.input_shape == (28, 28, 1) and real_mnist.num_classes == 10
    # Counts that every copy of MNIST has.
    np.testing.assert_array_equal(
        np.bincount(real_mnist.train.labels), [5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949]
    )
    assert channel_statistics(real_mnist.train.images, 255.0) == images.STATISTICS["mnist"]


def test_real_cifar10(real_cifar10):
    assert (len(real_cifar10.train), len(real_cifar10.eval["test"])) == (50_000, 10_000)
    assert real_cifar10.input_shape == (32, 32, 3)
    np.testing.assert_array_equal(np.bincount(real_cifar10.train.labels), 5000)
    np.testing.assert_array_equal(np.bincount(real_cifar10.eval["test"].labels), 1000)
    mean, std = channel_statistics(real_cifar10.train.images[::10], 255.0)
    quoted_mean, quoted_std = images.STATISTICS["cifar10"]
    np.testing.assert_allclose(mean, quoted_mean, atol=0.002)
    np.testing.assert_allclose(std, quoted_std, atol=0.005)  # a prepared copy may hold re-encoded pixels


def test_real_cifar10_streams_the_same_batches(real_cifar10):
    config = {**require("cifar10"), "augment": ("crop", "flip"), "batch_size": 128, "in_memory": False}
    streamed = data.load(config)
    assert data.fingerprint(streamed, 128, 0) == data.fingerprint(real_cifar10, 128, 0)
    expected = data.train_batches(real_cifar10, 128, seed=4)
    with data.train_iterator(streamed, 128, seed=4, start_step=390) as iterator:  # 390 straddles two epochs
        for k in (390, 391):
            batch = next(iterator)
            for key in batch:
                np.testing.assert_array_equal(batch[key], expected[k][key])


def test_real_tiny_shakespeare():
    dataset = data.load({**require("tiny_shakespeare"), "length": 64})
    tokens = [source.tokens for source in (dataset.train, *dataset.eval.values())]
    assert sum(map(len, tokens)) == 1_115_394  # the whole text, which is ASCII
    assert list(dataset.eval) == ["validation", "test"]
    assert dataset.train.tokens[:14].tobytes() == b"First Citizen:"
    assert max(part.max() for part in tokens) < 128
    batch = data.train_batches(dataset, 8, seed=0)[3]
    np.testing.assert_array_equal(batch["tokens"][:, 1:], batch["targets"][:, :-1])
