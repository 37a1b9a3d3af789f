"""Models as their authors write them: nobody knew of quantizers, and nothing is changed for them.

Each is initialised as it is, computes what it does without bits, is covered as the table says, and one compiled program
serves all widths, 32 bits being float but for rounding.
"""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qtrain.cost import count
from qtrain.inject import Rule, quantize
from qtrain.precision import Precision
from qtrain.quantizers import Uniform

KEY = jax.random.key(0)
RULE = Rule(ops="all", weight_quantizer=Uniform("affine"), act_quantizer=Uniform("affine"))
jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


def normal(*shape):
    return jax.random.normal(jax.random.key(7), shape)


TOKENS = jnp.arange(8).reshape(2, 4)


class Autoencoder(nn.Module):
    """Setup style, lists and dicts of submodules, two methods."""

    def setup(self):
        self.encoder = [nn.Conv(4, (3, 3), strides=2), nn.Conv(6, (3, 3), strides=2)]
        self.decoder = {"up": nn.ConvTranspose(4, (3, 3), strides=(2, 2)), "out": nn.ConvTranspose(1, (3, 3), (2, 2))}

    def encode(self, x):
        for layer in self.encoder:
            x = nn.relu(layer(x))
        return x

    def decode(self, z):
        return self.decoder["out"](nn.relu(self.decoder["up"](z)))

    def __call__(self, x):
        return self.decode(self.encode(x))


class EinsumAttention(nn.Module):
    """Attention written with DenseGeneral and jnp.einsum, and a mixture by nn.Einsum."""

    heads: int = 2

    @nn.compact
    def __call__(self, x):
        q, k, v = (nn.DenseGeneral((self.heads, 3), use_bias=False, name=name)(x) for name in "qkv")
        weights = nn.softmax(jnp.einsum("bqhd,bkhd->bhqk", q, k) / np.sqrt(3))
        mixed = jnp.einsum("bhqk,bkhd->bqhd", weights, v)
        return nn.Einsum((self.heads, 3, x.shape[-1]), "bqhd,hdo->bqo", name="merge")(mixed)


class LanguageModel(nn.Module):
    """Scanned, rematerialised blocks with flax's attention; the table is the head."""

    layers: int = 2

    @nn.compact
    def __call__(self, tokens):
        class Block(nn.Module):
            @nn.compact
            def __call__(self, x, mask):
                y = nn.SelfAttention(2)(nn.LayerNorm()(x), mask=mask)
                x = x + y
                return x + nn.Dense(6, name="down")(nn.gelu(nn.Dense(8, name="up")(nn.LayerNorm()(x)))), None

        table = nn.Embed(11, 6, name="vocabulary")
        scanned = nn.scan(
            nn.remat(Block),
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=nn.broadcast,
            length=self.layers,
        )
        x, _ = scanned(name="trunk")(table(tokens), nn.make_causal_mask(tokens))
        return table.attend(nn.LayerNorm()(x))


class Ensemble(nn.Module):
    """Members with parameters of their own, over the same input."""

    @nn.compact
    def __call__(self, x):
        members = nn.vmap(
            Member, variable_axes={"params": 0}, split_rngs={"params": True}, in_axes=None, out_axes=0, axis_size=3
        )
        return members(name="members")(x).mean(0)


class Member(nn.Module):
    """One of them."""

    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Einsum((6, 5), "bi,io->bo", name="first")(x))
        return nn.Dense(3, name="second")(x)


class Siamese(nn.Module):
    """A trunk that is called twice, a tuple of outputs, and a product of the two."""

    trunk: nn.Module

    @nn.compact
    def __call__(self, pair):
        left, right = (self.trunk(x) for x in pair)
        return left @ right.T, {"left": left, "right": right}


class Norms(nn.Module):
    """Batch norm, dropout, sown values, a counter of its own."""

    @nn.compact
    def __call__(self, x, train: bool = True):
        calls = self.variable("counters", "calls", lambda: jnp.zeros((), jnp.int32))
        if train:
            calls.value = calls.value + 1
        x = nn.Conv(4, (3, 3), use_bias=False, name="conv")(x)
        x = nn.BatchNorm(use_running_average=not train)(x)
        self.sow("intermediates", "features", x)
        x = nn.Dropout(0.5, deterministic=not train)(nn.relu(x))
        return nn.Dense(3)(x.mean((1, 2)))


