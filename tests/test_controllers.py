"""Controllers: their laws against slow references in NumPy, the budget for any signal, vmap, mistakes."""

import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qtrain import Precision, cost, schedules
from qtrain.errors import UsageError
from qtrain.schedules import Signals, budget_keeper, fractrain, muppet
from qtrain.schedules.budget_keeper import SIGNALS

LEVELS = Precision(weights=(3, 4, 6, 8), acts=(3, 4, 6, 8), grads=(6, 6, 8, 8))
COSTS = (57.0, 80.0, 105.0, 132.0, 161.0, 192.0)  # q² + 16 q for 3 … 8 bits
WIDTHS = Precision(weights=range(3, 9), acts=range(3, 9))


def course(controller, losses, grads=None, costs=None, norms=None):
    """The levels of the steps 0 … N − 1 and what each step left in the state, from one compiled scan."""
    losses = jnp.asarray(losses, jnp.float32)
    grads = {} if grads is None else {name: jnp.asarray(value, jnp.float32) for name, value in grads.items()}
    norms = jnp.ones_like(losses) if norms is None else jnp.asarray(norms, jnp.float32)
    per_level = jnp.ones(controller.count) if costs is None else jnp.asarray(costs, jnp.float32)

    def step(carry, inputs):
        state, spent = carry
        index, loss, norm, own = inputs
        spent = cost.add(spent, per_level[state["level"]])
        after = controller.update(state, Signals(index, loss, norm, own, spent))
        return (after, spent), (state["level"], after)

    begun = controller.init(jax.tree.map(lambda value: value[0], grads)), cost.zero()
    inputs = jnp.arange(len(losses)), losses, norms, grads
    (_, spent), (levels, states) = jax.lax.scan(step, begun, inputs)
    return levels, states, spent


# --- FracTrain


def fractrain_reference(losses, stages, interval, epsilon, alpha, scale_epochs):
    means, stage, levels = [], 0, []
    for t, loss in enumerate(losses):
        levels.append(stage)
        if t % interval == 0:
            epoch = []
        epoch.append(loss)
        if len(epoch) == interval:
            means.append(np.mean(epoch))
            scale = np.mean(means[:scale_epochs])
            if len(means) > 4 and stage < stages - 1:
                differences = [abs(means[-1 - i] - means[-1]) / scale for i in (1, 2, 3, 4)]
                if max(differences) <= epsilon:
                    stage, epsilon = stage + 1, alpha * epsilon
    return levels


@pytest.mark.parametrize(("epsilon", "alpha", "scale_epochs"), [(0.05, 0.3, 10), (0.4, 0.9, 2), (1.5, 1.0, 30)])
def test_fractrain_is_its_law(epsilon, alpha, scale_epochs):
    rng = np.random.default_rng(0)
    losses = np.exp(-np.arange(180) / 25) + 0.05 * rng.random(180)
    levels, states, _ = jax.jit(lambda losses: course(fractrain(LEVELS, 4, epsilon, alpha, scale_epochs), losses))(
        losses
    )
    expected = fractrain_reference(losses.astype(np.float32), 4, 4, epsilon, alpha, scale_epochs)
    np.testing.assert_array_equal(levels, expected)
    assert len(set(expected)) > 1, "the course is about a switch"
    assert np.all(np.diff(states["epsilon"]) <= 0)


def test_fractrain_needs_five_epochs_and_stops_at_the_last_stage():
    levels = jax.jit(lambda losses: course(fractrain(LEVELS, 2), losses)[0])(np.ones(40))
    # Nothing moves: the first switch is after the fifth epoch of two steps, one more with each epoch, up to the last.
    np.testing.assert_array_equal(levels, [0] * 10 + [1] * 2 + [2] * 2 + [3] * 26)


# --- MuPPET


