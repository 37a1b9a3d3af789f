"""Metrics: averages over the steps since the last row, and over the steps whose bits changed."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qtrain.metrics import bits_vector, cross_entropy, train_metrics
from qtrain.precision import Precision

AVERAGES = train_metrics(("accuracy",))
NAN = float("nan")


def averages(losses, changed, ratios):
    def one(loss, changed, ratio):
        return AVERAGES.single_from_model_output(
            loss=loss,
            accuracy=loss / 2,
            penalty=loss / 4,
            grad_norm=loss * 2,
            update_norm=loss * 3,
            grad_norm_ratio=ratio,
            update_norm_ratio=ratio + 1,
            changed=changed,
            bits_changed=changed.astype(jnp.float32),
        )

    total = AVERAGES.empty()
    for values in zip(losses, changed, ratios, strict=True):
        total = jax.jit(lambda total, *values: total.merge(one(*values)))(total, *map(jnp.asarray, values))
    return {name: float(value) for name, value in total.compute().items()}


def test_averages():
    found = averages([1.0, 2.0, 6.0], [False, True, True], [9.0, 0.5, 2.5])
    assert found == {
        "loss": 3.0,
        "accuracy": 1.5,
        "penalty": 0.75,
        "grad_norm": 6.0,
        "update_norm": 9.0,
        "grad_norm_ratio_on_change": 1.5,
        "update_norm_ratio_on_change": 2.5,
        "bits_changes": pytest.approx(2 / 3),
    }


def test_no_change_has_no_ratio():
    found = averages([1.0, 2.0], [False, False], [3.0, 4.0])
    assert math.isnan(found["grad_norm_ratio_on_change"]) and math.isnan(found["update_norm_ratio_on_change"])
    assert found["bits_changes"] == 0


def test_a_ratio_with_nothing_to_compare_is_left_out():
    # Gradient accumulation: between two updates the update is zero, and its ratio NaN.
    found = averages([1.0, 2.0, 3.0], [True, True, True], [NAN, 0.5, float("inf")])
    assert found["grad_norm_ratio_on_change"] == 0.5
    assert found["bits_changes"] == 1


def test_bits_vector():
    np.testing.assert_array_equal(bits_vector(Precision(weights=4, acts=None, grads=jnp.float32(8))), [4, 32, 8])
    assert bits_vector(Precision()).dtype == jnp.float32


def test_cross_entropy_against_float64():
    rng = np.random.default_rng(0)
    logits, labels = rng.normal(0, 20, (4, 7, 11)), rng.integers(0, 11, (4, 7))
    shifted = logits - logits.max(-1, keepdims=True)
    log_softmax = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
    expected = -np.take_along_axis(log_softmax, labels[..., None], -1)[..., 0]
    found = cross_entropy(jnp.asarray(logits, jnp.float32), jnp.asarray(labels))
    assert found.shape == (4, 7) and found.dtype == jnp.float32
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)
    assert cross_entropy(jnp.asarray(logits, jnp.bfloat16), jnp.asarray(labels)).dtype == jnp.float32


def test_cross_entropy_of_huge_logits_is_finite():
    logits = jnp.array([[1e30, 0.0], [0.0, 1e30]])
    np.testing.assert_array_equal(cross_entropy(logits, jnp.array([0, 0])), np.float32([0, 1e30]))
