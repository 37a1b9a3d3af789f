"""Augmentation and normalisation against slow references, one image at a time."""

import numpy as np
import pytest

from qtrain.data import augment as module
from qtrain.data.randomness import below, epoch_phase, example_draws


def reference(image, words, names, padding):
    """Plain Python: padded by hand, pixel by pixel."""
    height, width, _ = image.shape
    result = np.zeros_like(image)
    top, left, mirrored = 0, 0, False
    if "crop" in names:
        top, left = ((int(word) >> 32) * (2 * padding + 1) >> 32 for word in words[:2])
        top, left = top - padding, left - padding
    if "flip" in names:
        mirrored = int(words[2]) >> 63 == 1
    for y in range(height):
        for x in range(width):
            source_x = (width - 1 - x if mirrored else x) + left
            if 0 <= y + top < height and 0 <= source_x < width:
                result[y, x] = image[y + top, source_x]
    return result


@pytest.mark.parametrize("names", [(), ("crop",), ("flip",), ("crop", "flip")])
@pytest.mark.parametrize(("shape", "padding"), [((8, 8, 1), 4), ((5, 7, 3), 2), ((1, 2, 4), 3)])
def test_augment_equals_reference(names, shape, padding):
    rng = np.random.default_rng(0)
    images = rng.integers(1, 256, size=(40, *shape), dtype=np.uint8)
    before = images.copy()
    words = example_draws(seed=1, first=17, count=40)
    expected = np.stack([reference(image, row, names, padding) for image, row in zip(images, words, strict=True)])
    actual = module.augment(images, words, names, padding)
    np.testing.assert_array_equal(actual, expected)
    np.testing.assert_array_equal(images, before)  # the source's pixels are never written
    assert (not names) == np.array_equal(actual, before)


def test_draws_are_a_function_of_position():
    whole = example_draws(seed=9, first=0, count=100)
    np.testing.assert_array_equal(example_draws(9, 40, 10), whole[40:50])
    assert len(np.unique(whole)) == whole.size
    assert not np.intersect1d(whole, example_draws(10, 0, 100)).size
    assert len({epoch_phase(9, epoch, 1000) for epoch in range(50)}) > 40


@pytest.mark.parametrize("high", [1, 2, 9, 1000])
def test_below_is_uniform(high):
    extremes = np.array([0, 2**64 - 1], dtype=np.uint64)
    np.testing.assert_array_equal(below(extremes, high), [0, high - 1])
    values = below(example_draws(0, 0, 20_000).ravel(), high)
    assert values.min() >= 0 and values.max() < high
    counts = np.bincount(values, minlength=high)
    expected = values.size / high
    # Chi-squared within 5 standard deviations of its mean.
    assert np.sum((counts - expected) ** 2) / expected <= high - 1 + 5 * np.sqrt(2 * high)


@pytest.mark.parametrize(
    ("shape", "max_value", "mean", "std"),
    [((3, 8, 8, 1), 16.0, (0.3054,), (0.3761,)), ((2, 5, 7, 3), 255.0, (0.49, 0.48, 0.45), (0.25, 0.24, 0.26))],
)
def test_normalize_equals_float64(shape, max_value, mean, std):
    images = np.random.default_rng(0).integers(0, int(max_value) + 1, size=shape, dtype=np.uint8)
    actual = module.normalize(images, max_value, mean, std)
    assert actual.dtype == np.float32
    expected = (images.astype(np.float64) / max_value - np.array(mean)) / np.array(std)
    np.testing.assert_allclose(actual, expected, rtol=0, atol=5e-7)


def test_channel_statistics_standardise():
    images = np.random.default_rng(0).integers(0, 200, size=(50, 6, 6, 3), dtype=np.uint8)
    images[..., 2] = 51
    mean, std = module.channel_statistics(images, 255.0)
    assert mean[2] == 0.2 and std[2] == 1.0  # a constant channel is centred, not divided by zero
    normalized = module.normalize(images, 255.0, mean, std)
    np.testing.assert_allclose(normalized[..., :2].mean(axis=(0, 1, 2)), 0, atol=1e-3)
    np.testing.assert_allclose(normalized[..., :2].std(axis=(0, 1, 2)), 1, atol=1e-3)
