"""`scale_by_transition_rate` and bits: what counts as a transition when they change, their forms, no grid at all."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from transition_program import assert_equal, train, transform, tree

from qtrain.optim import RULES, scale_by_transition_rate, transition_metrics


def test_a_change_of_precision_is_no_transition():
    params, grads = tree(), jax.tree.map(jnp.zeros_like, tree())
    optimizer = transform()
    state, update = optimizer.init(params), jax.jit(optimizer.update)
    before = None
    for bits in (4, 8, 8, 3, 2, 5):
        _, state = update(grads, state, params, bits=jnp.float32(bits))
        assert state.transitions.tolist() == [0, 0]
        now = np.asarray(state.last["Dense_0"]["kernel"])
        assert before is None or bits == 8 or not np.array_equal(now, before)  # though the codes did change
        before = now
    assert update._cache_size() == 1


def test_transitions_are_counted_on_the_grid_of_the_update_before():
    params = {"kernel": jnp.array([[0.0, 0.0, 0.0, 0.0]])}
    optimizer = transform()
    state = optimizer.init(params)
    _, state = optimizer.update(params, state, params, bits=4)  # steps of 0.25
    params = {"kernel": jnp.array([[0.2, 0.1, 0.0, 0.0]])}  # 0.1 would be a change at 6 bits, not at 4
    _, state = optimizer.update(params, state, params, bits=6)
    assert float(state.transitions[0]) == 0.25
    params = {"kernel": jnp.array([[0.2, 0.1, 0.05, 0.0]])}
    _, state = optimizer.update(params, state, params, bits=2)
    assert float(state.transitions[0]) == 0.25  # on the 6-bit grid, of step 1/16
    assert float(state.bits[0]) == 2


FORMS = {
    "number": (lambda t: 4.0 + t % 2, lambda t: (4.0 + t % 2,) * 2),
    "tree": (
        lambda t: {"Dense_0": {"kernel": 4.0, "bias": None}, "Dense_1": {"kernel": 3.0 + t, "bias": None}},
        lambda t: (4.0, 3.0 + t),
    ),
    "prefix": (lambda t: {"Dense_0": 4.0, "Dense_1": 3.0 + t}, lambda t: (4.0, 3.0 + t)),
    "paths": (lambda t: {"Dense_0/kernel": 4.0, "Dense_1/kernel": 3.0 + t}, lambda t: (4.0, 3.0 + t)),
}


@pytest.mark.parametrize("name", FORMS)
def test_forms_of_bits(name):
    given, meant = FORMS[name]
    tree_form = lambda t: {"Dense_0": {"kernel": meant(t)[0]}, "Dense_1": {"kernel": meant(t)[1]}}  # noqa: E731
    optimizer = optax.chain(optax.sgd(1.0), transform(target_scale="sqrt_bits"))
    params, state = train(optimizer, bits=given)
    assert_equal((params, state), train(optimizer, bits=tree_form))
    metrics = transition_metrics(state)
    for path, bits in zip(("Dense_0/kernel", "Dense_1/kernel"), meant(5), strict=True):
        assert float(metrics[path]["target"]) == pytest.approx(0.02 * bits**0.5, rel=1e-6)


def test_integer_bits_stay_integers():
    """A `codes` that shifts by its bits gets integers back where it was given them."""
    kinds = []

    def codes(params, bits=None):
        kinds.append(None if bits is None else jnp.asarray(bits).dtype)
        return jax.tree.map(lambda w: jnp.round(w).astype(jnp.int32), params)

    optimizer = scale_by_transition_rate(codes, 0.02, 0.1)
    params = jnp.ones(3)
    optimizer.update(params, optimizer.init(params), params, bits=jnp.int32(4))
    assert kinds == [None, jnp.int32, jnp.int32]


@pytest.mark.parametrize("rule", RULES)
def test_without_a_grid_everything_is_held(rule):
    optimizer = optax.chain(optax.sgd(1.0), transform(rule, target_scale="sqrt_bits"))
    widths = [4, 4, 4, 32, 32, 4, 4]
    params, state, seen = tree(), None, []
    state = optimizer.init(params)
    for t, bits in enumerate(widths):
        updates, state = optimizer.update(tree(t + 1), state, params, bits=jnp.float32(bits))
        params = optax.apply_updates(params, updates)
        seen.append({key: float(value) for key, value in transition_metrics(state)["Dense_0/kernel"].items()})
    for t in (3, 4, 5):
        for key in ("running", "talr", "target"):
            assert seen[t][key] == seen[2][key]
        assert seen[t]["rate"] == 0
    assert seen[6]["talr"] != seen[2]["talr"] and seen[6]["rate"] > 0
    # A run that begins in float begins its average with its first grid.
    state, params = optimizer.init(params), tree()
    for bits in (32, 32, 4):
        _, state = optimizer.update(tree(1), state, params, bits=jnp.float32(bits))
    values = transition_metrics(state)["Dense_0/kernel"]
    assert float(values["running"]) == pytest.approx(0.04) and float(values["talr"]) == pytest.approx(0.1)


def test_extra_arguments_reach_the_codes():
    optimizer = transform()
    params, grads = tree(), jax.tree.map(jnp.zeros_like, tree())
    state = optimizer.init(params)
    _, state = optimizer.update(grads, state, params, scale=0.25)
    _, state = optimizer.update(grads, state, params, scale=0.5)  # another scale moves codes: those do count
    assert min(state.transitions) > 0.5


def test_codes_beyond_a_byte_are_told_apart():
    codes = lambda params: jax.tree.map(lambda w: w.astype(jnp.int32), params)  # noqa: E731
    optimizer = scale_by_transition_rate(codes, 0.02, 0.1)
    for step, counted in ((1, 1.0), (255, 1.0), (-200, 1.0), (256, 0.0)):  # 256 is what the low byte cannot show
        params = jnp.array([3.0, 200.0, 1000.0, -5000.0])
        _, state = optimizer.update(params, optimizer.init(params), params)
        _, state = optimizer.update(params, state, params + step)
        assert float(state.transitions[0]) == counted
