"""Images of many sizes: windows against slow references, the stream through TFDS records, and what is refused."""

import json
import math

import numpy as np
import pytest
from prepared_set import write_set

from qtrain import data
from qtrain.data import resize
from qtrain.data.randomness import example_draws, unit
from qtrain.errors import UsageError

SIZES = [(5, 9), (12, 7), (8, 8), (30, 11), (6, 21)]


def any_images(count, channels=3, seed=0):
    """Smooth ones, so that neighbouring windows differ little, of five sizes."""
    rng = np.random.default_rng(seed)
    result = []
    for i in range(count):
        height, width = SIZES[i % len(SIZES)]
        coarse = rng.integers(0, 256, size=(3, 3, channels)).astype(float)
        rows, columns = np.linspace(0, 2, height), np.linspace(0, 2, width)
        y, x = np.minimum(rows.astype(int), 1), np.minimum(columns.astype(int), 1)
        v, u = (rows - y)[:, None, None], (columns - x)[None, :, None]
        corners = [coarse[y + a][:, x + b] * abs(1 - a - v) * abs(1 - b - u) for a in (0, 1) for b in (0, 1)]
        result.append(np.clip(sum(corners), 0, 255).astype(np.uint8))
    return result


def triangle(image, box, shape):
    """Bilinear resampling by its definition: a triangle as wide as the larger of a source and a target pixel."""
    out = image.astype(np.float64)
    for axis, (low, high) in enumerate(((box[1], box[3]), (box[0], box[2]))):
        size, step = image.shape[axis], (high - low) / shape[axis]
        support = max(step, 1.0)
        centres = low + (np.arange(shape[axis]) + 0.5) * step
        first = np.maximum((centres - support + 0.5).astype(int), 0)
        last = np.minimum((centres + support + 0.5).astype(int), size)
        pixels = np.arange(size)
        weights = np.maximum(1 - np.abs(pixels + 0.5 - centres[:, None]) / support, 0)
        weights *= (pixels >= first[:, None]) & (pixels < last[:, None])
        weights /= weights.sum(axis=1, keepdims=True)
        out = np.moveaxis(np.tensordot(weights, out, (1, axis)), 0, axis)
    return out


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
@pytest.mark.parametrize("shape", [(4, 4), (13, 5), (40, 40)])
def test_resized_equals_reference(channels, shape):
    for image in any_images(5, channels):
        size = image.shape[:2]
        for box in (resize.central_box(size, shape, 0.9), (1, 2, 5, 5)):
            found = resize.resized(image, box, shape)
            assert found.shape == (*shape, channels) and found.dtype == np.uint8
            # Pillow rounds weights to 22 bits and the values between its two passes to whole ones.
            np.testing.assert_allclose(found, triangle(image, box, shape), atol=1.01)


@pytest.mark.parametrize("size", [(200, 400), (400, 200), (160, 160), (7, 3)])
@pytest.mark.parametrize("shape", [(100, 100), (64, 128)])
@pytest.mark.parametrize("share", [1.0, 0.875, 0.3])
def test_central_box(size, shape, share):
    left, top, right, bottom = resize.central_box(size, shape, share)
    height, width = size
    assert 0 <= left < right <= width and 0 <= top < bottom <= height
    assert math.isclose((right - left) / (bottom - top), shape[1] / shape[0])
    assert math.isclose(max((right - left) / width, (bottom - top) / height), share), "as large as fits"
    assert math.isclose(left + right, width) and math.isclose(top + bottom, height), "in the middle"


def test_whole_image_at_its_own_size_is_itself():
    for image in any_images(5):
        size = image.shape[:2]
        np.testing.assert_array_equal(resize.resized(image, resize.central_box(size, size, 1.0), size), image)


