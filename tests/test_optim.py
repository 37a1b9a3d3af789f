"""Optimizers by name: learning-rate schedules against closed forms, updates against optax composed by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from qtrain.config import base_config
from qtrain.errors import UsageError
from qtrain.optim import OPTIMIZERS, SCHEDULES, learning_rate_schedule, optimizer

STEPS, EPOCH = 100, 20


def settings(**overrides):
    config = base_config("digits_mlp").optimizer
    config.update(schedule="constant", learning_rate=0.1, **overrides)
    return config


def tree(seed):
    rng = np.random.default_rng(seed)
    layer = {"kernel": rng.normal(size=(3, 4)), "bias": rng.normal(size=4)}
    return {"params": {"Dense_0": jax.tree.map(jnp.float32, layer)}, "quant": {}}


def run(config, steps=4, total_steps=STEPS, transform=None):
    """Parameters after `steps` updates with fixed gradients."""
    if transform is None:
        transform, _ = optimizer(config, total_steps, EPOCH)
    params = tree(0)
    state = transform.init(params)

    @jax.jit
    def step(params, state, grads):
        updates, state = transform.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    history = [params]
    for i in range(steps):
        params, state = step(params, state, tree(i + 1))
        history.append(params)
    return history


def assert_close(left, right, **tolerance):
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, **{"rtol": 1e-6, "atol": 1e-7, **tolerance}), left, right
    )


# --- learning rates


def closed_form(schedule, t, warmup=0, peak=0.1, final=0.01, factor=0.1, boundaries=(50, 75)):
    if t < warmup:
        return peak * t / warmup
    u = min((t - warmup) / (STEPS - warmup), 1)
    if schedule == "cosine":
        return peak * ((1 - final) * (1 + np.cos(np.pi * u)) / 2 + final)
    if schedule == "linear":
        return peak + (peak * final - peak) * u
    if schedule == "wsd":
        u = max(t - (STEPS - 20), 0) / 20
        return peak * ((1 - final) * (1 + np.cos(np.pi * u)) / 2 + final)
    if schedule == "step":
        return peak * factor ** sum(t >= percent for percent in boundaries)
    return peak


@pytest.mark.parametrize("warmup", [0, 10])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_learning_rates(schedule, warmup):
    config = settings(warmup_steps=warmup, final_factor=0.01)
    config.schedule = schedule
    rate = jax.jit(learning_rate_schedule(config, STEPS, EPOCH))
    found = [float(rate(t)) for t in range(STEPS + 1)]
    np.testing.assert_allclose(
        found, [closed_form(schedule, t, warmup) for t in range(STEPS + 1)], rtol=1e-5, atol=1e-8
    )


def halved_cosine(peak, final, steps):
    return peak * (final + (1 - final) * (1 + np.cos(np.pi * np.arange(steps) / steps)) / 2)


@pytest.mark.parametrize(
    ("restart", "cooldown", "decay", "parts"),
    [  # parts: (warm-up, stable, falling) each
        (60, 20, 10, [(5, 43, 12), (5, 31, 4)]),  # percents are of the part
        (90, 20, 100, [(5, 67, 18), (5, 0, 5)]),  # what is left after the warm-up decays
        (0, 20, 100, [(5, 0, 95)]),
        (0, 20, 0, [(5, 95, 0)]),
    ],
)
def test_a_restart_is_a_part_of_its_own(restart, cooldown, decay, parts):
    config = settings(
        warmup_steps=5, final_factor=0.1, restart_percent=restart, cooldown_percent=cooldown, decay_percent=decay
    )
    config.schedule = "wsd"
    expected = [
        rate
        for rising, stable, falling in parts
        for rate in (*(0.1 * np.arange(rising) / max(rising, 1)), *[0.1] * stable, *halved_cosine(0.1, 0.1, falling))
    ]
    found = jax.jit(jax.vmap(learning_rate_schedule(config, STEPS, EPOCH)))(np.arange(STEPS))
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("unit", [{"warmup_steps": 20}, {"warmup_epochs": 1.0}, {"warmup_percent": 20.0}])
def test_warmup_units(unit):
    rate = learning_rate_schedule(settings(**unit), STEPS, EPOCH)
    assert float(rate(10)) == pytest.approx(0.05) and float(rate(20)) == pytest.approx(0.1)


def rates(total, schedule, **overrides):
    config = settings(final_factor=0.01, **overrides)
    config.schedule = schedule
    return np.asarray(jax.jit(jax.vmap(learning_rate_schedule(config, total, EPOCH)))(np.arange(total)))


@pytest.mark.parametrize("warmup", [0, 10])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_held_and_restarted(schedule, warmup):
    """A held run is a shorter one with steps put in; a restarted one is two, one after the other."""
    for first, length in ((0, 40), (30, 20), (90, 10)):
        held = rates(STEPS, schedule, warmup_steps=warmup, hold_start_steps=first, hold_steps=length)
        at, kept = max(first, warmup), max(first + length - max(first, warmup), 0)
        plain = rates(STEPS - kept, schedule, warmup_steps=warmup)
        last = plain[at] if at < len(plain) else rates(STEPS - kept + 1, schedule, warmup_steps=warmup)[-1]
        np.testing.assert_allclose(held[:at], plain[:at], rtol=1e-5)
        np.testing.assert_allclose(held[at + kept :], plain[at:], rtol=1e-5)
        assert np.ptp(held[at : at + kept]) == 0 and (at == len(plain) or held[at] == pytest.approx(last))
    restarted = rates(STEPS, schedule, warmup_steps=warmup, restart_percent=30.0)
    parts = [rates(length, schedule, warmup_steps=warmup) for length in (30, 70)]
    np.testing.assert_allclose(restarted, np.concatenate(parts), rtol=1e-5)


def test_boundaries_that_fall_on_one_step_multiply():
    config = settings(boundaries_percent=(30, 31))
    config.schedule = "step"
    rate = learning_rate_schedule(config, 10, EPOCH)
    assert float(rate(2)) == pytest.approx(0.1) and float(rate(3)) == pytest.approx(0.001)


def test_accumulation_counts_updates_but_durations_are_steps():
    config = settings(warmup_steps=40, accumulate_steps=4)
    config.schedule = "linear"
    _, rate = optimizer(config, STEPS, EPOCH)
    assert float(rate(5)) == pytest.approx(0.05)  # half of the ten updates that 40 steps make
    assert float(rate(10)) == pytest.approx(0.1) and float(rate(25)) == pytest.approx(0.0, abs=1e-9)


# --- transforms


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer_updates_and_takes_the_schedule(name):
    config = settings(name=name, weight_decay=0.01)
    before, *_, after = run(config)
    for old, new in zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True):
        assert np.all(np.isfinite(new)) and np.any(np.asarray(old) != np.asarray(new))
    config.schedule, config.final_factor = "linear", 0.0
    config.options = {"momentum": 0.0} if name == "lars" else {}  # its momentum is of steps already scaled by the rate
    *_, last, unchanged = run(config, steps=3, total_steps=2)
    assert_close(last, unchanged, rtol=0, atol=0)  # at the end of the schedule the rate is 0


@pytest.mark.parametrize(("momentum", "nesterov"), [(0.0, False), (0.9, False), (0.9, True)])
def test_sgd(momentum, nesterov):
    found = run(settings(name="sgd", momentum=momentum, nesterov=nesterov))[-1]
    params, velocity = tree(0), jax.tree.map(jnp.zeros_like, tree(0))
    for i in range(4):
        grads = tree(i + 1)
        velocity = jax.tree.map(lambda v, g: momentum * v + g, velocity, grads)
        used = jax.tree.map(lambda v, g: momentum * v + g, velocity, grads) if nesterov else velocity
        params = jax.tree.map(lambda p, u: p - 0.1 * u, params, used)
    assert_close(found, params)


@pytest.mark.parametrize("decay", ["kernels", "all"])
def test_weight_decay_is_coupled_for_sgd(decay):
    found = run(settings(name="sgd", momentum=0.9, weight_decay=0.1, decay=decay))[-1]
    params, velocity = tree(0), jax.tree.map(jnp.zeros_like, tree(0))
    for i in range(4):
        grads = jax.tree.map(lambda p, g: g + 0.1 * p * (p.ndim > 1 or decay == "all"), params, tree(i + 1))
        velocity = jax.tree.map(lambda v, g: 0.9 * v + g, velocity, grads)
        params = jax.tree.map(lambda p, v: p - 0.1 * v, params, velocity)
    assert_close(found, params)


def test_weight_decay_of_adam_is_coupled_and_of_adamw_decoupled():
    def mask(params):
        return jax.tree.map(lambda leaf: leaf.ndim > 1, params)

    coupled = optax.chain(optax.add_decayed_weights(0.1, mask), optax.adam(0.1))
    decoupled = optax.adamw(0.1, weight_decay=0.1, mask=mask)
    for name, expected in (("adam", coupled), ("adamw", decoupled)):
        assert_close(run(settings(name=name, weight_decay=0.1))[-1], run(None, transform=expected)[-1])
    assert_close(run(settings(name="adamw", weight_decay=0.0))[-1], run(settings(name="adam"))[-1])


def test_clipping_is_by_the_global_norm():
    config = settings(name="sgd", momentum=0.0, clip_norm=0.5)
    before, after = run(config, steps=1)
    step = jax.tree.map(lambda x, y: x - y, before, after)
    assert float(optax.tree.norm(step)) == pytest.approx(0.1 * 0.5, rel=1e-5)
    grads = tree(1)
    scale = 0.05 / optax.tree.norm(grads)
    assert_close(step, jax.tree.map(lambda g: g * scale, grads), rtol=1e-4)
    loose = settings(name="sgd", momentum=0.0, clip_norm=1e6)
    assert_close(run(loose)[-1], run(settings(name="sgd", momentum=0.0))[-1])


def test_accumulation_averages_micro_batches_before_clipping():
    config = settings(name="sgd", momentum=0.0, accumulate_steps=2, clip_norm=0.5)
    history = run(config, steps=4)
    assert_close(history[1], history[0], rtol=0, atol=0)
    assert_close(history[3], history[2], rtol=0, atol=0)
    mean = jax.tree.map(lambda a, b: (a + b) / 2, tree(1), tree(2))
    scale = min(1, 0.5 / float(optax.tree.norm(mean)))
    assert_close(history[2], jax.tree.map(lambda p, g: p - 0.1 * scale * g, history[0], mean), rtol=1e-5)


def test_options_reach_optax():
    assert_close(
        run(settings(name="adam", options={"b1": 0.5, "eps": 1e-3}))[-1],
        run(None, transform=optax.adam(0.1, b1=0.5, eps=1e-3))[-1],
    )


def test_the_update_compiles_once():
    transform, _ = optimizer(settings(name="adamw", accumulate_steps=2, clip_norm=1.0, weight_decay=0.1), STEPS, EPOCH)
    traces = 0

    @jax.jit
    def step(params, state, grads):
        nonlocal traces
        traces += 1
        updates, state = transform.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    params = tree(0)
    state = transform.init(params)
    for i in range(5):
        params, state = step(params, state, tree(i))
    assert traces == 1


def test_groups_have_a_rate_and_a_decay_of_their_own():
    groups = ({"path": ".*/bias", "learning_rate": 0.0}, {"path": "Dense_0/.*", "learning_rate": 0.01})
    found = run(settings(name="adamw", weight_decay=0.1, groups=groups))[-1]["params"]["Dense_0"]
    slow = settings(name="adamw", weight_decay=0.1)
    slow.learning_rate = 0.01
    alone = run(slow)[-1]["params"]["Dense_0"]
    np.testing.assert_allclose(found["kernel"], alone["kernel"], rtol=1e-6)
    np.testing.assert_array_equal(found["bias"], tree(0)["params"]["Dense_0"]["bias"])
    without = run(settings(name="adamw", weight_decay=0.1, groups=({"path": ".*", "weight_decay": 0.0},)))[-1]
    decayless = run(settings(name="adamw"))[-1]
    np.testing.assert_allclose(
        without["params"]["Dense_0"]["kernel"], decayless["params"]["Dense_0"]["kernel"], rtol=1e-6
    )


def test_a_group_that_matches_nothing():
    transform, _ = optimizer(settings(groups=({"path": "Dense_1/.*"},)), STEPS, EPOCH)
    with pytest.raises(UsageError, match=r"optimizer.groups.0..path='Dense_1/..': matches no parameter.*Dense_0/bias"):
        transform.init(tree(0))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"name": "adm"}, "optimizer.name='adm'.*Did you mean 'adam'"),
        ({"name": "sm3"}, "optimizer.name='sm3'"),  # takes no schedule
        ({"learning_rate": 0.0}, "optimizer.learning_rate=0.0"),
        ({"momentum": 1.0}, "optimizer.momentum=1.0"),
        ({"clip_norm": -1.0}, "optimizer.clip_norm=-1.0"),
        ({"weight_decay": float("nan")}, "optimizer.weight_decay=nan"),
        ({"decay": "biases"}, "optimizer.decay='biases'"),
        ({"warmup_percent": 100.0}, "optimizer.warmup is 100 steps of 100"),
        ({"warmup_percent": 5.0, "warmup_steps": 3}, "give exactly one"),
        ({"boundaries_percent": (50, 100)}, "optimizer.boundaries_percent"),
        ({"hold_percent": 100.0}, "optimizer.hold is 100 steps from step 0 on: of 100 steps none is left"),
        ({"hold_start_steps": 10}, "optimizer.hold_start is set without optimizer.hold_steps"),
        ({"hold_steps": 10, "restart_steps": 10}, "optimizer.hold and optimizer.restart are both set"),
        ({"hold_steps": 10, "hold_percent": 10.0}, "give exactly one"),
        ({"restart_steps": 100}, "optimizer.restart is step 100 of 100"),
        ({"restart_steps": 95, "warmup_steps": 5}, "optimizer.warmup is 5 steps of a part of 5"),
        ({"accumulate_steps": STEPS + 1}, "optimizer.accumulate_steps=101"),
        ({"options": {"beta": 0.9}}, "optimizer.options.beta: optax.adam takes"),
        ({"groups": ({"path": "Dense_0/bias", "rate": 1.0},)}, "optimizer.groups.0..rate: no such key"),
        ({"groups": ({"path": "("},)}, "optimizer.groups.0..path='.': not a regular expression"),
        ({"groups": ({"path": ".*", "weight_decay": -1.0},)}, "optimizer.groups.0..weight_decay=-1.0"),
        ({"options": {"b1": "x"}}, "optimizer.options=.*optax.adam refuses"),
    ],
)
def test_mistakes(overrides, message):
    config = settings()
    config.update(overrides)
    with pytest.raises(UsageError, match=message) as caught:
        optimizer(config, STEPS, EPOCH)
    assert "\n" not in str(caught.value)


def test_step_schedule_needs_boundaries():
    config = settings(boundaries_percent=())
    config.schedule = "step"
    with pytest.raises(UsageError, match="boundaries_percent is empty"):
        optimizer(config, STEPS, EPOCH)