class Mixed(nn.Module):
    """Half precision inside, full precision outside."""

    @nn.compact
    def __call__(self, x):
        x = nn.Dense(8, dtype=jnp.bfloat16, name="half")(x)
        x = nn.MultiHeadDotProductAttention(2, dtype=jnp.bfloat16, force_fp32_for_softmax=True, name="mix")(x)
        return nn.Dense(3, dtype=jnp.float32, param_dtype=jnp.float32, name="head")(x.astype(jnp.float32))


class Recurrent(nn.Module):
    """A stack of cells, one of each kind, the first in both directions, one scanned by hand."""

    @nn.compact
    def __call__(self, x):
        x = nn.Bidirectional(nn.RNN(nn.OptimizedLSTMCell(3)), nn.RNN(nn.OptimizedLSTMCell(3)), name="both")(x)
        x = nn.RNN(nn.GRUCell(3), name="gru")(x)
        x = nn.RNN(nn.MGUCell(3), name="mgu")(x)
        x = nn.RNN(nn.SimpleCell(3), name="simple")(x)
        scanned = nn.scan(
            nn.OptimizedLSTMCell, variable_broadcast="params", split_rngs={"params": False}, in_axes=1, out_axes=1
        )(3, name="by_hand")
        _, x = scanned(scanned.initialize_carry(jax.random.key(0), x[:, 0].shape), x)
        return nn.RNN(nn.LSTMCell(3), name="lstm")(x)[:, -1]


class CrossAttention(nn.Module):
    """Learned queries look at a sequence, with a bias for each distance and a mask."""

    @nn.compact
    def __call__(self, x):
        queries = self.param("queries", nn.initializers.normal(1.0), (3, 6))
        queries = jnp.broadcast_to(queries, (x.shape[0], 3, 6))
        mask = jnp.arange(x.shape[1]) < x.shape[1] - 1
        y = nn.MultiHeadAttention(num_heads=2, qkv_features=4, out_features=6, normalize_qk=True)(queries, x, mask=mask)
        return nn.Dense(2)(y.reshape(x.shape[0], -1))


class Experts(nn.Module):
    """A soft mixture: each expert has a slice of one kernel, and a gate adds them."""

    @nn.compact
    def __call__(self, x):
        gate = nn.softmax(nn.Dense(3, name="gate")(x))
        hidden = nn.relu(nn.Einsum((3, 6, 5), "bi,eio->beo", name="into")(x))
        out = nn.Einsum((3, 5, 6), "beo,eoi->bei", use_bias=False, name="out_of")(hidden)
        return jnp.einsum("bei,be->bi", out, gate)


class Jitted(nn.Module):
    """Methods under nn.jit, a subclassed layer, and a name with a dash."""

    @nn.compact
    def __call__(self, x):
        class Scaled(nn.Einsum):
            @nn.compact
            def __call__(self, x):
                return 2 * super().__call__(x)

        x = nn.jit(Member)(name="inner-member")(x)
        x = nn.remat(nn.Einsum)((3, 3), "bi,io->bo", name="remat")(x)
        return nn.jit(nn.Einsum)((3, 4), "bi,io->bo", name="jitted")(x) + Scaled((3, 4), "bi,io->bo", name="scaled")(x)


class Diffusion(nn.Module):
    """A small U-Net: skips are concatenated, a time embedding is added, attention in the middle."""

    @nn.compact
    def __call__(self, x, time):
        time = nn.Dense(4, name="time")(jnp.stack([jnp.sin(time), jnp.cos(time)], -1))
        down = nn.Conv(4, (3, 3), strides=2, name="down")(x) + time[:, None, None]
        flat = down.reshape(down.shape[0], -1, 4)
        middle = (flat + nn.MultiHeadDotProductAttention(1, name="middle")(flat)).reshape(down.shape)
        up = nn.ConvTranspose(4, (2, 2), strides=(2, 2), name="up")(nn.relu(middle))
        return nn.Conv(x.shape[-1], (3, 3), name="out")(jnp.concatenate([x, up], -1))


