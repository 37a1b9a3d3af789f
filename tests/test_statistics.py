"""The statistics of studies, against slow definitions of their own."""

import itertools
import math
import statistics as plain
from fractions import Fraction

import numpy as np
import pytest
import scipy.stats

from qtrain.errors import UsageError
from qtrain.statistics import (
    area_between,
    basic_ends,
    best_within,
    bootstrap_interval,
    draw_means,
    hypervolume,
    pareto_front,
    percentiles,
    rank_correlation,
)

NAN = float("nan")


def slow_percentile(values, percent):
    """Linear between the ordered values, by hand."""
    ordered = sorted(values)
    at = percent / 100 * (len(ordered) - 1)
    low = math.floor(at)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (at - low) * (ordered[high] - ordered[low])


def slow_means(values, draws, seed):
    """As studies before drew them: NumPy's choice, and a Python mean of each draw."""
    drawn = np.random.default_rng(seed).choice(np.asarray(values, float), (draws, len(values)))
    return [math.fsum(row) / len(values) for row in drawn]


@pytest.mark.parametrize("n", [2, 3, 10])
@pytest.mark.parametrize("level", [0.95, 0.8])
def test_percentile_interval(n, level):
    values = np.random.default_rng(n).normal(size=n).tolist()
    found = bootstrap_interval(values, level=level, draws=400, seed=5)
    drawn = slow_means(values, 400, 5)
    tail = 100 * (1 - level) / 2
    np.testing.assert_allclose(
        found[:3], [plain.mean(values), *(slow_percentile(drawn, p) for p in (tail, 100 - tail))]
    )
    assert found.n == n and found
    assert bootstrap_interval(iter(values), level=level, draws=400, seed=5) == found


def test_basic_interval():
    values = [1.0, 2.0, 4.0, 9.0]
    percentile, basic = (bootstrap_interval(values, draws=300, method=method) for method in ("percentile", "basic"))
    assert basic[1:3] == (2 * 4.0 - percentile.high, 2 * 4.0 - percentile.low)
    drawn = np.random.default_rng(0).normal(size=(101, 2))
    low, high = basic_ends(np.array([1.0, 2.0]), drawn, 0.9)
    np.testing.assert_allclose(
        low, [2 * e - slow_percentile(column, 95) for e, column in zip((1, 2), drawn.T, strict=True)]
    )
    np.testing.assert_allclose(
        high, [2 * e - slow_percentile(column, 5) for e, column in zip((1, 2), drawn.T, strict=True)]
    )


def test_percentiles_of_the_best_of_many_always_miss_and_reversed_ones_do_not():
    """Twenty equal points: the best of their means is luck, which resampling adds again."""
    held = np.zeros(2)
    for trial in range(120):
        values = np.random.default_rng(trial).normal(size=(20, 5))
        drawn = draw_means([dict(enumerate(row)) for row in values], draws=200, seed=trial).max(1)
        best = values.mean(1).max()
        for index, (low, high) in enumerate((percentiles(drawn), basic_ends(best, drawn))):
            held[index] += low <= 0 <= high
    assert held[0] / 120 < 0.1 and held[1] / 120 > 0.4


def slow_bca(values, statistic, level, draws, seed):
    normal, n = plain.NormalDist(), len(values)
    index = np.random.default_rng(seed).integers(0, n, (draws, n))
    drawn = [statistic([values[i] for i in row]) for row in index]
    estimate = statistic(values)
    below = (sum(d < estimate for d in drawn) + sum(d == estimate for d in drawn) / 2) / draws
    left_out = [statistic(values[:i] + values[i + 1 :]) for i in range(n)]
    d = [plain.mean(left_out) - value for value in left_out]
    a = sum(x**3 for x in d) / (6 * sum(x**2 for x in d) ** 1.5)
    z0 = normal.inv_cdf(below)
    ends = []
    for tail in ((1 - level) / 2, 1 - (1 - level) / 2):
        z = normal.inv_cdf(tail)
        ends.append(slow_percentile(drawn, 100 * normal.cdf(z0 + (z0 + z) / (1 - a * (z0 + z)))))
    return ends


@pytest.mark.parametrize("level", [0.95, 0.9])
def test_bca_interval(level):
    values = np.random.default_rng(3).exponential(size=12).tolist()
    found = bootstrap_interval(values, level=level, draws=500, method="bca")
    np.testing.assert_allclose(found[1:3], slow_bca(values, plain.fmean, level, 500, 0), rtol=1e-9)
    # The skew that it corrects for: both ends further up than those of the percentile interval.
    assert found.low > bootstrap_interval(values, level=level, draws=500).low
    theirs = scipy.stats.bootstrap([values], np.mean, confidence_level=level, method="BCa", random_state=1)
    spread = theirs.confidence_interval.high - theirs.confidence_interval.low
    ours = bootstrap_interval(values, level=level, draws=20_000, method="bca")
    np.testing.assert_allclose(ours[1:3], theirs.confidence_interval, atol=0.04 * spread)


