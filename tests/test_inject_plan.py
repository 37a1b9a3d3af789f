"""The plan: every multiplication of the model stands in it once, quantized or with the reason why not."""

import json
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
from inject_models import MLP, ConvNet, Normalized, Scanned, SetupMLP, Shared, Stack, normal, vmapped

from qtrain.cost import count
from qtrain.errors import UsageError
from qtrain.inject import Plan, Rule, default_rules, quantize
from qtrain.precision import Precision
from qtrain.quantizers import Uniform

KEY = jax.random.key(0)
X = normal(4, 6)
TENSOR = Uniform("affine", per="tensor")


def float_macs(model, *args, **kwargs):
    """Forward MACs of the plain model."""
    variables = jax.eval_shape(lambda key: model.init(key, *args, **kwargs), KEY)
    return count(lambda v, *a: model.apply(v, *a, **kwargs), variables, *args).forward


class Everything(nn.Module):
    """Layers that only some rules cover, and what is no layer."""

    @nn.compact
    def __call__(self, tokens):
        embed = nn.Embed(11, 6, name="embed")
        x = embed(tokens)  # [2, 5, 6]
        x = x + nn.MultiHeadDotProductAttention(2, name="attention")(x)
        x = nn.Dense(6, name="dense")(x)
        x = nn.ConvTranspose(6, (3,), name="transposed")(x)
        x = nn.Einsum((6, 4), "...i,io->...o", name="einsum")(x)
        x = x @ self.param("raw", nn.initializers.lecun_normal(), (4, 4))
        x = jnp.einsum("bti,bsi->bts", x, x) @ x
        x = nn.Dense(6, dot_general=jax.lax.dot_general, name="own")(x)
        x = nn.Dense(6, dot_general_cls=lambda: jax.lax.dot_general, name="own_cls")(x)
        return embed.attend(x)


QKVO = {f"attention/{name}": (2 * 5 * 36, True, "") for name in ("query", "key", "value", "out")}
LAYERS = {
    **QKVO,
    "dense": (2 * 5 * 36, True, ""),
    "transposed": (2 * 5 * 3 * 36, True, ""),
    "einsum": (2 * 5 * 24, True, ""),
    "embed/attend": (2 * 5 * 66, True, ""),
    "own": (2 * 5 * 24, False, "sets a dot_general of its own"),
    "own_cls": (2 * 5 * 36, False, "sets a dot_general of its own"),
}
ATTENTION = 2 * 2 * 5 * 5 * 6


