"""Small nnx models with their linen twins, and what the tests of the injection into them share."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from qtrain.precision import Precision
from qtrain.quantizers import Uniform

GRID = Uniform("symmetric", per="channel")
NOISY = dataclasses.replace(GRID, rounding="stochastic")
BITS = Precision(weights=4, acts=4)
TOKENS = np.arange(8) % 5


def normal(*shape):
    """Standard normal numbers; by numpy, which compiles nothing."""
    return jnp.asarray(np.random.default_rng(7).standard_normal(shape), jnp.float32)


class LinenResidual(nn.Module):
    @nn.compact
    def __call__(self, x):
        y = nn.Conv(4, (3, 3), strides=2, use_bias=False, name="conv1")(x)
        y = nn.relu(nn.BatchNorm(use_running_average=False, name="norm1")(y))
        y = nn.BatchNorm(use_running_average=False, name="norm2")(nn.Conv(4, (3, 3), name="conv2")(y))
        return nn.relu(y + nn.Conv(4, (1, 1), strides=2, name="shortcut")(x))


class Residual(nnx.Module):
    def __init__(self, rngs):
        self.conv1 = nnx.Conv(3, 4, (3, 3), strides=2, use_bias=False, rngs=rngs)
        self.norm1 = nnx.BatchNorm(4, rngs=rngs)
        self.conv2 = nnx.Conv(4, 4, (3, 3), rngs=rngs)
        self.norm2 = nnx.BatchNorm(4, rngs=rngs)
        self.shortcut = nnx.Conv(3, 4, (1, 1), strides=2, rngs=rngs)

    def __call__(self, x):
        y = nnx.relu(self.norm1(self.conv1(x)))
        return nnx.relu(self.norm2(self.conv2(y)) + self.shortcut(x))


class LinenAttention(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = x + nn.MultiHeadDotProductAttention(2, name="attend")(nn.LayerNorm(name="norm")(x))
        return x + nn.Dense(6, name="down")(nn.gelu(nn.Dense(8, name="up")(x)))


class Attention(nnx.Module):
    def __init__(self, rngs):
        self.norm = nnx.LayerNorm(6, rngs=rngs)
        self.attend = nnx.MultiHeadAttention(2, 6, decode=False, rngs=rngs)
        self.up, self.down = nnx.Linear(6, 8, rngs=rngs), nnx.Linear(8, 6, rngs=rngs)

    def __call__(self, x):
        x = x + self.attend(self.norm(x))
        return x + self.down(nnx.gelu(self.up(x)))


class LinenRecurrent(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(3, name="head")(nn.RNN(nn.LSTMCell(4, name="cell"), name="rnn")(x))


class Recurrent(nnx.Module):
    def __init__(self, rngs):
        self.rnn = nnx.RNN(nnx.LSTMCell(5, 4, rngs=rngs))
        self.head = nnx.Linear(4, 3, rngs=rngs)

    def __call__(self, x):
        return self.head(self.rnn(x))


class LinenLayers(nn.Module):
    @nn.compact
    def __call__(self, x):
        table = nn.Embed(5, 6, name="table")
        x = nn.ConvTranspose(6, (3,), strides=2, name="up")(nn.Einsum((6, 4), "bti,io->bto", name="merge")(x))
        return table.attend(nn.remat(nn.Einsum)((6, 6), "bti,io->bto", name="again")(x + table(TOKENS)))


class Layers(nnx.Module):
    """Those that call jax themselves, one inside ``nnx.remat``."""

    def __init__(self, rngs):
        self.merge = nnx.Einsum("bti,io->bto", (6, 4), (4,), rngs=rngs)
        self.up = nnx.ConvTranspose(4, 6, (3,), strides=2, rngs=rngs)
        self.again = nnx.Einsum("bti,io->bto", (6, 6), (6,), rngs=rngs)
        self.table = nnx.Embed(5, 6, rngs=rngs)

    def __call__(self, x):
        x = self.up(self.merge(x)) + self.table(TOKENS)
        return self.table.attend(nnx.remat(lambda layer, x: layer(x))(self.again, x))


class MLP(nnx.Module):
    def __init__(self, rngs, first=nnx.Linear, **kwargs):
        self.up, self.down = first(6, 8, rngs=rngs, **kwargs), nnx.Linear(8, 6, rngs=rngs)

    def __call__(self, x):
        return self.down(nnx.relu(self.up(x)))

    def fails(self, x):
        return self.down(self.up(x)) / jnp.zeros((7, 7))


TWINS = {
    "residual block": (LinenResidual(), Residual, normal(2, 6, 6, 3)),
    "attention block": (LinenAttention(), Attention, normal(2, 3, 6)),
    "lstm": (LinenRecurrent(), Recurrent, normal(2, 3, 5)),
    "layers": (LinenLayers(), Layers, normal(2, 4, 6)),
}


def made(cls, *args, **kwargs):
    """A model with normal numbers for parameters; no initialisation to compile."""
    model = nnx.eval_shape(lambda: cls(nnx.Rngs(0), *args, **kwargs))
    rng = np.random.default_rng(1)

    def number(variable):
        leaf = variable.get_value()
        if isinstance(variable, nnx.Param):
            return variable.replace(jnp.asarray(0.4 * rng.standard_normal(leaf.shape), leaf.dtype))
        is_key = jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
        return variable.replace(jax.random.key(0) if is_key else jnp.asarray(np.ones(leaf.shape), leaf.dtype))

    graphdef, state = nnx.split(model)
    return nnx.merge(graphdef, jax.tree.map(number, state, is_leaf=lambda leaf: isinstance(leaf, nnx.Variable)))


def distance(a, b):
    return np.linalg.norm(a - b) / max(np.linalg.norm(b), 1e-30)
