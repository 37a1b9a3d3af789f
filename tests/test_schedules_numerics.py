"""Schedules against independent references: float64 NumPy for the cyclic ones, plain Python for the rest."""

import doctest
import importlib
from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qtrain import schedules as S

NAMES = ["CR", "CT", "LR", "LT", "ER", "ETV", "ETH", "RR", "RTV", "RTH"]


def growth(letter, u, rate=4.0, beta=0.9):
    z = 1 - u
    return {
        "C": lambda: (1 - np.cos(np.pi * u)) / 2,
        "L": lambda: u,
        "E": lambda: 1 - np.exp(-rate * u),
        "R": lambda: 1 - z / ((1 - beta) + beta * z),
    }[letter]()


def reference(name, low, high, cycles, total_steps, cycle_length="floor_plus_one", **options):
    """The bits before rounding, in float64, from the paper's definitions."""
    t = np.arange(total_steps)
    T = total_steps // cycles + (1 if cycle_length == "floor_plus_one" else 0)
    u = (t % T).astype(np.float64) / T
    letter = name[0]
    up = low + (high - low) * growth(letter, u, **options)
    if name[1] == "R":
        return up
    if name.endswith("H"):
        down = low + (high - low) * growth(letter, 1 - u, **options)
    else:
        down = high - (high - low) * growth(letter, u, **options)
    return np.where((t // T) % 2 == 0, down, up)


def half_even(value):
    return round(value)  # Python rounds a Fraction half to even


CASES = [  # N, n, low, high, options; in most of them n does not divide N
    (64_000, 8, 3, 8, {}),
    (64_000, 8, 3, 8, {"cycle_length": "floor"}),
    (64_001, 32, 4, 6, {"cycle_length": "floor"}),
    (10_007, 3, 1, 32, {"rate": 0.7, "beta": 0.5}),
    (10_007, 10, 2, 16, {"rate": 20.0, "beta": 0.999, "cycle_length": "floor"}),
    (997, 31, 5, 8, {"cycle_length": "floor"}),
    (1000, 600, 3, 6, {}),
    (100, 100, 3, 8, {"cycle_length": "floor"}),
    (7, 2, 3, 8, {"beta": 0.0}),
    (1, 1, 3, 8, {}),
    (500, 4, 6, 6, {}),
]


@pytest.mark.parametrize(("total_steps", "cycles", "low", "high", "options"), CASES)
def test_suite_equals_float64_at_every_step(total_steps, cycles, low, high, options):
    ten = S.suite(low, high, cycles, total_steps, **options)
    assert list(ten) == NAMES
    bits = jax.jit(lambda t: {name: s(t) for name, s in ten.items()})(np.arange(total_steps))
    for name in NAMES:
        got = np.asarray(bits[name])
        keep = {"rate": "E", "beta": "R"}
        own = {k: v for k, v in options.items() if keep.get(k, name[0]) == name[0]}
        real = reference(name, low, high, cycles, total_steps, **own)
        near_half = np.abs(real - np.floor(real) - 0.5) <= 1e-4
        assert near_half.mean() < 0.01 or total_steps < 1001, name
        assert got.dtype == np.float32 and got.shape == (total_steps,)
        np.testing.assert_array_equal(got[~near_half], np.rint(real)[~near_half], err_msg=name)
        assert np.all(np.abs(got - real) <= 0.5 + 1e-4), name
        assert got.min() >= low and got.max() <= high, name


def test_a_million_steps():
    total_steps, cycles = 1_000_003, 3
    for name in ("CT", "ER", "RTH"):
        got = S.evaluate(S.by_name(name, 3, 8, cycles, total_steps), total_steps)
        real = reference(name, 3, 8, cycles, total_steps)
        near_half = np.abs(real - np.floor(real) - 0.5) <= 1e-4
        np.testing.assert_array_equal(got[~near_half], np.rint(real)[~near_half], err_msg=name)


@pytest.mark.parametrize("name", ["LR", "LT"])
@pytest.mark.parametrize(("total_steps", "cycles", "low", "high"), [(240, 3, 3, 8), (720, 4, 4, 7), (99, 9, 1, 6)])
def test_linear_profile_is_exact_at_ties(name, total_steps, cycles, low, high):
    s = S.by_name(name, low, high, cycles, total_steps, cycle_length="floor")
    T, ties = total_steps // cycles, 0
    expected = []
    for t in range(total_steps):
        rise = Fraction((high - low) * (t % T), T)
        value = high - rise if name == "LT" and (t // T) % 2 == 0 else low + rise
        ties += value.denominator == 2
        expected.append(half_even(value))
    assert ties > 0 or total_steps == 99
    assert S.evaluate(s, total_steps).tolist() == expected
    assert np.asarray(s(np.arange(total_steps))).tolist() == expected  # eager and jit agree at ties too


@pytest.mark.parametrize(
    ("start", "end", "total_steps", "begin"),
    [(8, 4, 80, 0), (3, 8, 100, 37), (2, 2, 5, 1), (32, 1, 1, 0), (4, 9, 7, 6)],
)
def test_linear_is_exact(start, end, total_steps, begin):
    span = total_steps - begin
    ramp = [Fraction(min(max(t - begin, 0), span), span) for t in range(total_steps + 5)]
    expected = [half_even(start + (end - start) * u) for u in ramp]
    assert (
        np.asarray(jax.jit(S.linear(start, end, total_steps, begin))(np.arange(total_steps + 5))).tolist() == expected
    )


def test_linear_over_two_billion_steps():
    N = 2**31 - 1
    steps = np.linspace(0, N, 1001).astype(np.int64)
    real = 1 + 31 * steps / N
    got = np.asarray(S.linear(1, 32, N)(steps))
    far = np.abs(real - np.floor(real) - 0.5) > 1e-4
    assert far.mean() > 0.9
    np.testing.assert_array_equal(got[far], np.rint(real)[far])


@pytest.mark.parametrize(
    ("name", "bits"),
    [
        ("CR", [3, 3, 4, 6, 7, 8, 8]),
        ("LR", [3, 4, 4, 6, 7, 8, 8]),
        ("ER", [3, 5, 6, 7, 8, 8, 8]),
        ("RR", [3, 3, 3, 3, 4, 5, 8]),
    ],
)
def test_published_bits_within_a_cycle(name, bits):
    s = S.by_name(name, 3, 8, cycles=1, total_steps=1000, cycle_length="floor")
    assert np.asarray(jax.jit(s)(np.array([0, 100, 250, 500, 750, 900, 999]))).tolist() == bits


@pytest.mark.parametrize("name", NAMES)
def test_ends_of_a_cycle(name):
    s = S.by_name(name, 3, 8, cycles=8, total_steps=64_000)
    T = s.steps_per_cycle
    first, last = s(np.array([0, 63_999]))
    assert T == 8001
    assert last == 8  # n = 8 is even: both patterns end at the top
    if s.pattern == "repeated":
        assert first == 3 and s(T) == 3
        np.testing.assert_array_equal(s(np.arange(T)), s(np.arange(T, 2 * T)))
    else:
        assert first == 8
        np.testing.assert_array_equal(s(np.arange(2 * T)), s(np.arange(2 * T, 4 * T)))


def test_cycle_length_decides_how_a_run_ends():
    assert S.by_name("CR", 3, 8, 32, 64_001)(64_000) == 8
    assert S.by_name("CR", 3, 8, 32, 64_001, cycle_length="floor")(64_000) == 3


SAVINGS = {  # low, high: percent saved by RR RTH | LR LT | CR CT | ETV | RTV | ER ETH, as printed
    (3, 8): (60.1, 37.2, 36.7, 36.5, 36.3, 17.8),
    (3, 6): (50.3, 30.4, 30.0, 29.9, 29.75, 13.7),
    (4, 8): (49.9, 30.5, 30.1, 30.0, 29.8, 14.2),
    (4, 6): (35.6, 20.8, 20.7, 20.6, 20.55, 8.8),
    (5, 8): (38.9, 23.4, 23.1, 23.1, 23.0, 10.5),
    (5, 6): (19.4, 10.65, 10.65, 10.65, 10.65, 3.7),
}
ROWS = (("RR", "RTH"), ("LR", "LT"), ("CR", "CT"), ("ETV",), ("RTV",), ("ER", "ETH"))


@pytest.mark.parametrize(("low", "high"), SAVINGS)
def test_published_savings(low, high):
    N = 80_000
    ten = S.suite(low, high, 8, N)
    saved = {name: 100 * S.saving(s, high, high, N) for name, s in ten.items()}
    for names, printed in zip(ROWS, SAVINGS[low, high], strict=True):
        for name in names:
            assert saved[name] == pytest.approx(printed, abs=0.07), name
    groups = [[saved[name] for name in S.GROUPS[group]] for group in ("small_saving", "medium_saving", "large_saving")]
    assert max(groups[0]) < min(groups[1]) and max(groups[1]) < min(groups[2])
    assert sorted(name for names in S.GROUPS.values() for name in names) == sorted(NAMES)


def test_cost_is_the_sum_by_hand():
    s = S.piecewise([2, 3], [4, 8, 2])
    assert S.relative_cost(s, 5, 6) == 2 * (16 + 48) + (64 + 96) + 2 * (4 + 24)
    assert S.relative_cost(s, 5, S.piecewise([1], [6, 7])) == (16 + 48) + (16 + 56) + (64 + 112) + 2 * (4 + 28)
    assert S.saving(s, 8, 6, 5) == pytest.approx(1 - 344 / (5 * (64 + 96)))
    assert S.saving(8, 8, 8, 5) == 0
    # float32 could not add this up: 3,000,000 steps of 8² + 2·8·8
    assert S.relative_cost(8, 3_000_001, 8) == 3_000_001 * 192


@pytest.mark.parametrize(
    "module", ["", ".schedule", ".basic", ".cycles", ".combinators", ".savings", ".config", ".precisions"]
)
def test_examples_in_docstrings(module):
    result = doctest.testmod(importlib.import_module(f"qtrain.schedules{module}"))
    assert result.attempted > 0 and result.failed == 0


def test_positions_are_whole_steps_in_one_jit_and_alone():
    s = S.cyclic("rex", 3, 8, 5, total_steps=3001, pattern="triangular", reflection="horizontal")
    together = S.evaluate(s, 3001)
    alone = jax.jit(s)
    for t in (0, 1, 600, 601, 602, 1800, 3000):
        assert alone(t) == together[t] == alone(jnp.int32(t))
