"""A small convolutional network for small images."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp


class CNN(nn.Module):
    """Per entry of `features` a 3×3 convolution, batch norm, ReLU and 2×2 pooling; then a hidden layer and the head.

    Returns float32 logits ``(batch, num_classes)``. For 8×8 digits (347,392 multiply-accumulates for ten classes) and
    28×28 images alike; every pooling halves the side, rounding down.

    Fields:
      num_classes: outputs of the head, the layer ``logits``.
      features: channels of each convolution, ``Conv_0``, ``Conv_1``, ...
      hidden: width of the dense layer before the head, ``Dense_0``; 0 leaves it out.
      pool: ``"average"`` or ``"max"``. The average's gradient is much the cheaper one on a CPU.
      batch_norm: running statistics in ``batch_stats``, momentum 0.9.
      dropout: rate before the head, from the rng ``dropout``.
      dtype: of the computation; parameters are float32.
    """

    num_classes: int
    features: Sequence[int] = (32, 64)
    hidden: int = 128
    pool: Literal["average", "max"] = "average"
    batch_norm: bool = True
    dropout: float = 0.0
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool = False) -> jax.Array:
        """Logits of a batch of images NHWC; with `train` the norms use the batch and update ``batch_stats``."""
        pool = nn.max_pool if self.pool == "max" else nn.avg_pool
        for channels in self.features:
            x = nn.Conv(channels, (3, 3), padding=1, use_bias=not self.batch_norm, dtype=self.dtype)(x)
            if self.batch_norm:
                x = nn.BatchNorm(use_running_average=not train, momentum=0.9, dtype=self.dtype)(x)
            x = pool(nn.relu(x), (2, 2), strides=(2, 2))
        x = x.reshape((x.shape[0], -1))
        if self.hidden:
            x = nn.relu(nn.Dense(self.hidden, dtype=self.dtype)(x))
        x = nn.Dropout(self.dropout, deterministic=not train)(x)
        return nn.Dense(self.num_classes, dtype=self.dtype, name="logits")(x).astype(jnp.float32)