def test_other_statistics_and_no_spread():
    values = [1.0, 2.0, 4.0, 8.0, 100.0]
    found = bootstrap_interval(values, lambda each: np.median(each, axis=-1), draws=300)
    assert found.estimate == 4.0 and found.low in values and found.high in values
    for method in ("percentile", "basic", "bca"):
        assert bootstrap_interval([0.5] * 4, method=method) == (0.5, 0.5, 0.5, 4)
    one = bootstrap_interval([0.7])
    assert one.estimate == 0.7 and math.isnan(one.low) and math.isnan(one.high) and one.n == 1 and not one


def test_coverage_is_what_is_said():
    """75 % for three values: what the docstring, the page and the studies say."""
    drawn = np.random.default_rng(0).normal(size=(500, 3))
    found = [bootstrap_interval(row, draws=400) for row in drawn]
    assert 0.68 < np.mean([each.low <= 0 <= each.high for each in found]) < 0.82


def test_drawn_means():
    one = {0: 1.0, 1: 2.0, 2: 4.0}
    shifted, reordered = {seed: value + 10 for seed, value in one.items()}, {2: 4.0, 0: 1.0, 1: 2.0}
    other = {seed + 1: value for seed, value in one.items()}
    drawn = draw_means([one, shifted, reordered, other, {5: 3.0}], draws=4000)
    assert drawn.shape == (4000, 5)
    np.testing.assert_allclose(drawn[:, 1], drawn[:, 0] + 10)  # the same seeds are drawn together
    np.testing.assert_allclose(drawn[:, 2], drawn[:, 0])
    assert abs(np.corrcoef(drawn[:, 0], drawn[:, 3])[0, 1]) < 0.06  # others on their own
    assert (drawn[:, 4] == 3.0).all()
    exact = [sum(draw) / 3 for draw in itertools.product(one.values(), repeat=3)]  # all 27 draws are as likely
    for value in set(exact):
        assert abs(np.isclose(drawn[:, 0], value).mean() - exact.count(value) / 27) < 0.025
    pairs = draw_means([{seed: (value, -value) for seed, value in one.items()}], draws=50)
    assert pairs.shape == (50, 1, 2)
    np.testing.assert_allclose(pairs[..., 0], -pairs[..., 1])  # a seed's numbers stay together


def test_percentiles():
    drawn = np.random.default_rng(0).normal(size=(101, 3))
    low, high = percentiles(drawn, 0.9)
    np.testing.assert_allclose(low, [slow_percentile(column, 5) for column in drawn.T])
    np.testing.assert_allclose(high, [slow_percentile(column, 95) for column in drawn.T])
    drawn[4, 1] = NAN
    assert np.isnan(percentiles(drawn)[0]).tolist() == [False, True, False]


def slow_front(cost, quality, maximize):
    better = (lambda a, b: a >= b) if maximize else (lambda a, b: a <= b)
    points = [i for i in range(len(cost)) if math.isfinite(cost[i]) and math.isfinite(quality[i])]
    dominated = {
        i
        for i, j in itertools.permutations(points, 2)
        if cost[j] <= cost[i] and better(quality[j], quality[i]) and (cost[j], quality[j]) != (cost[i], quality[i])
    }
    return [i for i in points if i not in dominated]


def grid_of_points(seed, n=7):
    """Few distinct whole numbers, so that there are ties of every kind."""
    return np.random.default_rng(seed).integers(1, 7, (2, n)).astype(float)


@pytest.mark.parametrize("maximize", [True, False])
def test_pareto_front(maximize):
    for seed in range(60):
        cost, quality = grid_of_points(seed)
        if seed % 5 == 0:
            quality[seed % 7] = NAN
        front = pareto_front(cost, quality, maximize=maximize)
        assert sorted(front.tolist()) == slow_front(cost, quality, maximize)
        assert (np.diff(cost[front]) >= 0).all()
    assert pareto_front([NAN], [1.0]).tolist() == []


def slow_best(cost, quality, budget, maximize):
    within = [q for c, q in zip(cost, quality, strict=True) if c <= budget]
    return (max if maximize else min)(within) if within else NAN