def muppet_reference(grads, steps, stages, interval, window, violations, margin, decay):
    last, level, levels, since, found = [], 0, [], [], 0
    for t in range(steps):
        levels.append(level)
        if (t + 1) % interval:
            continue
        last.append({name: value[t].astype(np.float64) for name, value in grads.items()})
        epoch = len(last) - 1
        if len(last) < window:
            continue
        per_layer = []
        for name in grads:
            kept = [each[name] for each in last[-window:]]
            per_layer.append(sum((g**2).sum() for g in kept) / (sum(kept) ** 2).sum())
        since.append(np.mean(per_layer))
        found += max(since) / since[-1] > 1 + margin * np.exp(-decay * epoch)
        if found >= violations and level < stages - 1:
            level, since, found = level + 1, [], 0
    return levels


@pytest.mark.parametrize(("window", "violations", "margin"), [(3, 2, 1.5), (2, 1, 0.5), (4, 3, 0.2)])
def test_muppet_is_its_law(window, violations, margin):
    rng = np.random.default_rng(1)
    steps, interval = 120, 3
    # Gradients of the epochs turn from independent to alike and back, so that the diversity falls several times.
    alike = (np.sin(np.arange(steps) / 9) + 1)[:, None, None]
    grads = {
        "a": (rng.normal(size=(steps, 4, 3)) + 3 * alike).astype(np.float32),
        "b": (rng.normal(size=(steps, 2, 2)) + alike).astype(np.float32),
    }
    levels = Precision(weights=(8, 12, 14, 16, 32))

    def run(grads):
        controller = muppet(levels, interval, window, violations, margin)
        return course(controller, jnp.ones(steps), grads)[:2]

    found, states = jax.jit(run)(grads)
    expected = muppet_reference(grads, steps, 5, interval, window, violations, margin, 0.1)
    np.testing.assert_array_equal(found, expected)
    assert len(set(expected)) > 1, "the course is about a switch"
    held = states["gradients"][-1]
    assert held.shape == (window - 1, 4 * 3 + 2 * 2)
    newest = (steps // interval - 1) % (window - 1)
    np.testing.assert_array_equal(held[newest], np.concatenate([grads["a"][-1].ravel(), grads["b"][-1].ravel()]))


def test_muppet_of_zero_gradients_stays():
    found = jax.jit(lambda: course(muppet(LEVELS, 1), jnp.ones(20), {"a": jnp.zeros((20, 2))})[:2])()
    assert np.all(np.isfinite(found[1]["diversity"])) and not np.any(found[0])


# --- the budget keeper


def keeper_reference(costs, pace, budget, interval, watched, gain, memory):
    """Levels and cost of the run in float64; the signal is that of `watched`."""
    costs, steps = np.asarray(costs, np.float64), len(pace)
    spent, growths, values, levels = 0.0, [], [], []
    mean = variance = 0.0
    for start in range(0, steps, interval):
        signal = 0.0
        if start:
            values.append(np.log(np.mean(watched[start - interval : start])))
            if len(values) > 1:
                growths.append(values[-1] - values[-2])
                rate = 1 / min(len(growths), memory)
                off = growths[-1] - mean
                mean += rate * off
                variance = (1 - rate) * (variance + rate * off**2)
                if variance > 0:
                    signal = np.clip((growths[-1] - mean) / (2 * np.sqrt(variance)), -1, 1)
        length = min(interval, steps - start)
        after, left = steps - start - length, budget - spent
        wanted = left * pace[start : start + length].sum() / pace[start:].sum() * (1 + gain * signal)
        wanted = min(
            max(wanted, length * costs[0], left - after * costs[-1]), length * costs[-1], left - after * costs[0]
        )
        lower = max(k for k in range(len(costs) - 1) if costs[k] <= wanted / length + 1e-9 or k == 0)
        upper = int(np.clip((wanted / length - costs[lower]) / (costs[lower + 1] - costs[lower]), 0, 1) * length + 1e-3)
        levels += [lower] * (length - upper) + [lower + 1] * upper
        spent += sum(costs[level] for level in levels[start:])
    return np.array(levels), spent


@pytest.mark.parametrize(
    ("share", "interval", "gain", "of"), [(0.6, 7, 0.5, "static"), (1.0, 10, -0.8, "CR"), (0.95, 200, 1.0, "RR")]
)
def test_budget_keeper_is_its_law(share, interval, gain, of):
    rng = np.random.default_rng(2)
    losses = np.exp(-np.arange(200) / 40 + 0.3 * rng.normal(size=200)).astype(np.float32)
    pace = np.full(200, COSTS[-1])
    if of != "static":
        bits = schedules.evaluate(schedules.by_name(of, low=3, high=8, cycles=4, total_steps=200), 200)
        pace = np.asarray(COSTS)[bits.astype(int) - 3]
    controller = budget_keeper(WIDTHS, COSTS, pace, share * pace.sum(), interval, gain=gain, memory=6)
    levels, _, total = jax.jit(lambda losses: course(controller, losses, costs=COSTS))(losses)
    expected, spent = keeper_reference(COSTS, pace, share * pace.sum(), interval, losses.astype(np.float64), gain, 6)
    different = np.flatnonzero(np.asarray(levels) != expected)
    assert len(different) <= 2, "but for a step where a share is whole to rounding"
    assert cost.value(total) == pytest.approx(spent, rel=2e-3)


def test_the_budget_is_met_whatever_the_signal_says():
    # Many controllers at once: their numbers are data. Signals that rise, fall, jump, are NaN, infinite, zero.
    rng = np.random.default_rng(3)
    steps = 130
    signals = np.stack([
        np.exp(rng.normal(size=steps) * 3),
        np.linspace(1e-6, 1e6, steps),
        np.geomspace(1e6, 1e-30, steps),
        np.where(rng.random(steps) < 0.2, np.nan, 1.0),
        np.where(rng.random(steps) < 0.2, np.inf, 1e-3),
        np.where(np.arange(steps) % 20 < 10, 1e-9, 1e9),
        np.zeros(steps),
        -rng.random(steps),
    ])  # fmt: skip
    controllers, budgets = [], []
    for number in range(64):
        pace = rng.random(steps) + 0.1
        pace *= COSTS[-1] / pace.max()
        budget = steps * (COSTS[0] + (COSTS[-1] - COSTS[0]) * (number % 9) / 8)  # the bounds too
        chosen = {"signal": SIGNALS[number % 4], "gain": (1.0, -1.0, 0.5)[number % 3], "noise_seed": number}
        controllers.append(budget_keeper(WIDTHS, COSTS, pace, budget, interval=13, **chosen))
        budgets.append(budget)
    stacked = jax.tree.map(lambda *leaves: np.stack(leaves), *controllers)
    watched = np.tile(signals, (8, 1))

    @jax.jit
    def run(controllers, losses, norms):
        one = lambda *given: course(given[0], given[1], costs=COSTS, norms=given[2])  # noqa: E731
        return jax.vmap(one)(controllers, losses, norms)

    levels, _, total = run(stacked, watched, np.roll(watched, 3, axis=0))
    spent, budgets = cost.value(total), np.array(budgets)
    steps_apart = np.max(np.diff(COSTS))
    assert np.all(spent <= budgets * (1 + 1e-6) + 2e-3 * steps_apart), "never above"
    assert np.all(spent > budgets - steps_apart * 1.002), "less than a step's difference below"
    assert np.all(np.abs(spent / budgets - 1) < 0.01)
    between = (budgets > budgets.min()) & (budgets < budgets.max())
    assert np.all([len(set(row)) > 1 for row in np.asarray(levels)[between]]), "and bits do change"
    # A long run of small budget shares counts exactly, too: float32 alone would lose steps.
    long = budget_keeper(WIDTHS, np.asarray(COSTS) * 1e9, np.ones(30_000), 30_000 * 1e11, 300)
    total = jax.jit(lambda losses: course(long, losses, costs=np.asarray(COSTS) * 1e9)[2])(rng.random(30_000))
    assert 0 <= 30_000 * 1e11 - cost.value(total) < 1e9 * steps_apart * 1.1


def test_the_signal_moves_spending():
    # The loss stands still in every other interval: that is where more bits are, and with a negative gain fewer.
    falls = np.repeat(np.tile([0.5, 1.0], 20), 10)
    losses = np.cumprod(falls ** (1 / 10))

    def mean_bits(gain, signal="loss"):
        controller = budget_keeper(WIDTHS, COSTS, np.ones(400), 0.6 * 400 * COSTS[-1], 10, gain=gain, signal=signal)
        levels, _, _ = jax.jit(lambda losses: course(controller, losses, costs=COSTS))(losses)
        blocks = np.asarray(levels).reshape(-1, 10).mean(1)[4:-2]
        return blocks[0::2].mean(), blocks[1::2].mean()  # after an interval that stood still; after one that fell

    still, fell = mean_bits(0.5)
    assert still > fell + 0.5
    still, fell = mean_bits(-0.5)
    assert still < fell - 0.5
    even = mean_bits(0.5, "none")
    assert abs(even[0] - even[1]) < 0.1


# --- all of them


@pytest.mark.parametrize(
    "controller",
    [
        fractrain(LEVELS, 3, epsilon=2.0),
        muppet(LEVELS, 3, margin=0.0, violations=1),
        budget_keeper(LEVELS, (1, 2, 3, 4), np.ones(30), 75, 5),
    ],
    ids=lambda controller: controller.name,
)
def test_decided_after_a_step_applies_from_the_next_one_on(controller):
    rng = np.random.default_rng(0)
    grads = {"a": rng.normal(size=(30, 5))}
    losses = rng.random(30)
    levels, states, _ = jax.jit(lambda l: course(controller, l, grads, costs=(1, 2, 3, 4)))(losses)
    np.testing.assert_array_equal(levels[1:], states["level"][:-1])
    assert len(set(np.asarray(levels).tolist())) > 1
    bits = jax.jit(jax.vmap(controller.bits))(states)
    np.testing.assert_array_equal(bits.grads, np.array([6, 6, 8, 8])[states["level"]])
    assert bits.weights.dtype == jnp.float32
    assert set(controller.metrics(jax.tree.map(lambda leaf: leaf[0], states))) >= {"level"}


@pytest.mark.parametrize(
    ("make", "pattern"),
    [
        (lambda: fractrain(Precision(), 3), "no kind is decided"),
        (lambda: fractrain(Precision(weights=(3, 4), grads=(8,)), 3), r"levels\.grads=\[8\]: give two or more"),
        (lambda: fractrain(Precision(weights=(3, 4), grads=(8, 8, 8)), 3), r"as many .*weights: 2, grads: 3"),
        (lambda: fractrain(LEVELS, 0), "interval=0"),
        (lambda: fractrain(LEVELS, 3, epsilon=0), "epsilon=0: must be a number above 0"),
        (lambda: fractrain(LEVELS, 3, alpha=1.5), "alpha=1.5"),
        (lambda: muppet(LEVELS, 3, window=1), "window=1"),
        (lambda: muppet(LEVELS, 3, violations=0), "violations=0"),
        (lambda: muppet(LEVELS, 3, margin=-1.0), "margin=-1"),
        (lambda: budget_keeper(WIDTHS, (1, 2, 3), np.ones(9), 30, 3), "give 6 increasing numbers"),
        (lambda: budget_keeper(WIDTHS, COSTS, np.zeros(9), 900, 3), "pace: give a number above 0"),
        (lambda: budget_keeper(WIDTHS, COSTS, np.ones(9), 100, 3), r"budget=100 .*from 513 .* to 1728"),
        (lambda: budget_keeper(WIDTHS, COSTS, np.ones(9), 900, 3, signal="los"), "signal='los'.*Did you mean 'loss'"),
        (lambda: budget_keeper(WIDTHS, COSTS, np.ones(9), 900, 3, gain=2.0), "gain=2"),
        (lambda: budget_keeper(WIDTHS, COSTS, np.ones(9), 900, 3, memory=1), "memory=1"),
    ],
)
def test_mistakes(make, pattern):
    with pytest.raises(UsageError, match=pattern) as caught:
        make()
    assert "\n" not in str(caught.value)


def test_the_documentation_runs():
    text = (Path(__file__).parents[1] / "docs" / "adaptive.md").read_text()
    (block,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    names: dict = {}
    exec(compile(block, "docs/adaptive.md", "exec"), names)
    assert names["bits"].weights > 3 and names["bits"].grads is None
