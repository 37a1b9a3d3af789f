"""Oscillations: counted and frozen against a slow reference, dampened against numpy, in all the wrappers."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from qtrain.errors import UsageError
from qtrain.optim import (
    codes_per_leaf,
    freeze_oscillations,
    freezing_threshold,
    oscillation_metrics,
    track_oscillations,
)


def step_of(bits):
    return 2.0 ** (2 - jnp.asarray(bits, jnp.float32))


def encode(path, weight, bits):
    bits = 4 if bits is None else bits
    high = 2.0 ** (jnp.asarray(bits, jnp.float32) - 1)
    return jnp.clip(jnp.round(weight / step_of(bits)), -high, high - 1).astype(jnp.int32) if "b" not in path else None


CODES = codes_per_leaf(encode)


def decode(codes, params, bits=None):
    return jax.tree.map(lambda code: code * step_of(4 if bits is None else bits), codes)


class Reference:
    """One weight at a time."""

    def __init__(self, count, m, threshold=None):
        self.m, self.threshold = m, threshold
        self.f, self.direction, self.last = [0.0] * count, [0] * count, [None] * count
        self.average, self.value, self.bits = [0.0] * count, [None] * count, None

    @staticmethod
    def code(weight, bits):
        code = np.round(np.float32(weight) / np.float32(2.0 ** (2 - bits)))
        return int(np.clip(code, -(2 ** (bits - 1)), 2 ** (bits - 1) - 1))

    def update(self, weights, updates, bits, t=0):
        out = []
        for i, weight in enumerate(weights):
            now = self.code(weight, bits)
            if self.last[i] is None:
                self.average[i] = now
            else:
                change = np.sign(self.code(weight, self.bits) - self.last[i])
                turned = change != 0 and change == -self.direction[i]
                self.f[i] = self.m * turned + (1 - self.m) * self.f[i]
                self.direction[i] = change or self.direction[i]
                self.average[i] = self.m * now + (1 - self.m) * self.average[i] if bits == self.bits else now
            self.last[i] = now
            if self.threshold and self.value[i] is None and self.f[i] > self.threshold(t):
                self.value[i] = round(self.average[i]) * 2.0 ** (2 - bits)
            out.append(updates[i] if self.value[i] is None else self.value[i] - weight)
        self.bits = bits
        return out


def noise(t, size=200):
    return np.random.default_rng(t).normal(size=size).astype(np.float32) * np.float32(0.2)


WIDTHS = [4] * 12 + [3] * 8 + [5] * 12


def test_frequencies_equal_the_reference():
    transform, reference = track_oscillations(CODES, 0.1), Reference(200, 0.1)
    params = jnp.asarray(noise(99))
    state, update = transform.init(params), jax.jit(transform.update)
    for t, bits in enumerate(WIDTHS):
        updates, state = update(jnp.asarray(noise(t)), state, params, bits=jnp.float32(bits))
        np.testing.assert_array_equal(updates, noise(t))
        reference.update(np.asarray(params), noise(t), bits)
        np.testing.assert_allclose(state.frequency, reference.f, rtol=1e-5, atol=1e-7)
        np.testing.assert_array_equal(state.direction, reference.direction)
        params = params + updates
    assert update._cache_size() == 1
    assert 0.02 < np.mean(reference.f) < 0.5
    assert state.direction.dtype == state.last.dtype == jnp.int8
    assert sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state)) == 6 * 200 + 8


def test_a_weight_that_goes_on_does_not_oscillate():
    transform = track_oscillations(CODES, 0.5)
    params = jnp.zeros(2)
    state = transform.init(params)
    for t in range(6):  # the first goes up all the time, the second up and down
        params = jnp.array([0.25 * t, 0.25 * (t % 2)])
        _, state = transform.update(params, state, params)
    assert state.frequency[0] == 0
    assert state.frequency[1] == pytest.approx(1 - 0.5**4)  # its first change has no previous one


def test_a_change_of_precision_is_no_oscillation():
    transform = track_oscillations(CODES, 0.5)
    params = jnp.asarray(noise(0))
    state = transform.init(params)
    for bits in (2, 8, 3, 32, 32, 5, 2, 7):
        _, state = transform.update(params, state, params, bits=bits)
    assert not np.any(state.frequency) and not np.any(state.direction)


# --- freezing


def limit(t):
    return jnp.where(t < 8, 1.0, 0.12)


def test_frozen_weights_equal_the_reference():
    transform = freeze_oscillations(CODES, decode, limit, 0.1)
    reference = Reference(200, 0.1, lambda t: float(limit(t)))
    params = jnp.asarray(noise(99))
    state, update = transform.init(params), jax.jit(transform.update)
    shares = []
    for t, bits in enumerate(WIDTHS):
        updates, state = update(jnp.asarray(noise(t)), state, params, bits=jnp.float32(bits))
        np.testing.assert_allclose(
            updates, reference.update(np.asarray(params), noise(t), bits, t), rtol=1e-5, atol=1e-6
        )
        frozen = [value is not None for value in reference.value]
        np.testing.assert_array_equal(state.frozen, frozen)
        params = params + updates
        shares.append(np.mean(frozen))
    assert update._cache_size() == 1
    assert shares[7] == 0 < shares[12] < shares[-1] < 1
    assert sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state)) == 11 * 200 + 8
    metrics = oscillation_metrics(state, threshold=0.05)[""]
    assert float(metrics["frozen"]) == pytest.approx(shares[-1])
    assert float(metrics["oscillation"]) == pytest.approx(np.mean(reference.f), rel=1e-4)
    assert float(metrics["oscillating"]) == pytest.approx(np.mean(np.array(reference.f) > 0.05))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_frozen_weight_has_its_value_exactly_and_keeps_it(dtype):
    """Whatever comes afterwards: momentum, weight decay, another precision; on a grid that is no power of two."""
    step = np.float32(0.3)
    codes = lambda params, bits=None: {"w": jnp.round(params["w"].astype(jnp.float32) / step).astype(jnp.int32)}  # noqa: E731
    values = lambda codes, params, bits=None: {"w": codes["w"] * step}  # noqa: E731
    optimizer = optax.chain(
        optax.add_decayed_weights(0.1), optax.sgd(0.3, momentum=0.9), freeze_oscillations(codes, values, 0.02, 0.05)
    )
    params = {"w": jnp.asarray(noise(0, 500), dtype)}
    state = optimizer.init(params)

    @jax.jit
    def update(params, state, grads, bits):
        updates, state = optimizer.update(grads, state, params, bits=bits)
        return optax.apply_updates(params, updates), state

    since = np.zeros(500, int)
    first = np.full(500, np.nan, np.float32)
    for t in range(25):
        params, state = update(params, state, {"w": jnp.asarray(noise(t, 500), dtype)}, jnp.float32(4 - t % 2))
        frozen = np.asarray(state[2].frozen["w"])
        now = np.asarray(params["w"], np.float32)
        grid = np.asarray(jnp.asarray(np.round(now / step) * step, dtype), np.float32)
        since += frozen
        np.testing.assert_allclose(
            now[since == 1], grid[since == 1], rtol=1e-6 if dtype == "float32" else 0.01, atol=1e-7
        )
        first[since == 2] = now[since == 2]
        np.testing.assert_array_equal(now[since >= 2], grid[since >= 2])
        np.testing.assert_array_equal(now[since >= 2], first[since >= 2])
    assert np.mean(since >= 2) > 0.2 and len(np.unique(now[since >= 2])) > 2


def test_freezing_among_other_transforms():
    params = {"a": {"w": jnp.asarray(noise(0)), "b": jnp.zeros(3)}}
    optimizer = optax.MultiSteps(
        optax.partition(
            {"w": optax.chain(optax.sgd(1.0), freeze_oscillations(CODES, decode, 0.05, 0.2)), "b": optax.sgd(0.1)},
            {"a": {"w": "w", "b": "b"}},
        ),
        2,
    )
    state = optimizer.init(params)

    @jax.jit
    def update(params, state, grads):
        updates, state = optimizer.update(grads, state, params, bits=jnp.float32(4))
        return optax.apply_updates(params, updates), state

    for t in range(30):
        grads = {"a": {"w": jnp.asarray(noise(t // 2)), "b": jnp.ones(3)}}
        params, state = update(params, state, grads)
    np.testing.assert_allclose(params["a"]["b"], -1.5, rtol=1e-5)
    metrics = oscillation_metrics(state)
    assert metrics.keys() == {"", "a/w"} and 0.1 < float(metrics["a/w"]["frozen"]) < 1
    assert float(metrics[""]["oscillation"]) == float(metrics["a/w"]["oscillation"]) > 0
    assert oscillation_metrics(optax.adam(0.1).init(params)) == {}
    stacked = jax.tree.map(lambda leaf: jnp.stack([leaf, leaf]), params)
    jax.vmap(optimizer.init)(stacked)


def test_threshold():
    schedule = freezing_threshold(1000, 0.1, 0.01, 0.25)
    times = np.arange(0, 1001, 5)
    u = np.clip((times / 1000 - 0.25) / 0.75, 0, 1)
    expected = np.where(times < 250, 1.0, 0.01 + 0.09 * (1 + np.cos(np.pi * u)) / 2)
    np.testing.assert_allclose(jax.jit(jax.vmap(schedule))(times), expected, rtol=1e-5)


# --- mistakes


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: track_oscillations(CODES, 0.0), "momentum=0.0: give a number above 0"),
        (lambda: freeze_oscillations(CODES, decode, -0.1), "threshold=-0.1: give a number of at least 0"),
        (lambda: freeze_oscillations(CODES, decode, 0.1, 2.0), "momentum=2.0"),
        (lambda: freezing_threshold(0), "total_updates=0"),
        (lambda: freezing_threshold(10, 0.1, 0.2), "start=0.1, end=0.2"),
        (lambda: freezing_threshold(10, first=1.0), "first=1.0"),
        (lambda: track_oscillations(codes_per_leaf(lambda *_: None)).init({"w": jnp.ones(3)}), "no leaf has any"),
        (
            lambda: track_oscillations(codes_per_leaf(lambda p, w, b: w)).init({"w": jnp.ones(3)}),
            "'w' is float32; give an integer array",
        ),
    ],
)
def test_mistakes(make, message):
    with pytest.raises(UsageError, match=message) as caught:
        make()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("wrong", [lambda code: code.astype(jnp.int32), lambda code: code[:1], lambda code: None])
def test_decoded_values_are_checked(wrong):
    transform = freeze_oscillations(CODES, lambda codes, params: jax.tree.map(wrong, codes), 0.1)
    params = {"w": jnp.ones(3)}
    with pytest.raises(UsageError, match=r"decode: 'w' is .*; give float values of shape"):
        transform.update(params, transform.init(params), params)
    with pytest.raises(UsageError, match="needs the parameters"):
        transform.update(params, transform.init(params))