@pytest.mark.parametrize("least", [0.08, 0.35, 1.0])
@pytest.mark.parametrize("size", [(200, 400), (160, 160), (1, 1), (1000, 3)])
def test_random_boxes(size, least):
    height, width = size
    words = example_draws(seed=3, first=0, count=4000)
    boxes = np.array([resize.random_box(size, row, least) for row in words])
    left, top, right, bottom = boxes.T
    assert left.min() >= 0 and top.min() >= 0 and right.max() <= width and bottom.max() <= height
    assert np.all(right > left) and np.all(bottom > top) and np.array_equal(boxes, boxes.astype(int))
    if size != (160, 160):
        return
    wide, tall = right - left, bottom - top
    whole = (wide < width) & (tall < height)
    ratio = (wide / tall)[whole]
    if least == 1.0:
        assert not np.any((wide < 0.86 * width) & (tall < 0.86 * height))  # 3/4 of a square: one side stays whole
        return
    assert ratio.min() > 0.75 - 0.03 and ratio.max() < 4 / 3 + 0.04 and abs(np.log(ratio).mean()) < 0.02
    assert ratio.min() < 0.78 and ratio.max() > 1.29
    share = wide * tall / (height * width)
    assert share.min() > 0.98 * least and (share < least + 0.1 * (1 - least)).mean() > 0.07
    small = share < 0.5  # none of these was shortened, so their areas are uniform
    assert abs(share[small].mean() - (least + 0.5) / 2) < 0.02
    free = (height - tall)[small] + 1
    assert abs((top[small] / free).mean() - 0.5) < 0.03 and (top[small] == 0).any()


def test_area_and_place_are_independent():
    words = example_draws(seed=3, first=0, count=20_000)
    upper = (words >> np.uint64(32)).astype(float) / 2**32
    for a, b in (
        (upper[:, 0], unit(words[:, 0])),
        (unit(words[:, 0]), unit(words[:, 1])),
        (upper[:, 2], unit(words[:, 1])),
    ):
        assert abs(np.corrcoef(a, b)[0, 1]) < 0.03
        assert 0 <= b.min() < b.max() < 1 and abs(b.mean() - 0.5) < 0.01


@pytest.fixture
def root(tmp_path):
    images = {"train": any_images(23, seed=1), "validation": any_images(7, seed=2)}
    write_set(
        tmp_path / "tiny" / "1.0.0",
        {split: len(found) for split, found in images.items()},
        stored_shape=(-1, -1, 3),
        images=images,
    )
    return tmp_path


def load(root, **changes):
    config = {"name": "tfds:tiny", "dir": str(root), "batch_size": 4, "image_shape": (6, 5, 3), "central_crop": 0.875}
    return data.load({**config, **changes})


def pixels_of(dataset, batch):
    """Whole numbers again, from what `normalize` made."""
    return np.rint((batch["image"] * np.array(dataset.std) + np.array(dataset.mean)) * 255).astype(np.uint8)


@pytest.mark.parametrize("in_memory", [False, True])
def test_evaluation_sees_the_middle(root, in_memory):
    dataset = load(root, in_memory=in_memory)
    assert dataset.input_shape == (6, 5, 3) and list(dataset.eval) == ["validation", "test"]
    expected = [
        resize.resized(x, resize.central_box(x.shape[:2], (6, 5), 0.875), (6, 5)) for x in any_images(7, seed=2)
    ]
    found = np.concatenate([pixels_of(dataset, batch) for batch in data.eval_batches(dataset, "test", 4)])[:7]
    np.testing.assert_array_equal(found, expected)
    assert data.fingerprint(dataset, 4, 0) == data.fingerprint(load(root, in_memory=not in_memory), 4, 0)
    for k in range(3):
        mine, other = (data.train_batches(d, 4, seed=0)[k] for d in (dataset, load(root, in_memory=not in_memory)))
        np.testing.assert_array_equal(mine["image"], other["image"])


def test_training_sees_windows_of_what_is_stored(root):
    dataset = load(root, in_memory=False, augment=("resized_crop", "flip"), crop_area=0.3)
    assert dataset.augment == ("resized_crop", "flip") and "augment resized_crop(0.3), flip" in dataset.describe()
    stored, batches = any_images(23, seed=1), data.train_batches(dataset, 4, seed=5)
    order = np.concatenate([data.pipeline.epoch_order(23, 5, epoch) for epoch in (0, 1)])
    words = example_draws(5, 0, 46)
    mirrored = 0
    for k in (0, 4, 5, 9):  # over the end of an epoch
        found = pixels_of(dataset, batches[k])
        for row in range(4):
            place = 4 * k + row
            image = stored[order[place]]
            box = resize.random_box(image.shape[:2], words[place], 0.3)
            expected = resize.resized(image, box, (6, 5))
            flip = int(words[place, 2]) >> 63 == 1
            mirrored += flip
            np.testing.assert_array_equal(found[row], expected[:, ::-1] if flip else expected)
    assert 0 < mirrored < 16
    plain = data.train_batches(load(root, in_memory=False), 4, seed=5)
    assert not np.array_equal(plain[0]["image"], batches[0]["image"])


