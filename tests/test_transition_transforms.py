"""`scale_by_transition_rate` among the transforms: of optax, of jax, and of the program."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from program import finished, start
from transition_program import CODES, assert_equal, numbers, plain, train, transform, tree

from qtrain.checkpoint import Checkpoints
from qtrain.errors import UsageError
from qtrain.optim import (
    RULES,
    TransitionState,
    adamt,
    adamwt,
    scale_by_transition_rate,
    sgdt,
    transition_metrics,
)


def rate(state, path):
    return float(transition_metrics(state)[path]["talr"])


# --- optax


def test_only_leaves_with_codes_are_scaled():
    params, grads = tree(), tree(1)
    optimizer = transform()
    updates, state = optimizer.update(grads, optimizer.init(params), params, bits=4)
    for name, layer in updates.items():
        np.testing.assert_allclose(layer["kernel"], 0.1 * grads[name]["kernel"], rtol=1e-6)
        assert_equal(layer["bias"], grads[name]["bias"])
    assert state.last["Dense_0"]["kernel"].dtype == jnp.int8 and state.last["Dense_0"]["bias"] is None
    # One int8 a weight and ten numbers a leaf at most.
    sizes = [leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state)]
    assert sum(sizes) <= 2 * (128 + 4 * 10) + 4


def kernels(tree):
    return jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key == "kernel", tree)


def labels(tree):
    return jax.tree.map(lambda kernel: "latent" if kernel else "rest", kernels(tree))


WRAPPED = {
    "chain": lambda rule: optax.chain(optax.identity(), plain(rule)),
    "masked": lambda rule: optax.masked(plain(rule), kernels),
    "partition": lambda rule: optax.partition({"latent": plain(rule), "rest": optax.sgd(0.1)}, labels),
    "MultiSteps of 1": lambda rule: optax.MultiSteps(plain(rule), 1),
    "apply_if_finite": lambda rule: optax.apply_if_finite(plain(rule), 3),
}


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("name", WRAPPED)
def test_wrappers_change_nothing(name, rule):
    wanted, state = train(plain(rule))
    params, wrapped = train(WRAPPED[name](rule))
    for layer in wanted:
        np.testing.assert_allclose(params[layer]["kernel"], wanted[layer]["kernel"], rtol=1e-5, atol=1e-6)
    left, right = transition_metrics(state), transition_metrics(wrapped)
    assert left.keys() == right.keys() == {"", "Dense_0/kernel", "Dense_1/kernel"}
    for path in left:
        for key in left[path]:
            assert float(right[path][key]) == pytest.approx(float(left[path][key]), rel=1e-4), (path, key)
    assert rate(state, "Dense_0/kernel") != pytest.approx(0.1)


def test_accumulated_gradients_count_as_one_update():
    """Two micro-batches an update: transitions are those between updates, and the inner count is of updates."""
    optimizer = optax.MultiSteps(optax.chain(optax.sgd(1.0), transform()), 2)
    params, state = tree(), None
    state = optimizer.init(params)
    reference = optax.chain(optax.sgd(1.0), transform())
    other, kept = tree(), reference.init(params)
    for t in range(4):
        grads = tree(t + 1)
        for _ in range(2):
            updates, state = optimizer.update(grads, state, params, bits=jnp.float32(4))
            params = optax.apply_updates(params, updates)
        updates, kept = reference.update(grads, kept, other, bits=jnp.float32(4))
        other = optax.apply_updates(other, updates)
        for path, values in transition_metrics(kept).items():
            assert float(transition_metrics(state)[path]["rate"]) == float(values["rate"])
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5), params, other)
    assert int(state.inner_opt_state[1].count) == 4


# --- the optimizers by name


def test_named_optimizers_scale_the_base_optimizer():
    fixed = {"target": 0.02, "others": 0.01}
    for make, base, rate0 in (
        (sgdt, optax.sgd(1.0, momentum=0.9), 0.1),
        (adamt, optax.adam(1.0), 1e-3),
        (adamwt, optax.adamw(1.0, weight_decay=1e-4), 3e-4),
    ):
        params, grads = tree(), tree(1)
        optimizer = make(CODES, **fixed)
        updates, _ = optimizer.update(grads, optimizer.init(params), params)
        expected, _ = base.update(grads, base.init(params), params)
        for name in params:
            np.testing.assert_allclose(updates[name]["kernel"], rate0 * expected[name]["kernel"], rtol=1e-5)
            np.testing.assert_allclose(updates[name]["bias"], 0.01 * expected[name]["bias"], rtol=1e-5)
        assert np.sum(updates["Dense_0"]["kernel"] * grads["Dense_0"]["kernel"]) < 0  # downhill


@pytest.mark.parametrize("make", [sgdt, adamt, adamwt])
def test_weight_decay_is_scaled_by_the_rate(make):
    """Without gradients only the decay moves a weight, and by U times as much."""
    params = {"kernel": jnp.full((4, 4), 2.0)}
    zero = jax.tree.map(jnp.zeros_like, params)
    moved = []
    for initial in (0.01, 0.02):
        optimizer = make(CODES, 0.02, initial, weight_decay=0.1)
        updates, _ = optimizer.update(zero, optimizer.init(params), params)
        moved.append(float(updates["kernel"][0, 0]))
    assert moved[0] < 0 and moved[1] == pytest.approx(2 * moved[0], rel=1e-5)
    if make is not adamt:  # whose decay passes through Adam's normalisation
        assert moved[0] == pytest.approx(-0.01 * 0.1 * 2.0, rel=1e-5)


def test_arguments_reach_the_transform_and_others_may_be_a_schedule():
    optimizer = sgdt(
        CODES, 0.02, rule="multiplicative", running_momentum=0.0, momentum=None, others=lambda t: 0.5**t, max_rate=0.2
    )
    params = tree()
    state = optimizer.init(params)
    for t in range(3):
        grads = tree(9)
        updates, state = optimizer.update(grads, state, params)
        np.testing.assert_allclose(updates["Dense_0"]["bias"], -(0.5**t) * grads["Dense_0"]["bias"], rtol=1e-6)
    assert rate(state, "Dense_0/kernel") == pytest.approx(0.2)  # m = 0 and no transitions: at once at the limit
    with pytest.raises(UsageError, match="'Dense_0/bias' has no codes and would learn at rate 1; give others="):
        sgdt(CODES, 0.02).init(params)
    optax.masked(sgdt(CODES, 0.02), kernels).init(params)  # nothing is left over


# --- jax


def test_vmap_over_runs_with_their_own_bits():
    optimizer = optax.chain(optax.sgd(1.0), transform("proportional", target_scale="sqrt_bits"))
    widths = jnp.array([2.0, 4.0, 8.0])
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *(tree(seed) for seed in range(3)))
    state = jax.vmap(optimizer.init)(stacked)

    @jax.jit
    @jax.vmap
    def step(params, state, grads, bits):
        updates, state = optimizer.update(grads, state, params, bits=bits)
        return optax.apply_updates(params, updates), state

    together = stacked
    for _ in range(4):
        together, state = step(together, state, stacked, widths)
    for run in range(3):
        params, alone = tree(run), optimizer.init(tree(run))
        for _ in range(4):
            updates, alone = jax.jit(optimizer.update)(tree(run), alone, params, bits=widths[run])
            params = optax.apply_updates(params, updates)
        close = lambda x, y: np.testing.assert_allclose(x[run], y, rtol=1e-5, atol=1e-6)  # noqa: E731, B023
        jax.tree.map(close, (together, state), (params, alone))


def test_initial_rates_may_differ_between_runs():
    def first(initial):
        optimizer = scale_by_transition_rate(CODES, 0.02, initial, rule="proportional")
        params = tree()
        return optimizer.update(params, optimizer.init(params), params)[1].rate[0]

    np.testing.assert_allclose(jax.vmap(first)(jnp.array([0.1, 0.3])), [0.1, 0.3], rtol=1e-6)


@pytest.mark.parametrize("rule", RULES)
def test_donation(rule):
    """The state may be donated; what the caller gave (bits) is not part of it afterwards."""
    optimizer = optax.chain(optax.sgd(1.0), transform(rule))
    params = tree()
    state = jax.jit(optimizer.init)(params)
    eager = optimizer.init(params)
    bits, grads = jnp.float32(4), tree(1)

    def step(params, state, bits):
        updates, state = optimizer.update(grads, state, params, bits=bits)
        return optax.apply_updates(params, updates), state

    donating = jax.jit(step, donate_argnums=(0, 1))
    other = tree()
    for _ in range(3):
        params, state = donating(params, state, bits)
        other, eager = donating(other, eager, bits)
    assert float(bits) == 4
    assert_equal((params, state), (other, eager))


def test_saved_and_resumed_is_bit_identical(tmp_path):
    for rule in RULES:
        optimizer = optax.partition({"latent": plain(rule), "rest": optax.sgd(0.1)}, labels)
        bits = lambda t: 4.0 - t % 3  # noqa: E731
        whole = train(optimizer, 6, bits)
        params, state = train(optimizer, 3, bits)
        folder = tmp_path / rule
        with Checkpoints(str(folder)) as checkpoints:
            checkpoints.save(3, {"params": params, "opt": state}, {})
            checkpoints.wait()
            abstract = jax.eval_shape(lambda: {"params": tree(), "opt": optimizer.init(tree())})  # noqa: B023
            restored = checkpoints.restore_latest(abstract).state
        resumed = train(optimizer, 3, bits, restored["opt"], restored["params"], first=3)
        assert_equal(resumed, whole)


PROGRAM = """
import json, sys
import jax, numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec
import transition_program as shared
from qtrain.optim import RULES

