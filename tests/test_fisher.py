"""Traces of the Fisher information, against sums over labels made by hand in numpy; as a metric of runs."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from program import final_state, rows, small_config

from qtrain import Precision, Rule, quantize
from qtrain.build import build
from qtrain.errors import UsageError
from qtrain.programs import Programs
from qtrain.sensitivity import fisher_trace, model_fisher_trace
from qtrain.sharding import make_mesh
from qtrain.tasks import NODES
from qtrain.train import train

SHAPES = {"a": (3, 4), "b": (4,), "c": (4, 5)}


def params():
    rng = np.random.default_rng(0)
    return {name: rng.normal(size=shape).astype(np.float32) for name, shape in SHAPES.items()}


def logits(params, x):
    return jnp.tanh(x @ params["a"] + params["b"]) @ params["c"]


def by_hand(params, x):
    """Σ_y p(y) ‖∂ log p(y)/∂w‖² of one input, by parameter: backpropagation written out."""
    hidden = np.tanh(x @ params["a"] + params["b"])
    out = hidden @ params["c"]
    chances = np.exp(out - out.max()) / np.exp(out - out.max()).sum()
    found = dict.fromkeys(SHAPES, 0.0)
    for label, chance in enumerate(chances):
        score = np.eye(5)[label] - chances
        inner = (params["c"] @ score) * (1 - hidden**2)
        gradients = {"a": np.outer(x, inner), "b": inner, "c": np.outer(hidden, score)}
        for name, gradient in gradients.items():
            found[name] += chance * np.sum(gradient**2)
    return found


def test_exact_traces():
    x = np.random.default_rng(1).normal(size=(6, 3)).astype(np.float32)
    each = [by_hand({k: v.astype(np.float64) for k, v in params().items()}, one) for one in x]
    found = jax.jit(lambda params, x: fisher_trace(logits, params, x))(params(), x)
    for name in SHAPES:
        values = [one[name] for one in each]
        assert float(found.mean[name]) == pytest.approx(np.mean(values), rel=1e-4)
        assert float(found.standard_error[name]) == pytest.approx(np.std(values, ddof=1) / np.sqrt(6), rel=1e-3)
    totals = [sum(one.values()) for one in each]
    assert float(found.total) == pytest.approx(np.mean(totals), rel=1e-4)
    assert float(found.total_error) == pytest.approx(np.std(totals, ddof=1) / np.sqrt(6), rel=1e-3)


@pytest.mark.parametrize("predictions", [(), (4,)])
def test_the_sampled_estimate_agrees_with_the_exact_one(predictions):
    """Also for several predictions an example, whose labels are drawn at once: scores of different ones cancel."""
    x = np.random.default_rng(2).normal(size=(2, *predictions, 3)).astype(np.float32)
    exact = np.mean([sum(by_hand(params(), one).values()) for one in x.reshape(-1, 3)])
    found = jax.jit(lambda key: [fisher_trace(logits, params(), x, k, 4000) for k in (None, key)])(jax.random.key(7))
    assert float(found[0].total) == pytest.approx(exact, rel=1e-4)
    assert float(found[1].total) == pytest.approx(exact, rel=0.03)  # each draw's deviation is about its mean
    one = jax.jit(lambda key: fisher_trace(logits, params(), x[:1], key))(jax.random.key(7))
    assert float(one.total) > 0 and float(one.total) != pytest.approx(exact, rel=1e-6) and np.isnan(one.total_error)


class Network(nn.Module):
    """Batch norm and dropout, of which evaluation takes neither the batch nor the chance."""

    @nn.compact
    def __call__(self, x, *, train=False):
        x = nn.BatchNorm(use_running_average=not train)(nn.Dense(5)(x))
        return nn.Dense(3)(nn.Dropout(0.5, deterministic=not train)(nn.tanh(x)))


class Graph(nn.Module):
    """Each node sees the one before it."""

    @nn.compact
    def __call__(self, graph, *, train=False):
        x = nn.Dense(3)(graph["nodes"])
        return x + jnp.roll(x, 1, axis=0) ** 2


def brute_force(apply, params, picked):
    """The trace by a gradient for each example and class, in a loop."""
    log_chance = jax.jit(jax.value_and_grad(lambda params, one, label: jax.nn.log_softmax(apply(params, one))[label]))
    total = 0.0
    for one in picked:
        for label in range(3):
            value, gradient = jax.device_get(log_chance(params, one, label))
            total += np.exp(value) * sum(np.sum(np.square(leaf)) for leaf in jax.tree.leaves(gradient))
    return total / len(picked)


@pytest.mark.parametrize("fixed", [None, 2])
@pytest.mark.parametrize("bits", [None, Precision(weights=3, acts=4, grads=2)])
def test_of_a_model(bits, fixed):
    rng = np.random.default_rng(3)
    qmodel = quantize(Network(), Rule(grad_quantizer=Rule().act_quantizer, grads=fixed), widest=8)
    x = rng.normal(size=(4, 6)).astype(np.float32)
    variables = qmodel.init(jax.random.key(0), x)
    variables = {**variables, "batch_stats": {"BatchNorm_0": {"mean": np.full(5, 0.2), "var": np.full(5, 2.0)}}}
    batch = {"image": x, "label": np.zeros(4, np.int32)}
    found = jax.jit(lambda: model_fisher_trace(qmodel, variables, batch, bits=bits, examples=3))()
    forward = None if bits is None else Precision(weights=3, acts=4, grads=32)  # the gradient is not quantized
    plain = quantize(Network(), Rule(grad_quantizer=Rule().act_quantizer), widest=8)

    def apply(params, i):
        return plain.apply({**variables, "params": params}, jnp.asarray(x)[i][None], train=False, bits=forward)[0]

    assert float(found.total) == pytest.approx(brute_force(apply, variables["params"], range(3)), rel=1e-4)
    assert jax.tree.structure(found.mean) == jax.tree.structure(variables["params"])


def test_of_the_nodes_of_a_graph():
    nodes = np.random.default_rng(4).normal(size=(5, 2)).astype(np.float32)
    empty = np.zeros(0, np.int32)
    batch = {"nodes": nodes, "senders": empty, "receivers": empty, "mask": np.array([0.0, 1, 0, 1, 1])}
    qmodel = quantize(Graph(), Rule(), widest=8)
    inputs = NODES.inputs(batch)
    variables = qmodel.init(jax.random.key(0), inputs)
    found = jax.jit(lambda: model_fisher_trace(qmodel, variables, batch, task=NODES, examples=2))()

    def apply(params, i):
        return qmodel.module.apply({"params": params}, inputs)[i]

    assert float(found.total) == pytest.approx(brute_force(apply, variables["params"], (1, 3)), rel=1e-4)


def test_rows_of_a_run(tmp_path):
    """The last row is what the function says of the last state: as the last step took the images, and as they are."""
    config = small_config(
        schedule="constant",
        train__steps=4,
        train__log_every_steps=4,
        fisher__examples=40,  # more than a batch
        fisher__samples=0,
        fisher__at=("step", "q_max", "float"),
        deficit__name="blur",
        deficit__length_percent=100.0,
    )
    train(config, str(tmp_path / "run"), quiet=True)
    (row,) = rows(tmp_path / "run", "train")
    experiment = build(config)
    batch = experiment.fisher_examples()
    assert len(batch["image"]) == 40
    variables = final_state(config, tmp_path / "run").variables
    blurred = experiment.additions.observed(jnp.int32(3), batch)
    taken = {"trace": (6, blurred), "trace_q_max": (6, batch), "trace_float": (None, batch)}
    measure = jax.jit(lambda batch, bits: model_fisher_trace(experiment.qmodel, variables, batch, bits=bits))
    for name, (bits, seen) in taken.items():
        found = measure(seen, bits and Precision(weights=6.0, acts=6.0, grads=8.0))
        assert row[f"fisher/{name}"] == pytest.approx(float(found.total), rel=1e-3)
        assert row[f"fisher/{name}_error"] == pytest.approx(float(found.total_error), rel=1e-3)
        kernel = found.mean["Dense_0"]["kernel"]
        assert row[f"fisher/Dense_0/kernel/{name}"] == pytest.approx(float(kernel), rel=1e-3)
    assert len({row[f"fisher/{name}"] for name in taken}) == 3


def test_labels_are_those_of_the_run_and_the_step():
    """Runs of other seeds have other labels, or averaging over seeds would leave the noise of the labels as it is."""
    experiment = build(small_config(schedule="constant", fisher__examples=8))
    programs = Programs(experiment, make_mesh())
    tables = programs.placed(experiment.tables())
    state = programs.initial_state(0, tables)

    def trace(seed, step):
        later = dataclasses.replace(state, step=jnp.int32(step))
        return float(programs.layer_metrics(later, programs.key(seed), tables, experiment.q_max)["fisher/trace"])

    drawn = {(seed, step): trace(seed, step) for seed in (0, 1) for step in (5, 10)}
    assert len(set(drawn.values())) == 4
    assert trace(1, 10) == drawn[1, 10]


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"fisher__examples": -1}, "fisher.examples=-1: give a whole number"),
        ({"fisher__examples": 1438}, "fisher.examples=1438: 'digits' has 1437 to train on"),
        ({"fisher__samples": -2}, "fisher.samples=-2"),
        ({"fisher__at": ()}, r"fisher.at=\(\)"),
        ({"fisher__at": ("step", "qmax")}, "fisher.at has 'qmax'.*Did you mean 'q_max'"),
    ],
)
def test_mistakes_in_a_config(changed, message):
    with pytest.raises(UsageError, match=message) as caught:
        build(small_config(**changed))
    assert "\n" not in str(caught.value)


def test_mistakes_in_a_call():
    with pytest.raises(UsageError, match="samples=0"):
        fisher_trace(logits, params(), np.ones((1, 3)), jax.random.key(0), 0)
    with pytest.raises(UsageError, match="finds boxes"):
        model_fisher_trace(None, {}, {}, task=object())
