"""Injection against the same network written by hand with explicit quantizers: outputs and gradients, bit for bit."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from inject_models import MLP, Block, Normalized, Scanned, SetupMLP, Stack, normal, random_variables
from jax import lax

from qtrain.errors import UsageError
from qtrain.inject import Rule, quantize
from qtrain.precision import Precision
from qtrain.quantizers import Uniform, quantize_cotangent

KEY = jax.random.key(0)
jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})

CHANNEL = Uniform("symmetric", per="channel")
TENSOR = Uniform("affine", per="tensor")
AFFINE = Uniform("affine")
RULES = {
    "default": Rule(),
    "cpt": Rule(weight_quantizer=AFFINE, act_quantizer=TENSOR, grad_quantizer=TENSOR),
    "acts_only": Rule(weight_quantizer=None, act_quantizer=Uniform("unsigned", per="tensor", clip_gradient=True)),
    "original": Rule(weight_quantizer=AFFINE, act_quantizer=AFFINE, grad_quantizer=TENSOR, residuals="original"),
    "fixed": Rule(weights=3, grads=4, act_quantizer=None, grad_quantizer=TENSOR, bias_quantizer=CHANNEL),
}


def product(x, kernel, rule, bits):
    """``x @ kernel`` for a rule at some bits, every step spelled out."""
    numbers = (((x.ndim - 1,), (0,)), ((), ()))
    widths = (rule.weights or bits.weights, rule.acts or bits.acts, rule.grads or bits.grads)

    def quantized(x, kernel, widths):
        if rule.act_quantizer is not None:
            x = rule.act_quantizer(x, widths[1], axes=(x.ndim - 1,))
        if rule.weight_quantizer is not None:
            kernel = rule.weight_quantizer(kernel, widths[0], axes=(0,))
        return lax.dot_general(x, kernel, numbers)

    if rule.residuals == "quantized":
        y = quantized(x, kernel, widths)
        return y if rule.grad_quantizer is None else quantize_cotangent(rule.grad_quantizer, y, widths[2], None)

    original = jax.custom_vjp(quantized)

    def backward(residuals, g):
        x, kernel, widths = residuals
        if rule.grad_quantizer is not None:
            g = rule.grad_quantizer(g, widths[2])
        of_x = lax.dot_general(g, kernel, (((g.ndim - 1,), (1,)), ((), ())))
        leading = tuple(range(x.ndim - 1))
        return of_x, lax.dot_general(x, g, ((leading, leading), ((), ()))), None

    original.defvjp(lambda x, kernel, widths: (quantized(x, kernel, widths), (x, kernel, widths)), backward)
    return original(x, kernel, widths)


def dense(params, x, rule, bits, dtype=None):
    kernel, bias = params["kernel"], params["bias"]
    if dtype is not None:
        x, kernel, bias = x.astype(dtype), kernel.astype(dtype), bias.astype(dtype)
    if rule.bias_quantizer is not None:
        bias = rule.bias_quantizer(bias, rule.weights or bits.weights)
    return product(x, kernel, rule, bits) + bias


def mlp(params, x, rule, bits, dtype=None):
    x = nn.relu(dense(params["Dense_0"], x, rule, bits, dtype))
    x = nn.relu(dense(params["Dense_1"], x, rule, bits, dtype))
    return dense(params["Dense_2"], x, rule, bits, dtype)


def block(params, x, rule, bits):
    hidden = nn.LayerNorm().apply({"params": params["LayerNorm_0"]}, x)
    return x + dense(params["down"], nn.relu(dense(params["up"], hidden, rule, bits)), rule, bits)


def remat(params, x, rule, bits):
    for name in ("block0", "block1"):
        x = jax.checkpoint(lambda p, x, b: block(p, x, rule, b))(params[name], x, bits)
    return dense(params["head"], x, rule, bits)


def scanned(params, x, rule, bits, wrap=lambda f: f):
    x = dense(params["stem"], x, rule, bits)
    body = wrap(lambda x, p: (block(p["block"], x, rule, bits), None))
    x, _ = lax.scan(body, x, params["layers"])
    return dense(params["head"], x, rule, bits)


def assert_same(injected, by_hand):
    assert jax.tree.structure(injected) == jax.tree.structure(by_hand)
    for a, b in zip(jax.tree.leaves(injected), jax.tree.leaves(by_hand), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)


def compare(model, by_hand, rule, x):
    """Output, parameter and input gradients at several widths; the widths are traced in both."""
    qmodel = quantize(model, rule)
    params = random_variables(model, x)["params"]

    def of(fn):
        def loss(params, x, bits):
            y = fn(params, x, bits)
            return jnp.sum(y.astype(jnp.float32) * jnp.cos(jnp.arange(y.size)).reshape(y.shape)), y

        return jax.grad(loss, argnums=(0, 1), has_aux=True)

    injected = of(lambda p, x, bits: qmodel.apply({"params": p}, x, bits=bits))
    written = of(lambda p, x, bits: by_hand(p, x, rule, bits))
    both = jit(lambda *args: (injected(*args), written(*args)))
    seen = []
    for weights, acts, grads in ((2, 3, 8), (4, 4, 4), (8, 6, 3), (32, 32, 32)):
        result = both(params, x, Precision(weights=weights, acts=acts, grads=grads))
        assert_same(*result)
        seen.append(np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(result[0][0])]))
    assert both._cache_size() == 1
    assert len({gradient.tobytes() for gradient in seen}) == (1 if rule.weights and rule.grads else 4)


@pytest.mark.parametrize("name", RULES)
def test_plain(name):
    compare(MLP(), mlp, RULES[name], normal(5, 6))


@pytest.mark.parametrize("name", ["cpt", "original"])
def test_remat(name):
    compare(Stack(nn.remat(Block)), remat, RULES[name], normal(5, 6))


def test_scan():
    compare(Scanned(), scanned, RULES["cpt"], normal(5, 6))


def test_scan_of_remat():
    wrap = functools.partial(jax.checkpoint, prevent_cse=False)
    model = Scanned(functools.partial(nn.remat, prevent_cse=False)(Block))
    compare(model, functools.partial(scanned, wrap=wrap), RULES["original"], normal(5, 6))


def test_bfloat16():
    """Quantized in the dtype that the layer computes in; parameters stay float32."""
    by_hand = functools.partial(mlp, dtype=jnp.bfloat16)
    compare(MLP(dtype=jnp.bfloat16), by_hand, RULES["cpt"], normal(5, 6))
    qmodel = quantize(MLP(dtype=jnp.bfloat16), Rule())
    variables = jax.eval_shape(qmodel.init, KEY, normal(5, 6))
    assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {jnp.dtype("float32")}
    out = jax.eval_shape(lambda v: qmodel.apply(v, normal(5, 6), bits=Precision(4, 4)), variables)
    assert out.dtype == jnp.bfloat16


def test_convolution():
    model = nn.Conv(6, (3, 3), strides=2, feature_group_count=2, padding="SAME")
    rule = Rule(grad_quantizer=TENSOR)

    def by_hand(params, x, rule, bits):
        numbers = ("NHWC", "HWIO", "NHWC")
        y = lax.conv_general_dilated(
            rule.act_quantizer(x, bits.acts, axes=(1, 2, 3)),
            rule.weight_quantizer(params["kernel"], bits.weights, axes=(0, 1, 2)),
            (2, 2),
            "SAME",
            dimension_numbers=numbers,
            feature_group_count=2,
        )
        return quantize_cotangent(rule.grad_quantizer, y, bits.grads, None) + params["bias"]

    compare(model, by_hand, rule, normal(2, 7, 7, 4))


def test_dense_general_with_a_batch_axis():
    """Scales are shared along the contracted axes alone."""

    def by_hand(params, x, rule, bits):
        x = rule.act_quantizer(x, bits.acts, axes=(2,))
        kernel = rule.weight_quantizer(params["kernel"], bits.weights, axes=(1,))
        return lax.dot_general(x, kernel, (((2,), (1,)), ((0,), (0,)))) + params["bias"][:, None]

    compare(nn.DenseGeneral(3, axis=-1, batch_dims=(0,)), by_hand, Rule(), normal(4, 5, 6))


def test_a_precision_for_each_layer():
    """``{path: Precision}``, traced: one compilation, and each layer has its own."""
    model, x, rules = MLP(), normal(5, 6), [Rule("Dense_1", weights=8, acts=8), Rule()]
    qmodel = quantize(model, rules)
    variables = random_variables(qmodel, x)
    run = jit(lambda v, bits: qmodel.apply(v, x, bits=bits))

    @jit
    def by_hand(params, first, last):
        y = nn.relu(dense(params["Dense_0"], x, Rule(), first))
        y = nn.relu(dense(params["Dense_1"], y, Rule(weights=8, acts=8), Precision()))
        return dense(params["Dense_2"], y, Rule(), last)

    for first, last in ((2, 8), (5, 3), (32, 4)):
        first, last = Precision(weights=first, acts=8), Precision(weights=last, acts=3)
        out = run(variables, {"Dense_0": first, "Dense_2": last})
        np.testing.assert_array_equal(out, by_hand(variables["params"], first, last))
    assert run._cache_size() == 1


def test_batch_norm_dropout_keywords_and_tuples():
    """At 32 bits everything but the arithmetic's text is the plain model's: state, noise, outputs, sown values."""
    model, x = Normalized(), normal(4, 6)
    qmodel = quantize(model, RULES["cpt"])
    variables = qmodel.init(KEY, x)
    options = {"train": True, "rngs": {"dropout": jax.random.key(3)}, "mutable": ["batch_stats", "intermediates"]}
    plain = jit(lambda v: model.apply(v, x, **options))(variables)
    injected = jit(lambda v, bits: qmodel.apply(v, x, bits=bits, **options))
    assert_same(injected(variables, Precision(32, 32)), plain)
    (logits, features), state = injected(variables, Precision(3, 3))
    assert set(state) == {"batch_stats", "intermediates"}
    assert bool(jnp.any(state["batch_stats"]["BatchNorm_0"]["mean"] != plain[1]["batch_stats"]["BatchNorm_0"]["mean"]))
    kept = features != 0
    assert 0 < int(kept.sum()) < kept.size and logits.shape == (4, 3)
    assert_same(qmodel.apply(variables, x, **options), model.apply(variables, x, **options))


def test_methods():
    model, x = SetupMLP(), normal(4, 6)
    qmodel = quantize(model, RULES["cpt"])
    variables = random_variables(qmodel, x)
    bits = Precision(weights=4, acts=4)
    code = qmodel.apply(variables, x, bits=bits, method="encode")
    np.testing.assert_array_equal(code, qmodel.apply(variables, x, bits=bits, method=SetupMLP.encode))
    np.testing.assert_array_equal(code, qmodel.apply(variables, x, bits=bits, method=lambda m, x: m.encode(x)))
    assert bool(jnp.any(code != model.apply(variables, x, method="encode")))
    whole = qmodel.apply(variables, x, bits=bits)
    np.testing.assert_array_equal(whole, qmodel.apply(variables, code, bits=bits, method="decode"))
    inner = qmodel.apply(variables, x, bits=bits, method=lambda m, x: m.encoder(x))
    assert bool(jnp.any(inner != model.apply(variables, x, method=lambda m, x: m.encoder(x))))


def test_a_collection_of_the_models_own_called_quant_survives():
    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            count = self.variable("quant", "count", jnp.zeros, ())
            return nn.Dense(3)(x) + count.value

    variables = quantize(Model(), Rule()).init(KEY, normal(2, 3))
    assert variables["quant"] == {"count": 0}


def test_a_random_stream_of_the_models_own_called_quant_is_left_to_it():
    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(3)(x + jax.random.normal(self.make_rng("quant"), x.shape))

    x, rngs = normal(2, 3), {"quant": jax.random.key(5)}
    qmodel = quantize(Model(), Rule())
    variables = qmodel.init({"params": KEY, **rngs}, x)
    plain = Model().apply(variables, x, rngs=rngs)
    np.testing.assert_array_equal(qmodel.apply(variables, x, rngs=rngs), plain)
    np.testing.assert_allclose(qmodel.apply(variables, x, bits=Precision(32, 32), rngs=rngs), plain, rtol=1e-6)


class TestStochasticRounding:
    rule = Rule(weight_quantizer=Uniform(rounding="stochastic"), act_quantizer=None)

    def run(self, model, x, bits, variables=None, rule=None):
        qmodel = quantize(model, rule or self.rule)
        variables = random_variables(model, x) if variables is None else variables
        return jit(lambda key: qmodel.apply(variables, x, bits=bits, rngs={"quant": key}))

    def test_same_key_same_noise(self):
        run = self.run(MLP(), normal(4, 6), Precision(3, 3))
        one, two = jax.random.key(1), jax.random.key(2)
        np.testing.assert_array_equal(run(one), run(one))
        assert bool(jnp.any(run(one) != run(two)))
        assert run._cache_size() == 1

    def test_unbiased(self):
        model, x = nn.Dense(3), normal(4, 6)
        qmodel = quantize(model, self.rule)
        variables = random_variables(qmodel, x)
        run = self.run(model, x, Precision(weights=3), variables)
        mean = jnp.mean(
            jax.jit(jax.vmap(lambda k: qmodel.apply(variables, x, bits=Precision(3), rngs={"quant": k})))(
                jax.random.split(KEY, 2000)
            ),
            axis=0,
        )
        plain = model.apply(variables, x)
        assert float(jnp.abs(mean - plain).max()) < 0.1 * float(jnp.abs(run(KEY) - plain).max())

    def test_layers_of_equal_weights_differ(self):
        model, x = nn.Sequential([nn.Dense(16, use_bias=False), nn.Dense(16, use_bias=False)]), jnp.eye(16)
        kernel = normal(16, 16)
        variables = {"params": {"layers_0": {"kernel": kernel}, "layers_1": {"kernel": kernel}}}
        out = quantize(model, self.rule).apply(
            variables,
            x,
            bits=Precision(weights=3),
            rngs={"quant": KEY},
            capture_intermediates=True,
            mutable=["intermediates"],
        )
        first = out[1]["intermediates"]["layers_0"]["__call__"][
            0
        ]  # the quantized kernel, since the input is the identity
        alone = quantize(
            nn.Dense(16, use_bias=False), Rule(".*", weight_quantizer=self.rule.weight_quantizer, act_quantizer=None)
        )
        other = alone.apply({"params": {"kernel": kernel}}, x, bits=Precision(weights=3), rngs={"quant": KEY})
        assert float(jnp.mean(first != other)) > 0.2  # path layers_0 against path ""
        assert not np.allclose(out[0], first @ first)

    def test_iterations_of_a_scan_differ(self):
        class Body(nn.Module):
            @nn.compact
            def __call__(self, carry, x):
                return carry, nn.Dense(16, use_bias=False)(x)

        model = nn.scan(Body, variable_axes={"params": 0}, split_rngs={"params": True}, length=2)()
        kernel = normal(16, 16)
        variables = {"params": {"Dense_0": {"kernel": jnp.stack([kernel, 1.25 * kernel])}}}
        qmodel = quantize(model, self.rule)
        _, out = qmodel.apply(variables, 0, jnp.stack([jnp.eye(16)] * 2), bits=Precision(3), rngs={"quant": KEY})
        # With the same noise the codes would be equal, and the outputs too but for the scale.
        assert float(jnp.mean(jnp.abs(out[0] * 1.25 - out[1]) > 1e-3)) > 0.2

    @pytest.mark.parametrize("field", ["weight_quantizer", "act_quantizer", "grad_quantizer", "bias_quantizer"])
    def test_a_missing_key_names_the_layer(self, field):
        qmodel = quantize(MLP(), [Rule("Dense_1", **{field: Uniform(rounding="stochastic")}), Rule()])
        variables = jax.eval_shape(qmodel.init, KEY, normal(4, 6))
        bits = Precision(8, 8, 8)
        with pytest.raises(UsageError, match=r"layer 'Dense_1' rounds stochastically.*rngs=\{'quant': key\}"):
            jax.eval_shape(lambda v: qmodel.apply(v, normal(4, 6), bits=bits), variables)

    def test_no_key_where_none_is_used(self):
        x = normal(4, 6)
        qmodel = quantize(MLP(), Rule(grad_quantizer=Uniform(rounding="stochastic")))
        variables = random_variables(qmodel, x)
        qmodel.apply(variables, x)  # float
        out = qmodel.apply(variables, x, bits=Precision(weights=4, acts=4))  # gradients in float
        np.testing.assert_allclose(out, quantize(MLP(), Rule()).apply(variables, x, bits=Precision(4, 4)), rtol=1e-6)

    def test_gradient_noise_reaches_the_gradient_alone(self):
        x = normal(4, 6)
        rule = Rule(grad_quantizer=Uniform("symmetric", per="tensor", rounding="stochastic"))
        qmodel = quantize(MLP(), rule)
        variables = random_variables(qmodel, x)

        @jit
        def run(params, key):
            def loss(params):
                y = qmodel.apply({"params": params}, x, bits=Precision(4, 4, 4), rngs={"quant": key})
                return jnp.sum(y**2), y

            return jax.grad(loss, has_aux=True)(params)

        (one, out), (two, same) = (run(variables["params"], jax.random.key(i)) for i in (1, 2))
        np.testing.assert_array_equal(out, same)
        assert bool(jnp.any(one["Dense_0"]["kernel"] != two["Dense_0"]["kernel"]))