mesh = jax.make_mesh((8,), ("x",), axis_types=(AxisType.Auto,))
params = shared.tree()
split = lambda leaf: NamedSharding(mesh, PartitionSpec(*["x"][: leaf.ndim > 0 and leaf.shape[0] % 8 == 0]))
put = lambda tree: jax.tree.map(lambda leaf: jax.device_put(leaf, split(leaf)), tree)
out = {}
for rule in RULES:
    optimizer = shared.plain(rule)
    trained, state = shared.train(optimizer, params=put(params), state=put(optimizer.init(params)))
    last = state[1].last["Dense_0"]["kernel"]
    assert {shard.data.shape for shard in last.addressable_shards} == {(2, 8)}
    out[rule] = [shared.numbers(state[1]), trained["Dense_1"]["kernel"].tolist()]
print(json.dumps(out))
"""


@pytest.mark.skipif(jax.device_count() != 1, reason="compares with one device")
def test_eight_devices_count_as_one_does():
    process = start([], code=PROGRAM, environment={"XLA_FLAGS": "--xla_force_host_platform_device_count=8"})
    code, out, error = finished(process)
    assert code == 0, error
    for rule, (scalars, weights) in json.loads(out).items():
        params, state = train(plain(rule))
        mine = numbers(state[1])
        np.testing.assert_allclose(scalars, mine, rtol=1e-5)
        np.testing.assert_allclose(weights, params["Dense_1"]["kernel"], rtol=1e-5, atol=1e-6)


def test_the_state_is_found_by_type():
    assert transition_metrics(optax.adam(1.0).init(tree())) == {}
    state = WRAPPED["partition"]("additive").init(tree())
    found = [x for x in jax.tree.leaves(state, is_leaf=lambda x: isinstance(x, TransitionState))]
    assert sum(isinstance(x, TransitionState) for x in found) == 1
