"""Counts of convolutions and of modules: by hand, by path, and against the program that jax differentiates."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cost_shapes import passes, shape

from qtrain import cost


def conv(x, kernel, strides=1, padding="SAME", **kwargs):
    return jax.lax.conv_general_dilated(
        x, kernel, (strides, strides), padding, dimension_numbers=("NHWC", "HWIO", "NHWC"), **kwargs
    )


# name: (image, kernel, options, MACs)
CONVOLUTIONS = {
    "same": ((2, 8, 8, 3), (3, 3, 3, 16), {}, 2 * 8 * 8 * 16 * 9 * 3),
    "valid": ((2, 8, 8, 3), (3, 3, 3, 16), {"padding": "VALID"}, 2 * 6 * 6 * 16 * 9 * 3),
    "strided": ((2, 8, 8, 3), (3, 3, 3, 16), {"strides": 2}, 2 * 4 * 4 * 16 * 9 * 3),
    "dilated kernel": ((2, 8, 8, 3), (3, 3, 3, 16), {"rhs_dilation": (2, 2)}, 2 * 8 * 8 * 16 * 9 * 3),
    "grouped": ((2, 8, 8, 12), (3, 3, 4, 6), {"feature_group_count": 3}, 2 * 8 * 8 * 6 * 9 * 4),
    "depthwise": ((2, 8, 8, 12), (3, 3, 1, 12), {"feature_group_count": 12}, 2 * 8 * 8 * 12 * 9),
    "batch groups": ((6, 8, 8, 3), (3, 3, 3, 9), {"batch_group_count": 3}, 2 * 8 * 8 * 9 * 9 * 3),
    # A transposed convolution: each of the 2·8·8 input pixels meets each of the 9 taps.
    "transposed": (
        (2, 8, 8, 3),
        (3, 3, 3, 16),
        {"lhs_dilation": (2, 2), "padding": ((1, 2), (1, 2))},
        2 * 8 * 8 * 9 * 3 * 16,
    ),
    "pointwise": ((2, 8, 8, 3), (1, 1, 3, 16), {}, 2 * 8 * 8 * 3 * 16),
}


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_convolutions(name):
    image, kernel, options, macs = CONVOLUTIONS[name]
    (op,) = cost.count(lambda w, x: conv(x, w, **options), shape(*kernel), shape(*image))
    assert (op.kind, op.forward, op.input_gradient, op.weight_gradient) == ("conv", macs, 0, macs)
    assert op.contraction == np.prod(kernel[:3])
    assert op.channels == kernel[3]


class Branch(nn.Module):
    @nn.compact
    def __call__(self, x, _=None):
        return nn.Dense(4, name="dense")(x), None


class Everything(nn.Module):
    """One net with every lifted transformation, adopted and shared modules, attention, and a recurrent cell."""

    @nn.compact
    def __call__(self, x):
        x = nn.Dense(4)(x)
        x, _ = nn.scan(Branch, variable_axes={"params": 0}, split_rngs={"params": True}, length=3)(name="scanned")(x)
        x, _ = nn.remat(Branch)(name="remat")(x)
        x, _ = nn.vmap(Branch, variable_axes={"params": 0}, split_rngs={"params": True})(name="vmapped")(x[None])
        x, _ = nn.jit(Branch)(name="jitted")(x[0])
        x = nn.RNN(nn.GRUCell(4))(x[None])
        x = nn.MultiHeadDotProductAttention(2)(x)
        return nn.Sequential([nn.Dense(3), nn.relu, nn.Dense(2)])(x)


def test_paths_are_module_paths():
    x = shape(6, 4)
    variables = jax.eval_shape(Everything().init, jax.random.key(0), x)
    ops = cost.count(Everything().apply, variables, x)
    kernels = {
        "/".join(str(key.key) for key in path[1:-1])
        for path, leaf in jax.tree_util.tree_flatten_with_path(variables)[0]
        if path[-1].key == "kernel"
    }
    attention = [op.path for op in ops if op.lhs.kind == op.rhs.kind == "act"]
    assert attention == ["MultiHeadDotProductAttention_0"] * 2  # QKᵀ and PV
    assert {op.path for op in ops} == kernels | set(attention)
    executions = {op.path: op.executions for op in ops}
    assert executions["scanned/dense"] == 3
    assert executions["GRUCell_0/hr"] == executions["GRUCell_0/ir"] == 6
    assert ops.weights == sum(
        np.prod(leaf.shape)
        for path, leaf in jax.tree_util.tree_flatten_with_path(variables)[0]
        if path[-1].key == "kernel"
    )


def test_the_root_module_has_the_empty_path():
    x = shape(3, 5)
    variables = jax.eval_shape(nn.Dense(5).init, jax.random.key(0), x)
    assert cost.count(nn.Dense(5).apply, variables, x)[0].path == ""


def test_tied_weights_count_once_as_weights_and_twice_as_operations():
    class Tied(nn.Module):
        @nn.compact
        def __call__(self, tokens):
            embed = nn.Embed(7, 4)
            return embed.attend(nn.Dense(4, use_bias=False)(embed(tokens)))

    tokens = shape(2, 3, dtype=jnp.int32)
    ops = cost.count(Tied().apply, jax.eval_shape(Tied().init, jax.random.key(0), tokens), tokens)
    # 6 tokens: 4·4 in the dense layer, 4·7 in the head; the dense layer's input gradient reaches the embedding.
    assert passes(ops) == (6 * 16 + 6 * 28, 6 * 16 + 6 * 28, 6 * 16 + 6 * 28)
    assert [op.path for op in ops] == ["Dense_0", "Embed_0"]
    assert ops.weights == 16 + 28


def softmax_attention(v, x):
    q, k = x @ v["q"], x @ v["k"]
    return jax.nn.softmax(q @ k.T) @ (x @ v["v"])


# An independent count of a training step: the products of the program that jax differentiates the loss to.
GRADIENT_PROGRAMS = {
    "dense": (lambda v, x: jnp.tanh(jnp.tanh(x @ v["a"]) @ v["b"]) @ v["a"], {"a": (5, 5), "b": (5, 5)}, (3, 5)),
    "attention": (softmax_attention, {"q": (5, 4), "k": (5, 4), "v": (5, 6)}, (3, 5)),
    "scan": (
        lambda v, x: jax.lax.scan(lambda c, w: (jnp.tanh(c @ w), None), x @ v["a"], v["b"])[0],
        {"a": (5, 5), "b": (4, 5, 5)},
        (3, 5),
    ),
    "vmap": (
        lambda v, x: jnp.tanh(jax.vmap(lambda w, x: x @ w)(v["a"], x)) @ v["b"],
        {"a": (2, 5, 5), "b": (5, 5)},
        (2, 3, 5),
    ),
    # SAME: the input gradient of an unpadded convolution is a padded one, whose taps on padding would count.
    "convolutions": (
        lambda v, x: conv(jnp.tanh(conv(jnp.tanh(conv(x, v["a"])), v["b"], 2)), v["c"]),
        {"a": (3, 3, 3, 6), "b": (3, 3, 6, 8), "c": (3, 3, 8, 4)},
        (2, 8, 8, 3),
    ),
    "grouped": (
        lambda v, x: conv(jnp.tanh(conv(x, v["a"])), v["b"], feature_group_count=3),
        {"a": (3, 3, 3, 6), "b": (3, 3, 2, 9)},
        (2, 8, 8, 3),
    ),
}


@pytest.mark.parametrize("name", GRADIENT_PROGRAMS)
def test_gradients_equal_the_products_of_the_differentiated_program(name):
    fn, sizes, image = GRADIENT_PROGRAMS[name]
    variables = {key: shape(*size) for key, size in sizes.items()}
    ops = cost.count(fn, variables, shape(*image))
    differentiated = cost.count(jax.grad(lambda v, x: jnp.sum(fn(v, x) ** 2)), variables, shape(*image))
    assert ops.input_gradient > 0
    assert sum(passes(ops)) == differentiated.forward
