"""Graphs: what is made of edges and splits, the sets that can be had, and what is said of broken ones."""

import sys
import types

import numpy as np
import pytest

from qtrain.data import digits, graph_sets
from qtrain.data.graph_sets import CORA, load_arxiv, load_cora, load_digits, load_file, nearest
from qtrain.data.graphs import SPLITS, GraphSplit, make_graph
from qtrain.errors import UsageError

NODES = 7


def arrays(**changes):
    """A legal graph's arrays: one direction of each edge but two, one edge twice, a self-loop; node 6 unlabelled."""
    rng = np.random.default_rng(0)
    base = {
        "features": rng.integers(0, 3, (NODES, 4)).astype(np.float32),
        "senders": np.array([5, 0, 1, 0, 2, 3, 4]),
        "receivers": np.array([0, 1, 0, 1, 3, 3, 5]),
        "labels": np.array([0, 1, 2, 0, 1, 2, -1]),
        "train": np.array([0, 1]),
        "validation": np.array([2]),
        "test": np.array([4, 3]),
    }
    base["features"][1] = 0
    return {**base, **changes}


def made(**changes):
    given = arrays(**changes)
    splits = {split: given.pop(split) for split in SPLITS}
    return make_graph("the test", given.pop("features"), splits=splits, **given)


def single_line(caught):
    assert "\n" not in str(caught.value)


def test_edges_have_both_directions_once_and_no_loops():
    graph = made()
    pairs = list(zip(graph.senders.tolist(), graph.receivers.tolist(), strict=True))
    assert set(pairs) == {(0, 1), (1, 0), (0, 5), (5, 0), (2, 3), (3, 2), (4, 5), (5, 4)}
    assert len(set(pairs)) == len(pairs)
    assert graph.receivers.tolist() == sorted(graph.receivers.tolist())
    assert graph.senders.dtype == graph.receivers.dtype == np.int32


def test_no_edges_at_all():
    empty = np.zeros(0, np.int64)
    assert made(senders=empty, receivers=empty).senders.shape == (0,)


def test_batches_differ_in_what_counts():
    graph = made(train=np.isin(np.arange(NODES), [0, 1]))  # a mask will do for indices
    sources = {split: GraphSplit(graph, split) for split in SPLITS}
    masks = [source.batch["mask"] for source in sources.values()]
    np.testing.assert_array_equal(masks, [[1, 1, 0, 0, 0, 0, 0], [0, 0, 1, 0, 0, 0, 0], [0, 0, 0, 1, 1, 0, 0]])
    assert [len(source) for source in sources.values()] == [1, 1, 1]
    # No label of another split is in a batch, and none that is no class.
    np.testing.assert_array_equal(sources["test"].batch["label"], [0, 0, 0, 0, 1, 0, 0])
    assert all(source.batch["nodes"] is graph.nodes for source in sources.values())
    assert sources["train"].batch is sources["train"].batch


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"receivers": np.array([0, 1, 7, 1, 3, 3, 5])}, "edge 2 goes from 1 to 7, but there are 7 nodes, 0 … 6"),
        ({"senders": np.array([5, 0, 1, -1, 2, 3, 4])}, "edge 3 goes from -1 to 1, but there are 7"),
        ({"senders": np.array([0, 1])}, "2 senders and 7 receivers"),
        ({"senders": np.array([0.5] * 7)}, "senders are float64"),
        ({"labels": np.array([0, 1, 2, 0, 1, 2, -2])}, "label of node 6 is -2; allowed are 0 … 2, and -1"),
        ({"num_classes": 2}, "label of node 2 is 2; allowed are 0 … 1"),
        ({"labels": np.array([0, 1])}, r"labels are int64 \(2,\); give a whole number for each of the 7"),
        ({"test": np.array([6])}, "node 6 is in 'test' and its label is -1"),
        ({"test": np.array([4, 2, 1])}, "1 nodes, 1 first, are in 'train' and in 'test'"),
        ({"validation": np.zeros(0, np.int64)}, "split 'validation' is empty"),
        ({"validation": np.zeros(NODES, bool)}, "split 'validation' is empty"),
        ({"train": np.array([0, 7])}, "'train' has node 7, but there are 7, 0 … 6"),
        ({"train": np.array([True, False])}, "nodes of 'train' are bool"),
        ({"features": np.ones(NODES)}, r"features are float64 \(7,\)"),
        ({"features": np.array([["a"]] * NODES)}, "they must be numbers"),
    ],
)
def test_broken_graphs(changes, message):
    with pytest.raises(UsageError, match=message) as caught:
        made(**changes)
    single_line(caught)
    assert str(caught.value).startswith("the test: ")


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_features_that_are_not_finite(value):
    features = arrays()["features"]
    features[3, 2] = value
    with pytest.raises(UsageError, match=f"feature 2 of node 3 is {value}"):
        made(features=features)