def test_windows_are_a_function_of_the_step(root):
    one, four = (
        load(root, in_memory=False, augment=("resized_crop",), workers=workers, prefetch=2 * workers)
        for workers in (0, 4)
    )
    batches = data.train_batches(one, 4, seed=0)
    with data.train_iterator(four, 4, seed=0, start_step=3) as iterator:
        for k in range(3, 15):
            np.testing.assert_array_equal(next(iterator)["image"], batches[k]["image"])
    parts = [data.train_batches(one, 4, seed=0, process_index=p, process_count=2)[6]["image"] for p in (0, 1)]
    np.testing.assert_array_equal(np.concatenate(parts), batches[6]["image"])


@pytest.mark.parametrize("in_memory", [False, True])
def test_windows_of_images_of_one_size(tmp_path, in_memory):
    contents = write_set(tmp_path / "tiny" / "1.0.0", {"train": 8, "test": 4}, (9, 7, 3))
    dataset = load(tmp_path, image_shape=(), central_crop=1.0, in_memory=in_memory, augment=("resized_crop",))
    found = pixels_of(dataset, data.train_batches(dataset, 8, seed=0)[0])
    order, words = data.pipeline.epoch_order(8, 0, 0), example_draws(0, 0, 8)
    for row in range(8):
        image = contents["train"][0][order[row]]
        box = resize.random_box((9, 7), words[row], 0.08)
        np.testing.assert_array_equal(found[row], resize.resized(image, box, (9, 7)))


def test_generated_images_are_cropped_too():
    config = {"name": "imagenette", "image_shape": (12, 10, 3), "batch_size": 8, "augment": ("resized_crop",)}
    dataset = data.load({**config, "in_memory": False, "central_crop": 0.875}, smoke=True)
    assert dataset.input_shape == (12, 10, 3) and dataset.num_classes == 10 and dataset.name == "smoke:imagenette"
    plain = data.load({**config, "augment": ()}, smoke=True)
    mine, other = (pixels_of(d, data.train_batches(d, 8, seed=0)[0]) for d in (dataset, plain))
    assert mine.shape == other.shape == (8, 12, 10, 3) and not np.array_equal(mine, other)
    assert data.load({"name": "imagenette", "batch_size": 8}, smoke=True).input_shape == (128, 128, 3)
    assert data.load({"name": "mnist", "batch_size": 8, "image_shape": (14, 14, 1)}, smoke=True).input_shape == (
        14,
        14,
        1,
    )


def test_imagenette_by_its_name(tmp_path):
    images = {"train": any_images(6), "validation": any_images(5)}
    folder = tmp_path / "imagenette" / "160px-v2" / "1.0.0"
    write_set(folder, {"train": 6, "validation": 5}, stored_shape=(-1, -1, 3), images=images, image_format="JPEG")
    dataset = data.load({"name": "imagenette", "dir": str(tmp_path), "batch_size": 2})
    assert dataset.input_shape == (128, 128, 3) and dataset.name == "imagenette/160px-v2"
    assert dataset.mean == (0.485, 0.456, 0.406)
    images, _ = dataset.eval["test"].gather(np.arange(5))
    for found, original in zip(images, any_images(5), strict=True):
        assert abs(found.mean() - original.mean()) < 25


def test_stored_grey_images_among_colours(root, tmp_path):
    folder = tmp_path / "grey" / "1.0.0"
    grey = any_images(4, channels=1)
    write_set(folder, {"train": 4, "test": 4}, stored_shape=(-1, -1, 3), images={"train": grey, "test": grey})
    images, _ = load(tmp_path, name="tfds:grey", in_memory=False).train.gather(np.arange(4))
    np.testing.assert_array_equal(images[..., 0], images[..., 2])
    box = resize.central_box(grey[1].shape[:2], (6, 5), 0.875)
    np.testing.assert_array_equal(images[1, ..., :1], resize.resized(grey[1], box, (6, 5)))


