"""The transition-rate rules: against the equations in numpy, on random gradients, and where nothing moves."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from qtrain.optim import RULES, scale_by_transition_rate

STEP = 0.5


def codes(params, bits=4):
    high = jnp.left_shift(1, jnp.asarray(bits, jnp.int32) - 1)
    return jax.tree.map(lambda w: jnp.clip(jnp.round(w / STEP * 2.0 ** (bits - 4)), -high, high - 1), params)


def integer_codes(params, bits=4):
    return jax.tree.map(lambda c: c.astype(jnp.int32), codes(params, bits))


# --- the equations, written down again


class Reference:
    """The equations in numpy, with Python's numbers in double precision; weights and updates in float32."""

    def __init__(self, rule, target, initial_rate, m=0.99, gain=None, max_rate=None, sqrt_bits=False):
        self.rule, self.target, self.m, self.sqrt_bits = rule, target, m, sqrt_bits
        self.rate = self.mean_rate = initial_rate
        default = {"additive": initial_rate, "proportional": 0.02, "multiplicative": None}[rule]
        self.gain = default if gain is None else gain
        self.limit = (np.inf if rule == "additive" else 100 * initial_rate) if max_rate is None else max_rate
        self.last = None
        self.t = 0

    @staticmethod
    def codes(weights, bits):
        scaled = (weights / np.float32(STEP) * np.float32(2.0 ** (bits - 4))).astype(np.float32)
        return np.clip(np.round(scaled), -(2 ** (bits - 1)), 2 ** (bits - 1) - 1).astype(np.int64)

    def update(self, weights, direction, bits):
        target = max(self.target(self.t), 0.0) * (np.sqrt(bits) if self.sqrt_bits else 1.0)
        if self.last is None:
            self.k, self.running, self.factor = 0.0, target, self.rate / target
        else:
            self.k = np.mean(self.codes(weights, self.last_bits) != self.last)
            self.running = self.m * self.running + (1 - self.m) * self.k
            if self.rule == "additive":
                self.rate = max(0.0, self.rate + self.gain * (target - self.running))
            elif self.rule == "multiplicative":
                self.rate = self.rate * (self.m + (1 - self.m) * target / (self.running + 1e-8))
            else:
                self.mean_rate = self.m * self.mean_rate + (1 - self.m) * self.rate
                wanted = self.mean_rate / (self.running + 1e-8)
                low, high = self.factor * np.exp(-self.gain), self.factor * np.exp(self.gain)
                self.factor = min(max(wanted, low), high, self.limit / max(target, 1e-8))
                self.rate = self.factor * target
            self.rate = min(self.rate, self.limit)
        self.t += 1
        self.last, self.last_bits, self.R = self.codes(weights, bits), bits, target
        return np.float32(self.rate) * direction


SETTINGS = [
    ("defaults", {}, {}),
    ("momentum 0", {"momentum": 0.0}, {"m": 0.0}),
    ("momentum 0.9, limited", {"momentum": 0.9, "max_rate": 0.11}, {"m": 0.9, "max_rate": 0.11}),
    ("bits", {"target_scale": "sqrt_bits"}, {"sqrt_bits": True}),
]


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("name, given, same", SETTINGS, ids=[name for name, *_ in SETTINGS])
def test_fifty_updates_equal_the_equations(rule, name, given, same):
    rng = np.random.default_rng(0)
    transform = scale_by_transition_rate(integer_codes, lambda t: 0.02 * (1 - t / 45), 0.1, rule=rule, **given)
    reference = Reference(rule, lambda t: 0.02 * (1 - t / 45), 0.1, **same)
    params = jnp.asarray(rng.normal(size=4000), jnp.float32)
    state, update = transform.init(params), jax.jit(transform.update)
    weights = np.asarray(params)
    widths = [4] * 10 + [3] * 15 + [5] * 25  # a schedule: two changes of precision
    for t in range(50):
        direction = rng.normal(size=4000).astype(np.float32) * np.float32(0.1 if t < 30 else 2.0)
        updates, state = update(jnp.asarray(direction), state, params, bits=jnp.float32(widths[t]))
        np.testing.assert_allclose(updates, reference.update(weights, direction, widths[t]), rtol=2e-5, atol=1e-7)
        assert state.transitions.item() == pytest.approx(reference.k, abs=1e-7)
        for mine, other in (("running", "running"), ("rate", "rate"), ("target", "R")):
            assert getattr(state, mine).item() == pytest.approx(getattr(reference, other), rel=2e-5, abs=1e-8), (
                t,
                mine,
            )
        assert state.step.item() == pytest.approx(np.abs(direction).mean() * reference.rate, rel=1e-4, abs=1e-8)
        params = params + updates
        weights = np.asarray(params)  # the trajectory is shared, so that a tie cannot set the two apart
    assert int(state.count) == 50
    if name == "defaults":
        assert reference.rate != 0.1  # the rate did move