# name → model, arguments, what is not quantized: path → what its note says.
MODELS: dict[str, tuple[nn.Module, tuple[Any, ...], dict[str, str]]] = {
    "autoencoder": (Autoencoder(), (normal(2, 8, 8, 1),), {}),
    "einsum attention": (EinsumAttention(), (normal(2, 4, 6),), {"": "two activations"}),
    "language model": (LanguageModel(), (TOKENS,), {}),
    "ensemble": (Ensemble(), (normal(2, 6),), {}),
    "siamese": (Siamese(Member()), ((normal(2, 6), normal(3, 6)),), {"": "two activations"}),
    "norms": (Norms(), (normal(2, 5, 5, 2),), {}),
    "mixed": (Mixed(), (normal(2, 4, 6),), {}),
    "recurrent": (Recurrent(), (normal(2, 4, 5),), {}),
    "cross attention": (CrossAttention(), (normal(2, 4, 6),), {}),
    "experts": (Experts(), (normal(2, 6),), {"": "two activations"}),
    "jitted": (Jitted(), (normal(2, 6),), {}),
    "diffusion": (Diffusion(), (normal(2, 4, 4, 2), normal(2)), {}),
}


@pytest.mark.parametrize("name", MODELS)
def test_a_foreign_model(name):
    model, args, expected = MODELS[name]
    rngs = {"params": KEY, "dropout": jax.random.key(1)}
    qmodel = quantize(model, RULE)

    # Parameters, and whatever else the model keeps, are the plain model's, bit for bit.
    plain_variables = jit(model.init)(rngs, *args)
    variables = jit(qmodel.init)(rngs, *args)
    assert variables.pop("quant") == {}
    assert jax.tree.structure(variables) == jax.tree.structure(plain_variables)
    for a, b in zip(jax.tree.leaves(variables), jax.tree.leaves(plain_variables), strict=True):
        assert a.dtype == b.dtype and np.array_equal(a, b)

    # Every multiplication stands in the plan; of what is not quantized it says why.
    plan = qmodel.plan(*args)
    apply = functools.partial(model.apply, rngs={"dropout": jax.random.key(1)}, mutable=True)
    assert plan.macs == sum(row.macs for row in plan) == count(apply, plain_variables, *args).forward
    left_out = {row.path: row.note for row in plan if not row.quantized and row.macs}
    assert left_out.keys() == expected.keys()
    assert all(words in left_out[path] for path, words in expected.items())
    assert plan.coverage == pytest.approx(1 - sum(plan[path].macs for path in expected) / plan.macs)

    # One program for all widths.
    traces = []
    options = {"rngs": {"dropout": jax.random.key(1)}, "mutable": ["batch_stats", "counters", "intermediates"]}

    @jit
    def run(variables, width):
        traces.append(1)
        bits = Precision(weights=width, acts=width, grads=width)
        return qmodel.apply(variables, *args, bits=bits, **options)

    plain = jit(lambda variables: model.apply(variables, *args, **options))(variables)
    wide, narrow = run(variables, 32.0), run(variables, 3.0)
    assert len(traces) == 1
    assert jax.tree.structure(wide) == jax.tree.structure(plain)
    coarse = name == "mixed"
    for a, b in zip(jax.tree.leaves(wide), jax.tree.leaves(plain), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_allclose(a, b, atol=3e-2 if coarse else 1e-5, rtol=3e-2 if coarse else 1e-5)
    outputs = zip(jax.tree.leaves(narrow[0]), jax.tree.leaves(plain[0]), strict=True)
    assert any(np.abs(a - b).max() > 1e-3 for a, b in outputs)
    without = jit(lambda variables: qmodel.apply(variables, *args, bits=None, **options))(variables)
    for a, b in zip(jax.tree.leaves(without), jax.tree.leaves(plain), strict=True):
        assert np.array_equal(a, b)
