"""Rows that a step has not used keep value and optimizer state; the one in use has an optimizer of its own."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from qtrain.errors import UsageError
from qtrain.inject import RowInUse
from qtrain.optim import only_rows_in_use

ROWS = 3
NORM, TABLE, KERNEL = ("params", "norm", "scale"), ("quant", "layer", "acts", "scale"), ("params", "layer", "kernel")
AXES = {NORM: 0, TABLE: 1}
SHAPES = {NORM: (ROWS, 4), TABLE: (2, ROWS), KERNEL: (4, 2)}


def tree_of(leaves):
    """A tree from leaves by name."""
    tree = {}
    for name, leaf in leaves.items():
        place = tree
        for key in name[:-1]:
            place = place.setdefault(key, {})
        place[name[-1]] = leaf
    return tree


def named(tree):
    """Leaves by the names along their paths."""
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {tuple(jax.tree_util.keystr((key,), simple=True) for key in path): leaf for path, leaf in leaves}


def owner(name):
    """The parameter that a leaf of a state belongs to."""
    return next((key for key in SHAPES if name[-len(key) :] == key), None)


def of_row(tree, row):
    """`tree`, with one row of each leaf that has rows, as a model without them has it."""

    def take(path, leaf):
        key = owner(tuple(jax.tree_util.keystr((part,), simple=True) for part in path))
        return jnp.take(leaf, row[key], AXES[key]) if key in AXES else leaf

    return jax.tree_util.tree_map_with_path(take, tree)


def labels(tree):
    return {group: jax.tree.map(lambda _, group=group: group, tree[group]) for group in ("params", "quant")}


OPTIMIZERS = {
    "sgd": optax.chain(optax.add_decayed_weights(0.1), optax.sgd(0.1, momentum=0.9, nesterov=True)),
    "adam": optax.adam(0.1),
    "adamw": optax.chain(
        optax.clip_by_global_norm(0.5), optax.adamw(optax.linear_schedule(0.1, 0.0, 9), weight_decay=0.1)
    ),
    "partition": optax.chain(
        optax.clip_by_global_norm(0.5),
        optax.partition(
            {
                "params": optax.chain(optax.add_decayed_weights(0.1), optax.sgd(0.1, momentum=0.9)),
                "quant": optax.inject_hyperparams(optax.adamw)(0.05, weight_decay=0.1),
            },
            labels,
        ),
    ),
}


def values(seed):
    rng = np.random.default_rng(seed)
    return {name: jnp.asarray(rng.normal(size=shape), jnp.float32) for name, shape in SHAPES.items()}


def gradients(seed, row):
    """Of a step that uses a row of each."""
    found = values(seed)
    for name, axis in AXES.items():
        used = np.arange(ROWS).reshape([-1 if a == axis else 1 for a in range(2)]) == row[name]
        found[name] = jnp.where(used, found[name], 0.0)
    return found


STEPS = [{NORM: 0, TABLE: 0}, {NORM: 1, TABLE: 1}, {NORM: 1, TABLE: 2}, {NORM: 0, TABLE: 2}, {NORM: 1, TABLE: 0}]


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_row_is_optimized_as_if_it_were_alone(name):
    """Against the same optimizer of models that have but the row in use, one after the other."""
    inner = OPTIMIZERS[name]
    transform = only_rows_in_use(inner)
    params = tree_of(values(0))
    state = transform.init(params)
    step = jax.jit(lambda grads, state, params, rows: transform.update(grads, state, params, rows=rows))
    alone = jax.jit(inner.update)
    for number, row in enumerate(STEPS):
        grads = tree_of(gradients(number + 1, row))
        expected = alone(of_row(grads, row), of_row(state, row), of_row(params, row))
        rows = {key: RowInUse(axis, jnp.int32(row[key])) for key, axis in AXES.items()}
        updates, new_state = step(grads, state, params, rows)
        # A norm over all gradients adds them up in another order where there are more rows.
        jax.tree.map(
            lambda found, wanted: np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-8),
            of_row((updates, new_state), row),
            expected,
        )
        new_params = optax.apply_updates(params, updates)
        before, seen = named((params, state)), 0
        for path, leaf in named((new_params, new_state)).items():
            if (key := owner(path)) in AXES:
                others = np.delete(np.arange(ROWS), row[key])
                kept, was = (np.take(np.asarray(array), others, AXES[key]) for array in (leaf, before[path]))
                assert kept.tobytes() == was.tobytes(), path
                assert not np.array_equal(leaf, before[path])
                seen += 1
        assert seen >= 4  # both parameters and at least a state of each
        params, state = new_params, new_state
    assert step._cache_size() == 1


def test_zeros_keep_their_sign_and_minus_one_is_no_row():
    transform = only_rows_in_use(optax.sgd(0.1, momentum=0.9))
    params = {"a": jnp.array([[-0.0, 0.0], [-0.0, 1.0]])}
    rows = {("a",): RowInUse(0, jnp.int32(-1)), ("another",): RowInUse(0, jnp.int32(0))}
    updates, state = transform.update({"a": jnp.ones((2, 2))}, transform.init(params), params, rows=rows)
    found = optax.apply_updates(params, updates)["a"]
    np.testing.assert_array_equal(found, params["a"])
    np.testing.assert_array_equal(np.signbit(found), np.signbit(params["a"]))
    assert not np.any(jax.tree.leaves(state)[0])


def test_the_longest_name_is_meant():
    """A module may be called as a collection is."""
    transform = only_rows_in_use(optax.trace(0.9))
    params = {"a": {"a": {"x": jnp.zeros(2)}, "x": jnp.zeros(2)}}
    rows = {("a", "x"): RowInUse(0, jnp.int32(1))}
    _, state = transform.update(jax.tree.map(jnp.ones_like, params), transform.init(params), params, rows=rows)
    assert state.trace["a"]["x"].tolist() == [0, 1] and state.trace["a"]["a"]["x"].tolist() == [1, 1]


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        (None, ("needs rows=", "qmodel.rows")),
        ({("a",): RowInUse(2, jnp.int32(0))}, ("'a' has shape (2, 2)", "no axis 2")),
    ],
)
def test_refusals(rows, words):
    transform = only_rows_in_use(optax.sgd(0.1))
    params = {"a": jnp.zeros((2, 2))}
    with pytest.raises(UsageError) as error:
        transform.update(params, transform.init(params), params, rows=rows)
    assert "\n" not in str(error.value) and all(word in str(error.value) for word in words)