CHANGES = [
    ({"central_crop": 1.0}, {"train_content", "eval_content"}),
    ({"image_shape": (5, 6, 3)}, {"input_shape", "train_content", "eval_content"}),
    ({"crop_area": 0.5}, {"data.crop_area"}),
    ({"augment": ("flip",)}, {"data.augment", "data.crop_area"}),
]


@pytest.mark.parametrize(("changes", "keys"), CHANGES, ids=[",".join(change) for change, _ in CHANGES])
def test_fingerprint_knows_the_transforms(root, changes, keys):
    config = {"in_memory": False, "augment": ("resized_crop", "flip")}
    before, after = (data.fingerprint(load(root, **{**config, **more}), 4, 0) for more in ({}, changes))
    differing = {key for key in {*before, *after} if before.get(key) != after.get(key)}
    assert keys <= differing and differing <= keys | {"normalization"}
    data.check_fingerprint(json.loads(json.dumps(before)), before)
    with pytest.raises(UsageError, match="other data"):
        data.check_fingerprint(before, after)


WRONG = [
    ("no shape", {"image_shape": ()}, ["data.image_shape is not set", "'tiny'", "(224, 224, 3)"]),
    ("other channels", {"image_shape": (6, 5, 1)}, ["data.image_shape is (6, 5, 1)", "3 channels", "give (6, 5, 3)"]),
    ("held resized", {"augment": ("resized_crop",)}, ["data.in_memory is True", "data.in_memory=False"]),
    ("two crops", {"augment": ("crop", "resized_crop")}, ["data.augment", "one of 'crop' and 'resized_crop'"]),
    ("no area", {"crop_area": 0.0}, ["data.crop_area is 0.0", "above 0 and at most 1"]),
    ("area in words", {"crop_area": "all"}, ["data.crop_area is 'all'", "number"]),
    ("more than the image", {"central_crop": 1.5}, ["data.central_crop is 1.5", "at most 1"]),
    ("central crop as a switch", {"central_crop": True}, ["data.central_crop is True", "number"]),
    ("digits resized", {"name": "digits", "central_crop": 1.0}, ["data.image_shape", "'digits' are not resized"]),
    ("digits cropped", {"name": "digits", "image_shape": ()}, ["data.central_crop is 0.875", "leave it at 1"]),
    ("mnist in colour", {"name": "mnist"}, ["data.image_shape is (6, 5, 3)", "1 channels", "give (6, 5, 1)"]),
]


@pytest.mark.parametrize(("changes", "parts"), [case[1:] for case in WRONG], ids=[case[0] for case in WRONG])
def test_wrong_value(root, changes, parts):
    with pytest.raises(UsageError) as raised:
        load(root, **changes)
    assert "\n" not in str(raised.value)
    for part in parts:
        assert part in str(raised.value)


def test_central_crop_of_images_that_keep_their_size(tmp_path):
    write_set(tmp_path / "tiny" / "1.0.0", {"train": 8, "test": 4}, (6, 5, 3))
    for shape in ((), (6, 5, 3)):
        with pytest.raises(UsageError, match=r"data\.central_crop is 0\.875.*keep their size \(6, 5, 3\)"):
            load(tmp_path, image_shape=shape)
    assert load(tmp_path, image_shape=(3, 3, 3)).input_shape == (3, 3, 3)


def test_damaged_image_in_a_stream(root):
    dataset = load(root, in_memory=False)
    path = next((root / "tiny" / "1.0.0").glob("tiny-train*"))
    before, *images = path.read_bytes().split(b"\x89PNG")
    images[2] = bytes(40) + images[2][40:]
    path.write_bytes(b"\x89PNG".join([before, *images]))
    words = example_draws(0, 0, 23)
    for gather in (dataset.train.gather, lambda rows: dataset.train.gather_windows(rows, words, 0.1)):
        with pytest.raises(UsageError, match="cannot be read"):
            gather(np.arange(23))


def test_source_protocols(root):
    dataset = load(root, in_memory=False)
    assert isinstance(dataset.train, data.WindowedSource)
    held = load(root, in_memory=True)
    assert isinstance(held.train, data.ImageSource) and not isinstance(held.train, data.WindowedSource)
