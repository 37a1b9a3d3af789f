"""Injection into models of every linen style: the same parameters, every layer reached, one compilation."""

import concurrent.futures
import dataclasses
import functools
import itertools
import os
import re
import subprocess
import sys
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from inject_models import MODELS, DecoratedBlock, normal, random_variables

from qtrain.cost import count
from qtrain.inject import Rule, quantize
from qtrain.precision import Precision
from qtrain.quantizers import Uniform

KEY = jax.random.key(0)
# Same program, quicker to compile: this file compiles a hundred of them.
jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
# The default rule's grid compiles slower, for the sake of its one-bit case.
RULE = Rule(weight_quantizer=Uniform("affine"), act_quantizer=Uniform("affine"))

# Every path with a Dense, DenseGeneral or Conv: what a plan that lost one would lack.
LAYERS = {
    "compact": ["Dense_0", "Dense_1", "Dense_2"],
    "bfloat16": ["Dense_0", "Dense_1", "Dense_2"],
    "setup": ["encoder", "hidden_0", "hidden_1", "decoder"],
    "sequential": ["layers_0", "layers_2/layers_0"],
    "root": [""],
    "dense_general": [""],
    "dense_general_batch": [""],
    "attention": ["query", "key", "value", "out"],
    "convolutions": ["strided", "dilated", "grouped", "depthwise", "masked", "head"],
    "causal": [""],
    "unbatched": [""],
    "remat": ["block0/up", "block0/down", "block1/up", "block1/down", "head"],
    "remat_layer": ["layers_0", "layers_1"],
    "remat_scan": ["up", "down"],
    "scan": ["stem", "layers/block/up", "layers/block/down", "head"],
    "scan_remat": ["stem", "layers/block/up", "layers/block/down", "head"],
    "scan_jit": ["stem", "layers/block/up", "layers/block/down", "head"],
    "vmap": ["block0/up", "block0/down", "block1/up", "block1/down", "head"],
    "vmap_layer": ["layers_0", "layers_1"],
    "jit": ["block0/up", "block0/down", "block1/up", "block1/down", "head"],
    "jit_method": ["block0/up", "block0/down", "block1/up", "block1/down", "head"],
    "jit_fields": ["layers_0/layers_0/up", "layers_0/layers_0/down", "layers_1/up", "layers_1/down"],
    "jit_root": ["twice", "once"],
    "lstm": [f"cell/{side}{gate}" for gate in "ifgo" for side in "ih"],
    "gru": [f"cell/{side}{gate}" for gate in "rzn" for side in "ih"],
    "shared": ["twice", "once"],
    "share_scope": ["layers_0", "layers_1"],
    "weight_norm": ["layers_0/layer_instance", "layers_1"],
    "subclass": ["layers_0", "layers_0/a", "layers_0/b", "layers_1", "layers_1/a", "layers_1/b"],
    "subclass_setup": ["layers_0", "layers_0/a", "layers_0/b", "layers_1", "layers_1/a", "layers_1/b"],
    "cond": ["left", "right"],
    "custom_vjp": ["inside"],
    "normalized": ["Dense_0", "Dense_1"],
    "partitioned": ["Dense_0", "Dense_1"],
}


def assert_same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert x.dtype == y.dtype
        np.testing.assert_array_equal(x, y)


def program(fn, *args):
    """The traced program as text, without memory addresses."""
    return re.sub(r"0x[0-9a-f]+", "", str(jax.make_jaxpr(fn)(*args)))


@pytest.mark.parametrize("name", MODELS)
def test_every_style(name):
    """One test for all properties, so that each model is compiled once."""
    model, args, kwargs = MODELS[name]
    qmodel = quantize(model, RULE)

    # A cache that nn.jit fills from the plain model must not be replayed: so the plain one goes first.
    plain_variables, variables = jit(lambda key: (model.init(key, *args, **kwargs), qmodel.init(key, *args, **kwargs)))(
        KEY
    )
    assert variables.pop("quant") == {}
    assert_same(variables, plain_variables)

    def plain(variables):
        return model.apply(variables, *args, **kwargs)

    assert program(lambda v: qmodel.apply(v, *args, **kwargs), variables) == program(plain, variables)

    traces = 0

    @jit
    def both(variables, bits):
        nonlocal traces
        traces += 1
        return qmodel.apply(variables, *args, bits=bits, **kwargs), plain(variables)

    at = {b: both(variables, Precision(weights=b, acts=b, grads=b)) for b in (*range(2, 9), 32)}
    assert traces == 1 and both._cache_size() == 1
    assert_same(*at[32])
    at = {b: quantized for b, (quantized, _) in at.items()}
    for low, high in itertools.pairwise(at):
        outputs = zip(jax.tree.leaves(at[low]), jax.tree.leaves(at[high]), strict=True)
        assert any(bool(jnp.any(x != y)) for x, y in outputs), (low, high)

    plan = qmodel.plan(*args, **kwargs)
    assert sorted(row.path for row in plan if row.quantized) == sorted(LAYERS[name])
    assert plan.macs == count(lambda v, *a: model.apply(v, *a, **kwargs), plain_variables, *args).forward


