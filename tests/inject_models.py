"""Small models in every style that linen allows, for the injection's tests."""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np


class MLP(nn.Module):
    """Compact style: Dense_0, Dense_1, Dense_2."""

    features: tuple[int, ...] = (8, 8, 4)
    dtype: Any = None

    @nn.compact
    def __call__(self, x):
        for width in self.features[:-1]:
            x = nn.relu(nn.Dense(width, dtype=self.dtype)(x))
        return nn.Dense(self.features[-1], dtype=self.dtype)(x)


class SetupMLP(nn.Module):
    """Setup style, with two methods and a helper that is not ``__call__``."""

    def setup(self):
        self.encoder = nn.Dense(8)
        self.hidden = [nn.Dense(8), nn.Dense(8, use_bias=False)]
        self.decoder = nn.Dense(6)

    def encode(self, x):
        x = self.encoder(x)
        for layer in self.hidden:
            x = nn.tanh(layer(x))
        return x

    def decode(self, z):
        return self.decoder(z)

    def __call__(self, x):
        return self.decode(self.encode(x))


class Block(nn.Module):
    """A residual block of two Dense layers."""

    width: int = 8

    @nn.compact
    def __call__(self, x):
        hidden = nn.relu(nn.Dense(self.width, name="up")(nn.LayerNorm()(x)))
        return x + nn.Dense(x.shape[-1], name="down")(hidden)


class DecoratedBlock(nn.Module):
    """The same with ``nn.jit`` on the method."""

    width: int = 8

    @nn.jit
    @nn.compact
    def __call__(self, x):
        hidden = nn.relu(nn.Dense(self.width, name="up")(x))
        return x + nn.Dense(x.shape[-1], name="down")(hidden)


class Stack(nn.Module):
    """Some blocks of a class, and a head."""

    block: Callable[..., nn.Module] = Block
    depth: int = 2

    @nn.compact
    def __call__(self, x):
        for index in range(self.depth):
            x = self.block(name=f"block{index}")(x)
        return nn.Dense(3, name="head")(x)


class Body(nn.Module):
    """The body of a scan."""

    block: Callable[..., nn.Module] = Block

    @nn.compact
    def __call__(self, x, _):
        return self.block(name="block")(x), None


class Scanned(nn.Module):
    """Blocks under ``nn.scan``, between two Dense layers."""

    block: Callable[..., nn.Module] = Block
    axes: Any = None
    length: int = 3

    @nn.compact
    def __call__(self, x):
        axes = {"params": 0, **(self.axes or {})}
        scan = nn.scan(Body, variable_axes=axes, split_rngs={"params": True}, length=self.length)
        x = nn.Dense(6, name="stem")(x)
        x, _ = scan(self.block, name="layers")(x, None)
        return nn.Dense(3, name="head")(x)


class Shared(nn.Module):
    """One layer, called twice."""

    @nn.compact
    def __call__(self, x):
        layer = nn.Dense(6, name="twice")
        return nn.Dense(3, name="once")(nn.relu(layer(nn.relu(layer(x)))))


class ConvNet(nn.Module):
    """Strided, dilated, grouped, depthwise, circular and masked convolutions."""

    @nn.compact
    def __call__(self, x):
        x = nn.Conv(8, (3, 3), strides=2, name="strided")(x)
        x = nn.Conv(8, (3, 3), kernel_dilation=2, name="dilated")(x)
        x = nn.relu(nn.Conv(8, (3, 3), feature_group_count=2, padding="VALID", name="grouped")(x))
        x = nn.Conv(8, (2, 2), feature_group_count=8, padding="CIRCULAR", use_bias=False, name="depthwise")(x)
        x = nn.Conv(4, (1, 1), mask=jnp.ones((1, 1, 8, 4)).at[0, 0, 0].set(0), name="masked")(x)
        return nn.Dense(3, name="head")(x.reshape(x.shape[0], -1))


class SharesScope(nn.Module):
    """A wrapper whose layer lives in its own scope."""

    def setup(self):
        self.inner = nn.Dense(6)
        nn.share_scope(self, self.inner)

    def __call__(self, x):
        return self.inner(x)


class LowRank(nn.Dense):
    """A Dense with a low-rank addition, as subclasses write it: super().__call__ and submodules."""

    @nn.compact
    def __call__(self, x):
        return super().__call__(x) + nn.Dense(self.features, name="b")(nn.Dense(2, name="a")(x))


class LowRankSetup(nn.Dense):
    """The same with a setup."""

    def setup(self):
        self.a, self.b = nn.Dense(2), nn.Dense(self.features)

    @nn.compact
    def __call__(self, x):
        return super().__call__(x) + self.b(self.a(x))


class RematDense(nn.Dense):
    """A subclass that calls its parent under a transformation."""

    @nn.compact
    def __call__(self, x):
        return nn.remat(lambda module, x: nn.Dense.__call__(module, x))(self, x)


class Branches(nn.Module):
    """``nn.cond`` over two layers."""

    @nn.compact
    def __call__(self, x):
        left, right = nn.Dense(5, name="left"), nn.Dense(5, name="right")
        if self.is_initializing():
            left(x), right(x)
        return nn.cond(x.sum() > 0, lambda m, x: left(x), lambda m, x: right(x), self, x)


