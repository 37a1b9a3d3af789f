"""Rules: what they match, which wins, what bits and quantizers they mean, in Python and in configs."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import pytest
from inject_models import KEY, MLP, Block, ConvNet, Stack, X, normal

import qtrain
from qtrain.errors import UsageError
from qtrain.inject import Rule, default_rules, quantize, quantizer_from_config, rules_from_config
from qtrain.precision import Precision
from qtrain.quantizers import Uniform

TENSOR = Uniform("affine", per="tensor")


def bits_of(model, rules, *args, **kwargs):
    """Path → (weights, acts, grads) of the plan."""
    plan = quantize(model, rules).plan(*(args or (X,)), **kwargs)
    return {row.path: (row.bits.weights, row.bits.acts, row.bits.grads) for row in plan}


FOLLOWS = ("schedule", "schedule", None)


class TestMatching:
    def test_the_first_full_match_wins(self):
        rules = [Rule("Dense_1", weights=4, acts=4), Rule("Dense_.", weights=8), Rule()]
        assert bits_of(MLP(), rules) == {
            "Dense_0": (8, "schedule", None),
            "Dense_1": (4, 4, None),
            "Dense_2": (8, "schedule", None),
        }

    def test_order_decides(self):
        rules = [Rule(), Rule("Dense_1", weights=4, acts=4)]
        assert set(bits_of(MLP(), rules).values()) == {FOLLOWS}
        plan = quantize(MLP(), rules).plan(X)
        assert plan.unused == ("Dense_1",)
        assert "rule path='Dense_1' is never used" in str(plan)

    def test_a_part_of_a_path_is_no_match(self):
        assert bits_of(Stack(), [Rule("head", weights=8, acts=8), Rule("block0/.*")]) == {
            "block0/up": FOLLOWS,
            "block0/down": FOLLOWS,
            "head": (8, 8, None),
            "block1/up": (None, None, None),
            "block1/down": (None, None, None),
        } | bits_of(Stack(), [Rule("head", weights=8, acts=8), Rule("block0/.*")])
        with pytest.raises(UsageError, match="matches no module"):
            bits_of(Stack(), Rule("block"))

    def test_the_root_is_the_empty_path(self):
        assert bits_of(nn.Dense(3), Rule("")) == {"": FOLLOWS}
        assert bits_of(nn.Dense(3), Rule()) == {"": FOLLOWS}
        with pytest.raises(UsageError, match="matches no module"):
            bits_of(nn.Dense(3), Rule("Dense_0"))

    def test_operations(self):
        conv = {"strided", "dilated", "grouped", "depthwise", "masked"}
        rules = [Rule(ops="conv", weights=8, acts=8), Rule(ops=("dot",), weights=4, acts=4)]
        found = bits_of(ConvNet(), rules, normal(1, 8, 8, 3))
        assert found == {**dict.fromkeys(conv, (8, 8, None)), "head": (4, 4, None)}

    @pytest.mark.parametrize(
        ("position", "at"), [("first", {"Dense_0"}), ("last", {"Dense_2"}), ("ends", {"Dense_0", "Dense_2"})]
    )
    def test_positions(self, position, at):
        found = bits_of(MLP(), [Rule(position=position, weights=8, acts=8), Rule()])
        assert {path for path, bits in found.items() if bits == (8, 8, None)} == at

    def test_everything_passes_over_norms(self):
        plan = quantize(Stack(), Rule()).plan(X)
        assert not any("LayerNorm" in row.path for row in plan)

    def test_a_layer_without_a_rule_stays_in_float(self):
        model = MLP()
        qmodel = quantize(model, Rule("Dense_1"))
        variables = qmodel.init(KEY, X)
        assert [row.note for row in qmodel.plan(X)] == ["no rule", "", "no rule"]

        def hidden(apply, **kwargs):
            _, state = apply(variables, X, capture_intermediates=True, mutable=["intermediates"], **kwargs)
            return {name: value["__call__"][0] for name, value in state["intermediates"].items() if name != "__call__"}

        plain, quantized = hidden(model.apply), hidden(qmodel.apply, bits=Precision(3, 3))
        np.testing.assert_array_equal(plain["Dense_0"], quantized["Dense_0"])
        assert bool(jnp.any(plain["Dense_1"] != quantized["Dense_1"]))


class TestDefaults:
    def test_first_and_last_stay_at_eight_bits_and_the_plan_says_so(self):
        qmodel = quantize(MLP())
        assert qmodel.rules == default_rules()
        plan = qmodel.plan(X)
        assert [(row.bits.weights, row.bits.acts) for row in plan] == [(8, 8), ("schedule",) * 2, (8, 8)]
        assert [row.note for row in plan] == ["first or last layer", "", "first or last layer"]
        assert plan.followers == ("Dense_1",)
        assert "symmetric/channel @ 8 fixed" in str(plan) and "symmetric/channel @ schedule" in str(plan)

    def test_the_ends_ignore_the_schedule(self):
        qmodel = quantize(MLP((8, 4)))
        variables = qmodel.init(KEY, X)
        run = jax.jit(lambda bits: qmodel.apply(variables, X, bits=bits))
        np.testing.assert_array_equal(run(Precision(2, 2)), run(Precision(7, 7)))
        eight = quantize(MLP((8, 4)), Rule())
        expected = jax.jit(lambda bits: eight.apply(variables, X, bits=bits))(Precision(8, 8))
        np.testing.assert_allclose(run(Precision(2, 2)), expected, rtol=1e-6, atol=1e-6)

    def test_a_rule_by_default(self):
        rule = qtrain.Rule()
        assert rule.weight_quantizer == rule.act_quantizer == Uniform("symmetric", per="channel")
        assert rule.grad_quantizer is None and rule.bias_quantizer is None
        assert (rule.path, rule.residuals, rule.execution, rule.position) == (".*", "quantized", "fake", "any")
        assert (rule.weights, rule.acts, rule.grads) == (None, None, None)

    def test_ends_and_quantizers_are_arguments(self):
        first, rest = default_rules(weight_quantizer=TENSOR, act_quantizer=None, grad_quantizer=TENSOR, ends=6)
        assert (first.weights, first.acts, first.position, rest.weights) == (6, 6, "ends", None)
        assert (
            {rule.weight_quantizer for rule in (first, rest)}
            == {rule.grad_quantizer for rule in (first, rest)}
            == {TENSOR}
        )


def quantized_gradient(rule):
    """Gradient of the kernel of one Dense under a rule, and the one in float."""
    model, x = nn.Dense(4), normal(32, 6)
    qmodel = quantize(model, rule)
    params = model.init(KEY, x)["params"]

    def gradient(apply, **kwargs):
        return jax.jit(jax.grad(lambda p: jnp.sum(apply({"params": p}, x, **kwargs) ** 3)))(params)["kernel"]

    return gradient(qmodel.apply, bits=Precision(4, 4, 4)), gradient(model.apply), x, params


class TestFields:
    def test_residuals_change_the_gradient_and_not_the_output(self):
        model, variables = nn.Dense(4), nn.Dense(4).init(KEY, X)
        outputs = [
            quantize(model, Rule(residuals=r)).apply(variables, X, bits=Precision(4, 4))
            for r in ("quantized", "original")
        ]
        np.testing.assert_array_equal(*outputs)
        quantized, original = (quantized_gradient(Rule(residuals=r))[0] for r in ("quantized", "original"))
        difference = float(jnp.linalg.norm(quantized - original) / jnp.linalg.norm(original))
        assert 0.01 < difference < 0.3

    def test_gradient_quantizer(self):
        coarse, plain, *_ = quantized_gradient(Rule(grads=2, grad_quantizer=TENSOR))
        fine, *_ = quantized_gradient(Rule(grads=16, grad_quantizer=TENSOR))
        without, *_ = quantized_gradient(Rule())
        assert float(jnp.linalg.norm(fine - without)) < 1e-3 * float(jnp.linalg.norm(without))
        assert float(jnp.linalg.norm(coarse - without)) > 1e-2 * float(jnp.linalg.norm(without))
        assert plain.shape == coarse.shape

    def test_bias_quantizer(self):
        bias = jnp.asarray([0.11, -0.52, 1.0, 0.7])
        variables = {"params": {"kernel": jnp.zeros((6, 4)), "bias": bias}}
        rule = Rule(bias_quantizer=Uniform("symmetric", per="tensor"), weights=3)
        out = quantize(nn.Dense(4), rule).apply(variables, X, bits=Precision())
        np.testing.assert_allclose(out[0], [0, -2 / 3, 1, 2 / 3], rtol=1e-6)
        np.testing.assert_array_equal(
            quantize(nn.Dense(4), Rule(weights=3)).apply(variables, X, bits=Precision())[0], bias
        )
        assert "bias symmetric/tensor" in quantize(nn.Dense(4), rule).plan(X)[""].note

    def test_fixed_bits_and_the_schedules(self):
        qmodel = quantize(MLP(), Rule(weights=3))
        variables = qmodel.init(KEY, X)
        run = jax.jit(lambda bits: qmodel.apply(variables, X, bits=bits))
        np.testing.assert_array_equal(run(Precision(weights=2, acts=4)), run(Precision(weights=8, acts=4)))
        assert bool(jnp.any(run(Precision(weights=2, acts=4)) != run(Precision(weights=2, acts=5))))

    def test_none_leaves_an_operand_in_float(self):
        qmodel = quantize(nn.Dense(4), Rule())
        variables = qmodel.init(KEY, X)
        plain = nn.Dense(4).apply(variables, X)
        np.testing.assert_array_equal(qmodel.apply(variables, X, bits=Precision()), plain)
        assert bool(jnp.any(qmodel.apply(variables, X, bits=Precision(weights=3)) != plain))
        assert bool(jnp.any(qmodel.apply(variables, X, bits=Precision(acts=3)) != plain))
        assert (
            quantize(nn.Dense(4), Rule(weight_quantizer=None, act_quantizer=None)).plan(X)[""].note == "float by rule"
        )


class TestConfig:
    def test_rules(self):
        specs = [
            {"path": "head", "weights": 8, "acts": 8, "act_quantizer": "affine/tensor"},
            {
                "ops": ["conv"],
                "weight_quantizer": {"grid": "aqt", "per": [0, 3]},
                "grad_quantizer": "affine/tensor/stochastic",
            },
            {"weight_quantizer": "symmetric/32", "act_quantizer": None, "position": "first"},
            Rule(),
        ]
        rules = rules_from_config(specs)
        assert rules == (
            Rule("head", 8, 8, act_quantizer=TENSOR),
            Rule(
                ops=("conv",),
                weight_quantizer=Uniform("aqt", per=(0, 3)),
                grad_quantizer=Uniform("affine", per="tensor", rounding="stochastic"),
            ),
            Rule(weight_quantizer=Uniform(per=32), act_quantizer=None, position="first"),
            Rule(),
        )
        config = ml_collections.ConfigDict({"rules": [ml_collections.ConfigDict(spec) for spec in specs[:3]]})
        assert rules_from_config(config.rules) == rules[:3]

    @pytest.mark.parametrize(
        "spec", ["symmetric/channel", "affine/tensor/stochastic", "aqt/64", "unsigned/row/floor", "sign/column"]
    )
    def test_a_quantizer_says_what_the_config_said(self, spec):
        assert "/".join(quantizer_from_config(spec, "q").describe().split()) == spec

    def test_quantizers_and_none_pass_through(self):
        assert quantizer_from_config(None, "q") is None
        assert quantizer_from_config(TENSOR, "q") is TENSOR
        config = ml_collections.ConfigDict({"grid": "affine", "per": "tensor", "statistics": 0.9})
        assert quantizer_from_config(config, "q") == Uniform("affine", per="tensor", statistics=0.9)

    @pytest.mark.parametrize(
        ("spec", "message"),
        [
            ("afine/tensor", r"q\.grid='afine'.*Did you mean 'affine'"),
            ("affine/tenser", r"q\.per='tenser'.*Did you mean 'tensor'"),
            ("affine/tensor/stochastic/0.9", "give 'grid/per/rounding'"),
            ({"gird": "affine"}, r"q\.gird: Uniform has no such field.*Did you mean 'grid'"),
            ({"statistics": 1.5}, r"q\.statistics=1.5"),
            ({"statistics": "0.9"}, r"^q\."),
            (8, "q=8: give 'grid/per/rounding'"),
            (["affine"], r"q=\['affine'\]: give"),
        ],
    )
    def test_quantizer_mistakes(self, spec, message):
        with pytest.raises(UsageError, match=message):
            quantizer_from_config(spec, "q")

    @pytest.mark.parametrize(
        ("specs", "message"),
        [
            ([], r"quant\.rules is empty"),
            ("default", r"quant\.rules='default': give a sequence"),
            ({"path": "head"}, r"quant\.rules=.*: give a sequence"),
            (4, r"quant\.rules=4: give a sequence"),
            (["head"], r"quant\.rules\[0\]='head': give a mapping"),
            ([{}, {"wieghts": 4}], r"quant\.rules\[1\]\.wieghts: a rule has no such field.*Did you mean 'weights'"),
            ([{}, {"weights": 0}], r"quant\.rules\[1\]: .*weights=0 is not a width"),
            ([{"path": "("}], r"quant\.rules\[0\]: .*not a regular expression"),
            ([{"act_quantizer": "afine"}], r"quant\.rules\[0\]\.act_quantizer\.grid='afine'"),
        ],
    )
    def test_rule_mistakes(self, specs, message):
        with pytest.raises(UsageError, match=message):
            rules_from_config(specs)


def test_rules_reach_into_blocks_by_depth():
    found = bits_of(Stack(Block, 3), [Rule("block[01]/.*", weights=4), Rule(r"block\d+/down", acts=6), Rule()])
    assert found["block0/down"] == (4, "schedule", None)
    assert found["block2/down"] == ("schedule", 6, None)
    assert found["block2/up"] == found["head"] == FOLLOWS