@pytest.mark.parametrize("name", ["remat_layer", "scan_remat", "jit_method", "weight_norm", "custom_vjp", "cond"])
def test_gradients_pass_through_every_transformation(name):
    model, args, _ = MODELS[name]
    qmodel = quantize(model, dataclasses.replace(RULE, grad_quantizer=Uniform("affine", per="tensor")))
    variables = random_variables(model, *args)

    @jit
    def gradient(params, bits):
        return jax.grad(lambda p: jnp.sum(qmodel.apply({"params": p}, *args, bits=bits) ** 2))(params)

    expected = jit(jax.grad(lambda p: jnp.sum(model.apply({"params": p}, *args) ** 2)))(variables["params"])
    in_float = gradient(variables["params"], Precision(32, 32, 32))
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-5), in_float, expected)
    coarse = gradient(variables["params"], Precision(weights=32, acts=32, grads=2))
    kernels = [(x, y) for x, y in zip(jax.tree.leaves(coarse), jax.tree.leaves(in_float), strict=True) if x.ndim > 1]
    assert kernels and all(bool(jnp.all(jnp.isfinite(x))) for x, _ in kernels)
    assert any(bool(jnp.any(x != y)) for x, y in kernels)


@pytest.mark.parametrize("name", ["jit", "jit_method", "jit_fields", "scan_jit", "jit_root"])
def test_nn_jit_does_not_confuse_equal_blocks(name):
    """nn.jit replays the trace of an equal block: each must still have the bits of its own path."""
    model, args, _ = MODELS[name]
    qmodel = quantize(model, RULE)
    variables = random_variables(model, *args)
    paths = LAYERS[name]
    run = jit(lambda bits: qmodel.apply(variables, *args, bits=bits))
    bits = {path: Precision(weights=2 + index, acts=8) for index, path in enumerate(paths)}
    out = run(bits)
    for path in paths:
        assert bool(jnp.any(out != run({**bits, path: Precision(weights=8, acts=3)}))), path
    assert run._cache_size() == 1
    twin = {"jit": "remat", "scan_jit": "scan", "jit_root": "shared"}.get(name)
    if twin:
        same = quantize(MODELS[twin][0], RULE)
        expected = jit(lambda bits: same.apply(variables, *args, bits=bits))(bits)
        np.testing.assert_allclose(out, expected, rtol=1e-5, atol=1e-6)


def test_nn_jit_keeps_nothing_of_an_earlier_call():
    """Not the bits of the call before, nor the rules of another wrapper of the same class, nor anything when plain."""
    model = nn.Sequential([DecoratedBlock(4), DecoratedBlock(4)])
    x = normal(2, 6)
    qmodel, fixed = quantize(model, RULE), quantize(model, dataclasses.replace(RULE, weights=2, acts=2))
    variables = random_variables(model, x)
    plain = model.apply(variables, x)
    coarse = qmodel.apply(variables, x, bits=Precision(2, 2))
    fine = qmodel.apply(variables, x, bits=Precision(8, 8))
    assert float(jnp.abs(coarse - plain).max()) > 10 * float(jnp.abs(fine - plain).max()) > 0
    np.testing.assert_array_equal(fixed.apply(variables, x, bits=Precision()), coarse)
    np.testing.assert_array_equal(qmodel.apply(variables, x), plain)
    np.testing.assert_array_equal(model.apply(variables, x), plain)


@pytest.mark.parametrize("name", ["compact", "scan", "attention"])
def test_vmap_over_precision_equals_a_loop(name):
    model, args, _ = MODELS[name]
    qmodel = quantize(model, RULE)
    variables = random_variables(model, *args)
    widths = jnp.arange(2, 10)

    def run(bits):
        return qmodel.apply(variables, *args, bits=bits)

    together = jit(jax.vmap(run))(Precision(weights=widths, acts=widths[::-1]))
    one = jit(run)
    for index in range(len(widths)):
        alone = one(Precision(weights=widths[index], acts=widths[::-1][index]))
        np.testing.assert_allclose(together[index], alone, rtol=1e-6, atol=1e-6)


