"""Attention's products of two activations, whatever function computes them; and whole transformers."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from pulled_back import KEY, TENSOR, bits, jit, normal, pulled_back
from quantizer_reference import fake_quantize

from qtrain import cost
from qtrain.inject import Rule, quantize
from qtrain.models import transformer
from qtrain.precision import Precision

PARTS = ("attention/qk", "attention/pv")


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


def causal_and_dropped(query, key, value, **options):
    """flax's own with a causal mask, and dropout whose noise is KEY's."""
    options |= {"mask": nn.make_causal_mask(query[..., 0, 0]), "dropout_rng": KEY, "dropout_rate": 0.5}
    return nn.dot_product_attention(query, key, value, **options)


@pytest.mark.parametrize("function", [own_function, fused_function, causal_and_dropped])
def test_attention(function):
    model, x, width = Attention(function), normal(1, 2, 3, 6), 4
    qmodel = quantize(model, Rule(ops="attention", act_quantizer=TENSOR))
    params = jit(model.init)(KEY, x)["params"]
    out, cotangent, found = pulled_back(lambda p: qmodel.apply({"params": p}, x, bits=bits(float(width))), params)
    w = {name: np.asarray(layer["kernel"], np.float64) for name, layer in params["attention"].items()}
    kept, hidden = np.ones((3, 3)), np.zeros((3, 3))
    if function is causal_and_dropped:
        kept, hidden = np.asarray(jax.random.bernoulli(KEY, 0.5, (3, 3))) / 0.5, np.triu(np.full((3, 3), -1e30), 1)

    def quantized(tensor):
        return fake_quantize(tensor, "symmetric", "tensor", width)

    query, key, value = (
        np.einsum("bti,ihd->bthd", x.astype(np.float64), w[name]) for name in ("query", "key", "value")
    )
    # flax divides the queries by √depth, others the products: with one scale that is the same.
    query, key, value = quantized(query / np.sqrt(3)), quantized(key), quantized(value)
    scores = np.einsum("bthd,bshd->bhts", query, key) + hidden
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    rounded = quantized(weights * kept)
    np.testing.assert_allclose(out, np.einsum("bhts,bshd,hdo->bto", rounded, value, w["out"]), atol=3e-6)

    of_mixed = np.einsum("bto,hdo->bthd", cotangent, w["out"])
    of_weights = np.einsum("bthd,bshd->bhts", of_mixed, value) * kept
    of_scores = weights * (of_weights - (of_weights * weights).sum(-1, keepdims=True))
    expected = {
        "query": np.einsum("bhts,bshd,bti->ihd", of_scores, key, x) / np.sqrt(3),
        "key": np.einsum("bhts,bthd,bsi->ihd", of_scores, query, x),
        "value": np.einsum("bhts,bthd,bsi->ihd", rounded, of_mixed, x),
    }
    for name, gradient in expected.items():
        np.testing.assert_allclose(found["attention"][name]["kernel"], gradient, atol=1e-5)
    if function is causal_and_dropped:
        plan = qmodel.plan(x)
        assert {row.path: row.macs for row in plan if row.quantized} == dict.fromkeys(PARTS, 2 * 2 * 3 * 3 * 3)
        own = cost.Ops(op for op in plan.ops if op.path in PARTS)
        assert cost.bitops(own, Precision(weights=2, acts=5), ("forward",)) == own.forward * 25


class Learned(nn.Module):
    """Learned queries, which are no weights of the product that they enter."""

    @nn.compact
    def __call__(self, x):
        queries = self.param("queries", nn.initializers.normal(1.0), (1, 3, 6))
        return nn.MultiHeadDotProductAttention(2, name="attention")(queries, x)


def test_learned_queries_count_the_bits_of_activations():
    plan = quantize(Learned(), Rule(ops=("weighted", "attention"))).plan(normal(1, 1, 4, 6))
    assert [op.lhs.kind for op in plan.ops if op.path == "attention/qk"] == ["weight"]
    own = cost.Ops(op for op in plan.ops if op.path in PARTS)
    assert cost.bitops(own, Precision(weights=2, acts=5), ("forward",)) == own.forward * 25
    assert cost.memory_bits(plan.ops, Precision(weights=2, acts=5)) == 2 * (4 * 6 * 6 + 3 * 6)  # kernels and queries


def test_attention_weights_are_still_sown_and_dropped():
    class Model(nn.Module):
        @nn.compact
        def __call__(self, x, train=True):
            layer = nn.MultiHeadDotProductAttention(2, dropout_rate=0.5, deterministic=not train, name="attention")
            return layer(x, sow_weights=True)

    x, rngs = normal(1, 2, 3, 6), {"dropout": jax.random.key(4)}
    model = Model()
    qmodel = quantize(model, Rule(ops="all"))
    variables = {"params": jit(model.init)({"params": KEY, **rngs}, x)["params"]}
    options = {"rngs": rngs, "mutable": ["intermediates"]}
    plain, sown = jit(lambda v: model.apply(v, x, **options))(variables)
    out, own = jit(lambda v: qmodel.apply(v, x, bits=bits(32.0), **options))(variables)
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


def test_running_ranges_of_attention():
    x = normal(1, 2, 3, 6)
    ranges = dataclasses.replace(TENSOR, statistics=0.5)
    qmodel = quantize(Attention(), Rule(ops="all", act_quantizer=ranges))
    variables = jit(qmodel.init)(KEY, x)
    update = jit(lambda v, x: qmodel.apply(v, x, bits=bits(4.0), mutable=["quant_stats"]))
    _, state = update(variables, x)
    assert sorted(state["quant_stats"]["attention"]["qk"]) == ["acts", "acts_rhs"]
    assert all(int(kept["count"]) == 1 for kept in state["quant_stats"]["attention"]["pv"].values())
    moved, _ = update({**variables, **state}, 2 * x)
    fixed = jit(lambda v, x: qmodel.apply(v, x, bits=bits(4.0)))({**variables, **state}, 2 * x)
    assert not np.array_equal(moved, fixed)


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ({"scan_layers": True, "remat": True, "positions": "rotary", "norm": "rms", "mlp": "swiglu"}, 1.0),
        ({"tied": True}, 1.0),
    ],
    ids=["llama", "tied"],
)
def test_a_transformer_is_covered_and_one_program_serves_all_widths(kind, expected):
    tokens = np.arange(10).reshape(2, 5) % 7
    model = transformer.TransformerLM(7, 8, num_layers=1, width=8, num_heads=2, **kind)
    qmodel = quantize(model, Rule(ops="all"))
    plan = qmodel.plan(tokens)
    assert plan.coverage == expected
    variables = {"params": jit(model.init)(KEY, tokens)["params"]}
    traces = []

    @jit
    def run(variables, width):
        traces.append(1)
        return qmodel.apply(variables, tokens, bits=bits(width))

    plain = jit(model.apply)(variables, tokens)
    np.testing.assert_allclose(run(variables, 32.0), plain, atol=1e-5)
    assert np.abs(run(variables, 3.0) - plain).max() > 1e-2
    assert len(traces) == 1
