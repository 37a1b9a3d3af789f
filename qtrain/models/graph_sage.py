"""GraphSAGE: a node's own features and the average of its neighbours' are transformed apart."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from qtrain.models.gcn import GraphNetwork, MeanAggregation

Array = jax.Array


class SAGELayer(nn.Module):
    """Y = X·W + b + P·(X·V), P the average over neighbours: the dense layers ``self`` (W, b) and ``neighbours`` (V).

    The neighbours' product comes before the average: the same function but for rounding, and of wide features, such as
    a bag of words, far fewer numbers go along the edges.
    """

    features: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Array, senders: Array, receivers: Array) -> Array:
        """``[N, F]`` to ``[N, features]``."""
        kernel_init = nn.initializers.glorot_uniform()
        own = nn.Dense(self.features, dtype=self.dtype, kernel_init=kernel_init, name="self")(x)
        h = nn.Dense(self.features, use_bias=False, dtype=self.dtype, kernel_init=kernel_init, name="neighbours")(x)
        return own + MeanAggregation(name="aggregate")(h, senders, receivers)


class GraphSAGE(GraphNetwork):
    """Node features and edges to float32 logits ``[N, num_classes]``, by `SAGELayer`; called as `GCN` is.

    The fields are those of `GCN`. What rules can name: ``layer_0/self``, ``layer_0/neighbours``, …, ``logits/self``,
    ``logits/neighbours``, and what is averaged, ``layer_0/aggregate/messages``, ….

    Hamilton, Ying and Leskovec 2017, arXiv 1706.02216, algorithm 1 with the mean aggregator: a layer of the
    concatenated [x_i, average] is the sum of two. All neighbours are averaged, not a sample; features are not scaled to
    length 1 after each layer; the last layer gives the logits.

    >>> graph = {"nodes": jnp.ones((3, 4)), "senders": jnp.array([0, 1]), "receivers": jnp.array([1, 0])}
    >>> model = GraphSAGE(num_classes=2)
    >>> model.apply(model.init(jax.random.key(0), graph), graph).shape
    (3, 2)
    """

    def _layer(self, features: int, name: str) -> Any:
        return SAGELayer(features, self.dtype, name=name)

    def _entries(self, num_nodes: int, num_edges: int) -> int:
        return num_edges
