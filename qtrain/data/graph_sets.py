"""Graphs by name: Cora or any file like it, the digits as neighbours of one another, OGBN-Arxiv."""

from __future__ import annotations

import dataclasses
import importlib.util
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from qtrain.data import digits
from qtrain.data.graphs import SPLITS, Graph, make_graph
from qtrain.errors import UsageError, did_you_mean

CORA = Path(__file__).parents[3] / "shared" / "data" / "cora" / "cora.npz"  # beside the checkout

_SPARSE = ("features_data", "features_indices", "features_indptr", "features_shape")
_ARRAYS = ("labels", "senders", "receivers", *SPLITS)


def load_file(path: str | Path, *, normalize_rows: bool = True, key: str = "data.path") -> Graph:
    """A graph from an npz file.

    Its arrays: ``features`` `[N, F]`, or the same as a matrix of compressed rows, ``features_data``,
    ``features_indices``, ``features_indptr`` and ``features_shape``; ``labels``, ``senders``, ``receivers``, ``train``,
    ``validation`` and ``test`` as `make_graph` takes them; ``num_classes`` where a class has no node.

    Args:
      path: of the file.
      normalize_rows: each node's features are divided by their sum (Kipf and Welling 2017, section 5.2), zeros stay.
      key: what the path is called in messages.

    Raises:
      UsageError: no such file, not an npz file, arrays missing, negative features to be normalised, and as
        `make_graph`.
    """
    file, what = Path(path).expanduser(), f"{key} {str(path)!r}"
    if not file.is_file():
        reason = "is a folder" if file.is_dir() else "there is no such file"
        raise UsageError(f"{key} is {str(path)!r}; {reason}; give the npz file of a graph")
    arrays = _arrays(what, file)
    nodes = _features(what, arrays)
    missing = [name for name in _ARRAYS if name not in arrays]
    if missing:
        raise UsageError(
            f"{what} has no array {missing[0]!r}, only {_names(arrays)}.{did_you_mean(missing[0], arrays)}"
        )
    num_classes = arrays.get("num_classes")
    if num_classes is not None and (num_classes.ndim or num_classes.dtype.kind not in "iu" or num_classes < 1):
        raise UsageError(f"{what}: num_classes is {num_classes.tolist()}; it must be one whole number, at least 1")
    graph = make_graph(
        what,
        nodes,
        arrays["senders"],
        arrays["receivers"],
        arrays["labels"],
        {split: arrays[split] for split in SPLITS},
        None if num_classes is None else int(num_classes),
    )
    return _row_normalized(what, graph) if normalize_rows else graph


def _arrays(what: str, file: Path) -> dict[str, np.ndarray]:
    """What an npz file holds; no pickles, which could be programs."""
    if not zipfile.is_zipfile(file):
        raise UsageError(f"{what} is no npz file; numpy.savez writes one")
    try:
        with np.load(file, allow_pickle=False) as stored:
            return {name: stored[name] for name in stored.files}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise UsageError(f"{what} cannot be read as an npz file ({' '.join(str(error).split())[:120]})") from error


def _features(what: str, arrays: Mapping[str, np.ndarray]) -> np.ndarray:
    """The features, dense."""
    if "features" in arrays:
        return arrays["features"]
    missing = [name for name in _SPARSE if name not in arrays]
    if missing:
        raise UsageError(
            f"{what} has no array 'features', nor {missing[0]!r} of compressed rows ({', '.join(_SPARSE)}), only "
            f"{_names(arrays)}"
        )
    from scipy.sparse import csr_array

    data, indices, indptr, shape = (arrays[name] for name in _SPARSE)
    try:
        rows = csr_array((data, indices, indptr), shape=tuple(shape.tolist()))
        rows.check_format(full_check=True)
    except (ValueError, TypeError) as error:
        raise UsageError(f"{what}: the compressed rows of features are broken ({error})") from error
    return rows.toarray()


def _row_normalized(what: str, graph: Graph) -> Graph:
    negative = np.flatnonzero((graph.nodes < 0).any(axis=1))
    if len(negative):
        raise UsageError(
            f"{what}: node {negative[0]} has a negative feature, and rows are to be divided by their sum; set "
            "data.normalize_rows=False"
        )
    sums = graph.nodes.sum(axis=1, keepdims=True)
    return dataclasses.replace(graph, nodes=graph.nodes / np.where(sums > 0, sums, 1))


def _names(arrays: Mapping[str, np.ndarray]) -> str:
    return ", ".join(map(repr, arrays)) or "none"


def load_cora(path: str = "") -> Graph:
    """Cora: 2,708 papers, 5,278 citations, 1,433 words, 7 classes; 140 papers to train on, 500 and 1,000.

    Args:
      path: of the npz file; "" for ``../shared/data/cora/cora.npz`` beside the checkout.

    Sen et al. 2008, "Collective classification in network data"; split of Yang et al. 2016, arXiv 1603.08861
    (Planetoid): the first 20 papers of each class, the next 500, the last 1,000.
    """
    if not path and not CORA.is_file():
        raise UsageError(
            "data.path is not set, and there is no ../shared/data/cora/cora.npz; give the npz file of Cora"
        )
    return load_file(path or CORA)


