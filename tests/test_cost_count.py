"""Counts by hand, operand kinds and needed gradients, through every kind of nested program."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cost_shapes import passes, shape
from jax.sharding import AbstractMesh, PartitionSpec

import qtrain
from qtrain import cost


def kinds(ops):
    return [(op.lhs.kind, op.rhs.kind) for op in ops]


W, X = shape(5, 5), shape(3, 5)
M = 3 * 5 * 5  # x[3, 5] @ w[5, 5]


@jax.custom_jvp
def straight_through(x):
    return jnp.round(x)


straight_through.defjvps(lambda g, ans, x: g)


@jax.custom_vjp
def integer_product(w, x):
    """A layer that runs on integer codes, with its own gradient."""
    product = jax.lax.dot(x.astype(jnp.int8), w.astype(jnp.int8), preferred_element_type=jnp.int32)
    return product.astype(jnp.float32)


integer_product.defvjp(lambda w, x: (integer_product(w, x), (w, x)), lambda r, g: (r[1].T @ g, g @ r[0].T))


@jax.custom_vjp
def value_of_one_gradient_to_the_other(x, quantized):
    return quantized


value_of_one_gradient_to_the_other.defvjp(lambda x, quantized: (quantized, None), lambda _, g: (g, None))


def quantized_operand(x):
    return value_of_one_gradient_to_the_other(x, jnp.round(jax.lax.stop_gradient(x)))


def late_weight(w, x):
    """The first carry does not depend on the weight: only the second iteration's product needs an input gradient."""
    return jax.lax.scan(lambda carry, _: (carry[::-1], carry[0] @ w), (x, x @ w), length=4)[1]


# name: (fn(w, x), forward, input-gradient and weight-gradient MACs in units of x @ w, kinds of the products)
PROGRAMS = {
    "first layer": (lambda w, x: x @ w, 1, 0, 1, "aw"),
    "two layers": (lambda w, x: (x @ w) @ w, 2, 1, 2, "aw aw"),
    "weight on the left": (lambda w, x: w @ (w @ x.T), 2, 1, 2, "wa wa"),
    "weights alone": (lambda w, x: jnp.ones((3, 5)) @ w, 1, 0, 1, "cw"),
    "constant kernel": (lambda w, x: (x * w[0]) @ jnp.ones((5, 5)), 1, 1, 0, "ac"),
    "argument alone": (lambda w, x: x @ jnp.ones((5, 5)), 1, 0, 0, "ac"),
    "kernel made of an argument": (lambda w, x: (x * w[0]) @ (w * x.sum()), 1, 2, 0, "aa"),
    "stop_gradient": (lambda w, x: jax.lax.stop_gradient(x @ w) @ w, 2, 0, 2, "aw aw"),
    "integers cut": (lambda w, x: jax.nn.one_hot(jnp.argmax(x @ w, -1), 5) @ w, 2, 0, 2, "aw aw"),
    "comparison cuts": (lambda w, x: jnp.where(x @ w > 0, 1.0, 0.0) @ w, 2, 0, 2, "aw aw"),
    "round has no derivative": (lambda w, x: jnp.round(x @ w) @ w, 2, 0, 2, "aw aw"),
    "custom_jvp": (lambda w, x: straight_through(x @ w) @ straight_through(w), 2, 1, 2, "aw aw"),
    "custom_vjp on integers": (lambda w, x: integer_product(w, integer_product(w, x)), 2, 1, 2, "aw aw"),
    "straight through": (lambda w, x: quantized_operand(x @ quantized_operand(w)) @ w, 2, 1, 2, "aw aw"),
    "relu": (lambda w, x: jax.nn.relu(x @ w) @ w, 2, 1, 2, "aw aw"),
    "jit": (jax.jit(lambda w, x: (x @ w) @ w), 2, 1, 2, "aw aw"),
    "checkpoint": (jax.checkpoint(lambda w, x: (x @ w) @ w), 2, 1, 2, "aw aw"),
    "scan": (lambda w, x: jax.lax.scan(lambda c, _: (c @ w, None), x, length=7)[0], 7, 7, 7, "aw"),
    "scan over data": (lambda w, x: jax.lax.map(lambda row: row[None] @ w, x), 1, 0, 1, "aw"),
    "scan over weights": (
        lambda w, x: jax.lax.scan(lambda c, scale: (c @ (scale * w), None), x, w[0])[0],
        5,
        5,
        5,
        "aw",
    ),
    "scan in scan": (
        lambda w, x: jax.lax.scan(
            lambda c, _: (jax.lax.scan(lambda d, _: (d @ w, None), c, length=2)[0], None), x, length=3
        )[0],
        6,
        6,
        6,
        "aw",
    ),
    "scan to a fixpoint": (late_weight, 5, 4, 5, "aw aw"),
    "scan of length 0": (lambda w, x: jax.lax.scan(lambda c, _: (c @ w, None), x, length=0)[0] @ w, 1, 1, 1, "aw"),
    "fori": (lambda w, x: jax.lax.fori_loop(0, 3, lambda i, c: c @ w, x), 3, 3, 3, "aw"),
    "cond": (
        lambda w, x: jax.lax.cond(x.sum() > 0, lambda y: y @ w @ w, lambda y: y @ w, x),
        2,
        1,
        2,
        "aw aw",
    ),
    "vmap of the weight": (
        lambda w, x: jax.vmap(lambda w, x: x @ w, (0, None))(jnp.stack([w, w]), x),
        2,
        0,
        2,
        "wa",
    ),
    "vmap of both": (
        lambda w, x: jax.vmap(lambda w, x: x @ w)(jnp.stack([w, w]), jnp.stack([x, x])),
        2,
        0,
        2,
        "aw",
    ),
    "einsum": (lambda w, x: jnp.einsum("bi,io->bo", x, w), 1, 0, 1, "aw"),
    "grad": (jax.grad(lambda w, x: jnp.sum((x @ w) ** 2)), 2, 1, 1, "aw aa"),
}


