"""HASB: roulettes, and what a step makes of them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qtrain import Precision
from qtrain.errors import UsageError
from qtrain.methods.hasb import Hasb, roulette

WIDTHS = (8, 6, 4, 2)
LAYERS = ("a", "b", "c")


def make(**changed):
    fields = {"sigma": 0.5, "steps_per_epoch": 10, "total_steps": 40}
    return Hasb(LAYERS, WIDTHS, **{**fields, **changed})


def test_sensitive_layers_prefer_wide_widths_and_the_others_none():
    found = np.asarray(roulette(WIDTHS, jnp.array([1.0, 9.0, 2.0, 4.0])))  # the mean is 4: it counts as sensitive
    even, wide = [0.25] * 4, [0.4, 0.3, 0.2, 0.1]
    np.testing.assert_allclose(found, [even, wide, even, wide], rtol=1e-6)
    np.testing.assert_array_equal(jax.jit(lambda t: roulette(WIDTHS, t))(jnp.array([1.0, 9.0, 2.0, 4.0])), found)


@pytest.mark.parametrize(
    ("step", "expected"), [(0, 0.125), (9, 0.125), (10, 0.25), (39, 0.5), (45, 0.5)], ids=lambda value: str(value)
)
def test_the_probability_grows_by_epochs(step, expected):
    assert float(make().probability(step)) == expected


def test_a_run_of_a_partial_epoch_counts_it():
    assert float(make(total_steps=41).probability(0)) == pytest.approx(0.1)
    assert float(make(total_steps=5).probability(0)) == 0.5


@pytest.fixture(scope="module")
def drawn():
    """4000 draws in the last epoch, at 6-bit steps, in one compiled program; and how often it was traced."""
    hasb, probabilities, traced = make(followers=("a", "b", "c", "d")), roulette(WIDTHS, jnp.array([0.0, 0.0, 9.0])), []

    @jax.jit
    def assign(keys, step):
        traced.append(1)
        precision = Precision(weights=jnp.float32(6), acts=jnp.float32(6), grads=8)
        return jax.vmap(lambda key: hasb.assign(key, step, precision, probabilities))(keys)

    found = assign(jax.random.split(jax.random.key(0), 4000), 39)
    assign(jax.random.split(jax.random.key(1), 4000), 0)
    return found, traced


def test_layers_switch_as_often_as_they_should_and_by_their_roulette(drawn):
    found, traced = drawn
    assert len(traced) == 1 and list(found) == ["a", "b", "c", "d"]
    for path, odds in (("a", [0.25] * 4), ("b", [0.25] * 4), ("c", [0.4, 0.3, 0.2, 0.1])):
        bits = np.asarray(found[path].weights)
        for width, share in zip(WIDTHS, odds, strict=True):
            expected = 0.5 * share + 0.5 * (width == 6)
            assert np.mean(bits == width) == pytest.approx(expected, abs=4 * np.sqrt(expected / 4000))
        np.testing.assert_array_equal(found[path].acts, bits)
        assert np.all(np.asarray(found[path].grads) == 8)
    assert np.all(np.asarray(found["d"].weights) == 6)  # it has no trace: it follows the step
    a, b = np.asarray(found["a"].weights), np.asarray(found["b"].weights)
    assert abs(np.corrcoef(a, b)[0, 1]) < 4 / np.sqrt(4000)  # each by itself


def test_without_sigma_nothing_switches_and_what_is_float_stays_so():
    probabilities = roulette(WIDTHS, jnp.ones(3))
    found = make(sigma=0.0).assign(jax.random.key(0), 39, Precision(weights=4, acts=4), probabilities)
    assert {path: (float(p.weights), float(p.acts), p.grads) for path, p in found.items()} == dict.fromkeys(
        LAYERS, (4.0, 4.0, None)
    )
    found = make(sigma=1.0, acts=False).assign(jax.random.key(0), 39, Precision(weights=4, acts=7), probabilities)
    assert all(precision.acts == 7 for precision in found.values())
    found = make(sigma=1.0).assign(jax.random.key(0), 39, Precision(weights=4), probabilities)
    assert all(precision.acts is None for precision in found.values())


def test_traces_are_put_in_the_order_of_the_layers():
    np.testing.assert_array_equal(make().ordered({"c": 3.0, "a": 1.0, "b": 2.0}), [1.0, 2.0, 3.0])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: make(sigma=1.5), "sigma=1.5"),
        (lambda: make(total_steps=0), "total_steps=0"),
        (lambda: Hasb((), WIDTHS, 0.1, 1, 1), "no layer follows"),
        (lambda: Hasb(LAYERS, (), 0.1, 1, 1), "widths="),
        (lambda: roulette((8, 2.5), jnp.ones(2)), "widths="),
        (lambda: roulette((8, 2), jnp.float32(1)), "vector"),
        (lambda: make().ordered({"a": 1.0}), r"no trace for \['b', 'c'\]"),
    ],
)
def test_mistakes(call, message):
    with pytest.raises(UsageError, match=message) as raised:
        call()
    assert "\n" not in str(raised.value)
