"""Graph convolutional networks: what graph networks share, and the convolution of Kipf and Welling."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp

from qtrain.errors import UsageError, did_you_mean

NORMS = ("none", "layer")
KEYS = ("nodes", "senders", "receivers")
"""What a graph holds for a model."""

Array = jax.Array


class Messages(nn.Module):
    """What each node sends to all its neighbours, ``[N, F]``: a name for rules, and nothing else.

    It is what aggregation adds up, and every term has the factor 1: with one scale a tensor, sums of codes are the sum.
    """

    @nn.compact
    def __call__(self, messages: Array) -> Array:
        """The messages as they are."""
        return messages


class SymmetricAggregation(nn.Module):
    """y = D^(−1/2)·(A + I)·D^(−1/2)·h, D the diagonal of the degrees of A + I.

    Computed as y = s ⊙ (Σ_{j→i} m_j + m_i) with s = d^(−1/2) and m = s ⊙ h, which pass the submodule ``messages``; sums
    are float32. A node without neighbours keeps its h.
    """

    @nn.compact
    def __call__(self, h: Array, senders: Array, receivers: Array) -> Array:
        """``[N, F]`` to the same shape and dtype; edges int32 ``[E]``, an undirected one in both directions."""
        scale = jax.lax.rsqrt(1.0 + _degrees(receivers, len(h)))[:, None]
        messages = Messages(name="messages")((scale * h).astype(h.dtype))
        return (scale * (_received(messages, senders, receivers) + messages)).astype(h.dtype)


class MeanAggregation(nn.Module):
    """y_i = the average of h_j over the edges j → i, 0 for a node without; h pass the submodule ``messages``."""

    @nn.compact
    def __call__(self, h: Array, senders: Array, receivers: Array) -> Array:
        """``[N, F]`` to the same shape and dtype; edges int32 ``[E]``."""
        messages = Messages(name="messages")(h)
        degrees = jnp.maximum(_degrees(receivers, len(h)), 1.0)[:, None]
        return (_received(messages, senders, receivers) / degrees).astype(h.dtype)


def _degrees(receivers: Array, num_nodes: int) -> Array:
    """Edges into each node, float32 ``[N]``."""
    return jax.ops.segment_sum(jnp.ones(receivers.shape, jnp.float32), receivers, num_nodes)


def _received(messages: Array, senders: Array, receivers: Array) -> Array:
    """The sum of the messages that each node receives, float32 ``[N, F]``."""
    return jax.ops.segment_sum(messages[senders].astype(jnp.float32), receivers, len(messages))


class GraphConvolution(nn.Module):
    """Y = D^(−1/2)·(A + I)·D^(−1/2)·X·W + b: the dense layer ``transform``, then ``aggregate``, then the ``bias``."""

    features: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Array, senders: Array, receivers: Array) -> Array:
        """``[N, F]`` to ``[N, features]``."""
        kernel_init = nn.initializers.glorot_uniform()
        h = nn.Dense(self.features, use_bias=False, dtype=self.dtype, kernel_init=kernel_init, name="transform")(x)
        y = SymmetricAggregation(name="aggregate")(h, senders, receivers)
        return y + self.param("bias", nn.initializers.zeros_init(), (self.features,)).astype(self.dtype)


class GraphNetwork(nn.Module):
    """Layers ``layer_0``, … with ReLU between them and one called ``logits``; the base of `GCN` and `GraphSAGE`."""

    num_classes: int
    num_layers: int = 2
    width: int = 16
    norm: Literal["none", "layer"] = "none"
    dropout: float = 0.0
    input_dropout: float = 0.0
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, graph: Mapping[str, Array], *, train: bool = False) -> Array:
        """Float32 logits ``[N, num_classes]`` of all nodes of a graph."""
        nodes, senders, receivers = self._checked(graph)
        x = nn.Dropout(self.input_dropout, deterministic=not train)(nodes)
        for index in range(self.num_layers - 1):
            x = self._layer(self.width, f"layer_{index}")(x, senders, receivers)
            if self.norm == "layer":
                x = nn.LayerNorm(dtype=self.dtype, name=f"norm_{index}")(x)
            x = nn.Dropout(self.dropout, deterministic=not train)(nn.relu(x))
        return self._layer(self.num_classes, "logits")(x, senders, receivers).astype(jnp.float32)

    def aggregation_macs(self, num_nodes: int, num_edges: int) -> int:
        """Multiply-accumulates of all aggregations of a forward pass, as products with a sparse matrix of the edges.

        They are gathers and sums, not products of matrices, so that `qtrain.cost` does not count them.
        """
        entries = self._entries(num_nodes, num_edges)
        return entries * ((self.num_layers - 1) * self.width + self.num_classes)

    def _layer(self, features: int, name: str) -> Any:
        raise NotImplementedError

    def _entries(self, num_nodes: int, num_edges: int) -> int:
        """Entries of the matrix that aggregation multiplies by."""
        raise NotImplementedError

    def _checked(self, graph: Mapping[str, Array]) -> tuple[Array, Array, Array]:
        if self.norm not in NORMS:
            names = ", ".join(map(repr, NORMS))
            raise UsageError(f"norm={self.norm!r} is not one of {names}.{did_you_mean(self.norm, NORMS)}")
        if not isinstance(graph, Mapping) or any(key not in graph for key in KEYS):
            found = ", ".join(map(repr, graph)) if isinstance(graph, Mapping) else type(graph).__name__
            raise UsageError(f"the input is {found}; a graph network takes a mapping with {', '.join(KEYS)}")
        nodes, senders, receivers = (jnp.asarray(graph[key]) for key in KEYS)
        if nodes.ndim != 2 or senders.ndim != 1 or senders.shape != receivers.shape:
            raise UsageError(
                f"a graph has nodes [N, F], senders [E] and receivers [E]; these are {nodes.shape}, {senders.shape} "
                f"and {receivers.shape}"
            )
        return nodes, senders, receivers


class GCN(GraphNetwork):
    """Node features and edges to float32 logits ``[N, num_classes]``, by graph convolutions (`GraphConvolution`).

    Called as ``model.apply(variables, graph, train=False)``, `graph` a mapping of ``nodes`` ``[N, F]``, ``senders`` and
    ``receivers``, int32 ``[E]``: an undirected edge in both directions, no self-loop (every node is its own neighbour
    as it is), each pair once, as `qtrain.data.graphs` gives them. An edge that is there twice counts twice; indices out
    of range are not noticed here. On a GPU sums over edges may differ in the last bits from call to call.

    What rules can name: the dense layers ``layer_0/transform``, …, ``logits/transform``, which hold every product of
    matrices, and what is aggregated, ``layer_0/aggregate/messages``, ….

    Fields:
      num_classes: outputs of the last layer, ``logits``.
      num_layers, width: the other ``num_layers − 1`` have `width` features.
      norm: ``"layer"``: a layer norm before each ReLU; ``"none"``.
      dropout: rate on what each ReLU puts out, from the rng ``dropout``.
      input_dropout: rate on the features of the nodes.
      dtype: of the products and messages; parameters, sums and logits are float32.

    Kipf and Welling 2017, arXiv 1609.02907, equation 2; theirs has no bias. Cora: two layers of width 16, both rates
    0.5. OGBN-Arxiv: three of width 512, layer norm, dropout 0.2.

    >>> graph = {"nodes": jnp.ones((3, 4)), "senders": jnp.array([0, 1]), "receivers": jnp.array([1, 0])}
    >>> model = GCN(num_classes=2)
    >>> model.apply(model.init(jax.random.key(0), graph), graph).shape
    (3, 2)
    """

    def _layer(self, features: int, name: str) -> Any:
        return GraphConvolution(features, self.dtype, name=name)

    def _entries(self, num_nodes: int, num_edges: int) -> int:
        return num_nodes + num_edges