@pytest.mark.parametrize("name", PROGRAMS)
def test_programs(name):
    fn, forward, inputs, weights, expected_kinds = PROGRAMS[name]
    ops = cost.count(fn, W, X)
    assert passes(ops) == (forward * M, inputs * M, weights * M)
    letters = {"a": "act", "w": "weight", "c": "const"}
    # vmap may swap the operands of a product, so their order is compared where nothing is mapped.
    order = sorted if "vmap" in name else tuple
    expected = {tuple(order(letters[letter] for letter in pair)) for pair in expected_kinds.split()}
    assert {tuple(order(pair)) for pair in kinds(ops)} == expected


def test_equal_products_are_one_record():
    class Shared(nn.Module):
        @nn.compact
        def __call__(self, x):
            layer = nn.Dense(4, name="layer")
            return layer(layer(layer(x)))

    x = shape(2, 4)
    ops = cost.count(Shared().apply, jax.eval_shape(Shared().init, jax.random.key(0), x), x)
    # The first call lacks the input gradient and so is a record of its own.
    assert [(op.path, op.executions) for op in ops] == [("layer", 1), ("layer", 2)]
    assert passes(ops) == (3 * 32, 2 * 32, 3 * 32)
    assert ops.weights == 16


def test_while_is_counted_once_and_flagged():
    ops = cost.count(lambda w, x: jax.lax.while_loop(lambda c: (c @ w).sum() < 9, lambda c: c @ w, x), W, X)
    assert ops.forward == 2 * M  # once in the test, once in the body
    assert all(op.flags == ("trip_count_unknown",) for op in ops)


def test_while_outputs_depend_on_the_test():
    def fn(w, x):
        steps, _ = jax.lax.while_loop(lambda c: c[1] < x.sum(), lambda c: (c[0] * 2.0, c[1] + 1.0), (w, 0.0))
        return x @ steps

    assert kinds(cost.count(fn, W, X)) == [("act", "act")]


def test_cond_flags_only_branches_that_differ():
    def fn(other):
        return lambda w, x: jax.lax.cond(x.sum() > 0, lambda y: y @ w, other(w), x)

    assert [op.flags for op in cost.count(fn(lambda w: lambda y: y @ w), W, X)] == [()]
    assert [op.flags for op in cost.count(fn(lambda w: lambda y: y), W, X)] == [("largest_branch",)]


def test_platform_dependent_branches_are_one():
    def fn(w, x):
        return jax.lax.platform_dependent(x, cpu=lambda y: y @ w, default=lambda y: y @ w)

    (op,) = cost.count(fn, W, X)
    assert (op.forward, op.flags) == (M, ())


def test_shard_map_counts_every_device():
    mesh = AbstractMesh((4, 2), ("data", "model"))
    fn = jax.shard_map(
        lambda w, x: x @ w,
        mesh=mesh,
        in_specs=(PartitionSpec(None, "model"), PartitionSpec("data")),
        out_specs=PartitionSpec("data", "model"),
    )
    ops = cost.count(fn, shape(6, 10), shape(8, 6))
    assert passes(ops) == (8 * 6 * 10, 0, 8 * 6 * 10)
    assert ops[0].executions == 8


