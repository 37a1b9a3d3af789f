"""Hessian traces, against the exact Hessian."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qtrain import Rule, quantize
from qtrain.errors import UsageError
from qtrain.metrics import cross_entropy
from qtrain.sensitivity import hessian_trace, weight_traces


class Network(nn.Module):
    """Two dense layers with a batch norm and dropout between them, which training mode would use."""

    @nn.compact
    def __call__(self, x, *, train=False):
        x = nn.BatchNorm(use_running_average=not train)(nn.Dense(5)(x))
        x = nn.Dropout(0.5, deterministic=not train)(nn.tanh(x))
        return nn.Dense(3)(x)


@pytest.fixture(scope="module")
def network():
    rng = np.random.default_rng(0)
    qmodel = quantize(Network(), Rule(), widest=8)
    inputs = jnp.asarray(rng.normal(size=(3, 16, 4)), jnp.float32)
    variables = qmodel.init(jax.random.key(1), inputs[0])
    statistics = {"mean": jnp.linspace(-1, 1, 5), "var": jnp.linspace(0.5, 2, 5)}
    variables = {**variables, "batch_stats": {"BatchNorm_0": statistics}}
    batches = [{"image": x, "label": jnp.asarray(rng.integers(0, 3, 16))} for x in inputs]
    return qmodel, variables, batches


def exact_traces(qmodel, variables, batches):
    """The traces of the diagonal blocks of the whole Hessian of the mean loss over all batches."""
    names = {"Dense_0/kernel": ("Dense_0", (4, 5)), "Dense_1/kernel": ("Dense_1", (5, 3))}

    def loss(kernels):
        params = dict(variables["params"])
        for name, (module, shape) in names.items():
            params[module] = {**params[module], "kernel": kernels[name].reshape(shape)}
        losses = [
            cross_entropy(qmodel.module.apply({**variables, "params": params}, b["image"]), b["label"]).mean()
            for b in batches
        ]
        return sum(losses) / len(losses)

    flat = {name: variables["params"][module]["kernel"].ravel() for name, (module, _) in names.items()}
    hessian = jax.jit(jax.hessian(loss))(flat)
    return {name: float(np.trace(hessian[name][name])) for name in names}


def test_the_estimate_agrees_with_the_exact_trace_within_its_own_error(network):
    qmodel, variables, batches = network
    exact = exact_traces(*network)
    weights = qmodel.weights(batches[0]["image"])
    found = weight_traces(qmodel, weights, variables, batches, jax.random.key(3), draws=400, tolerance=0.0)
    assert found.draws == 400 and found.mean.keys() == exact.keys()
    for name, value in exact.items():
        error = found.standard_error[name]
        assert abs(found.mean[name] - value) < 4 * error  # 1 in 16000 by chance; the key is fixed
        assert 0 < error < 0.03 * max(map(abs, exact.values()))  # so that the line above says something


def test_a_diagonal_hessian_needs_two_draws_and_is_exact():
    def quadratic(w):
        return jnp.sum(jnp.arange(6.0).reshape(2, 3) * w["a"] ** 2) - 0.5 * jnp.sum(w["b"] ** 2)

    found = hessian_trace(quadratic, {"a": jnp.ones((2, 3)), "b": jnp.ones(4)}, jax.random.key(0))
    assert found.mean == {"a": 30.0, "b": -4.0} and found.draws == 2 and found.change == 0.0
    assert found.standard_error == {"a": 0.0, "b": 0.0}


def test_drawing_stops_as_it_says():
    """v·Hv of [[0, 1], [1, 0]] is ±2, beside a block of 10: the running means are known from the draws themselves."""

    def loss(w):
        return w["a"][0] * w["a"][1] + 5.0 * jnp.sum(w["b"] ** 2)

    params, key = {"a": jnp.ones(2), "b": jnp.ones(1)}, jax.random.key(5)
    samples = []
    for k in range(60):
        signs = jax.random.rademacher(jax.random.split(jax.random.fold_in(key, k), 2)[0], (2,), jnp.float32)
        samples.append([2.0 * float(signs[0] * signs[1]), 10.0])
    means = np.cumsum(samples, 0) / np.arange(1, 61)[:, None]
    changes = np.abs(np.diff(means, axis=0)).sum(1) / np.abs(means[1:]).sum(1)
    for tolerance in (0.1, 0.01):
        stop = int(np.argmax(changes < tolerance)) + 2
        found = hessian_trace(loss, params, key, 60, tolerance)
        assert found.draws == stop and found.change == pytest.approx(changes[stop - 2])
        assert found.mean["a"] == pytest.approx(means[stop - 1, 0]) and found.mean["b"] == 10.0
        deviation = np.std(np.array(samples)[:stop, 0], ddof=1)
        assert found.standard_error["a"] == pytest.approx(deviation / np.sqrt(stop))
    assert hessian_trace(loss, params, key, 7, 0.0).draws == 7


def test_the_loss_is_compiled_once():
    traced = []

    def loss(w, batch):
        traced.append(1)
        return jnp.sum(batch * jnp.tanh(w) ** 2)

    found = hessian_trace(loss, jnp.ones(3), jax.random.key(0), 5, 0.0, batches=[jnp.ones(3), 3 * jnp.ones(3)])
    assert len(traced) == 1 and found.draws == 5
    second = jax.hessian(lambda w: jnp.sum(2 * jnp.tanh(w) ** 2))(jnp.ones(3))
    assert found.mean == pytest.approx(float(np.trace(second)), rel=1e-6)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"params": {}}, "no parameters"),
        ({"draws": 0}, "draws=0"),
        ({"draws": 2.5}, "draws=2.5"),
        ({"tolerance": -1.0}, "tolerance=-1.0"),
        ({"batches": []}, "no batches"),
        ({"params": {"a": jnp.array([jnp.nan])}}, "not finite"),
    ],
)
def test_what_cannot_be_estimated(changed, message):
    arguments = {"loss": lambda w: jnp.sum(w["a"] ** 3), "params": {"a": jnp.ones(1)}, "key": jax.random.key(0)}
    with pytest.raises(UsageError, match=message) as raised:
        hessian_trace(**{**arguments, **changed})
    assert "\n" not in str(raised.value)
