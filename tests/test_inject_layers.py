"""Beyond Dense and Conv: einsums, transposed convolutions, embeddings, attention, fused cells, parameters, outputs.

Values and gradients against a float64 reference: a bilinear product's gradient is the product with each basis vector.
"""

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from quantizer_reference import fake_quantize

from qtrain.cost import count
from qtrain.errors import UsageError
from qtrain.inject import Rule, quantize
from qtrain.models import lstm, transformer
from qtrain.models.residual import Residual
from qtrain.precision import Precision
from qtrain.quantizers import LSQ, Uniform

KEY = jax.random.key(0)
CHANNEL, TENSOR = Uniform("symmetric", per="channel"), Uniform("symmetric", per="tensor")
EVERYTHING = Rule(ops="all", weight_quantizer=CHANNEL, act_quantizer=CHANNEL)
jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


def normal(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def bits(width):
    return Precision(weights=width, acts=width, grads=width)


def pulled_back(function, x):
    """The value at `x`, a cotangent, and what it is pulled back to; compiled."""
    cotangent = normal(5, *jax.eval_shape(function, x).shape)

    def both(x):
        out, back = jax.vjp(function, x)
        return out, back(cotangent)[0]

    out, gradient = jit(both)(x)
    return out, cotangent, gradient


def transposed_convolution(x, w, stride, transpose_kernel=False):
    """One axis, without padding: each input element adds its multiple of the kernel to the output."""
    if transpose_kernel:
        w = w[::-1].swapaxes(1, 2)  # of the convolution that it transposes
    batch, length, _ = x.shape
    taps, _, features = w.shape
    out = np.zeros((batch, stride * (length - 1) + taps + max(stride - taps, 0), features))
    for i in range(length):
        for k in range(taps):
            out[:, i * stride + k] += x[:, i] @ w[taps - 1 - k]
    return out


@dataclasses.dataclass(frozen=True)
class Case:
    """A layer, the name of its weight, its product in numpy, and the axes of both operands that share a scale."""

    module: nn.Module
    x: np.ndarray
    weight: str
    product: object
    axes: tuple
    path: str
    op: str
    method: str = "__call__"


def einsum(equation):
    return functools.partial(np.einsum, equation)


CASES = {
    "einsum": Case(
        nn.Einsum((6, 2, 4), "bti,iho->btho"),
        normal(1, 2, 3, 6),
        "kernel",
        einsum("bti,iho->btho"),
        ((2,), (0,)),
        "",
        "einsum",
    ),
    "einsum, weight first": Case(
        nn.Einsum((5, 6, 2), "bti,oih->bhot", use_bias=False),
        normal(1, 2, 3, 6),
        "kernel",
        einsum("bti,oih->bhot"),
        ((2,), (1,)),
        "",
        "einsum",
    ),
    "einsum, a kernel for each head": Case(
        nn.Einsum((2, 6, 4), "bthi,hio->btho", use_bias=False),
        normal(1, 2, 3, 2, 6),
        "kernel",
        einsum("bthi,hio->btho"),
        ((3,), (1,)),
        "",
        "einsum",
    ),
    "attend": Case(
        nn.Embed(7, 6),
        normal(1, 2, 3, 6),
        "embedding",
        lambda x, w: x @ w.T,
        ((2,), (1,)),
        "attend",
        "attend",
        "attend",
    ),
    "transposed": Case(
        nn.ConvTranspose(4, (3,), strides=(2,), padding="VALID"),
        normal(1, 2, 4, 3),
        "kernel",
        functools.partial(transposed_convolution, stride=2),
        ((1, 2), (0, 1)),
        "",
        "conv_transpose",
    ),
    "transposed, kernel too": Case(
        nn.ConvTranspose(4, (3,), strides=(2,), padding="VALID", transpose_kernel=True),
        normal(1, 2, 4, 3),
        "kernel",
        functools.partial(transposed_convolution, stride=2, transpose_kernel=True),
        ((1, 2), (0, 2)),
        "",
        "conv_transpose",
    ),
}


def gradient(product, shape, cotangent):
    """Of Σ cotangent · product(x), which is linear in x."""
    found = np.zeros(shape)
    for index in np.ndindex(*shape):
        basis = np.zeros(shape)
        basis[index] = 1
        found[index] = np.sum(cotangent * product(basis))
    return found


@pytest.mark.parametrize("name", CASES)
def test_products_with_a_weight(name):
    case = CASES[name]
    qmodel = quantize(case.module, EVERYTHING)
    init = functools.partial(qmodel.init, KEY, case.x, method=case.method)
    variables = init()
    plain = case.module.init(KEY, case.x, method=case.method)
    assert jax.tree.all(jax.tree.map(np.array_equal, variables["params"], plain["params"]))
    params = variables["params"]
    w = np.asarray(params[case.weight], np.float64)
    (row,) = [row for row in qmodel.plan(case.x, method=case.method) if row.macs]
    assert (row.path, row.op) == (case.path, case.op) and row.quantized

    traces = []

    @jit
    def run(params, x, width, cotangent):
        traces.append(1)
        out, back = jax.vjp(
            lambda params, x: qmodel.apply({"params": params}, x, bits=bits(width), method=case.method), params, x
        )
        return out, back(cotangent)

    for width in (3, 8, 32):
        xq = fake_quantize(case.x, "symmetric", "channel", width, case.axes[0])
        wq = fake_quantize(w, "symmetric", "channel", width, case.axes[1])
        expected = case.product(xq, wq)
        cotangent = normal(5, *expected.shape)
        out, (of_params, of_x) = run(params, case.x, float(width), cotangent)
        assert out.shape == expected.shape
        np.testing.assert_allclose(out, expected, atol=3e-6)
        np.testing.assert_allclose(of_x, gradient(lambda x, w=wq: case.product(x, w), xq.shape, cotangent), atol=1e-5)
        of_weight = gradient(lambda w, x=xq: case.product(x, w), wq.shape, cotangent)
        np.testing.assert_allclose(of_params[case.weight], of_weight, atol=1e-5)
    assert len(traces) == 1
    plain_out = case.module.apply(plain, case.x, method=case.method)
    np.testing.assert_allclose(run(params, case.x, 32.0, cotangent)[0], plain_out, atol=2e-6)
    np.testing.assert_array_equal(qmodel.apply(variables, case.x, bits=None, method=case.method), plain_out)


def test_a_table_that_is_looked_up():
    model = nn.Embed(7, 6)
    tokens = np.array([[0, 3, 3], [6, 0, 1]])
    qmodel = quantize(model, Rule(ops="embed", weight_quantizer=CHANNEL))
    params = qmodel.init(KEY, tokens)["params"]
    out, cotangent, found = pulled_back(lambda p: qmodel.apply({"params": p}, tokens, bits=bits(3.0)), params)
    table = fake_quantize(params["embedding"], "symmetric", "channel", 3, (1,))
    np.testing.assert_allclose(out, table[tokens], atol=1e-6)
    expected = np.zeros((7, 6))
    np.add.at(expected, tokens, cotangent)
    np.testing.assert_allclose(found["embedding"], expected, atol=1e-6)
    (weight,) = qmodel.weights(tokens)
    assert (weight.name, weight.axes) == ("embedding", (1,))
    assert count(lambda v, t: qmodel.apply(v, t, bits=bits(3.0)), {"params": params}, tokens).forward == 0


class Attention(nn.Module):
    """Attention of two heads without biases, by a function of its own."""

    function: object = nn.dot_product_attention

    @nn.compact
    def __call__(self, x):
        return nn.MultiHeadDotProductAttention(2, use_bias=False, attention_fn=self.function, name="attention")(x)


def own_function(query, key, value, **_):
    """What an author may write: neither flax's signature nor its einsums."""
    weights = jnp.einsum("btnh,bsnh->bnts", query, key) / np.sqrt(query.shape[-1])
    return jnp.einsum("bnts,bsnh->btnh", jax.nn.softmax(weights), value)


def fused_function(query, key, value):
    """jax's own."""
    return jax.nn.dot_product_attention(query, key, value, implementation="xla")


@pytest.mark.parametrize("function", [nn.dot_product_attention, own_function, fused_function])
def test_attention(function):
    model, x, width = Attention(function), normal(1, 2, 3, 6), 4
    qmodel = quantize(model, Rule(ops="attention", act_quantizer=TENSOR))
    params = model.init(KEY, x)["params"]
    out, cotangent, found = pulled_back(lambda p: qmodel.apply({"params": p}, x, bits=bits(float(width))), params)
    w = {name: np.asarray(layer["kernel"], np.float64) for name, layer in params["attention"].items()}

    def quantized(tensor):
        return fake_quantize(tensor, "symmetric", "tensor", width)

    query, key, value = (
        np.einsum("bti,ihd->bthd", x.astype(np.float64), w[name]) for name in ("query", "key", "value")
    )
    # flax divides the queries by √depth, others the products: with one scale that is the same.
    query, key, value = quantized(query / np.sqrt(3)), quantized(key), quantized(value)
    scores = np.einsum("bthd,bshd->bhts", query, key)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    rounded = quantized(weights)
    np.testing.assert_allclose(out, np.einsum("bhts,bshd,hdo->bto", rounded, value, w["out"]), atol=3e-6)

    of_mixed = np.einsum("bto,hdo->bthd", cotangent, w["out"])
    of_weights = np.einsum("bthd,bshd->bhts", of_mixed, value)
    of_scores = weights * (of_weights - (of_weights * weights).sum(-1, keepdims=True))
    expected = {
        "query": np.einsum("bhts,bshd,bti->ihd", of_scores, key, x) / np.sqrt(3),
        "key": np.einsum("bhts,bthd,bsi->ihd", of_scores, query, x),
        "value": np.einsum("bhts,bthd,bsi->ihd", rounded, of_mixed, x),
    }
    for name, gradient in expected.items():
        np.testing.assert_allclose(found["attention"][name]["kernel"], gradient, atol=1e-5)

    plan = qmodel.plan(x)
    assert {row.path: row.macs for row in plan if row.quantized} == dict.fromkeys(
        ("attention/qk", "attention/pv"), 2 * 2 * 3 * 3 * 3
    )
    ops = {op.path: op.marker.acts for op in plan.ops if op.marker}
    assert ops == {"attention/qk": "schedule", "attention/pv": "schedule"}


def test_attention_weights_are_still_sown_and_dropped():
    class Model(nn.Module):
        @nn.compact
        def __call__(self, x, train=True):
            layer = nn.MultiHeadDotProductAttention(2, dropout_rate=0.5, deterministic=not train, name="attention")
            return layer(x, sow_weights=True)

    x, rngs = normal(1, 2, 3, 6), {"dropout": jax.random.key(4)}
    model = Model()
    qmodel = quantize(model, Rule(ops="all"))
    variables = {"params": model.init({"params": KEY, **rngs}, x)["params"]}
    plain, sown = model.apply(variables, x, rngs=rngs, mutable=["intermediates"])
    out, own = qmodel.apply(variables, x, bits=bits(32.0), rngs=rngs, mutable=["intermediates"])
    np.testing.assert_allclose(out, plain, atol=2e-6)
    for a, b in zip(jax.tree.leaves(own), jax.tree.leaves(sown), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6)


def test_an_attention_whose_einsums_are_its_own_is_left_alone():
    einsums = dict.fromkeys(("qk_attn_weights_einsum_cls", "attn_weights_value_einsum_cls"), lambda: jnp.einsum)
    plan = quantize(nn.Sequential([nn.MultiHeadDotProductAttention(2, **einsums)]), Rule(ops="all")).plan(
        normal(1, 2, 3, 6)
    )
    (row,) = [row for row in plan if not row.quantized]
    assert row.note.startswith("sets qk_attn_weights_einsum_cls") and row.macs == 2 * 2 * 2 * 3 * 3 * 3


@pytest.mark.parametrize("quantizer", [CHANNEL, TENSOR, LSQ()], ids=lambda q: q.describe())
def test_a_fused_cell_is_the_unfused_one(quantizer):
    """The same rows, the same bits: outputs, gradients, and what quantizers have learned."""
    tokens = np.array([[0, 3, 3, 1], [6, 0, 1, 2]])
    grad = dataclasses.replace(TENSOR, rounding="stochastic")
    acts = LSQ() if quantizer.learns else quantizer
    fields = {"weight_quantizer": quantizer, "act_quantizer": acts, "bias_quantizer": quantizer, "grad_quantizer": grad}
    results = []
    for fused in (True, False):
        qmodel = quantize(lstm.LSTMLM(7, width=4, fused=fused), Rule(ops="all", **fields))
        variables = qmodel.init(KEY, tokens)

        def loss(variables, width, qmodel=qmodel):
            return jnp.mean(qmodel.apply(variables, tokens, bits=bits(width), rngs={"quant": KEY}) ** 2)

        plan = qmodel.plan(tokens)
        assert plan.coverage == 1
        rows = {row.path: (row.macs, row.weights, row.bias, row.weight_scales) for row in plan}
        names = {weight.name: weight.axes for weight in qmodel.weights(tokens)}
        results.append((rows, names, *jit(jax.value_and_grad(loss))(variables, 4.0)))
    (rows, names, value, gradient), (other_rows, other_names, other_value, other_gradient) = results
    assert rows == other_rows and names == other_names
    np.testing.assert_allclose(value, other_value, rtol=1e-6)
    assert jax.tree.structure(gradient) == jax.tree.structure(other_gradient)
    for a, b in zip(jax.tree.leaves(gradient), jax.tree.leaves(other_gradient), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6)


class Stream(nn.Module):
    """Branches that meet, and raw parameters, under a scan or a vmap."""

    @nn.compact
    def __call__(self, x, _=None):
        gain = self.param("gain", nn.initializers.normal(), (x.shape[-1],))
        x = Residual(name="residual")(x, nn.Dense(x.shape[-1], name="dense")(x) * gain)
        return x, None


class Streams(nn.Module):
    """Three layers."""

    remat: bool = False

    @nn.compact
    def __call__(self, x):
        kind = nn.remat(Stream) if self.remat else Stream
        layers = nn.scan(kind, variable_axes={"params": 0}, split_rngs={"params": True}, length=3)
        x, _ = layers(name="layers")(x, None)
        ensemble = nn.vmap(Stream, in_axes=None, variable_axes={"params": 0}, split_rngs={"params": True}, axis_size=2)
        return ensemble(name="members")(x)[0].sum(0)


@pytest.mark.parametrize("remat", [False, True])
def test_outputs_and_parameters_under_transformations(remat):
    model, x, width = Streams(remat), normal(1, 2, 6), 3
    rules = [
        Rule(".*/gain", ops="param", weight_quantizer=TENSOR),
        Rule(".*residual", ops="output", act_quantizer=TENSOR, grad_quantizer=TENSOR),
    ]
    qmodel = quantize(model, rules)
    variables = qmodel.init(KEY, x)
    params = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), variables["params"])
    assert jax.tree.all(jax.tree.map(np.array_equal, variables["params"], model.init(KEY, x)["params"]))

    def quantized(tensor):
        return fake_quantize(tensor, "symmetric", "tensor", width)

    def layer(own, index, x):
        return x @ own["dense"]["kernel"][index] + own["dense"]["bias"][index], quantized(own["gain"][index])

    value = x.astype(np.float64)
    for index in range(3):
        hidden, gain = layer(params["layers"], index, value)
        value = quantized(value + hidden * gain)
    ends = [layer(params["members"], index, value) for index in range(2)]
    expected = sum(quantized(value + hidden * gain) for hidden, gain in ends)
    function = functools.partial(qmodel.apply, bits=bits(float(width)))
    out, cotangent, found = pulled_back(lambda p: function({"params": p}, x), variables["params"])
    np.testing.assert_allclose(out, expected, atol=1e-5)

    for index, (hidden, _) in enumerate(ends):
        of_gain = np.sum(quantized(cotangent) * hidden, axis=0)
        np.testing.assert_allclose(found["members"]["gain"][index], of_gain, atol=1e-5)

    plan = qmodel.plan(x)
    assert {row.path: row.op for row in plan if row.quantized} == {
        "layers/residual/output": "output",
        "members/residual/output": "output",
        "layers/gain": "param",
        "members/gain": "param",
    }
    assert {w.name: (w.shape, w.stacked) for w in qmodel.weights(x)} == {
        "layers/gain": ((3, 6), 1),
        "members/gain": ((2, 6), 1),
    }


