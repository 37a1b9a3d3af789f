"""Graph networks against dense matrices in numpy, their symmetries, their parts' names and their costs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qtrain
from qtrain import Precision, Rule
from qtrain.errors import UsageError
from qtrain.models.gcn import GCN, GraphConvolution, MeanAggregation, SymmetricAggregation
from qtrain.models.graph_sage import GraphSAGE, SAGELayer

NODES, FEATURES, CLASSES = 9, 5, 3
# Node 8 has no neighbour; node 0 is a hub; (1, 2) is there twice, as is (2, 1); node 3 is joined to itself.
PAIRS = ((0, 1), (0, 2), (0, 3), (0, 4), (0, 5), (1, 2), (1, 2), (4, 5), (6, 7))
SENDERS = np.array([*(a for a, _ in PAIRS), *(b for _, b in PAIRS), 3], np.int32)
RECEIVERS = np.array([*(b for _, b in PAIRS), *(a for a, _ in PAIRS), 3], np.int32)
MODELS = {"gcn": GCN, "sage": GraphSAGE, "gcn, three layers, norm": GCN, "sage, three layers, norm": GraphSAGE}


def compiled(function):
    """Compiled in the least time."""
    return jax.jit(function, compiler_options={"xla_backend_optimization_level": 0})


def adjacency():
    """A[i, j]: edges from j to i."""
    matrix = np.zeros((NODES, NODES))
    np.add.at(matrix, (RECEIVERS, SENDERS), 1)
    return matrix


def symmetric():
    """D^(−1/2)·(A + I)·D^(−1/2)."""
    matrix = adjacency() + np.eye(NODES)
    scale = np.diag(matrix.sum(axis=1) ** -0.5)
    return scale @ matrix @ scale


def mean():
    """Every row of A over its sum, zeros where that is zero."""
    matrix = adjacency()
    return matrix / np.maximum(matrix.sum(axis=1, keepdims=True), 1)


AGGREGATIONS = {"symmetric": (SymmetricAggregation, symmetric), "mean": (MeanAggregation, mean)}
LAYERS = {"convolution": (GraphConvolution, symmetric), "sage": (SAGELayer, mean)}


def graph(seed=0):
    nodes = np.random.default_rng(seed).normal(size=(NODES, FEATURES)).astype(np.float32)
    return {"nodes": jnp.asarray(nodes), "senders": jnp.asarray(SENDERS), "receivers": jnp.asarray(RECEIVERS)}


def network(name, **fields):
    deep = {"num_layers": 3, "norm": "layer"} if "three" in name else {}
    return MODELS[name](num_classes=CLASSES, width=4, **deep, **fields)


def test_symmetric_normalisation_by_hand():
    """Two nodes, one edge: A + I is all ones and every degree 2; a third node keeps its own."""
    h = jnp.array([[2.0], [4.0], [5.0]])
    y = SymmetricAggregation().apply({}, h, jnp.array([0, 1]), jnp.array([1, 0]))
    np.testing.assert_allclose(y, [[3.0], [3.0], [5.0]], rtol=1e-6)


def test_normalised_matrix_has_the_eigenvector_of_the_degrees():
    """D^(1/2)·1 is left as it is, which says that both sides are divided by the same roots."""
    roots = np.sqrt(adjacency().sum(axis=1) + 1)[:, None]
    y = SymmetricAggregation().apply({}, jnp.asarray(roots, jnp.float32), SENDERS, RECEIVERS)
    np.testing.assert_allclose(y, roots, rtol=1e-6)


@pytest.mark.parametrize("name", AGGREGATIONS)
def test_aggregation_is_a_product_with_the_dense_matrix(name):
    """With a hub, an isolated node, an edge that is there twice and a self-loop; backwards with its transpose."""
    module, matrix = AGGREGATIONS[name]
    x, cotangent = np.random.default_rng(1).normal(size=(2, NODES, FEATURES))
    y, pull = jax.vjp(lambda x: module().apply({}, x, SENDERS, RECEIVERS), jnp.asarray(x, jnp.float32))
    np.testing.assert_allclose(y, matrix() @ x, atol=1e-6)
    np.testing.assert_allclose(pull(jnp.asarray(cotangent, jnp.float32))[0], matrix().T @ cotangent, atol=1e-6)


@pytest.mark.parametrize("name", LAYERS)
def test_layer_and_its_gradients_against_numpy(name):
    layer, matrix = LAYERS[name]
    module, x, m = layer(4), np.asarray(graph()["nodes"]), matrix()
    params = module.init(jax.random.key(0), x, SENDERS, RECEIVERS)["params"]
    params = jax.tree.map(lambda p: p + 0.1, params)  # a bias of 0 would hide where it is added
    cotangent = np.random.default_rng(2).normal(size=(NODES, 4)).astype(np.float32)

    def loss(params, x):
        return jnp.sum(cotangent * module.apply({"params": params}, x, SENDERS, RECEIVERS))

    y = module.apply({"params": params}, x, SENDERS, RECEIVERS)
    by_params, by_x = compiled(jax.grad(loss, (0, 1)))(params, x)
    if name == "convolution":
        kernel = params["transform"]["kernel"]
        expected = m @ x @ kernel + params["bias"]
        gradients = {"transform": {"kernel": (m @ x).T @ cotangent}, "bias": cotangent.sum(axis=0)}
        of_x = m.T @ cotangent @ kernel.T
    else:
        own, others = params["self"]["kernel"], params["neighbours"]["kernel"]
        expected = x @ own + params["self"]["bias"] + m @ x @ others
        gradients = {
            "self": {"kernel": x.T @ cotangent, "bias": cotangent.sum(axis=0)},
            "neighbours": {"kernel": (m @ x).T @ cotangent},
        }
        of_x = cotangent @ own.T + m.T @ cotangent @ others.T
    np.testing.assert_allclose(y, expected, atol=1e-5)
    np.testing.assert_allclose(by_x, of_x, atol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), by_params, gradients)


def test_two_layer_gcn_against_numpy():
    """softmax-free equation 9 of Kipf and Welling: Â·ReLU(Â·X·W₀)·W₁, with biases."""
    model, inputs = network("gcn"), graph()
    params = jax.tree.map(lambda p: p + 0.1, model.init(jax.random.key(0), inputs)["params"])
    first, second = params["layer_0"], params["logits"]
    hidden = symmetric() @ np.asarray(inputs["nodes"]) @ first["transform"]["kernel"] + first["bias"]
    expected = symmetric() @ np.maximum(hidden, 0) @ second["transform"]["kernel"] + second["bias"]
    np.testing.assert_allclose(model.apply({"params": params}, inputs), expected, atol=1e-5)


@pytest.mark.parametrize("name", MODELS)
def test_network_does_not_know_the_numbers_of_nodes_nor_the_order_of_edges(name):
    model, inputs = network(name), graph()
    variables = model.init(jax.random.key(0), inputs)
    rng = np.random.default_rng(3)
    order, edges = rng.permutation(NODES), rng.permutation(len(SENDERS))
    number = np.argsort(order)  # node order[i] becomes node i
    other = {
        "nodes": inputs["nodes"][order],
        "senders": jnp.asarray(number[SENDERS[edges]]),
        "receivers": jnp.asarray(number[RECEIVERS[edges]]),
    }
    apply = compiled(model.apply)
    logits = apply(variables, inputs)
    assert logits.shape == (NODES, CLASSES) and logits.dtype == jnp.float32
    np.testing.assert_allclose(apply(variables, other), logits[order], atol=1e-5)
    # Not for want of looking at them.
    assert np.abs(apply(variables, {**inputs, "nodes": inputs["nodes"][order]}) - logits).max() > 1e-2


def test_isolated_node_is_alone():
    """What others have does not reach node 8, and neither layer divides by a degree of 0."""
    for name in ("gcn", "sage"):
        model, inputs = network(name), graph()
        variables = model.init(jax.random.key(0), inputs)
        apply = compiled(model.apply)
        before, changed = apply(variables, inputs), inputs["nodes"].at[:8].add(1.0)
        after = apply(variables, {**inputs, "nodes": changed})
        assert np.isfinite(after).all()
        np.testing.assert_array_equal(after[8], before[8])
        assert not np.array_equal(after[7], before[7])


def test_neighbours_beyond_the_integers_of_bfloat16():
    """Sums are float32: 1,000 ones in bfloat16 would stop at 256."""
    hub, ones = jnp.zeros(1000, jnp.int32), jnp.ones((1001, 1), jnp.bfloat16)
    y = MeanAggregation().apply({}, ones, jnp.arange(1, 1001), hub)
    assert y.dtype == jnp.bfloat16 and y[0, 0] == 1.0


def test_dropout_is_in_training_alone():
    model, inputs = network("gcn", dropout=0.5, input_dropout=0.5), graph()
    variables = model.init(jax.random.key(0), inputs)
    first, second = (
        model.apply(variables, inputs, train=True, rngs={"dropout": jax.random.key(seed)}) for seed in (0, 1)
    )
    assert not np.array_equal(first, second)
    np.testing.assert_array_equal(model.apply(variables, inputs), network("gcn").apply(variables, inputs))
    # Each rate on its own changes something.
    for field in ("dropout", "input_dropout"):
        rngs = {"dropout": jax.random.key(0)}
        own = network("gcn", **{field: 0.5}).apply(variables, inputs, train=True, rngs=rngs)
        assert not np.array_equal(own, model.apply(variables, inputs))


def test_messages_have_a_name():
    """What passes ``messages`` is what is added up: d^(−1/2)·h of a convolution, h of a mean."""
    for name, scale in (("gcn", (adjacency().sum(axis=1) + 1) ** -0.5), ("sage", np.ones(NODES))):
        model, inputs = network(name), graph()
        variables = model.init(jax.random.key(0), inputs)
        _, state = model.apply(variables, inputs, capture_intermediates=True, mutable=["intermediates"])
        found = state["intermediates"]["layer_0"]
        (messages,) = found["aggregate"]["messages"]["__call__"]
        (h,) = found["transform" if name == "gcn" else "neighbours"]["__call__"]
        np.testing.assert_allclose(messages, scale[:, None] * h, rtol=1e-5, atol=1e-6)


def test_costs_are_those_of_the_transforms_and_of_a_sparse_matrix():
    """The plan has every product of matrices and quantizes all; edges are counted apart."""
    inputs, per_node = graph(), FEATURES * 4 + 4 * CLASSES
    for name, products, matrix in (("gcn", 1, adjacency() + np.eye(NODES)), ("sage", 2, adjacency())):
        model = network(name)
        plan = qtrain.quantize(model, Rule()).plan(inputs)
        assert plan.macs == products * NODES * per_node
        assert plan.coverage == 1.0
        # The weighted duplicates are edges of their own.
        assert model.aggregation_macs(NODES, len(SENDERS)) == matrix.sum() * (4 + CLASSES)


def test_one_program_quantizes_to_any_width():
    for name, layers in (("gcn", ("transform",)), ("sage", ("self", "neighbours"))):
        qmodel, inputs = qtrain.quantize(network(name), Rule()), graph()
        variables = qmodel.init(jax.random.key(0), inputs)
        assert qmodel.plan(inputs).followers == tuple(f"{a}/{b}" for a in ("layer_0", "logits") for b in layers)
        traces = []

        def apply(variables, inputs, bits, qmodel=qmodel, traces=traces):
            traces.append(1)
            return qmodel.apply(variables, inputs, bits=bits)

        program = compiled(apply)
        plain = qmodel.apply(variables, inputs)
        errors = [
            float(jnp.abs(program(variables, inputs, Precision(*[jnp.float32(bits)] * 2)) - plain).max())
            for bits in (2, 8, 32)
        ]
        assert errors[0] > 0.1 > errors[1] > 1e-4 > errors[2]
        assert len(traces) == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"nodes": jnp.ones((2, 3, 4))}, r"nodes \[N, F\].* these are \(2, 3, 4\)"),
        ({"senders": jnp.zeros((2,), jnp.int32)}, r"\(2,\) and \(19,\)"),
    ],
)
def test_wrong_shapes(change, message):
    with pytest.raises(UsageError, match=message):
        network("gcn").init(jax.random.key(0), {**graph(), **change})


def test_wrong_input_and_norm():
    with pytest.raises(UsageError, match=r"'nodes', 'senders'; a graph network takes a mapping with nodes, senders,"):
        network("gcn").init(jax.random.key(0), {name: graph()[name] for name in ("nodes", "senders")})
    with pytest.raises(UsageError, match="takes a mapping"):
        network("sage").init(jax.random.key(0), jnp.ones((2, 3)))
    with pytest.raises(UsageError, match=r"norm='layers' is not one of 'none', 'layer'\. Did you mean 'layer'\?"):
        network("gcn", norm="layers").init(jax.random.key(0), graph())