def test_a_gain_is_used():
    for rule, gains in (("additive", (0.1, 1.0)), ("proportional", (0.001, 0.1))):
        rates = []
        for gain in gains:
            transform = scale_by_transition_rate(integer_codes, 0.02, 0.1, rule=rule, gain=gain, momentum=0.5)
            params, state = jnp.zeros(10), None
            state = transform.init(params)
            for _ in range(3):
                _, state = transform.update(params, state, params)
            rates.append(state.rate.item())
        assert rates[1] > rates[0] > 0.1


# --- random gradients


WEIGHTS, STEPS, WINDOW = 100_000, 3000, 100
CLIPPED, OPEN = "4 bits", "grid without ends"


def simulate(ends):
    """Windows of k/R for each rule and without one; gradients are 100 times as large in the second half."""

    def grid(weights):
        return jnp.clip(jnp.round(weights / STEP), *ends).astype(jnp.int32)

    target, decay = optax.cosine_decay_schedule(5e-3, STEPS), optax.cosine_decay_schedule(0.1, STEPS)
    transforms = {rule: scale_by_transition_rate(grid, target, 0.1, rule=rule) for rule in RULES}

    def update(carry, t):
        weights, states, buffer, plain, last, key = carry
        scale = jnp.where(t < STEPS // 2, 0.01, 1.0)
        buffer = 0.9 * buffer + scale * jax.random.normal(jax.random.fold_in(key, t), (WEIGHTS,))
        weights, states, out = dict(weights), dict(states), {}
        for rule, transform in transforms.items():
            updates, states[rule] = transform.update(-buffer, states[rule], weights[rule])
            weights[rule] += updates
            out[rule] = states[rule].transitions[0]
        now = grid(plain)  # without a rule: a learning rate that falls as the target does
        out["none"] = jnp.mean(now != last)
        return (weights, states, buffer, plain - decay(t) * buffer, now, key), (out, target(t))

    @jax.jit
    def run(key):
        start = jax.random.normal(jax.random.fold_in(key, STEPS), (WEIGHTS,))
        states = {rule: transform.init(start) for rule, transform in transforms.items()}
        carry = (dict.fromkeys(RULES, start), states, jnp.zeros(WEIGHTS), start, grid(start), key)
        return jax.lax.scan(update, carry, jnp.arange(STEPS))[1]

    rates, wanted = jax.device_get(run(jax.random.key(0)))
    windows = {name: values.reshape(-1, WINDOW).mean(1) for name, values in rates.items()}
    return windows, wanted.reshape(-1, WINDOW).mean(1)


@pytest.fixture(scope="module", params=[CLIPPED, OPEN])
def simulation(request):
    return request.param, *simulate((-8, 7) if request.param == CLIPPED else (-jnp.inf, jnp.inf))


def test_the_rate_follows_its_target(simulation):
    _, rates, target = simulation
    deviation = {name: np.abs(rate / target - 1)[4:13].mean() for name, rate in rates.items()}
    assert deviation["multiplicative"] < 0.05
    assert deviation["additive"] < 0.15
    assert deviation["proportional"] < 0.02
    assert deviation["none"] > 0.2


def test_the_rate_comes_back_after_gradients_grow(simulation):
    grid, rates, target = simulation
    ratio = {name: rate[20:26].mean() / target[20:26].mean() for name, rate in rates.items()}
    for rule in RULES:
        assert 1 / 1.5 < ratio[rule] < 1.5, rule
    # On 4 bits the control's weights walk off the grid, where no code changes any more.
    assert ratio["none"] > (15 if grid == CLIPPED else 60)


def test_the_proportional_rule_does_not_lag():
    """The target falls to a tenth in 50 updates, U has to follow: the paper's rule is late, ours is not."""
    target = optax.cosine_decay_schedule(5e-3, 50, alpha=0.1)

    def grid(weights):
        return jnp.round(weights / STEP).astype(jnp.int32)

    late = {}
    for rule in RULES:
        transform = scale_by_transition_rate(grid, lambda t: target(jnp.maximum(t - 300, 0)), 0.1, rule=rule)

        def update(carry, t, transform=transform):
            weights, state = carry
            noise = 0.03 * jax.random.normal(jax.random.fold_in(jax.random.key(1), t), weights.shape)
            updates, state = transform.update(noise, state, weights)
            return (weights + updates, state), state.transitions[0]

        start = jax.random.normal(jax.random.key(0), (20_000,))
        carry = (start, transform.init(start))
        rate = jax.jit(lambda carry, update=update: jax.lax.scan(update, carry, jnp.arange(400))[1])(carry)
        late[rule] = float(rate[350:].mean() / 5e-4)
    assert late["proportional"] < 1.3
    assert late["additive"] > 2 * late["proportional"] and late["multiplicative"] > 2 * late["proportional"]


# --- where nothing moves


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("largest", [None, 0.3])
def test_a_tensor_without_transitions_never_blows_up(rule, largest):
    """Gradients are 0: K falls to 0, and the multiplicative rule divides by it."""
    transform = scale_by_transition_rate(integer_codes, 5e-3, 0.1, rule=rule, max_rate=largest)
    params = jnp.ones(10)

    @jax.jit
    def run(state):
        def update(state, _):
            updates, state = transform.update(jnp.zeros(10), state, params)
            return state, (state.rate, jnp.max(jnp.abs(updates)))

        return jax.lax.scan(update, state, None, 5000)

    state, (rates, moved) = run(transform.init(params))
    assert np.isfinite(jax.tree.leaves(state)[0]).all() and np.max(moved) == 0
    allowed = {"additive": 0.1 * (1 + 5000 * 5e-3)}.get(rule, 10.0) if largest is None else largest
    assert 0.1 < np.max(rates) <= allowed * (1 + 1e-5)
    # The rates at the limit are no trap: with transitions they come down again.
    falling = transform.update(jnp.ones(10), state._replace(running=jnp.full(1, 0.9)), params)[1]
    assert falling.rate.item() < state.rate.item()


def test_a_target_of_zero_stops_the_rate_and_may_return():
    for rule in RULES:
        target = lambda t: jnp.where((t > 20) & (t < 300), -1.0, 0.02)  # noqa: E731  below 0 counts as 0
        transform = scale_by_transition_rate(integer_codes, target, 0.1, rule=rule, momentum=0.9)
        params = jax.random.normal(jax.random.key(0), (1000,))
        state, update = transform.init(params), jax.jit(transform.update)
        rates = []
        for t in range(420):
            noise = jax.random.normal(jax.random.fold_in(jax.random.key(1), t), (1000,))
            updates, state = update(noise, state, params)
            params = params + updates
            rates.append(state.rate.item())
        assert np.isfinite(rates).all() and state.target.item() == pytest.approx(0.02)
        assert rates[299] < 0.1 * rates[20]
        if rule != "multiplicative":  # the authors' rule stays near 0 for long once it got there
            assert rates[-1] > 10 * rates[299]