def test_learned_parameters_of_raw_parameters_and_outputs():
    model, x = Streams(), normal(1, 2, 6)
    lsq = LSQ(per="tensor")
    rules = [Rule(".*/gain", ops="param", weight_quantizer=lsq), Rule(".*residual", ops="output", act_quantizer=lsq)]
    qmodel = quantize(model, rules)
    variables = qmodel.calibrate(qmodel.init(KEY, x), x, bits=bits(4.0))
    assert jnp.shape(variables["quant"]["layers"]["gain"]["weights"]["scale"]) == (3,)
    value, gradient = jit(jax.value_and_grad(lambda v: jnp.sum(qmodel.apply(v, x, bits=bits(4.0)) ** 2)))(variables)
    scales = [gradient["quant"][name]["gain"]["weights"]["scale"] for name in ("layers", "members")]
    assert all(np.all(scale != 0) for scale in scales) and np.isfinite(value)
    assert gradient["quant"]["layers"]["residual"]["output"]["acts"]["scale"] != 0
    for weight in qmodel.weights(x):
        assert weight.learned(variables["quant"])["scale"].shape == weight.shape[:1]


def test_running_ranges_of_attention():
    x = normal(1, 2, 3, 6)
    ranges = dataclasses.replace(TENSOR, statistics=0.5)
    qmodel = quantize(Attention(), Rule(ops="all", act_quantizer=ranges))
    variables = qmodel.init(KEY, x)
    _, state = qmodel.apply(variables, x, bits=bits(4.0), mutable=["quant_stats"])
    assert sorted(state["quant_stats"]["attention"]["qk"]) == ["acts", "acts_rhs"]
    assert all(int(kept["count"]) == 1 for kept in state["quant_stats"]["attention"]["pv"].values())
    moved, _ = qmodel.apply({**variables, **state}, 2 * x, bits=bits(4.0), mutable=["quant_stats"])
    fixed = qmodel.apply({**variables, **state}, 2 * x, bits=bits(4.0))
    assert not np.array_equal(moved, fixed)


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ({}, 1.0),
        ({"scan_layers": True, "remat": True, "positions": "rotary", "norm": "rms", "mlp": "swiglu"}, 1.0),
        ({"tied": True}, 1.0),
    ],
    ids=["plain", "llama", "tied"],
)
def test_a_transformer_is_covered_and_one_program_serves_all_widths(kind, expected):
    tokens = np.arange(10).reshape(2, 5) % 7
    model = transformer.TransformerLM(7, 8, num_layers=2, width=8, num_heads=2, **kind)
    qmodel = quantize(model, Rule(ops="all"))
    plan = qmodel.plan(tokens)
    assert plan.coverage == expected
    variables = {"params": model.init(KEY, tokens)["params"]}
    traces = []

    @jit
    def run(variables, width):
        traces.append(1)
        return qmodel.apply(variables, tokens, bits=bits(width))

    plain = jit(model.apply)(variables, tokens)
    np.testing.assert_allclose(run(variables, 32.0), plain, atol=1e-5)
    assert np.abs(run(variables, 3.0) - plain).max() > 1e-2
    assert len(traces) == 1


