"""Images with boxes: scenes of digits, VOC from a prepared folder, the pipeline, and what is said of broken ones."""

import time

import numpy as np
import pytest
from prepared_boxes import write_boxes

from qtrain import data
from qtrain.data import digit_scenes, digits, voc
from qtrain.data.boxes import NO_BOX, Scenes, check_boxes, mirrored
from qtrain.errors import UsageError

SCENES = {"name": "digit_scenes", "batch_size": 4, "num_train": 40, "num_test": 12}


def real(scenes):
    """(row, box as whole numbers, label) of every box."""
    for row, labels in enumerate(scenes.labels):
        for box, label in zip(scenes.boxes[row], labels, strict=True):
            if label != NO_BOX:
                yield row, box.astype(int), label


def test_scenes_are_functions_of_their_index():
    dataset = data.load(SCENES)
    whole, some = dataset.train.scenes(np.arange(40)), dataset.train.scenes(np.array([7, 3]))
    for one, other in zip(whole, some, strict=True):
        np.testing.assert_array_equal(one[[7, 3]], other)
    again = data.load({**SCENES, "seed": 5, "num_train": 50})
    np.testing.assert_array_equal(again.train.scenes(np.arange(40)).images, whole.images)
    assert len({image.tobytes() for image in whole.images}) == 40
    assert not np.array_equal(dataset.eval["test"].scenes(np.arange(12)).boxes, whole.boxes[:12])


def test_boxes_are_tight_inside_and_apart():
    source = data.load({**SCENES, "overlap": 0.05}).train
    scenes = source.scenes(np.arange(40))
    assert set((scenes.labels != NO_BOX).sum(axis=1)) == {1, 2, 3, 4, 5}
    assert not scenes.ignored.any() and scenes.images.dtype == np.uint8
    np.testing.assert_array_equal(scenes.boxes[scenes.labels == NO_BOX], 0)
    by_scene = [[] for _ in range(40)]
    for row, (y0, x0, y1, x1), label in real(scenes):
        assert 0 <= y0 < y1 <= 64 and 0 <= x0 < x1 <= 64 and y1 - y0 <= 24 and x1 - x0 <= 24 and 0 <= label < 10
        ink = scenes.images[row, y0:y1, x0:x1, 0] >= digit_scenes.INK
        assert all(edge.any() for edge in (ink[0], ink[-1], ink[:, 0], ink[:, -1]))
        for other in by_scene[row]:
            assert digit_scenes._overlap((y0, x0, y1, x1), other) <= 0.05
        by_scene[row].append((y0, x0, y1, x1))
    outside = scenes.images[..., 0].copy()
    for row, (y0, x0, y1, x1), _ in real(scenes):
        outside[row, y0:y1, x0:x1] = 0
    assert not outside.any(), "nothing is drawn but what has a box"
    heights = [box[2] - box[0] for _, box, _ in real(scenes)]
    assert min(heights) < 11 and max(heights) > 21


def test_digits_of_the_splits_stay_apart():
    dataset = data.load(SCENES)
    train, test = digits.load()
    assert {tuple(image.ravel()) for image in train.images}.isdisjoint(tuple(image.ravel()) for image in test.images)
    for source, own in ((dataset.train, train), (dataset.eval["test"], test)):
        np.testing.assert_array_equal(source.source.images, own.images)
    # A digit at its own size is the stored one, so that a scene can be traced back to its split.
    digit = test.images[0, ..., 0]
    rows, columns = (np.flatnonzero((digit > 2).any(axis=axis)) for axis in (1, 0))
    expected = np.rint(digit[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1] * (255 / 16))
    np.testing.assert_array_equal(digit_scenes._scaled(digit, 8), expected)


