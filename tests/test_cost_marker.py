"""The marker survives every transformation as one scope, and tells the count an op's path and bits."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AbstractMesh, PartitionSpec

from qtrain import cost
from qtrain.cost import OpBits, decode, encode

MARKERS = [
    OpBits(""),
    OpBits("", weights="schedule", acts="schedule", grads=8),
    OpBits("Block_0/Dense_1", weights=8, acts=None, grads="schedule"),
    OpBits("a-b/c.d/é ü/(x)/%2F;:\"'", weights=16, acts=1, grads=32),
    OpBits("quantized-w8-a8-g8-rq-x", weights=2, acts="schedule", residuals="original"),
    OpBits("folded", residuals="folded"),
    OpBits("r", acts=8, residuals="requantized"),
]


@pytest.mark.parametrize("marker", MARKERS)
def test_round_trip(marker):
    name = encode(marker)
    assert decode(name) == marker
    assert set(name) <= set("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_.%~-")


@pytest.mark.parametrize(
    "name", ["", "Dense_0", "quantized", "quantized-w8-a8-rq-x", "quantized-wq-a8-g8-rq-x", "...qhd,->"]
)
def test_ordinary_scopes_are_not_markers(name):
    assert decode(name) is None


MARKER = OpBits("inner/layer", weights="schedule", acts=4, grads=None)


def marked(w, x):
    with jax.named_scope("outer"), jax.named_scope(encode(MARKER)):
        return x @ w


@jax.custom_vjp
def custom(w, x):
    return marked(w, x)


custom.defvjp(lambda w, x: (custom(w, x), None), lambda residuals, g: (None, g))

TRANSFORMED = {
    "plain": marked,
    "jit": jax.jit(marked),
    "checkpoint": jax.checkpoint(marked),
    "custom_vjp": custom,
    "scan": lambda w, x: jax.lax.scan(lambda c, _: (marked(w, c), None), x, length=1)[0],
    "while": lambda w, x: jax.lax.while_loop(lambda c: c.sum() < 0, lambda c: marked(w, c), x),
    "cond": lambda w, x: jax.lax.cond(x.sum() > 0, marked, marked, w, x),
    "vmap": lambda w, x: jax.vmap(marked, in_axes=(None, 0))(w, x[None])[0],
    "vmap of vmap": lambda w, x: jax.vmap(jax.vmap(marked, in_axes=(None, 0)), in_axes=(None, 0))(w, x[None, None]),
    "jvp": lambda w, x: jax.jvp(lambda x: marked(w, x), (x,), (jnp.zeros_like(x),))[0],
    "shard_map": lambda w, x: jax.shard_map(
        marked,
        mesh=AbstractMesh((1,), ("data",)),
        in_specs=(PartitionSpec(), PartitionSpec("data")),
        out_specs=PartitionSpec("data"),
    )(w, x),
    "all": lambda w, x: jax.jit(
        lambda w, x: jax.lax.scan(lambda c, _: (jax.checkpoint(jax.vmap(custom, (None, 0)))(w, c), None), x, length=1)
    )(w, x[None]),
}


@pytest.mark.parametrize("name", TRANSFORMED)
def test_count_reads_the_marker_through(name):
    operand = jax.ShapeDtypeStruct((3, 3), jnp.float32)
    ops = cost.count(TRANSFORMED[name], operand, operand)
    assert {(op.path, op.marker) for op in ops} == {("inner/layer", MARKER)}


def test_innermost_marker_wins():
    outer = OpBits("block")

    def fn(w, x):
        with jax.named_scope(encode(outer)):
            return marked(w, x) @ w

    operand = jax.ShapeDtypeStruct((3, 3), jnp.float32)
    assert [op.marker for op in cost.count(fn, operand, operand)] == [MARKER, outer]


def test_compiles_with_the_marker_in_the_metadata():
    text = jax.jit(marked).lower(jnp.ones((3, 3)), jnp.ones((3, 3))).compile().as_text()
    assert encode(MARKER) in text


class Injected(nn.Module):
    """What the injection does: the layer's product is surrounded by its marker."""

    layer: str

    @nn.compact
    def __call__(self, x, _=None):
        def dot_general(*args, **kwargs):
            with jax.named_scope(encode(OpBits(self.layer, weights="schedule", acts="schedule"))):
                return jax.lax.dot_general(*args, **kwargs)

        return nn.Dense(x.shape[-1], dot_general=dot_general)(x), None


def test_marker_is_authoritative_in_lifted_modules():
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            lifted = nn.scan(nn.remat(Injected), variable_axes={"params": 0}, split_rngs={"params": True}, length=3)
            return lifted("my/own/path", name="layers")(x)[0]

    x = jnp.ones((2, 4))
    (op,) = cost.count(Net().apply, Net().init(jax.random.key(0), x), x)
    assert (op.path, op.executions, op.rhs.parameter) == ("my/own/path", 3, "params/layers/Dense_0/kernel")