def test_jax_transformations_of_apply():
    model, (x,), _ = MODELS["compact"]
    qmodel = quantize(model, RULE)
    variables = jit(qmodel.init)(KEY, x)
    shapes = jax.eval_shape(qmodel.init, KEY, x)
    assert jax.tree.map(jnp.shape, variables) == jax.tree.map(lambda leaf: leaf.shape, shapes)
    bits = Precision(weights=4, acts=4)

    def apply(variables, x):
        return qmodel.apply(variables, x, bits=bits)

    assert jax.eval_shape(apply, variables, x).shape == (4, 4)
    assert program(apply, variables, x).count("dot_general") == 3
    each = jit(jax.vmap(apply, in_axes=(None, 0)))(variables, x[:, None])
    np.testing.assert_allclose(each[:, 0], jit(apply)(variables, x), rtol=1e-6, atol=1e-6)  # a scale per row
    value, pullback = jit(lambda v, x: jax.vjp(apply, v, x))(variables, x)
    of_variables, of_inputs = pullback(value)
    assert of_inputs.shape == x.shape
    assert jax.tree.structure(of_variables) == jax.tree.structure(variables)


def test_captured_intermediates_are_the_plain_models():
    model, (x,), _ = MODELS["sequential"]
    qmodel = quantize(model, RULE)
    variables = random_variables(model, x)

    def structure(apply, **kwargs):
        return jax.tree.map(
            jnp.shape,
            jax.eval_shape(
                lambda v: apply(v, x, capture_intermediates=True, mutable=["intermediates"], **kwargs)[1], variables
            ),
        )

    assert structure(qmodel.apply, bits=Precision(4, 4)) == structure(model.apply)


def test_the_users_module_is_left_alone():
    layer = MODELS["root"][0]
    before = {name: getattr(layer, name) for name in ("dot_general", "promote_dtype")}
    qmodel = quantize(layer, Rule(bias_quantizer=Uniform()))
    variables = jax.eval_shape(qmodel.init, KEY, normal(4, 6))
    jax.eval_shape(lambda v: qmodel.apply(v, normal(4, 6), bits=Precision(4, 4)), variables)
    assert before == {name: getattr(layer, name) for name in before}


def test_concurrent_calls_do_not_see_each_other():
    model, (x,), _ = MODELS["compact"]
    variables = random_variables(model, x)
    qmodel = quantize(model, RULE)
    alone = {b: jax.jit(lambda v, b=b: qmodel.apply(v, x, bits=Precision(b, b)))(variables) for b in (2, 4, 8)}

    def run(width):
        fresh = quantize(model, RULE)
        plain = jax.make_jaxpr(lambda v: model.apply(v, x))(variables)
        return width, jax.jit(lambda v: fresh.apply(v, x, bits=Precision(width, width)))(variables), str(plain)

    with concurrent.futures.ThreadPoolExecutor(6) as pool:
        for width, out, plain in pool.map(run, [2, 4, 8] * 2):
            np.testing.assert_array_equal(out, alone[width])
            assert "round" not in plain


DEVICES = """
import jax, jax.numpy as jnp, numpy as np, sys
sys.path.insert(0, sys.argv[1])
from inject_models import MLP
from qtrain.inject import Rule, quantize
from qtrain.precision import Precision
from qtrain.quantizers import Uniform
assert jax.device_count() == 8
model, x = MLP(), jax.random.normal(jax.random.key(1), (16, 6)) * jnp.arange(1, 17)[:, None]
rule = Rule(act_quantizer=Uniform("affine", per="tensor", statistics=0.9),
            grad_quantizer=Uniform("symmetric", per="tensor", rounding="stochastic"))
qmodel = quantize(model, rule)
variables = qmodel.init(jax.random.key(0), x)
def step(variables, x):
    def loss(params):
        y, state = qmodel.apply({**variables, "params": params}, x, bits=Precision(3, 3, 4),
                                rngs={"quant": jax.random.key(2)}, mutable=["quant_stats"])
        return jnp.mean(y ** 2), (y, state)
    return jax.value_and_grad(loss, has_aux=True)(variables["params"])
one = jax.jit(step)(variables, x)
mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
P, N = jax.sharding.PartitionSpec, jax.sharding.NamedSharding
spread = jax.device_put(x, N(mesh, P("data")))
eight = jax.jit(step, in_shardings=(N(mesh, P()), N(mesh, P("data"))))(variables, spread)
assert len(spread.sharding.device_set) == 8
jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-6), one, eight)
stats = jax.device_get(eight[0][1][1]["quant_stats"])
np.testing.assert_allclose(stats["Dense_0"]["acts"]["max"].ravel(), x.max(), rtol=1e-6)
np.testing.assert_array_equal(one[0][1][1]["quant_stats"]["Dense_0"]["acts"]["max"], stats["Dense_0"]["acts"]["max"])
print("same")
"""


def test_one_and_eight_devices_agree():
    """A range is that of the global batch, and so is the noise."""
    flags = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
    environment = {**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-c", DEVICES, str(Path(__file__).parent)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0 and done.stdout.strip() == "same", done.stderr[-2000:]