class SignGradient(nn.Module):
    """``nn.custom_vjp`` around a layer."""

    @nn.compact
    def __call__(self, x):
        def layer(module, x):
            return nn.Dense(5, name="inside")(x)

        def backward(vjp, g):
            of_params, of_inputs = vjp(g)
            return of_params, jnp.sign(of_inputs)

        return nn.custom_vjp(layer, lambda m, x: nn.vjp(layer, m, x), backward)(self, x)


class Normalized(nn.Module):
    """Batch norm, dropout, a keyword, and a tuple of outputs."""

    @nn.compact
    def __call__(self, x, *, train: bool = False):
        x = nn.Dense(8)(x)
        x = nn.BatchNorm(use_running_average=not train)(x)
        x = nn.Dropout(0.5, deterministic=not train)(nn.relu(x))
        self.sow("intermediates", "features", x)
        return nn.Dense(3)(x), x


class Partitioned(nn.Module):
    """Boxed parameters."""

    @nn.compact
    def __call__(self, x):
        init = nn.with_partitioning(nn.initializers.lecun_normal(), (None, "model"))
        return nn.Dense(3)(nn.Dense(6, kernel_init=init)(x))


def vmapped(module):
    """A class with its own parameters for each entry of the first axis."""
    return nn.vmap(module, in_axes=0, out_axes=0, variable_axes={"params": 0}, split_rngs={"params": True})


def normal(*shape):
    """A standard normal array."""
    return jax.random.normal(jax.random.key(7), shape)


def random_variables(model, *args, **kwargs):
    """Normal numbers in the shapes of ``model.init``: no initialisation to compile, and no bias of zero."""
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(lambda key: model.init(key, *args, **kwargs), jax.random.key(0))
    return jax.tree.map(lambda leaf: jnp.asarray(0.4 * rng.standard_normal(leaf.shape), leaf.dtype), shapes)


KEY = jax.random.key(0)
X = normal(4, 6)

# name → (model, arguments, keywords).
MODELS: dict[str, tuple[nn.Module, tuple[Any, ...], dict[str, Any]]] = {
    "compact": (MLP(), (normal(4, 6),), {}),
    "bfloat16": (MLP(dtype=jnp.bfloat16), (normal(4, 6),), {}),
    "setup": (SetupMLP(), (normal(4, 6),), {}),
    "sequential": (nn.Sequential([nn.Dense(8), nn.relu, nn.Sequential([nn.Dense(3)])]), (normal(4, 6),), {}),
    "root": (nn.Dense(3), (normal(4, 6),), {}),
    "dense_general": (nn.DenseGeneral((2, 3), axis=(-2, -1)), (normal(4, 5, 6),), {}),
    "dense_general_batch": (nn.DenseGeneral(3, axis=-1, batch_dims=(0,)), (normal(4, 5, 6),), {}),
    "attention": (nn.MultiHeadDotProductAttention(2), (normal(2, 5, 6),), {}),
    "convolutions": (ConvNet(), (normal(2, 8, 8, 3),), {}),
    "causal": (nn.Conv(3, (3,), padding="CAUSAL"), (normal(2, 7, 4),), {}),
    "unbatched": (nn.Conv(3, (3, 3)), (normal(5, 5, 4),), {}),
    "remat": (Stack(nn.remat(Block)), (normal(4, 6),), {}),
    "remat_layer": (nn.Sequential([nn.remat(nn.Dense)(5), nn.Dense(3)]), (normal(4, 6),), {}),
    "remat_scan": (nn.remat_scan(Block, lengths=(2, 2))(), (normal(4, 6),), {}),
    "scan": (Scanned(), (normal(4, 6),), {}),
    "scan_remat": (Scanned(nn.remat(Block)), (normal(4, 6),), {}),
    "scan_jit": (Scanned(nn.jit(Block)), (normal(4, 6),), {}),
    "vmap": (Stack(vmapped(Block)), (normal(2, 4, 6),), {}),
    "vmap_layer": (nn.Sequential([vmapped(nn.Dense)(5), nn.Dense(3)]), (normal(2, 4, 6),), {}),
    "jit": (Stack(nn.jit(Block)), (normal(4, 6),), {}),
    "jit_method": (Stack(DecoratedBlock), (normal(4, 6),), {}),
    "jit_fields": (nn.Sequential([nn.Sequential([DecoratedBlock()]), DecoratedBlock()]), (normal(4, 6),), {}),
    "jit_root": (nn.jit(Shared)(), (normal(4, 6),), {}),
    "lstm": (nn.RNN(nn.LSTMCell(4)), (normal(2, 3, 6),), {}),
    "gru": (nn.RNN(nn.GRUCell(4)), (normal(2, 3, 6),), {}),
    "shared": (Shared(), (normal(4, 6),), {}),
    "share_scope": (nn.Sequential([SharesScope(), SharesScope()]), (normal(4, 6),), {}),
    "weight_norm": (nn.Sequential([nn.WeightNorm(nn.Dense(5)), nn.Dense(3)]), (normal(4, 6),), {}),
    "subclass": (nn.Sequential([LowRank(6), LowRank(3)]), (normal(4, 6),), {}),
    "subclass_setup": (nn.Sequential([LowRankSetup(6), LowRankSetup(3)]), (normal(4, 6),), {}),
    "cond": (Branches(), (normal(4, 6),), {}),
    "custom_vjp": (SignGradient(), (normal(4, 6),), {}),
    "normalized": (Normalized(), (normal(4, 6),), {"train": False}),
    "partitioned": (Partitioned(), (normal(4, 6),), {}),
}
