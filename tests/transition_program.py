"""What the tests of the transition-rate transform share: codes, parameters, and a few jitted updates."""

import jax
import jax.numpy as jnp
import numpy as np
import optax

from qtrain.optim import codes_per_leaf, scale_by_transition_rate


def encode(path, weight, bits, scale=0.25):
    if not path.endswith("kernel"):
        return None
    high = jnp.left_shift(1, jnp.asarray(4 if bits is None else bits, jnp.int32) - 1)
    step = scale * 8 / high
    return jnp.clip(jnp.round(weight / step), -high, high - 1).astype(jnp.int32)


CODES = codes_per_leaf(encode)


def tree(seed=0, size=(16, 8)):
    rng = np.random.default_rng(seed)
    layer = lambda: {"kernel": rng.normal(size=size), "bias": rng.normal(size=size[1])}  # noqa: E731
    return jax.tree.map(jnp.float32, {"Dense_0": layer(), "Dense_1": layer()})


def transform(rule="additive", target=0.02, **settings):
    return scale_by_transition_rate(CODES, target, 0.1, rule=rule, momentum=0.9, **settings)


def train(optimizer, steps=6, bits=lambda t: 4.0, state=None, params=None, first=0, **extra):
    """Parameters and state after `steps` jitted updates with fixed gradients."""
    params = tree() if params is None else params
    state = optimizer.init(params) if state is None else state
    optimizer, traces = optax.with_extra_args_support(optimizer), []

    @jax.jit
    def step(params, state, grads, bits):
        traces.append(1)
        updates, state = optimizer.update(grads, state, params, bits=bits, **extra)
        return optax.apply_updates(params, updates), state

    for t in range(first, first + steps):
        params, state = step(params, state, tree(t + 1), jax.tree.map(jnp.float32, bits(t)))
    assert len(traces) == 1
    return params, state


def assert_equal(left, right):
    jax.tree.map(np.testing.assert_array_equal, left, right)
    assert jax.tree.structure(left) == jax.tree.structure(right)


def plain(rule):
    return optax.chain(optax.sgd(1.0, momentum=0.9), transform(rule))


def numbers(state):
    """All there is in a state but the codes."""
    return np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(state._replace(last=()))]).tolist()