def test_a_table_looked_up_and_attended_to_is_one_parameter():
    tokens = np.arange(6).reshape(2, 3)
    model = transformer.TransformerLM(7, 4, num_layers=1, width=4, num_heads=2, tied=True)
    qmodel = quantize(model, Rule(ops="all", weight_quantizer=LSQ(), act_quantizer=LSQ()))
    names = [weight.name for weight in qmodel.weights(tokens)]
    assert names.count("token_embedding/embedding") == 1
    quant = jax.eval_shape(lambda: qmodel.init(KEY, tokens))["quant"]["token_embedding"]
    assert sorted(quant) == ["attend", "weights"] and sorted(quant["attend"]) == ["acts"]


def test_positions_count_among_what_a_rule_applies_to():
    tokens = np.arange(6).reshape(2, 3)
    model = transformer.TransformerLM(7, 4, num_layers=1, width=4, num_heads=2, tied=True)

    def ends(*ops):
        rules = [Rule(position="ends", ops=ops, weights=8, acts=8), Rule(ops="all")]
        return [row.path for row in quantize(model, rules).plan(tokens) if 8 in (row.bits.weights, row.bits.acts)]

    assert ends("dot", "conv") == ["block_0/attention/query", "block_0/mlp_out"]
    assert ends("dot", "embed", "attend") == ["token_embedding", "token_embedding/attend"]


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        (Rule("absent", ops="param"), "rule path='absent' matches no module"),
        (Rule("layers/gain", ops="output"), "rule path='layers/gain' matches no module"),
        (Rule(".*dense", ops="param"), "matches only what cannot be quantized"),
        (
            Rule(".*gain", ops="param", weight_quantizer=dataclasses.replace(TENSOR, statistics=0.9)),
            "parameter 'layers/gain': weight_quantizer .* keeps a running range",
        ),
        (Rule(".*residual", ops="output", act_quantizer=LSQ(per="channel")), "learns a scale per example"),
    ],
)
def test_mistakes(rule, message):
    with pytest.raises(UsageError, match=message):
        quantize(Streams(), rule).plan(normal(1, 2, 6))