def load_digits(neighbours: int = 8) -> Graph:
    """The 1,797 digits, each joined to the `neighbours` nearest others: pixels, standardised; 10 classes.

    The distance is Euclidean; of equally near digits the earlier ones are taken. An edge stands where either is among
    the other's nearest. The test nodes are the 360 of `qtrain.data.digits`; of the others the first 20 of each class
    train, the next 300 validate, and the rest have no part in any split.

    Raises:
      UsageError: for `neighbours` below 1 or above 1,796.
    """
    train, test = digits.load()
    pixels = np.concatenate([train.images, test.images]).reshape(len(train) + len(test), -1)
    labels, count = np.concatenate([train.labels, test.labels]), len(pixels)
    if isinstance(neighbours, bool) or not isinstance(neighbours, int) or not 1 <= neighbours < count:
        raise UsageError(f"neighbours is {neighbours!r}; it must be a whole number from 1 to {count - 1}")
    senders = nearest(pixels.astype(np.int64), neighbours)
    rank = np.zeros(len(train), np.int64)  # of a digit within its class
    for label in range(digits.NUM_CLASSES):
        rank[train.labels == label] = np.arange(np.sum(train.labels == label))
    splits = {
        "train": np.flatnonzero(rank < 20),
        "validation": np.flatnonzero(rank >= 20)[:300],
        "test": np.arange(len(train), count),
    }
    nodes = (pixels / digits.MAX_VALUE - digits.MEAN[0]) / digits.STD[0]
    receivers = np.repeat(np.arange(count), neighbours)
    return make_graph("the digits", nodes, senders.reshape(-1), receivers, labels, splits, digits.NUM_CLASSES)


def nearest(points: np.ndarray, neighbours: int) -> np.ndarray:
    """Of each of the points `[N, F]`, whole numbers, the indices of the nearest others `[N, neighbours]`, ascending.

    Squared distances are whole numbers too, so that ties are exact: of equally near points the first ones are taken.
    """
    squares = np.sum(points**2, axis=1)
    distances = squares[:, None] + squares[None] - 2 * (points @ points.T)
    keys = distances * len(points) + np.arange(len(points))
    np.fill_diagonal(keys, np.iinfo(np.int64).max)
    return np.sort(np.argpartition(keys, neighbours - 1, axis=1)[:, :neighbours], axis=1)


def generated(num_nodes: int, features: int, num_classes: int, neighbours: int = 4) -> Graph:
    """A graph of communities, one a class, always the same: for tests and smoke runs.

    Every node is joined to `neighbours` drawn ones, 4 of 5 of its own class on average, and has normal features around
    a centre of its class. In turn nodes train, validate and test.
    """
    rng = np.random.default_rng(0)
    labels = rng.permutation(np.arange(num_nodes) % num_classes)
    nodes = rng.normal(size=(num_classes, features))[labels] + rng.normal(size=(num_nodes, features))
    senders = np.repeat(np.arange(num_nodes), neighbours)
    anyone = rng.integers(0, num_nodes, senders.shape)
    members = [np.flatnonzero(labels == label) for label in range(num_classes)]
    same = np.array([rng.choice(members[labels[node]]) for node in senders])
    receivers = np.where(rng.random(senders.shape) < 0.8, same, anyone)
    splits = {split: np.arange(start, num_nodes, len(SPLITS)) for start, split in enumerate(SPLITS)}
    return make_graph("the generated graph", nodes, senders, receivers, labels, splits, num_classes)


def load_arxiv(path: str) -> Graph:
    """OGBN-Arxiv: 169,343 papers, 128 features, 40 classes, split by year, as `ogb` reads it; nothing is downloaded.

    Args:
      path: the folder that holds ``ogbn_arxiv``, the unpacked archive of the Open Graph Benchmark.

    Hu et al. 2020, arXiv 2005.00687. Citations are taken as undirected.

    Raises:
      UsageError: no package `ogb`, no such folder, or one that `ogb` would ask to download anew or cannot read.
    """
    if importlib.util.find_spec("ogb") is None:
        raise UsageError("data.name='ogbn_arxiv' needs the package ogb; run pip install 'qtrain[ogb]'")
    folder = Path(path).expanduser() / "ogbn_arxiv"
    ready = (folder / "raw" / "edge.csv.gz").is_file() or (folder / "processed" / "data_processed").is_file()
    # Without the file of its release ogb asks, on the terminal, whether to download the set again.
    if not path or not ready or not (folder / "RELEASE_v1.txt").is_file():
        raise UsageError(
            f"data.path is {str(path)!r}; there is no complete ogbn_arxiv in it, and nothing is downloaded: unpack the "
            "archive of the Open Graph Benchmark there"
        )
    from ogb.nodeproppred import NodePropPredDataset

    try:
        stored: Any = NodePropPredDataset("ogbn-arxiv", root=str(folder.parent))
        arrays, labels = stored[0]
        indices = stored.get_idx_split()
    except Exception as error:
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:120]}"
        raise UsageError(f"data.path {str(path)!r}: ogb cannot read ogbn_arxiv ({reason})") from error
    splits = {split: indices["valid" if split == "validation" else split] for split in SPLITS}
    what, (senders, receivers) = f"data.path {str(path)!r}", arrays["edge_index"]
    return make_graph(what, arrays["node_feat"], senders, receivers, labels.reshape(-1), splits, 40)