@pytest.mark.parametrize(
    ("rule", "expected"),
    [
        (
            Rule(),
            {
                **LAYERS,
                "embed": (0, False, "no rule with ops='embed'"),
                "attention": (ATTENTION, False, "no rule with ops='attention'"),
            },
        ),
        (
            Rule(ops="all"),
            {
                **LAYERS,
                "embed": (0, True, ""),
                "attention/qk": (ATTENTION // 2, True, ""),
                "attention/pv": (ATTENTION // 2, True, ""),
            },
        ),
        (
            Rule(ops=("dot", "attention"), path="(?!.*qk).*"),
            {
                **LAYERS,
                "transposed": (2 * 5 * 3 * 36, False, "no rule"),
                "einsum": (2 * 5 * 24, False, "no rule"),
                "embed/attend": (2 * 5 * 66, False, "no rule"),
                "embed": (0, False, "no rule with ops='embed'"),
                "attention/qk": (ATTENTION // 2, True, ""),  # by the path of the attention that it is a part of
                "attention/pv": (ATTENTION // 2, True, ""),
            },
        ),
        (
            Rule("attention/qk", ops="attention"),
            {
                **{path: (macs, False, note or "no rule") for path, (macs, _, note) in LAYERS.items()},
                "embed": (0, False, "no rule with ops='embed'"),
                "attention/qk": (ATTENTION // 2, True, ""),
                "attention": (ATTENTION // 2, False, "no rule with ops='attention'"),
            },
        ),
    ],
)
def test_every_multiplication_stands_in_the_plan_with_its_share(rule, expected):
    tokens = jnp.arange(10).reshape(2, 5)
    model = Everything()
    plan = quantize(model, rule).plan(tokens)
    assert {row.path: (row.macs, row.quantized, row.note) for row in plan if row.path} == expected
    (raw,) = [row for row in plan if row.path == ""]
    assert raw.macs == 2 * 5 * 16 + 2 * (2 * 5 * 5 * 4) and not raw.quantized
    assert raw.note.startswith("not reached by the injection")
    assert plan.macs == float_macs(model, tokens) == sum(row.macs for row in plan)
    assert plan.coverage == pytest.approx(sum(row.macs for row in plan if row.quantized) / plan.macs)
    text = str(plan)
    for row in plan:
        assert f"{100 * row.macs / plan.macs:.1f} %" in text
    assert f"{100 * plan.coverage:.1f} % of {plan.macs:,} forward MACs have both operands quantized" in text


@pytest.mark.parametrize(
    ("path", "advice"), [("embed", ""), ("own", ""), ("attention", r"; ops=\('attention',\) would"), ("raw", "")]
)
def test_a_rule_only_for_what_is_not_covered_is_refused(path, advice):
    rule = Rule(path, ops=("dot", "conv"))
    message = f"path='{path}'.*matches " + (
        "no module" if path == "raw" else f"only what cannot be quantized.*{advice}"
    )
    with pytest.raises(UsageError, match=message):
        quantize(Everything(), [rule, Rule()]).plan(jnp.arange(10).reshape(2, 5))


class OwnCall(nn.Dense):
    """A Dense whose call ignores its contraction."""

    @nn.compact
    def __call__(self, x):
        return x @ self.param("kernel", self.kernel_init, (x.shape[-1], self.features))


def test_a_subclass_that_ignores_the_contraction_is_not_called_quantized():
    model = nn.Sequential([nn.Dense(6), OwnCall(3)])
    plan = quantize(model, Rule()).plan(X)
    assert [(row.path, row.macs, row.quantized) for row in plan] == [("layers_0", 144, True), ("layers_1", 72, False)]
    assert plan["layers_1"].note == "not reached by the injection: not a layer"


def test_recurrent_cells_that_are_fused():
    model = nn.Sequential([nn.RNN(nn.OptimizedLSTMCell(5)), nn.Dense(3)])
    x = normal(2, 7, 6)
    plan = quantize(model, Rule()).plan(x)
    sizes = {"i": 6, "h": 5}
    gates = {f"layers_0/cell/{side}{gate}": 2 * 7 * 5 * size for side, size in sizes.items() for gate in "ifgo"}
    assert {row.path: row.macs for row in plan} == {**gates, "layers_1": 2 * 7 * 15}
    assert plan.coverage == 1
    assert plan.macs == float_macs(model, x) == 2 * 7 * (4 * 5 * 11 + 15)


def test_convolutions_scans_and_shared_layers_by_hand():
    """The numbers, counted on paper."""
    plan = quantize(ConvNet(), Rule()).plan(normal(2, 8, 8, 3))
    assert {row.path: row.macs for row in plan} == {
        "strided": 2 * 16 * 9 * 3 * 8,
        "dilated": 2 * 16 * 9 * 8 * 8,
        "grouped": 2 * 4 * 9 * 4 * 8,
        "depthwise": 2 * 4 * 4 * 8,
        "masked": 2 * 4 * 8 * 4,
        "head": 2 * 16 * 3,
    }
    assert plan.weight_scales == {"strided": 8, "dilated": 8, "grouped": 8, "depthwise": 8, "masked": 4, "head": 3}

    plan = quantize(Scanned(length=3), Rule()).plan(X)
    assert {row.path: row.macs for row in plan} == {
        "stem": 4 * 36,
        "layers/block/up": 3 * 4 * 48,
        "layers/block/down": 3 * 4 * 48,
        "head": 4 * 18,
    }
    assert plan.weight_scales == {"stem": 6, "layers/block/up": 3 * 8, "layers/block/down": 3 * 6, "head": 3}

    plan = quantize(Shared(), Rule()).plan(X)
    assert {row.path: row.macs for row in plan} == {"twice": 2 * 4 * 36, "once": 4 * 18}
    assert plan.weight_scales == {"twice": 6, "once": 3}

    plan = quantize(Stack(vmapped(nn.Dense), 0), Rule()).plan(normal(5, 6))
    assert plan["head"].macs == 5 * 18


def test_fields_of_a_row():
    rules = [
        Rule("Dense_0", weights=8, acts=8, weight_quantizer=TENSOR),
        Rule("Dense_1", act_quantizer=None, residuals="original", bias_quantizer=TENSOR),
        Rule(grad_quantizer=Uniform("affine", per="tensor", rounding="stochastic"), grads=8),
    ]
    first, second, third = plan = quantize(MLP(), rules).plan(X)
    assert (first.path, first.module, first.op, first.macs) == ("Dense_0", "Dense", "dot", 4 * 6 * 8)
    assert (first.weights, first.acts, first.grads, first.bias) == (
        "affine/tensor",
        "symmetric/channel",
        "float",
        "float",
    )
    assert (first.bits.weights, first.bits.acts, first.bits.grads, first.weight_scales) == (8, 8, None, 1)
    assert (second.acts, second.bias, second.residuals) == ("float", "affine/tensor", "original")
    assert second.note == "backward sees original operands; bias affine/tensor"
    assert (second.bits.weights, second.bits.acts) == ("schedule", None)
    assert (third.grads, third.bits.grads, third.weight_scales) == ("affine/tensor stochastic", 8, 4)
    assert plan.followers == ("Dense_1", "Dense_2")
    assert plan.coverage == pytest.approx((192 + 128) / (192 + 256 + 128))
    assert len(plan) == 3 and plan["Dense_1"] is second
    with pytest.raises(KeyError):
        plan["Dense_7"]
    bits = {"path": "Dense_1", "weights": "schedule", "acts": None, "grads": None, "residuals": "original"}
    assert json.loads(plan.dumps())[1]["bits"] == {**bits, "pair": False}
    assert next(op.marker for op in plan.ops if op.path == "Dense_1") == second.bits


def test_fixed_bits_that_are_no_quantization():
    plan = quantize(MLP(), [Rule("Dense_0", weights=32, acts=32), Rule("Dense_1", acts=24), Rule()]).plan(X)
    assert [row.quantized for row in plan] == [False, True, True]
    assert plan["Dense_0"].note == "float by rule" and plan.coverage == pytest.approx(128 / 576)
    assert re.split(r"\s{2,}", str(plan).splitlines()[2])[2:5] == ["float"] * 3


def test_the_table_reads():
    plan = quantize(MLP(), default_rules()).plan(X)
    assert isinstance(plan, Plan)
    lines = str(plan).splitlines()
    fixed, follows, ends = "symmetric/channel @ 8 fixed", "symmetric/channel @ schedule", "first or last layer"
    assert [re.split(r"\s{2,}", line) for line in (lines[0], *lines[2:5])] == [
        ["layer", "op", "weights", "acts", "gradients", "MACs", "share", "note"],
        ["Dense_0", "dot", fixed, fixed, "float", "192", "33.3 %", ends],
        ["Dense_1", "dot", follows, follows, "float", "256", "44.4 %"],
        ["Dense_2", "dot", fixed, fixed, "float", "128", "22.2 %", ends],
    ]
    assert set(lines[1]) == {"-", " "}
    assert lines[5:] == ["100.0 % of 576 forward MACs have both operands quantized"]
    for column in ("weights", "acts", "gradients"):  # every cell begins below its header
        at = lines[0].index(column)
        assert all(line[at - 1] == " " != line[at] for line in lines[1:5])
    assert "(root)" in str(quantize(nn.Dense(3), Rule()).plan(X))


def test_shapes_alone_will_do():
    model = Normalized()
    qmodel = quantize(model, Rule())
    expected = qmodel.plan(X, train=False)
    for x in (jax.ShapeDtypeStruct((4, 6), "float32"), jax.device_get(X)):
        assert str(qmodel.plan(x, train=False)) == str(expected)
    assert qmodel.plan(X, train=True).macs == expected.macs  # dropout and batch statistics
    assert qmodel.plan(X, train=True, rngs=KEY).macs == expected.macs
    assert qmodel.plan(X, train=True, rngs={"params": KEY, "dropout": KEY}).macs == expected.macs
    assert qmodel.plan(jax.ShapeDtypeStruct((8, 6), "float32"), train=False).macs == 2 * expected.macs


def test_a_model_with_a_random_stream_of_its_own():
    class Noisy(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(3)(x + jax.random.normal(self.make_rng("noise"), x.shape))

    assert quantize(Noisy(), Rule()).plan(X).macs == 72


def test_a_plan_of_a_method():
    plan = quantize(SetupMLP(), Rule()).plan(X, method="encode")
    assert [row.path for row in plan] == ["encoder", "hidden_0", "hidden_1"]


def test_plans_cost_nothing_and_change_nothing():
    """No computation: a model far too large to run is planned in its place."""
    huge = jax.ShapeDtypeStruct((1 << 20, 1 << 20), "float32")
    plan = quantize(MLP((1 << 20, 8)), Rule()).plan(huge)
    assert plan["Dense_0"].macs == 1 << 60


def test_operations_carry_the_markers_that_cost_prices():
    plan = quantize(MLP(), default_rules(grad_quantizer=TENSOR)).plan(X)
    marked = {op.path: (op.marker.weights, op.marker.acts, op.marker.grads) for op in plan.ops}
    assert marked == {"Dense_0": (8, 8, "schedule"), "Dense_1": ("schedule",) * 3, "Dense_2": (8, 8, "schedule")}
    assert plan.ops.forward == plan.macs


def test_static_arguments_that_are_not_arrays():
    class Deep(nn.Module):
        @nn.compact
        def __call__(self, x, depth, activation):
            for _ in range(depth):
                x = activation(nn.Dense(6)(x))
            return x

    qmodel = quantize(Deep(), Rule())
    assert qmodel.plan(X, 3, nn.relu).macs == 3 * 144
    assert qmodel.plan(X, depth=2, activation=nn.tanh).macs == 2 * 144
    variables = qmodel.init(KEY, X, 3, nn.relu)
    out = qmodel.apply(variables, X, 3, nn.relu, bits=Precision(3, 3))
    assert bool(jnp.any(out != qmodel.apply(variables, X, 2, nn.relu, bits=Precision(3, 3))))