def test_pallas_kernel_counts_every_grid_cell():
    pl = pytest.importorskip("jax.experimental.pallas")

    def kernel(x_ref, w_ref, out_ref):
        out_ref[...] = jnp.dot(x_ref[...], w_ref[...])

    def fn(w, x):
        return pl.pallas_call(
            kernel,
            out_shape=shape(8, 6),
            grid=(4, 3),
            in_specs=[pl.BlockSpec((2, 5), lambda i, j: (i, 0)), pl.BlockSpec((5, 2), lambda i, j: (0, j))],
            out_specs=pl.BlockSpec((2, 2), lambda i, j: (i, j)),
        )(x, w)

    assert cost.count(fn, shape(5, 6), shape(8, 5)).forward == 8 * 5 * 6


@pytest.mark.parametrize(
    ("dtype", "bits"), [("float32", 32), ("bfloat16", 16), ("float16", 16), ("int8", 8), ("bool", 1)]
)
def test_native_bits(dtype, bits):
    (op,) = cost.count(lambda w, x: jax.lax.dot(x, w), shape(5, 5, dtype=dtype), shape(3, 5, dtype=dtype))
    assert (op.lhs.native_bits, op.rhs.native_bits) == (bits, bits)
    assert op.weight_gradient == (M if bits >= 16 else 0)


def test_a_complex_product_is_four_real_ones():
    complex_ = functools.partial(shape, dtype=jnp.complex64)
    (op,) = cost.count(lambda w, x: x @ w, complex_(5, 5), complex_(3, 5))
    assert (op.forward, op.lhs.native_bits) == (4 * M, 32)


def test_which_collections_are_differentiated():
    variables = {
        "params": {"w": W},
        "quant": {"s": W},
        "batch_stats": {"m": W},
        "quant_stats": {"a": W},
    }
    layer = {"w": "params", "s": "quant", "m": "batch_stats", "a": "quant_stats"}
    for leaf, collection in layer.items():
        (op,) = cost.count(lambda v, x, c=collection, n=leaf: x @ v[c][n], variables, X)
        assert op.rhs.kind == "weight"
        assert op.weight_gradient == (M if collection in ("params", "quant") else 0)
        assert op.rhs.parameter == f"{collection}/{leaf}"
    # Without "params" there are no collections: all of it is differentiated.
    (op,) = cost.count(lambda v, x: x @ v["batch_stats"]["m"], {"batch_stats": {"m": W}}, X)
    assert op.weight_gradient == M


def test_a_quantized_kernel_is_the_parameter_it_came_from():
    variables = {"params": {"layer": {"kernel": W}}, "quant": {"layer": {"scale": shape(5)}}}

    def fn(v, x):
        scale = v["quant"]["layer"]["scale"]
        return x @ (straight_through(v["params"]["layer"]["kernel"] / scale) * scale)

    (op,) = cost.count(fn, variables, X)
    assert (op.path, op.rhs.parameter, op.rhs.parameter_size) == ("layer", "params/layer/kernel", 25)


@pytest.mark.parametrize(
    "arguments",
    [
        ((), {"bits": qtrain.Precision(4, 4, 8)}),
        ((), {"bits": qtrain.Precision(shape(), shape(), None)}),
        ((), {"bits": {"layer": qtrain.Precision(shape(), 4, 8)}}),
        ((), {"rngs": {"quant": jax.random.key(0)}}),
        ((), {"rngs": {"quant": np.zeros(2, np.uint32)}}),
        ((jax.random.key(0),), {}),
        ((qtrain.Precision(shape(), shape(), shape()),), {}),
    ],
)
def test_bits_and_randomness_make_no_activation_of_a_weight(arguments):
    def fn(w, x, *args, **kwargs):
        for leaf in jax.tree.leaves((args, kwargs)):
            typed = hasattr(leaf, "dtype") and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
            w = w * jnp.sum(jax.random.key_data(leaf) if typed else leaf).astype(jnp.float32)
        return x @ w

    args, kwargs = arguments
    assert kinds(cost.count(fn, W, X, *args, **kwargs)) == [("act", "weight")]


def test_keyword_arrays_are_data_and_other_keywords_are_static():
    def fn(w, *, x, train):
        assert train is True
        return x @ w

    assert kinds(cost.count(fn, W, x=X, train=True)) == [("act", "weight")]


def test_nothing_is_executed():
    def fn(w, x):
        jax.debug.callback(lambda _: pytest.fail("executed"), x)
        return x @ w

    assert cost.count(fn, jnp.ones((5, 5)), jnp.ones((3, 5))).forward == M