def test_stochastic_rounding_needs_a_key_and_folds_it_by_path():
    model, x = Streams(), normal(1, 2, 6)
    stochastic = dataclasses.replace(TENSOR, rounding="stochastic")
    qmodel = quantize(model, Rule(".*", ops="param", weight_quantizer=stochastic))
    variables = qmodel.init(KEY, x)
    with pytest.raises(UsageError, match=r"rngs=\{'quant': key\}"):
        qmodel.apply(variables, x, bits=bits(2.0))
    first, again, other = (
        qmodel.apply(variables, x, bits=bits(2.0), rngs={"quant": jax.random.key(seed)}) for seed in (1, 1, 2)
    )
    assert np.array_equal(first, again) and not np.array_equal(first, other)


@pytest.mark.parametrize("grid", ["symmetric", "affine"])
def test_a_transposed_convolution_on_codes(grid):
    case = CASES["transposed"]
    quantizer = Uniform(grid, per="tensor")
    rule = Rule(weight_quantizer=quantizer, act_quantizer=quantizer, execution="native")
    qmodel = quantize(case.module, rule, widest=8)
    if grid == "affine":
        with pytest.raises(UsageError, match="a zero point is not corrected in a convolution with a dilated input"):
            qmodel.plan(case.x)
        return
    variables = qmodel.init(KEY, case.x)
    fake = quantize(case.module, dataclasses.replace(rule, execution="fake"))
    np.testing.assert_allclose(
        qmodel.apply(variables, case.x, bits=bits(4)), fake.apply(variables, case.x, bits=bits(4)), atol=1e-6
    )
