"""A graph whose nodes are to be classified, as the arrays and masks of one batch; `qtrain.data.graph_sets` has some.

The whole graph is one batch. Training sees all nodes and edges and the labels of the training nodes alone, which a mask
tells (transductive learning); evaluation differs from it in the mask.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping

import numpy as np

from qtrain.errors import UsageError

SPLITS = ("train", "validation", "test")
UNKNOWN = -1
"""The label of a node of which none is known; such a node is in no split."""


@dataclasses.dataclass(frozen=True, eq=False)
class Graph:
    """An undirected graph, checked; made by `make_graph`.

    Attributes:
      nodes: features, float32 `[N, F]`.
      senders, receivers: int32 `[E]`, each edge in both directions, once, no self-loop, by receiver and then sender.
      labels: int32 `[N]`, 0 … num_classes − 1, or `UNKNOWN`.
      num_classes: C.
      splits: "train", "validation" and "test": bool `[N]`, disjoint.
    """

    nodes: np.ndarray
    senders: np.ndarray
    receivers: np.ndarray
    labels: np.ndarray
    num_classes: int
    splits: Mapping[str, np.ndarray]


@dataclasses.dataclass(frozen=True, eq=False)
class GraphSplit:
    """One example: the whole graph, and a mask that says whose labels count."""

    graph: Graph
    split: str

    def __len__(self) -> int:
        return 1

    @functools.cached_property
    def batch(self) -> dict[str, np.ndarray]:
        """``nodes``, ``senders``, ``receivers``, ``label`` int32 `[N]` and ``mask`` float32 `[N]`; one object always.

        The label of a node outside the split is 0, lest it be used.
        """
        graph, mask = self.graph, self.graph.splits[self.split]
        arrays = {"nodes": graph.nodes, "senders": graph.senders, "receivers": graph.receivers}
        return {**arrays, "label": np.where(mask, graph.labels, 0).astype(np.int32), "mask": mask.astype(np.float32)}

    def describe(self, name: str) -> str:
        """One line: sizes of the graph and of its splits."""
        graph = self.graph
        nodes, features = graph.nodes.shape
        sizes = ", ".join(f"{mask.sum()} {split}" for split, mask in graph.splits.items())
        return (
            f"{name}: one graph of {nodes} nodes with {features} features, {len(graph.senders) // 2} edges, "
            f"{graph.num_classes} classes; {sizes} nodes"
        )


def make_graph(
    what: str,
    nodes: np.ndarray,
    senders: np.ndarray,
    receivers: np.ndarray,
    labels: np.ndarray,
    splits: Mapping[str, np.ndarray],
    num_classes: int | None = None,
) -> Graph:
    """Checks the arrays and makes the edges undirected: both directions, no duplicates, no self-loops.

    Args:
      what: how errors begin, such as ``"data.path 'cora.npz'"``.
      nodes: `[N, F]`, finite.
      senders, receivers: `[E]`, whole numbers 0 … N − 1, in any order; one direction of an edge is enough.
      labels: `[N]`, 0 … C − 1, or -1 for nodes that are in no split.
      splits: for each of `SPLITS` the indices of its nodes, or bool `[N]`.
      num_classes: C; by default the largest label + 1.

    Raises:
      UsageError: for an array of another shape or kind, an edge, label or index out of range, features that are not
        finite, a split that is empty, or two that overlap.
    """
    nodes = np.asarray(nodes)
    if nodes.ndim != 2 or not nodes.size or nodes.dtype.kind not in "fiub":
        raise UsageError(f"{what}: features are {nodes.dtype} {nodes.shape}; they must be numbers (nodes, features)")
    nodes, count = np.ascontiguousarray(nodes, np.float32), len(nodes)
    finite = np.isfinite(nodes)
    if not finite.all():
        node, feature = np.argwhere(~finite)[0]
        raise UsageError(
            f"{what}: feature {feature} of node {node} is {nodes[node, feature]}; features must be finite numbers"
        )
    labels = _whole_numbers(what, "labels", labels, count)
    if num_classes is None:
        num_classes = int(labels.max()) + 1
    wrong = np.flatnonzero((labels < UNKNOWN) | (labels >= num_classes))
    if len(wrong):
        raise UsageError(
            f"{what}: the label of node {wrong[0]} is {labels[wrong[0]]}; allowed are 0 … {num_classes - 1}, and "
            f"{UNKNOWN} for a node in no split"
        )
    senders, receivers = _edges(what, senders, receivers, count)
    masks = _masks(what, splits, labels)
    return Graph(nodes, senders, receivers, labels.astype(np.int32), num_classes, masks)


def _whole_numbers(what: str, name: str, values: np.ndarray, size: int | None = None) -> np.ndarray:
    """`values` as int64, one for each of `size` nodes."""
    values = np.asarray(values)
    if values.ndim != 1 or values.dtype.kind not in "iu" or (size is not None and len(values) != size):
        wanted = "whole numbers in one dimension" if size is None else f"a whole number for each of the {size} nodes"
        raise UsageError(f"{what}: {name} are {values.dtype} {values.shape}; give {wanted}")
    return values.astype(np.int64)


def _edges(what: str, senders: np.ndarray, receivers: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Senders and receivers of both directions, int32, sorted and unique, without self-loops."""
    ends = [_whole_numbers(what, name, v) for name, v in (("senders", senders), ("receivers", receivers))]
    if len(ends[0]) != len(ends[1]):
        raise UsageError(f"{what}: there are {len(ends[0])} senders and {len(ends[1])} receivers; give one of each")
    pairs = np.stack(ends)
    outside = np.flatnonzero(((pairs < 0) | (pairs >= count)).any(axis=0))
    if len(outside):
        edge = outside[0]
        raise UsageError(
            f"{what}: edge {edge} goes from {pairs[0, edge]} to {pairs[1, edge]}, but there are {count} nodes, "
            f"0 … {count - 1}"
        )
    pairs = pairs[:, pairs[0] != pairs[1]]
    keys = np.unique(np.concatenate([pairs[1] * count + pairs[0], pairs[0] * count + pairs[1]]))
    return (keys % count).astype(np.int32), (keys // count).astype(np.int32)


def _masks(what: str, splits: Mapping[str, np.ndarray], labels: np.ndarray) -> dict[str, np.ndarray]:
    """The splits as bool `[N]`, disjoint, none empty, and every node of them labelled."""
    count, masks = len(labels), {}
    for split in SPLITS:
        given = np.asarray(splits[split])
        indices = np.flatnonzero(given) if given.dtype == bool and given.shape == (count,) else given
        indices = _whole_numbers(what, f"the nodes of {split!r}", indices)
        if not len(indices):
            raise UsageError(f"{what}: the split {split!r} is empty; give it a node at least")
        outside = indices[(indices < 0) | (indices >= count)]
        if len(outside):
            raise UsageError(f"{what}: {split!r} has node {outside[0]}, but there are {count}, 0 … {count - 1}")
        masks[split] = np.isin(np.arange(count), indices)
        unknown = np.flatnonzero(masks[split] & (labels == UNKNOWN))
        if len(unknown):
            raise UsageError(f"{what}: node {unknown[0]} is in {split!r} and its label is {UNKNOWN}; label it")
        for other in SPLITS[: SPLITS.index(split)]:
            both = np.flatnonzero(masks[split] & masks[other])
            if len(both):
                raise UsageError(f"{what}: {len(both)} nodes, {both[0]} first, are in {other!r} and in {split!r}")
    return masks
