"""The training stream is a function of (data, seed, step); evaluation sees every example once."""

import dataclasses
import json

import grain
import numpy as np
import pytest

from qtrain import data
from qtrain.errors import UsageError

BATCH = 12  # divides neither 50 images nor 50 windows, so that batches straddle epochs
IMAGES = {"name": "synthetic", "image_shape": (6, 5, 3), "num_train": 50, "num_test": 20, "batch_size": BATCH}
STREAMS = {
    "images": IMAGES,
    "augmented": {**IMAGES, "augment": ("crop", "flip"), "crop_padding": 2},
    "text": {"name": "synthetic_text", "length": 9, "num_train": 50, "num_test": 20, "batch_size": BATCH},
}


@pytest.fixture(params=STREAMS, scope="module")
def dataset(request):
    return data.load(STREAMS[request.param])


def assert_same(actual, expected):
    assert actual.keys() == expected.keys()
    for key in expected:
        np.testing.assert_array_equal(actual[key], expected[key])
        assert actual[key].dtype == expected[key].dtype


def take(iterator, count):
    return [next(iterator) for _ in range(count)]


def differ(first, second):
    return any(not np.array_equal(first[key], second[key]) for key in first)


def test_shapes_and_dtypes(dataset):
    batch = data.train_batches(dataset, BATCH, seed=0)[0]
    if dataset.kind == "image":
        expected = {"image": ((BATCH, 6, 5, 3), np.float32), "label": ((BATCH,), np.int32)}
    else:
        expected = {"tokens": ((BATCH, 9), np.int32), "targets": ((BATCH, 9), np.int32)}
    assert {key: (value.shape, value.dtype) for key, value in batch.items()} == expected


def test_batch_is_independent_of_history(dataset):
    batches = data.train_batches(dataset, BATCH, seed=3)
    assert isinstance(batches, grain.MapDataset)
    forward = [batches[k] for k in range(12)]
    again = data.train_batches(dataset, BATCH, seed=3)
    for k in (11, 0, 5, 5, 4):
        assert_same(again[k], forward[k])
    assert_same(again[10**9], batches[10**9])


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_iterator_equals_the_stream_whatever_reads_ahead(dataset, workers):
    batches = data.train_batches(dataset, BATCH, seed=3)
    with data.train_iterator(dataclasses.replace(dataset, workers=workers), BATCH, seed=3) as iterator:
        for k, batch in enumerate(take(iterator, 12)):
            assert_same(batch, batches[k])


def test_restart_gives_the_same_stream(dataset):
    with data.train_iterator(dataset, BATCH, seed=1) as iterator:
        whole = take(iterator, 12)
    with data.train_iterator(dataset, BATCH, seed=1, start_step=7) as iterator:
        for k in range(7, 12):
            assert_same(next(iterator), whole[k])


def test_state_round_trip(dataset):
    with data.train_iterator(dataset, BATCH, seed=1) as iterator:
        take(iterator, 4)
        state = json.loads(json.dumps(iterator.get_state()))
        expected = take(iterator, 3)
        iterator.set_state(state)  # backwards, with batches read ahead
        for batch in expected:
            assert_same(next(iterator), batch)
    with data.train_iterator(dataset, BATCH, seed=1) as fresh:
        fresh.set_state(state)
        assert fresh.get_state() == state
        assert_same(next(fresh), expected[0])


def test_wrong_state_and_closed_iterator(dataset):
    iterator = data.train_iterator(dataset, BATCH, seed=1)
    for state in ({}, {"next_step": -1}, {"next_step": "3"}):
        with pytest.raises(UsageError, match="next_step"):
            iterator.set_state(state)
    iterator.close()
    with pytest.raises(ValueError, match="closed"):
        next(iterator)


def test_seeds_and_epochs_differ(dataset):
    first, other = (data.train_batches(dataset, 25, seed=seed) for seed in (0, 1))
    assert differ(first[0], other[0])
    assert differ(first[0], first[2])  # the same place in the next epoch
    # An epoch of one seed is no epoch of its neighbour, so that runs over seeds 0, 1, 2 are independent.
    assert differ(first[2], other[0]) and differ(first[0], other[2])