@pytest.mark.parametrize("maximize", [True, False])
def test_best_within_hypervolume_and_area_between(maximize):
    """Points and references are whole numbers, so that areas are counts of unit squares."""
    sign = 1 if maximize else -1
    for seed in range(40):
        cost, quality = grid_of_points(seed)
        budgets = np.arange(0.5, 9)
        expected = [slow_best(cost, quality, budget, maximize) for budget in budgets]
        np.testing.assert_array_equal(best_within(cost, quality, budgets, maximize=maximize), expected)

        reference = (6.0, 2.0 if maximize else 5.0)
        # Each column of width 1 is as high as what is reached at its left end, which is a whole number.
        columns = [slow_best(cost, quality, budget, maximize) for budget in range(int(reference[0]))]
        area = sum(max(sign * (best - reference[1]), 0) for best in columns if not math.isnan(best))
        assert hypervolume(cost, quality, reference, maximize=maximize) == pytest.approx(area)

        other_cost, other_quality = grid_of_points(seed + 1000, n=5)
        low, high = max(cost.min(), other_cost.min()), min(cost.max(), other_cost.max())
        found = area_between(cost, quality, other_cost, other_quality, maximize=maximize)
        back = area_between(other_cost, other_quality, cost, quality, maximize=maximize)
        if low > high:
            assert all(math.isnan(value) for value in found)
            continue
        both = [
            (slow_best(cost, quality, c, maximize), slow_best(other_cost, other_quality, c, maximize)) for c in range(8)
        ]
        columns = [sign * (a - b) for a, b in both[int(low) : int(high)]]
        assert found.area == pytest.approx(sum(columns)) and (found.low, found.high) == (low, high)
        mean = Fraction(int(sum(columns)), len(columns)) if columns else sign * np.subtract(*both[int(low)])
        assert found.mean == pytest.approx(float(mean))
        assert (back.area, back.mean) == pytest.approx((-found.area, -found.mean))


def test_logarithm_of_cost_and_leading_axes():
    rng = np.random.default_rng(0)
    cost, quality, other = rng.uniform(1, 1000, (3, 2, 6)), rng.random((3, 2, 6)), rng.uniform(1, 1000, (3, 2, 4))
    whole = hypervolume(cost, quality, (2000.0, 0.1), log_cost=True)
    between = area_between(cost, quality, other, quality[..., :4], log_cost=True)
    assert whole.shape == between.mean.shape == (3, 2)
    for i, j in itertools.product(range(3), range(2)):
        one = hypervolume(np.log10(cost[i, j]), quality[i, j], (math.log10(2000.0), 0.1))
        assert whole[i, j] == pytest.approx(one)
        apart = area_between(np.log10(cost[i, j]), quality[i, j], np.log10(other[i, j]), quality[i, j, :4])
        np.testing.assert_allclose([each[i, j] for each in between[:2]], apart[:2])
        np.testing.assert_allclose([between.low[i, j], between.high[i, j]], [10**apart.low, 10**apart.high])


def slow_ranks(values):
    return [sum(v < value for v in values) + (sum(v == value for v in values) + 1) / 2 for value in values]


def slow_correlation(x, y):
    try:
        return plain.correlation(slow_ranks(x), slow_ranks(y))
    except plain.StatisticsError:
        return None


def test_rank_correlation():
    for seed in range(12):
        rng = np.random.default_rng(seed)
        x, y = rng.integers(0, 5, 8).tolist(), rng.normal(size=8).tolist()
        found = rank_correlation(x, y, draws=200, seed=seed)
        assert found.estimate == pytest.approx(slow_correlation(x, y))
        assert found.estimate == pytest.approx(scipy.stats.spearmanr(x, y).statistic)
        index = np.random.default_rng(seed).integers(0, 8, (200, 8))
        drawn = [slow_correlation([x[i] for i in row], [y[i] for i in row]) for row in index]
        drawn = [value for value in drawn if value is not None]
        np.testing.assert_allclose(found[1:3], [slow_percentile(drawn, 2.5), slow_percentile(drawn, 97.5)], atol=1e-12)
    assert rank_correlation([1, 2, 3, 4, 5, 6], [2, 4, 8, 16, 32, 64]).estimate == 1.0
    assert not rank_correlation([1, 2, 3, 4, 5, 6], [2, 4, 8, 16, 32, 64])  # in order in every draw
    assert not rank_correlation([1, 2, 3, 4, 5], [3, 1, 2, 5, 4])  # too few
    assert math.isnan(rank_correlation([1, 1, 1], [1, 2, 3]).estimate)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: bootstrap_interval([]), "at least one"),
        (lambda: bootstrap_interval([1.0, NAN]), "not finite"),
        (lambda: bootstrap_interval([1.0, 2.0], method="student"), "percentile, basic, bca"),
        (lambda: bootstrap_interval([1.0, 2.0], level=95), "between 0 and 1"),
        (lambda: bootstrap_interval([1.0, 2.0], draws=0), "at least 1"),
        (lambda: pareto_front([1.0], [1.0, 2.0]), "shapes"),
        (lambda: hypervolume([], [], (1.0, 0.0)), "no points"),
        (lambda: hypervolume([1.0, NAN], [1.0, 2.0], (3.0, 0.0)), "not finite"),
        (lambda: hypervolume([0.0, 1.0], [1.0, 2.0], (3.0, 0.0), log_cost=True), "not above 0"),
        (lambda: rank_correlation([1.0], [1.0, 2.0]), "shapes"),
        (lambda: rank_correlation([1.0, NAN], [1.0, 2.0]), "not finite"),
    ],
)
def test_refusals(call, words):
    with pytest.raises(UsageError, match=words) as refused:
        call()
    assert "\n" not in str(refused.value)