def sparse(features):
    rows, columns = np.nonzero(features)
    return {
        "features_data": features[rows, columns],
        "features_indices": columns,
        "features_indptr": np.concatenate([[0], np.cumsum(np.bincount(rows, minlength=len(features)))]),
        "features_shape": np.array(features.shape),
    }


def test_file_of_dense_and_of_sparse_features(tmp_path):
    given = arrays()
    np.savez(tmp_path / "dense.npz", **given)
    rest = {name: array for name, array in given.items() if name != "features"}
    np.savez(tmp_path / "sparse.npz", **rest, **sparse(given["features"]))
    dense, other = (load_file(tmp_path / name) for name in ("dense.npz", "sparse.npz"))
    np.testing.assert_array_equal(dense.nodes, other.nodes)
    sums = given["features"].sum(axis=1)
    np.testing.assert_allclose(dense.nodes.sum(axis=1), sums > 0, rtol=1e-6)  # rows of zeros stay
    np.testing.assert_array_equal(load_file(tmp_path / "dense.npz", normalize_rows=False).nodes, given["features"])
    assert dense.num_classes == 3
    np.savez(tmp_path / "classes.npz", **given, num_classes=5)
    assert load_file(tmp_path / "classes.npz").num_classes == 5


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"labels": None, "label": np.zeros(NODES, int)}, r"has no array 'labels', only .* Did you mean 'label'\?"),
        ({"validation": None}, "has no array 'validation'"),
        ({"features": None}, "has no array 'features', nor 'features_data' of compressed rows"),
        ({"features": -np.ones((NODES, 2))}, "node 0 has a negative feature.*data.normalize_rows=False"),
        ({"num_classes": np.array([3])}, r"num_classes is \[3\]"),
        ({"labels": np.array([None] * NODES)}, "cannot be read as an npz file"),  # a pickle
        ({"receivers": np.array([0, 1, 7, 1, 3, 3, 5])}, "edge 2 goes from 1 to 7"),
    ],
)
def test_broken_files(tmp_path, changes, message):
    given = {name: array for name, array in arrays(**changes).items() if array is not None}
    np.savez(tmp_path / "graph.npz", **given)
    with pytest.raises(UsageError, match=message) as caught:
        load_file(tmp_path / "graph.npz")
    single_line(caught)


def test_broken_compressed_rows(tmp_path):
    given = {name: array for name, array in arrays().items() if name != "features"}
    rows = sparse(arrays()["features"])
    rows["features_indices"][0] = 99
    np.savez(tmp_path / "graph.npz", **given, **rows)
    with pytest.raises(UsageError, match="compressed rows of features are broken") as caught:
        load_file(tmp_path / "graph.npz")
    single_line(caught)


def test_paths_that_are_no_graph(tmp_path, monkeypatch):
    with pytest.raises(UsageError, match="there is no such file"):
        load_file(tmp_path / "none.npz")
    with pytest.raises(UsageError, match="is a folder"):
        load_file(tmp_path)
    (tmp_path / "text.npz").write_text("not a zip file")
    np.save(tmp_path / "one.npy", np.zeros(3))
    for name in ("text.npz", "one.npy"):
        with pytest.raises(UsageError, match="is no npz file"):
            load_file(tmp_path / name)
    monkeypatch.setattr(graph_sets, "CORA", tmp_path / "cora.npz")
    with pytest.raises(UsageError, match="path is not set, and there is no") as caught:
        load_cora()
    single_line(caught)


@pytest.mark.skipif(not CORA.is_file(), reason="no shared/data/cora/cora.npz beside the checkout")
def test_cora_is_the_planetoid_split():
    graph = load_cora()
    assert graph.nodes.shape == (2708, 1433) and graph.num_classes == 7
    assert len(graph.senders) == 2 * 5278
    assert [int(mask.sum()) for mask in graph.splits.values()] == [140, 500, 1000]
    assert np.bincount(graph.labels[graph.splits["train"]]).tolist() == [20] * 7
    np.testing.assert_allclose(graph.nodes.sum(axis=1), 1, rtol=1e-5)  # every paper has a word
    assert np.mean(graph.labels[graph.senders] == graph.labels[graph.receivers]) == pytest.approx(0.810, abs=5e-4)


