"""ALRS against numpy: its factors, its mean, its rate for each reading of the sign, and the transform."""

import doctest
import importlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from qtrain.errors import UsageError
from qtrain.methods.alrs import SIGNS, alrs_rate, mean_clipped_gradient, scale_by_alrs, width_factor


def reference_factor(width, high):
    delta = high - width
    return 10 ** (-delta / 2) if delta % 2 == 0 else 5 * 10 ** (-(delta + 1) / 2)


def reference_mean(gradients):
    return np.mean([min(np.max(np.abs(np.clip(g, -1, 1))), 1) for g in gradients])


def reference_rate(lr, mean, width, high, sign):
    bracket = {"clamp": max(lr - mean, 0), "one_minus": lr * (1 - mean), "signed": lr - mean}[sign]
    return reference_factor(width, high) * bracket


def gradients_of(size):
    rng = np.random.default_rng(0)
    return {
        "layers_0": {"scale": jnp.asarray(size * rng.standard_normal(), jnp.float32)},
        "layers_1": {"scale": jnp.asarray(size * rng.standard_normal((1, 4)), jnp.float32)},
        "table": jnp.zeros(4, jnp.float32).at[2].set(-size),
    }


def test_factors():
    np.testing.assert_allclose([width_factor(b, 8) for b in (8, 6, 4, 2)], [1, 0.1, 0.01, 0.001], rtol=1e-7)
    np.testing.assert_allclose([width_factor(b, 4) for b in (4, 3, 2)], [1, 0.5, 0.1], rtol=1e-7)
    traced = jax.jit(lambda b: width_factor(b, 8))
    for width in range(1, 9):
        assert traced(jnp.int32(width)) == traced(jnp.float32(width)) == width_factor(width, 8)
        np.testing.assert_allclose(width_factor(width, 8), reference_factor(width, 8), rtol=1e-6)
    assert traced(jnp.int32(12)) == 1.0
    np.testing.assert_allclose(jax.vmap(traced)(jnp.array([8, 7, 6])), [1, 0.5, 0.1], rtol=1e-6)


@pytest.mark.parametrize("sign", SIGNS)
def test_the_transform_against_numpy(sign):
    optimizer = scale_by_alrs(None, 8, lambda count: 0.1 / (1 + count), sign=sign)
    update = jax.jit(lambda g, state, width: optimizer.update(g, state, width=width))
    state = optimizer.init(gradients_of(1.0))
    for count, (width, size) in enumerate([(8, 0.01), (6, 0.03), (5, 0.3), (2, 30.0), (8, 1e-4)]):
        gradients = gradients_of(size)
        mean = reference_mean([np.asarray(leaf) for leaf in jax.tree.leaves(gradients)])
        np.testing.assert_allclose(mean_clipped_gradient(gradients), mean, rtol=1e-6)
        rate = reference_rate(0.1 / (1 + count), mean, width, 8, sign)
        updates, state = update(gradients, state, jnp.int32(width))
        np.testing.assert_allclose(state.rate, rate, rtol=1e-5, atol=1e-9)
        jax.tree.map(
            lambda u, g, r=rate: np.testing.assert_allclose(u, -r * g, rtol=1e-5, atol=1e-9), updates, gradients
        )
        assert state.count == count + 1
        if sign == "clamp":
            assert (state.rate == 0) == (size >= 0.3 or mean >= 0.1 / (1 + count))
        if sign == "one_minus":
            assert state.rate >= 0
        if sign == "signed" and size == 30.0:
            assert state.rate < 0
    assert update._cache_size() == 1


def test_one_width_momentum_and_other_leaves():
    """The mean is of the gradients, not of the momentum; leaves that are not scales are left alone."""
    params = {"kernel": jnp.ones(3), "scale": jnp.float32(1.0)}
    gradients = {"kernel": jnp.full(3, 5.0), "scale": jnp.float32(0.02)}
    optimizer = optax.partition(
        {"scales": scale_by_alrs(7, 8, 0.1, base=optax.trace(0.9)), "weights": optax.sgd(0.1)},
        {"kernel": "weights", "scale": "scales"},
    )
    state = optimizer.init(params)
    buffer = 0.0
    for _ in range(3):
        updates, state = optimizer.update(gradients, state, params)
        buffer = 0.9 * buffer + 0.02
        np.testing.assert_allclose(updates["scale"], -0.5 * (0.1 - 0.02) * buffer, rtol=1e-5)
        np.testing.assert_allclose(updates["kernel"], -0.5, rtol=1e-6)
    updates, _ = optimizer.update(gradients, state, params, width=8)  # the update's own counts
    np.testing.assert_allclose(updates["scale"], -(0.1 - 0.02) * (0.9 * buffer + 0.02), rtol=1e-5)


def test_nothing_to_scale_half_precision_and_nan():
    assert mean_clipped_gradient({}) == 0 and mean_clipped_gradient({"a": jnp.zeros((0,))}) == 0
    optimizer = scale_by_alrs(8, 8, 0.5)
    half = {"a": jnp.asarray([0.25, -0.125], jnp.bfloat16)}
    updates, _ = optimizer.update(half, optimizer.init(half))
    assert updates["a"].dtype == jnp.bfloat16
    np.testing.assert_array_equal(np.asarray(updates["a"], np.float32), [-0.0625, 0.03125])
    assert np.isnan(mean_clipped_gradient({"a": jnp.float32(np.nan), "b": jnp.float32(1.0)}))


def test_mistakes():
    with pytest.raises(UsageError, match=r"sign='clap': give one of .* Did you mean 'clamp'"):
        scale_by_alrs(None, 8, 0.1, sign="clap")
    with pytest.raises(UsageError, match="sign='max'"):
        alrs_rate(0.1, 0.0, 8, sign="max")
    with pytest.raises(UsageError, match="width=10: it is above high=8"):
        scale_by_alrs(10, 8, 0.1)
    with pytest.raises(UsageError, match="high=24: give"):
        scale_by_alrs(None, 24, 0.1)
    optimizer = scale_by_alrs(None, 8, 0.1)
    with pytest.raises(UsageError, match="width: an update of scale_by_alrs needs it"):
        optimizer.update({"a": jnp.float32(0.1)}, optimizer.init({"a": jnp.float32(0.1)}))


def test_examples():
    assert doctest.testmod(importlib.import_module("qtrain.methods.alrs")).failed == 0
