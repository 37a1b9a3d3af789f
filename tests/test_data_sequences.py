"""Pixel sequences of the digits and of prepared image sets, and the generated time series."""

import numpy as np
import pytest
from prepared_set import write_set

from qtrain import data
from qtrain.data import digits, sequences
from qtrain.errors import UsageError


def test_sequential_digits_are_the_digits_row_by_row():
    images, pixels = data.load({"name": "digits"}), sequences.sequential(data.load({"name": "digits"}))
    assert (pixels.name, pixels.input_shape, pixels.num_classes) == ("sequential_digits", (64, 1, 1), 10)
    assert (pixels.num_train, len(pixels.eval["test"])) == (1437, 360)
    batch, flat = (data.train_batches(one, 7, seed=3)[2] for one in (images, pixels))
    np.testing.assert_array_equal(flat["image"][:, :, 0], batch["image"].reshape(7, 64, 1))
    np.testing.assert_array_equal(flat["label"], batch["label"])
    # The ninth step is the first pixel of the second row.
    stored, _ = digits.load()[0].gather(np.arange(3))
    np.testing.assert_array_equal(pixels.train.gather(np.arange(3))[0][:, 8, 0, 0], stored[:, 1, 0, 0])
    evaluated = list(data.eval_batches(pixels, "test", 200))
    assert [one["image"].shape for one in evaluated] == [(200, 64, 1, 1)] * 2
    assert sum(one["mask"].sum() for one in evaluated) == 360


@pytest.mark.parametrize("in_memory", [True, False])
def test_sequences_of_a_prepared_set(tmp_path, in_memory):
    contents = write_set(tmp_path / "tiny" / "1.0.0", {"train": 6, "test": 4})
    dataset = data.load({"name": "tfds:tiny", "dir": str(tmp_path), "batch_size": 2, "in_memory": in_memory})
    pixels = sequences.sequential(dataset)
    assert pixels.input_shape == (20, 1, 3) and (pixels.mean, pixels.std) == (dataset.mean, dataset.std)
    gathered, labels = pixels.eval["test"].gather(np.arange(4))
    np.testing.assert_array_equal(gathered, contents["test"][0].reshape(4, 20, 1, 3))
    np.testing.assert_array_equal(labels, contents["test"][1])


def test_a_fingerprint_tells_sequences_from_images():
    images = data.load({"name": "digits"})
    before, after = (data.fingerprint(one, 8, 0) for one in (images, sequences.sequential(images)))
    assert before != after and before["train_content"] == after["train_content"]


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"name": "synthetic_text", "num_train": 8, "num_test": 8, "batch_size": 2}, "which has no images"),
        ({"name": "digits", "augment": ("flip",)}, r"data\.augment is \('flip',\).*leave it at \(\)"),
    ],
)
def test_what_is_no_set_of_plain_images_is_refused(config, message):
    with pytest.raises(UsageError, match=message) as error:
        sequences.sequential(data.load(config))
    assert "\n" not in str(error.value)


def test_cylinder_bell_funnel_has_its_shapes():
    source = sequences.cylinder_bell_funnel(30_000, seed=0, split=0)
    series, labels = source.gather(np.arange(30_000))
    assert series.shape == (30_000, *sequences.CYLINDER_BELL_FUNNEL_SHAPE) and series.dtype == np.float32
    assert np.bincount(labels).tolist() == [10_000] * 3
    # The mean shape of a class: E = 6·P(a ≤ t ≤ b)·ramp; before t = 16 nothing but noise, which has unit variance.
    means = np.array([series[labels == label, :, 0, 0].mean(0) for label in range(3)])
    np.testing.assert_allclose(means[:, :15], 0, atol=0.05)
    np.testing.assert_allclose(series[:, :15].var(), 1.0, atol=0.01)
    np.testing.assert_allclose(means[0, 33:46], 6.0, atol=0.06)  # t = 34 … 46: within every cylinder
    assert np.all(np.diff(means[1, 33:46:4]) > 0) and np.all(np.diff(means[2, 33:46:4]) < 0)
    np.testing.assert_allclose(means[1] + means[2], means[0], atol=0.2)  # the ramps add up to the plateau


def test_cylinder_bell_funnel_is_reproducible_standardised_and_split():
    first, again, other = (sequences.cylinder_bell_funnel(60, 0, split) for split in (0, 0, 1))
    np.testing.assert_array_equal(first.images, again.images)
    np.testing.assert_array_equal(first.labels, again.labels)
    assert np.abs(first.images - other.images).min() > 0
    large = sequences.cylinder_bell_funnel(20_000, 1, 0).images
    np.testing.assert_allclose(large.mean(), sequences.CYLINDER_BELL_FUNNEL_MEAN, atol=0.02)
    np.testing.assert_allclose(large.std(), sequences.CYLINDER_BELL_FUNNEL_STD, atol=0.02)


def test_time_series_go_through_the_pipeline():
    dataset = sequences.load_cylinder_bell_funnel(num_train=96, num_test=30)
    assert (dataset.input_shape, dataset.num_classes, dataset.num_train) == ((128, 1, 1), 3, 96)
    batch = data.train_batches(dataset, 96, seed=0)[0]
    assert batch["image"].shape == (96, 128, 1, 1) and batch["image"].dtype == np.float32
    np.testing.assert_allclose(batch["image"].mean(), 0, atol=0.1)
    np.testing.assert_allclose(batch["image"].std(), 1, atol=0.1)
    assert data.fingerprint(dataset, 8, 0) == data.fingerprint(dataset, 8, 0)