def test_nearest_against_all_pairs_with_ties():
    points = np.random.default_rng(0).integers(0, 4, (40, 2))  # many equal distances
    for i, found in enumerate(nearest(points, 5)):
        distance = [(int(np.sum((points[i] - p) ** 2)), j) for j, p in enumerate(points) if j != i]
        assert found.tolist() == sorted(j for _, j in sorted(distance)[:5])


def test_digits_graph():
    graph = load_digits()
    train, test = digits.load()
    assert graph.nodes.shape == (1797, 64) and graph.num_classes == 10
    masks = graph.splits
    assert [int(mask.sum()) for mask in masks.values()] == [200, 300, 360]
    assert np.bincount(graph.labels[masks["train"]]).tolist() == [20] * 10
    np.testing.assert_array_equal(graph.labels[masks["test"]], test.labels)
    assert np.bincount(graph.receivers).min() == 8
    first = np.flatnonzero(masks["train"])[0]
    pixels = (train.images[first].reshape(-1) / 16 - 0.3054) / 0.3761
    np.testing.assert_allclose(graph.nodes[first], pixels, rtol=1e-5)
    with pytest.raises(UsageError, match="neighbours is 0; it must be a whole number from 1 to 1796"):
        load_digits(0)


def fake_ogb(monkeypatch, dataset):
    """A package `ogb` that gives `dataset`, and no other."""
    package, inner = types.ModuleType("ogb"), types.ModuleType("ogb.nodeproppred")
    inner.NodePropPredDataset = dataset
    monkeypatch.setitem(sys.modules, "ogb", package)
    monkeypatch.setitem(sys.modules, "ogb.nodeproppred", inner)
    monkeypatch.setattr(graph_sets.importlib.util, "find_spec", lambda name: package)


def test_arxiv_without_the_package(monkeypatch):
    monkeypatch.setattr(graph_sets.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UsageError, match=r"needs the package ogb; run pip install 'qtrain\[ogb\]'") as caught:
        load_arxiv("somewhere")
    single_line(caught)


def test_arxiv_is_never_downloaded(monkeypatch, tmp_path):
    def dataset(*arguments, **keywords):
        raise AssertionError("ogb would ask whether to download")

    fake_ogb(monkeypatch, dataset)
    folder = tmp_path / "ogbn_arxiv"
    for path in ("", str(tmp_path), str(tmp_path / "none")):
        with pytest.raises(UsageError, match="nothing is downloaded"):
            load_arxiv(path)
    (folder / "raw").mkdir(parents=True)
    (folder / "raw" / "edge.csv.gz").touch()
    with pytest.raises(UsageError, match="nothing is downloaded"):  # of no release: ogb would ask
        load_arxiv(str(tmp_path))
    (folder / "RELEASE_v1.txt").touch()
    with pytest.raises(UsageError, match=r"ogb cannot read ogbn_arxiv \(AssertionError: ogb would ask") as caught:
        load_arxiv(str(tmp_path))
    single_line(caught)


def test_arxiv_as_ogb_gives_it(monkeypatch, tmp_path):
    given = arrays(labels=np.array([0, 1, 2, 0, 1, 39, 5]))

    class Dataset:
        def __init__(self, name, root):
            assert (name, root) == ("ogbn-arxiv", str(tmp_path))

        def __getitem__(self, index):
            edges = np.stack([given["senders"], given["receivers"]])
            return {"edge_index": edges, "node_feat": given["features"]}, given["labels"][:, None]

        def get_idx_split(self):
            return {"train": given["train"], "valid": given["validation"], "test": given["test"]}

    fake_ogb(monkeypatch, Dataset)
    (tmp_path / "ogbn_arxiv" / "processed").mkdir(parents=True)
    for name in ("processed/data_processed", "RELEASE_v1.txt"):
        (tmp_path / "ogbn_arxiv" / name).touch()
    graph = load_arxiv(str(tmp_path))
    assert graph.num_classes == 40 and len(graph.senders) == 8
    assert graph.splits["validation"].tolist() == [False, False, True, False, False, False, False]


def test_generated_graph_is_one_of_communities():
    graph = graph_sets.generated(num_nodes=60, features=5, num_classes=4)
    again = graph_sets.generated(num_nodes=60, features=5, num_classes=4)
    np.testing.assert_array_equal(graph.senders, again.senders)
    assert [int(mask.sum()) for mask in graph.splits.values()] == [20, 20, 20]
    same = np.mean(graph.labels[graph.senders] == graph.labels[graph.receivers])
    assert 0.7 < same < 0.95  # 0.8 + 0.2/4
    assert GraphSplit(graph, "train").describe("it") == (
        f"it: one graph of 60 nodes with 5 features, {len(graph.senders) // 2} edges, 4 classes; "
        "20 train, 20 validation, 20 test nodes"
    )
