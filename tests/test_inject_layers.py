"""Layers beyond Dense and Conv: einsums, transposed convolutions, embeddings, fused cells.

Values and gradients against a float64 reference: a bilinear product's gradient is the product with each basis vector.
"""

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from pulled_back import CHANNEL, KEY, TENSOR, bits, jit, normal, pulled_back
from quantizer_reference import fake_quantize

from qtrain import cost, export
from qtrain.errors import UsageError
from qtrain.inject import Rule, quantize
from qtrain.models import lstm, transformer
from qtrain.precision import Precision
from qtrain.quantizers import LSQ, Uniform

EVERYTHING = Rule(ops="all", weight_quantizer=CHANNEL, act_quantizer=CHANNEL, bias_quantizer=TENSOR)


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
    variables = jit(functools.partial(qmodel.init, method=case.method))(KEY, case.x)
    plain = jit(functools.partial(case.module.init, method=case.method))(KEY, case.x)
    assert jax.tree.all(jax.tree.map(np.array_equal, variables["params"], plain["params"]))
    params = dict(variables["params"])
    w = np.asarray(params[case.weight], np.float64)
    if "bias" in params:
        params["bias"] = normal(9, *params["bias"].shape)
    plan = qmodel.plan(case.x, method=case.method)
    (row,) = [row for row in plan if row.macs]
    assert (row.path, row.op) == (case.path, case.op) and row.quantized
    assert cost.bitops(plan.ops, Precision(weights=3, acts=5), ("forward",)) == row.macs * 15

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
        if "bias" in params:
            expected = expected + fake_quantize(params["bias"], "symmetric", "tensor", width)
        cotangent = normal(5, *expected.shape)
        out, (of_params, of_x) = run(params, case.x, float(width), cotangent)
        assert out.shape == expected.shape
        np.testing.assert_allclose(out, expected, atol=3e-6)
        np.testing.assert_allclose(of_x, gradient(lambda x, w=wq: case.product(x, w), xq.shape, cotangent), atol=1e-5)
        of_weight = gradient(lambda w, x=xq: case.product(x, w), wq.shape, cotangent)
        np.testing.assert_allclose(of_params[case.weight], of_weight, atol=1e-5)
        if "bias" in params:
            leading = tuple(range(cotangent.ndim - params["bias"].ndim))
            np.testing.assert_allclose(of_params["bias"], cotangent.sum(leading), atol=1e-5)
    assert len(traces) == 1
    plain_out = case.module.apply({"params": params}, case.x, method=case.method)
    np.testing.assert_allclose(out, plain_out, atol=2e-6)  # at 32 bits
    np.testing.assert_array_equal(qmodel.apply({"params": params}, case.x, bits=None, method=case.method), plain_out)


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
    assert cost.count(lambda v, t: qmodel.apply(v, t, bits=bits(3.0)), {"params": params}, tokens).forward == 0


@pytest.mark.parametrize(
    "quantizer", [CHANNEL, pytest.param(LSQ(), marks=pytest.mark.slow)], ids=lambda q: q.describe()
)
def test_a_fused_cell_is_the_unfused_one(quantizer):
    """The same rows, the same bits: outputs, gradients, and what quantizers have learned."""
    tokens = np.array([[0, 3, 3], [6, 0, 1]])
    grad = TENSOR if quantizer.learns else dataclasses.replace(TENSOR, rounding="stochastic")
    acts = LSQ() if quantizer.learns else quantizer
    fields = {"weight_quantizer": quantizer, "act_quantizer": acts, "bias_quantizer": quantizer, "grad_quantizer": grad}
    results = []
    for fused in (True, False):
        qmodel = quantize(lstm.LSTMLM(7, num_layers=1, width=4, fused=fused), Rule(ops="all", **fields))
        variables = jit(qmodel.init)(KEY, tokens)

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


def test_a_table_looked_up_and_attended_to_is_one_parameter():
    tokens = np.arange(6).reshape(2, 3)
    model = transformer.TransformerLM(7, 4, num_layers=1, width=4, num_heads=2, tied=True)
    qmodel = quantize(model, Rule(ops="all", weight_quantizer=LSQ(), act_quantizer=LSQ()))
    names = [weight.name for weight in qmodel.weights(tokens)]
    assert names.count("token_embedding/embedding") == 1
    quant = jax.eval_shape(lambda: qmodel.init(KEY, tokens))["quant"]["token_embedding"]
    assert sorted(quant) == ["attend", "weights"] and sorted(quant["attend"]) == ["acts"]


def test_a_file_holds_a_table_that_is_looked_up_and_attended_to_in_one_form(tmp_path):
    class Tied(nn.Module):
        @nn.compact
        def __call__(self, tokens, train=True):
            table = nn.Embed(7, 4, name="table")
            return table.attend(table(tokens))

    tokens, model = np.arange(6).reshape(2, 3), Tied()
    variables = {"params": jit(model.init)(KEY, tokens)["params"], "quant": {}}
    report = export.save(tmp_path / "a", quantize(model, Rule(ops="all")), variables, Precision(4, 4), tokens)
    assert report.difference == 0
    with pytest.raises(UsageError, match="'table' and 'table/attend' share the parameter"):
        export.save(tmp_path / "b", quantize(model, Rule()), variables, Precision(4, 4), tokens)


def test_positions_count_among_what_a_rule_applies_to():
    tokens = np.arange(6).reshape(2, 3)
    model = transformer.TransformerLM(7, 4, num_layers=1, width=4, num_heads=2, tied=True)

    def ends(*ops):
        rules = [Rule(position="ends", ops=ops, weights=8, acts=8), Rule(ops="all")]
        return [row.path for row in quantize(model, rules).plan(tokens) if 8 in (row.bits.weights, row.bits.acts)]

    assert ends("dot", "conv") == ["block_0/attention/query", "block_0/mlp_out"]
    assert ends("dot", "embed", "attend") == ["token_embedding", "token_embedding/attend"]


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