def test_batches_flips_and_evaluation():
    dataset = data.load({**SCENES, "augment": ("flip",)})
    plain = data.load(SCENES)
    seen = [0, 0]
    for k in range(6):
        batch, other = (data.train_batches(one, 4, seed=0)[k] for one in (dataset, plain))
        assert {name: (value.shape, str(value.dtype)) for name, value in batch.items()} == {
            "image": ((4, 64, 64, 1), "float32"),
            "boxes": ((4, 5, 4), "float32"),
            "label": ((4, 5), "int32"),
            "ignored": ((4, 5), "bool"),
        }
        np.testing.assert_array_equal(batch["label"], other["label"])
        for row in range(4):
            flipped = not np.array_equal(batch["image"][row], other["image"][row])
            seen[flipped] += 1
            there = other["label"][row] != NO_BOX
            expected = other["boxes"][row].copy()
            if flipped:
                np.testing.assert_array_equal(batch["image"][row], other["image"][row][:, ::-1])
                expected[there] = np.stack(
                    [expected[there, i] if i % 2 == 0 else 64 - expected[there, 4 - i] for i in range(4)], 1
                )
            np.testing.assert_array_equal(batch["boxes"][row], expected)
    assert min(seen) > 3
    parts = [data.train_batches(plain, 4, 0, process, 2)[2]["boxes"] for process in (0, 1)]
    np.testing.assert_array_equal(np.concatenate(parts), data.train_batches(plain, 4, 0)[2]["boxes"])
    batches = list(data.eval_batches(plain, "test", 5))
    assert [batch["mask"].sum() for batch in batches] == [5, 5, 2]
    np.testing.assert_array_equal(batches[2]["boxes"][2], batches[2]["boxes"][1])
    with pytest.raises(UsageError, match=r"eval split is 'val'; 'digit_scenes' has 'test'"):
        next(iter(data.eval_batches(plain, "val", 5)))


def test_fingerprint_sees_the_scenes():
    prints = [
        data.fingerprint(data.load({**SCENES, **more}), 4, 0) for more in ({}, {"overlap": 0.5}, {"max_boxes": 4})
    ]
    assert prints[0] == data.fingerprint(data.load(SCENES), 4, 0)
    assert len({one["train_content"] for one in prints}) == 3 and "normalization" in prints[0]


def test_mirrored_twice_is_the_same():
    scenes = data.load({**SCENES, "name": "synthetic_boxes", "max_boxes": 9}).train.scenes(np.arange(8))
    assert scenes.boxes.shape == (8, 9, 4) and (scenes.labels != NO_BOX).sum(axis=1).max() <= 5
    rows = np.arange(8) % 2 == 0
    once = mirrored(scenes, rows)
    assert not np.array_equal(once.boxes[0], scenes.boxes[0])
    for one, other in zip(mirrored(once, rows), scenes, strict=True):
        np.testing.assert_array_equal(one, other)
    for row, (y0, x0, y1, x1), _ in real(once):  # a rectangle may be covered by another, but never is it noise
        assert once.images[row, y0:y1, x0:x1].min() >= 64


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"augment": ("crop",)}, "has boxes; only 'flip' moves them"),
        ({"central_crop": 0.5}, "has boxes; leave it at 1"),
        ({"image_shape": (64, 64, 3)}, "has images of 1 channels"),
        ({"image_shape": (20, 64, 1)}, "with sides of at least 24 pixels"),
        ({"max_boxes": 0}, "data.max_boxes is 0; it must be at least 1"),
        ({"overlap": 1.5}, "data.overlap is 1.5; it must be a number above 0 and at most 1"),
        (
            {"name": "digits", "max_boxes": 7, "num_train": 9},
            "data.max_boxes is 7, which is for data.name='digit_scenes'",
        ),
        ({"name": "voc", "overlap": 0.2}, "data.overlap is 0.2, which is for data.name='digit_scenes', not 'voc'"),
        ({"batch_size": 41}, "more than the 40 training examples"),
    ],
)
def test_refused(changes, message):
    with pytest.raises(UsageError, match=message) as caught:
        data.load({**SCENES, **changes})
    assert "\n" not in str(caught.value)


GOOD = [((0.0, 0.0, 0.5, 1.0), 3, False), ((0.25, 0.5, 1.0, 0.75), 19, True)]


def write(root, **splits):
    rng = np.random.default_rng(0)
    sizes = ((10, 20), (16, 16), (30, 12))
    found = {}
    for split, count in {"train": 3, "validation": 2, "test": 2}.items():
        pixels = [rng.integers(0, 256, (*sizes[i % 3], 3), dtype=np.uint8) for i in range(count)]
        found[split] = [(image, splits.get(split, GOOD)) for image in pixels]
    write_boxes(root / "voc" / "2007" / "5.0.0", found)
    return found