@pytest.mark.parametrize("processes", [2, 3, 4])
def test_processes_make_blocks_of_the_global_batch(dataset, processes):
    whole = data.train_batches(dataset, BATCH, seed=5)
    parts = [data.train_batches(dataset, BATCH, 5, process, processes) for process in range(processes)]
    for k in (0, 4, 9):  # 4 straddles two epochs
        for process, part in enumerate(parts):
            block = slice(process * BATCH // processes, (process + 1) * BATCH // processes)
            assert_same(part[k], {key: value[block] for key, value in whole[k].items()})


def test_augmentation_draws_follow_the_position_in_the_stream():
    """Identical images, cropped: what differs between rows, batches and epochs is the draw alone."""
    marked = np.zeros((8, 9, 9, 1), np.uint8)
    marked[:, 4, 4] = 255
    source = data.ImageArrays(marked, np.zeros(8, np.int32))
    dataset = data.Dataset(
        "dots", "image", (9, 9, 1), 1, source, {"test": source}, mean=(0.0,), std=(1.0,), augment=("crop",)
    )
    small, large = (data.train_batches(dataset, batch_size, seed=0) for batch_size in (2, 8))
    dots = np.concatenate([small[k]["image"] for k in range(100)]).reshape(200, 81)
    np.testing.assert_array_equal(dots, np.concatenate([large[k]["image"] for k in range(25)]).reshape(200, 81))
    assert np.all(dots.sum(axis=1) == 1)
    # 200 uniform draws out of 81 places leave 81·(80/81)²⁰⁰ ≈ 7 empty.
    assert 65 < len(np.unique(dots.argmax(axis=1))) < 81


def test_every_epoch_shows_every_image_once():
    # 50 distinct images of one pixel: the pixel tells which one it is.
    pixels = np.arange(50, dtype=np.uint8)
    source = data.ImageArrays(pixels.reshape(50, 1, 1, 1), pixels.astype(np.int32))
    dataset = data.Dataset("counted", "image", (1, 1, 1), 50, source, {"test": source}, mean=(0.0,), std=(1.0,))
    batches = data.train_batches(dataset, BATCH, seed=2)
    labels = np.concatenate([batches[k]["label"] for k in range(25)])  # 300 examples: 6 epochs
    images = np.concatenate([batches[k]["image"] for k in range(25)])
    np.testing.assert_array_equal(np.rint(images[:, 0, 0, 0] * 255), labels)
    epochs = labels.reshape(6, 50)
    for epoch in epochs:
        np.testing.assert_array_equal(np.sort(epoch), np.arange(50))
    assert len({tuple(epoch) for epoch in epochs}) == 6


def test_order_is_uniform():
    """Over many epochs each example comes first, and follows each other one, about equally often."""
    from qtrain.data.randomness import epoch_order

    orders = np.stack([epoch_order(5, seed=0, epoch=epoch) for epoch in range(6000)])
    for place in range(5):
        counts = np.bincount(orders[:, place], minlength=5)
        assert np.sum((counts - 1200) ** 2 / 1200) < 23.5  # chi-squared with 4 degrees of freedom, p = 1e-4
    follows = np.bincount(orders[:-1, 4] * 5 + orders[1:, 0], minlength=25)  # last of one epoch, first of the next
    assert np.sum((follows - 240) ** 2 / 240) < 60  # 24 degrees of freedom, p < 1e-4


@pytest.mark.parametrize(("size", "length"), [(100, 9), (101, 9), (19, 9), (18, 9), (17, 9), (10, 9), (30, 1), (2, 1)])
def test_text_windows(size, length):
    """Targets are inputs shifted by one; within an epoch no target comes twice and windows lie a length apart."""
    text = np.arange(size, dtype=np.uint8)  # the token is its own position
    source = data.TokenSource(text, length)
    dataset = data.Dataset("positions", "tokens", (length,), 256, source, {"test": source})
    windows = dataset.num_train
    assert windows == max(1, size // length - 1)
    batches = data.train_batches(dataset, windows, seed=0)  # one batch is one epoch
    phases = set()
    for epoch in range(60):
        batch = batches[epoch]
        np.testing.assert_array_equal(batch["targets"], batch["tokens"] + 1)
        starts = np.sort(batch["tokens"][:, 0])
        np.testing.assert_array_equal(np.diff(starts), length)
        np.testing.assert_array_equal(batch["tokens"], batch["tokens"][:, :1] + np.arange(length))
        phases.add(int(starts[0]))
    # Every phase that leaves room is used, and no other.
    assert phases == set(range(min(length, size - windows * length)))


def test_text_evaluation_reads_every_whole_window():
    source = data.TokenSource(np.arange(100, dtype=np.uint8), 9)
    dataset = data.Dataset("positions", "tokens", (9,), 256, source, {"test": source})
    batches = list(data.eval_batches(dataset, "test", 4))
    targets = np.concatenate([batch["targets"][batch["mask"] == 1] for batch in batches])
    np.testing.assert_array_equal(targets.ravel(), np.arange(1, 100))  # ⌊99/9⌋ = 11 windows use every token


@pytest.mark.parametrize("batch_size", [1, 4, 7, 20, 32])
def test_evaluation_pads_and_counts(dataset, batch_size):
    batches = list(data.eval_batches(dataset, "test", batch_size))
    assert len(batches) == data.num_eval_batches(dataset, "test", batch_size) == -(-20 // batch_size)
    assert sum(batch["mask"].sum() for batch in batches) == 20
    assert len({tuple(value.shape for value in batch.values()) for batch in batches}) == 1
    for batch in batches:
        assert batch["mask"].dtype == np.float32 and batch["mask"].shape == (batch_size,)
    singles = list(data.eval_batches(dataset, "test", 1))
    for key in singles[0]:
        joined = np.concatenate([batch[key][batch["mask"] == 1] for batch in batches])
        np.testing.assert_array_equal(joined, np.concatenate([single[key] for single in singles]))


def test_evaluation_over_processes(dataset):
    whole = list(data.eval_batches(dataset, "test", 8))
    for process in range(4):
        part = data.eval_batches(dataset, "test", 8, process, 4)
        for batch, expected in zip(part, whole, strict=True):
            assert_same(batch, {key: value[2 * process : 2 * process + 2] for key, value in expected.items()})


def test_evaluation_can_be_left_early(dataset):
    batches = data.eval_batches(dataset, "test", 4)
    next(batches)
    batches.close()
    with pytest.raises(StopIteration):
        next(batches)


def test_steps_per_epoch(dataset):
    assert dataset.num_train == 50
    assert dataset.steps_per_epoch(BATCH) == 4
    assert dataset.steps_per_epoch(50) == 1
    with pytest.raises(UsageError, match=r"data\.batch_size is 51"):
        dataset.steps_per_epoch(51)


FINGERPRINT_CHANGES = [
    ("seed", {}, {"seed": 1}, {"data.seed", "order"}),
    ("batch", {}, {"batch_size": 6}, {"data.batch_size"}),
    ("augmentation", {"augment": ("flip",)}, {}, {"data.augment"}),
    ("cropping", {"augment": ("crop",)}, {}, {"data.augment", "data.crop_padding"}),
    ("classes", {"num_classes": 5}, {}, {"num_classes", "train_content", "eval_content", "normalization"}),
    ("test set", {"num_test": 21}, {}, {"eval_examples", "eval_content"}),
    ("unused padding", {"crop_padding": 7}, {}, set()),
    ("threads", {"workers": 3, "prefetch": 9}, {}, set()),
]


@pytest.mark.parametrize(
    ("changes", "arguments", "keys"), [c[1:] for c in FINGERPRINT_CHANGES], ids=[c[0] for c in FINGERPRINT_CHANGES]
)
def test_fingerprint_names_what_differs(changes, arguments, keys):
    saved = data.fingerprint(data.load(IMAGES), **{"batch_size": BATCH, "seed": 0})
    current = data.fingerprint(data.load({**IMAGES, **changes}), **{"batch_size": BATCH, "seed": 0, **arguments})
    assert {key for key in saved | current if saved.get(key) != current.get(key)} == keys
    for before, now in ((json.loads(json.dumps(saved)), current), (json.loads(json.dumps(current)), saved)):
        if not keys:
            data.check_fingerprint(before, now)
            continue
        with pytest.raises(UsageError) as raised:
            data.check_fingerprint(before, now)
        message = str(raised.value)
        assert "\n" not in message
        for key in keys:
            was, is_now = (json.dumps(values[key]) if key in values else "absent" for values in (before, now))
            assert f"{key} was {was} and is {is_now}" in message


def test_fingerprint_of_changed_pixels_and_text():
    images = data.load(IMAGES)
    changed = images.train.images.copy()
    changed[13, 2, 1, 0] ^= 1
    other = dataclasses.replace(images, train=data.ImageArrays(changed, images.train.labels))
    with pytest.raises(UsageError, match="train_content was"):
        data.check_fingerprint(data.fingerprint(images, 4, 0), data.fingerprint(other, 4, 0))
    text = data.load(STREAMS["text"])
    tokens = text.train.tokens.copy()
    tokens[100] ^= 1
    other = dataclasses.replace(text, train=data.TokenSource(tokens, 9))
    with pytest.raises(UsageError, match="train_content was"):
        data.check_fingerprint(data.fingerprint(text, 4, 0), data.fingerprint(other, 4, 0))
    data.check_fingerprint(data.fingerprint(text, 4, 0), data.fingerprint(text, 4, 0))
