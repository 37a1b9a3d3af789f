"""Small floats through rules and configs: a model's products, its running ranges, and what a config may say."""

import functools

import flax.linen as nn
import float_reference
import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import pytest
from inject_models import MLP, normal

from qtrain.errors import UsageError
from qtrain.inject import Rule, quantize, quantizer_from_config, rules_from_config
from qtrain.precision import Precision
from qtrain.quantizers import Float, Uniform

KEY = jax.random.key(0)
X = normal(16, 6)
jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
E4M3 = Rule(weight_quantizer=Float("e4m3", per="channel"), act_quantizer=Float("e4m3"))


def test_a_layer_multiplies_the_reference_s_values_at_every_width():
    """Forward and both gradients of a Dense layer; one program, widths from powers of two to float."""
    grads = Float("e5m2", per="channel")
    qmodel = quantize(nn.Dense(5, use_bias=False), Rule(**vars_of(E4M3), grad_quantizer=grads))
    variables, cotangent = qmodel.init(KEY, X), normal(16, 5) * 3
    traces = []

    @jax.jit
    def run(params, x, bits):
        traces.append(bits)
        out, vjp = jax.vjp(lambda p, x: qmodel.apply({"params": p}, x, bits=Precision(bits, bits, bits)), params, x)
        return out, *vjp(cotangent)

    kernel = np.asarray(variables["params"]["kernel"])
    for bits in (5, 6, 7, 8, 12, 24):
        out, d_params, d_x = run(variables["params"], X, jnp.int32(bits))
        w = float_reference.fake_quantize(kernel, "e4m3fn", bits, "channel", (0,))
        a = float_reference.fake_quantize(X, "e4m3fn", bits, "tensor")
        g = float_reference.fake_quantize(cotangent, "e5m2", max(bits, 6), "channel")  # five exponent bits
        np.testing.assert_allclose(out, a @ w, rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(d_params["kernel"], a.T @ g, rtol=1e-5, atol=1e-4)
        np.testing.assert_allclose(d_x, g @ w.T, rtol=1e-5, atol=1e-4)
    assert len(traces) == 1


def test_stochastic_cotangents_and_fixed_bits():
    rounding = Float("e5m2", rounding="stochastic")
    rules = [Rule("Dense_0", 8, 8, **vars_of(E4M3), grad_quantizer=rounding), Rule(grads=8, grad_quantizer=rounding)]
    qmodel = quantize(MLP(), rules)
    variables = qmodel.init(KEY, X)
    plan = str(qmodel.plan(X))
    assert "e4m3fn/channel @ 8 fixed" in plan and "e5m2/tensor stochastic @ 8 fixed" in plan

    @jit
    def gradient(params, key):
        def loss(p):
            return jnp.sum(qmodel.apply({"params": p}, X, bits=Precision(4, 4, 8), rngs={"quant": key}) ** 2)

        return jax.grad(loss)(params)

    first, again, other = (gradient(variables["params"], jax.random.key(seed)) for seed in (1, 1, 2))
    jax.tree.map(np.testing.assert_array_equal, first, again)
    assert np.any(first["Dense_0"]["kernel"] != other["Dense_0"]["kernel"])
    assert all(np.all(np.isfinite(leaf)) and np.any(leaf) for leaf in jax.tree.leaves(first))
    with pytest.raises(UsageError, match="rounds stochastically and has no key"):
        qmodel.apply(variables, X, bits=Precision(4, 4, 8))


def vars_of(rule):
    return {name: getattr(rule, name) for name in ("weight_quantizer", "act_quantizer")}


def test_running_ranges():
    """r ← m·r + (1 − m)·absmax; training uses a batch's own, evaluation the running one."""
    momentum = 0.75
    quantizer = Float("e4m3", statistics=momentum)
    qmodel = quantize(nn.Dense(6, use_bias=False), Rule(weight_quantizer=None, act_quantizer=quantizer))
    variables = {**qmodel.init(KEY, X), "params": {"kernel": jnp.eye(6)}}
    assert set(variables["quant_stats"]["acts"]) == {"absmax", "count"}

    @jit
    def step(variables, x):
        out, state = qmodel.apply(variables, x, bits=Precision(acts=8), mutable=["quant_stats"])
        return out, {**variables, **state}

    running = None
    for index in range(4):
        x = X * (1 + index)
        out, variables = step(variables, x)
        np.testing.assert_allclose(out, float_reference.fake_quantize(x, "e4m3fn", 8, "tensor"), rtol=1e-5)
        largest = np.abs(x).max()
        running = largest if running is None else momentum * running + (1 - momentum) * largest
        np.testing.assert_allclose(variables["quant_stats"]["acts"]["absmax"].squeeze(), running, rtol=1e-6)
    x = 10 * X
    out = jit(lambda v, x: qmodel.apply(v, x, bits=Precision(acts=8)))(variables, x)
    np.testing.assert_allclose(np.abs(out).max(), running, rtol=1e-5)  # what lies beyond saturates
    np.testing.assert_allclose(out, float_reference.cast(x / running * 448, "e4m3fn") * running / 448, rtol=1e-5)
    for per in ("channel", "row"):
        with pytest.raises(UsageError, match="keeps a running range with a scale per example"):
            quantize(MLP(), Rule(act_quantizer=Float(per=per, statistics=0.9))).plan(X)


def test_too_few_fixed_bits_are_named():
    qmodel = quantize(nn.Dense(3), Rule(weights=4, weight_quantizer=Float("e4m3")))
    variables = qmodel.init(KEY, X)
    with pytest.raises(UsageError, match=r"bits: 4 is too few for format 'e4m3fn'"):
        qmodel.apply(variables, X, bits=Precision(8, 8))


@pytest.mark.parametrize(
    ("spec", "quantizer"),
    [
        ("e4m3", Float("e4m3fn")),
        ("e4m3/tensor/stochastic", Float("e4m3", rounding="stochastic")),
        ("e5m2fnuz/channel", Float("e5m2fnuz", per="channel")),
        ("e2m1/32", Float("e2m1", per=32)),
        ({"format": "e5m2", "scaled": False, "clip_gradient": True}, Float("e5m2", scaled=False, clip_gradient=True)),
        ({"format": "e3m4", "per": [0, 1], "statistics": 0.9}, Float("e3m4", per=(0, 1), statistics=0.9)),
        ("affine/tensor", Uniform("affine", per="tensor")),
        ({"per": "tensor"}, Uniform(per="tensor")),
    ],
)
def test_configs(spec, quantizer):
    assert quantizer_from_config(spec, "q") == quantizer
    if isinstance(spec, dict):
        assert quantizer_from_config(ml_collections.ConfigDict(spec), "q") == quantizer
    assert rules_from_config([{"act_quantizer": spec}]) == (Rule(act_quantizer=quantizer),)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("e4m", r"q\.grid='e4m': give a grid of \('symmetric'.*or a small float of \('e4m3'.*Did you mean 'e4m3'"),
        ("e5m2fnu", r"q\.grid='e5m2fnu'.*Did you mean 'e5m2fnuz'"),
        ("afine", r"q\.grid='afine'.*Did you mean 'affine'"),
        ("e4m3/tenser", r"q\.per='tenser'.*Did you mean 'tensor'"),
        ("e4m3/tensor/floor", r"q\.rounding='floor': a small float takes one of"),
        ({"format": "e9m9"}, r"q\.format='e9m9': give one of \('e4m3'"),
        ({"format": "e4m3", "grid": "affine"}, r"q\.grid: Float has no such field; it takes \['clip_gradient'"),
        ({"format": "e4m3", "scale": False}, r"q\.scale: Float has no such field.*Did you mean 'scaled'"),
        ({"scaled": False}, r"q\.scaled: Uniform has no such field"),
        ({"format": "e4m3", "statistics": "0.9"}, r"^q\."),
        (8, r"q=8: give 'grid/per/rounding' such as 'affine/tensor' or 'e4m3/tensor'"),
    ],
)
def test_mistakes_in_configs(spec, message):
    with pytest.raises(UsageError, match=message):
        quantizer_from_config(spec, "q")
