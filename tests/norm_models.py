"""Models with norms in every style that linen allows, and batches for them."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

import qtrain

BATCHES, ROWS, WIDTH = 5, 16, 6
RULES = (qtrain.Rule(path=".*"),)


def batches(count=BATCHES, dtype=jnp.float32, seed=0):
    rng = np.random.default_rng(seed)
    shift = rng.normal(size=(count, 1, WIDTH))
    images = shift + rng.uniform(0.5, 2, size=(count, 1, WIDTH)) * rng.normal(size=(count, ROWS, WIDTH))
    return [{"image": jnp.asarray(each, dtype), "label": jnp.zeros(ROWS, jnp.int32)} for each in images]


def variables_of(qmodel, seed=3):
    """Initial variables with running statistics that nothing could be confused with."""
    image = batches(1)[0]["image"]
    variables = qmodel.init({"params": jax.random.key(seed), "dropout": jax.random.key(1)}, image, train=False)
    return {**variables, "batch_stats": jax.tree.map(lambda x: x + 100.0, variables["batch_stats"])}


class InputNorm(nn.Module):
    """A norm of the input, whose statistics numpy knows."""

    dtype: Any = None
    norm: Any = nn.BatchNorm
    fast: bool = True

    @nn.compact
    def __call__(self, x, *, train=False):
        norm = self.norm(
            use_running_average=not train, use_fast_variance=self.fast, momentum=0.7, dtype=self.dtype, name="norm"
        )
        return nn.Dense(3, name="head", dtype=self.dtype)(norm(x))


class Subclass(nn.BatchNorm):
    """As users extend it."""

    @nn.compact
    def __call__(self, x, **kwargs):
        return 2 * super().__call__(x, **kwargs)


class Block(nn.Module):
    """A layer, a norm and a layer without statistics."""

    train: bool = False

    @nn.compact
    def __call__(self, x):
        x = nn.Dense(WIDTH, name="dense")(x)
        x = nn.BatchNorm(use_running_average=not self.train, momentum=0.99, name="norm")(x)
        return nn.LayerNorm()(nn.relu(x))


class Body(nn.Module):
    """The body of a scan."""

    block: Any = Block
    train: bool = False

    @nn.compact
    def __call__(self, x, _):
        return self.block(train=self.train, name="block")(x), None


class Deep(nn.Module):
    """Three blocks of a class, one after the other or under ``nn.scan``."""

    block: Any = Block
    scanned: bool = False

    @nn.compact
    def __call__(self, x, *, train=False):
        if not self.scanned:
            for index in range(3):
                x = self.block(train=train, name=f"block{index}")(x)
        else:
            axes = {"params": 0, "batch_stats": 0}
            scan = nn.scan(Body, variable_axes=axes, split_rngs={"params": True}, length=3)
            x, _ = scan(self.block, train=train, name="layers")(x, None)
        return nn.Dense(3, name="head")(x)


class Twice(nn.Module):
    """One norm for two inputs."""

    norm: Any = nn.BatchNorm

    @nn.compact
    def __call__(self, x, *, train=False):
        norm = self.norm(use_running_average=not train, name="norm")
        return nn.Dense(3)(norm(x) + norm(5 * x + 1))


class Frozen(nn.Module):
    """A norm that never looks at the batch, before one that does."""

    @nn.compact
    def __call__(self, x, *, train=False):
        x = nn.BatchNorm(use_running_average=True, name="frozen")(x)
        return nn.Dense(3)(nn.BatchNorm(use_running_average=not train, name="norm")(x))


class OwnStatistics(nn.Module):
    """A norm of somebody's own."""

    @nn.compact
    def __call__(self, x, *, train=False):
        mean = self.variable("batch_stats", "mean", lambda: jnp.zeros(WIDTH))
        if train and not self.is_initializing():
            mean.value = 0.5 * mean.value + 0.5 * x.mean(0)
        return nn.Dense(3)(InputNorm()(x - mean.value, train=train))


class Plain(nn.Module):
    """No norm with statistics."""

    @nn.compact
    def __call__(self, x, *, train=False):
        return nn.Dense(3)(nn.LayerNorm()(x))


class Spectral(nn.Module):
    """State of a power iteration beside the norm's statistics."""

    @nn.compact
    def __call__(self, x, *, train=False):
        x = nn.SpectralNorm(nn.Dense(WIDTH), name="spectral")(x, update_stats=train)
        return nn.Dense(3)(nn.BatchNorm(use_running_average=not train, name="norm")(x))


class Dropped(nn.Module):
    """Dropout before a norm."""

    @nn.compact
    def __call__(self, x, *, train=False):
        x = nn.Dropout(0.5, deterministic=not train)(x)
        return nn.Dense(3)(nn.BatchNorm(use_running_average=not train, name="norm")(x))


class ZeroMomentum(nn.Module):
    """`Block` with momentum 0."""

    train: bool = False

    @nn.compact
    def __call__(self, x):
        x = nn.Dense(WIDTH, name="dense")(x)
        x = nn.BatchNorm(use_running_average=not self.train, momentum=0.0, name="norm")(x)
        return nn.LayerNorm()(nn.relu(x))
