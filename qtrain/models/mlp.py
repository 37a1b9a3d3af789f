"""A multi-layer perceptron."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp


class MLP(nn.Module):
    """Dense layers with ReLU between them, on the flattened input; returns float32 logits ``(batch, num_classes)``.

    Fields:
      num_classes: outputs of the head, the layer ``logits``.
      features: width of each hidden layer, ``Dense_0``, ``Dense_1``, ...
      dropout: rate after each hidden layer, from the rng ``dropout``.
      dtype: of the computation; parameters are float32.
    """

    num_classes: int
    features: Sequence[int] = (256, 128)
    dropout: float = 0.0
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool = False) -> jax.Array:
        """Logits of a batch of arrays of any one shape."""
        x = x.reshape((x.shape[0], -1))
        for width in self.features:
            x = nn.relu(nn.Dense(width, dtype=self.dtype)(x))
            x = nn.Dropout(self.dropout, deterministic=not train)(x)
        return nn.Dense(self.num_classes, dtype=self.dtype, name="logits")(x).astype(jnp.float32)