def load_voc(root, **changes):
    return data.load(
        {"name": "voc", "dir": str(root), "batch_size": 2, "image_shape": (32, 40, 3), "max_boxes": 3, **changes}
    )


def test_voc(tmp_path):
    contents = write(tmp_path)
    streamed, held = (load_voc(tmp_path, in_memory=in_memory, augment=("flip",)) for in_memory in (False, True))
    assert (streamed.num_train, streamed.num_classes, streamed.input_shape) == (5, 20, (32, 40, 3))
    scenes = streamed.train.scenes(np.array([4, 0]))
    np.testing.assert_array_equal(scenes.boxes[1], [[0, 0, 16, 40], [8, 20, 32, 30], [0, 0, 0, 0]])
    np.testing.assert_array_equal(scenes.labels[0], [3, 19, NO_BOX])
    np.testing.assert_array_equal(scenes.ignored[0], [False, True, False])
    source = contents["validation"][1][0]  # the fifth: validation is trained on too
    assert abs(scenes.images[0].mean() - source.mean()) < 3
    for split in ("train", "test"):
        one, other = (d.train if split == "train" else d.eval[split] for d in (streamed, held))
        for a, b in zip(one.scenes(np.arange(len(one))), other.scenes(np.arange(len(other))), strict=True):
            np.testing.assert_array_equal(a, b)
    assert data.fingerprint(streamed, 2, 0) == data.fingerprint(held, 2, 0)


@pytest.mark.parametrize(
    ("box", "message"),
    [
        (((0.0, 0.0, 0.5, 1.2), 3, False), r"box 0 of example [0-9] of 'train' in 'voc/2007', \(0, 0, 16, 48\)"),
        (((0.5, 0.2, 0.5, 0.4), 3, False), "is empty: y1 must be above y0, and x1 above x0"),
        (((0.6, 0.2, 0.5, 0.4), 3, False), "is empty"),
        (((0.0, 0.0, float("nan"), 1.0), 3, False), "is not finite"),
        (((0.0, 0.0, 0.5, 1.0), 20, False), "has the label 20; allowed are 0 … 19"),
    ],
)
def test_broken_boxes(tmp_path, box, message):
    write(tmp_path, train=[box])
    dataset = load_voc(tmp_path, in_memory=False)
    with pytest.raises(UsageError, match=message) as caught, data.train_iterator(dataset, 2, seed=0) as batches:
        for _ in range(3):
            next(batches)
    assert "\n" not in str(caught.value)


def test_too_many_boxes_and_missing_sets(tmp_path):
    start = time.monotonic()
    with pytest.raises(UsageError, match=r"'voc/2007' is not prepared in .*tfds.data_source\('voc/2007'") as caught:
        load_voc(tmp_path)
    assert "\n" not in str(caught.value) and time.monotonic() - start < 2
    write(tmp_path)
    with pytest.raises(
        UsageError, match=r"data.max_boxes is 1, but 'voc/2007' has an image with 2 boxes; give at least 2"
    ):
        load_voc(tmp_path, in_memory=True, max_boxes=1)
    bare = tmp_path / "other"
    pixels = np.zeros((4, 4, 3), np.uint8)
    write_boxes(bare / "voc" / "2007" / "5.0.0", {"train": [(pixels, GOOD)], "test": [(pixels, GOOD)]})
    with pytest.raises(UsageError, match="has the splits train, test; 'validation' is needed"):
        load_voc(bare)
    plain = tmp_path / "plain"
    write_boxes(
        plain / "voc" / "2007" / "5.0.0",
        {split: [(pixels, GOOD)] for split in ("train", "validation", "test")},
        fields=("bbox", "label"),
    )
    with pytest.raises(
        UsageError, match="images with boxes need an 'image' and 'objects' with bbox, label, is_difficult"
    ):
        voc.open_set(str(plain))


def test_check_boxes_passes_what_is_right():
    scenes = data.load({**SCENES, "name": "synthetic_boxes"}).train.scenes(np.arange(4))
    assert isinstance(scenes, Scenes)
    for boxes, labels in zip(scenes.boxes, scenes.labels, strict=True):
        check_boxes(boxes[labels >= 0], labels[labels >= 0], (32, 32), 10, "a scene")
