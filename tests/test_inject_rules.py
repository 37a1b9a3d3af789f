"""Rules: what they match, which wins, what bits they mean, and every way of getting them wrong."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import pytest
from inject_models import MLP, Block, ConvNet, SetupMLP, Stack, normal

import qtrain
from qtrain.errors import UsageError
from qtrain.inject import Rule, default_rules, quantize, quantizer_from_config, rules_from_config
from qtrain.precision import Precision
from qtrain.quantizers import Uniform

KEY = jax.random.key(0)
X = normal(4, 6)
TENSOR = Uniform("affine", per="tensor")


def bits_of(model, rules, *args, **kwargs):
    """Path → (weights, acts, grads) of the plan."""
    plan = quantize(model, rules).plan(*(args or (X,)), **kwargs)
    return {row.path: (row.bits.weights, row.bits.acts, row.bits.grads) for row in plan}


FOLLOWS = ("schedule", "schedule", None)


class Auxiliary(nn.Module):
    """A head that evaluation skips, and which comes last."""

    @nn.compact
    def __call__(self, x, train=True):
        x = nn.relu(nn.Dense(8, name="stem")(x))
        x = nn.relu(nn.Dense(8, name="middle")(x))
        out = nn.Dense(3, name="head")(x)
        if train:
            nn.Dense(3, name="auxiliary")(x)
        return out


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


class TestLayersThatACallSkips:
    """Rules are about the model; one call may reach a part of it."""

    def test_a_rule_for_a_skipped_layer_stands(self):
        qmodel = quantize(Auxiliary(), [Rule("auxiliary", weights=8, acts=8), Rule()])
        variables = qmodel.init(KEY, X)
        out = qmodel.apply(variables, X, train=False, bits=Precision(3, 3))
        np.testing.assert_array_equal(out, qmodel.apply(variables, X, train=True, bits=Precision(3, 3)))
        with pytest.raises(UsageError, match="'auxilliary' matches no module"):
            quantize(Auxiliary(), [Rule("auxilliary"), Rule()]).apply(variables, X, train=False, bits=Precision(3, 3))

    def test_the_last_layer_is_the_models_not_the_calls(self):
        qmodel = quantize(Auxiliary())
        variables = qmodel.init(KEY, X)
        assert qmodel.plan(X).followers == ("middle", "head")
        out = qmodel.apply(variables, X, train=False, bits=Precision(2, 2))
        np.testing.assert_array_equal(out, qmodel.apply(variables, X, train=True, bits=Precision(2, 2)))

    def test_an_order_that_was_never_seen_is_asked_for(self):
        variables = quantize(Auxiliary()).init(KEY, X)
        fresh = quantize(Auxiliary())
        with pytest.raises(UsageError, match=r"does not reach \['auxiliary'\].*call plan or init before"):
            fresh.apply(variables, X, train=False, bits=Precision(2, 2))
        fresh.plan(X)
        fresh.apply(variables, X, train=False, bits=Precision(2, 2))

    def test_a_method_that_sees_half_of_the_model(self):
        qmodel = quantize(SetupMLP())
        variables = qmodel.init(KEY, X)
        whole = qmodel.apply(variables, X, bits=Precision(2, 2))
        code = qmodel.apply(variables, X, bits=Precision(2, 2), method="encode")
        np.testing.assert_array_equal(whole, qmodel.apply(variables, code, bits=Precision(2, 2), method="decode"))

    def test_bits_for_a_skipped_layer(self):
        qmodel = quantize(Auxiliary(), Rule())
        variables = qmodel.init(KEY, X)
        bits = {path: Precision(4, 4) for path in ("stem", "middle", "head", "auxiliary")}
        out = qmodel.apply(variables, X, train=False, bits=bits)
        np.testing.assert_array_equal(out, qmodel.apply(variables, X, train=False, bits=Precision(4, 4)))
        with pytest.raises(
            UsageError, match=r"bits\['auxilliary'\].*did you mean 'auxiliary'|Did you mean 'auxiliary'"
        ):
            qmodel.apply(variables, X, train=True, bits={**bits, "auxilliary": Precision(4, 4)})


class TestMistakes:
    @pytest.mark.parametrize("bits", [0, -1, 4.5, "four", True, float("nan"), [4], float("inf")])
    @pytest.mark.parametrize("name", ["weights", "acts", "grads"])
    def test_fixed_bits(self, name, bits):
        with pytest.raises(UsageError, match=f"rule 'head': {name}=.* is not a width; give a whole number") as error:
            Rule("head", **{name: bits})
        assert "\n" not in str(error.value)

    @pytest.mark.parametrize("bits", [8, 8.0, np.int64(8), np.float32(8)])
    def test_whole_numbers_are_widths(self, bits):
        assert Rule(weights=bits).weights == 8

    @pytest.mark.parametrize(
        "bits", [0, -1, 4.5, "four", True, np.array([4.0, 0.0]), jnp.float32(4.5), jnp.array([8, 0])]
    )
    @pytest.mark.parametrize("per_layer", [False, True])
    def test_the_steps_bits(self, bits, per_layer):
        qmodel = quantize(nn.Dense(3), Rule())
        variables = jax.eval_shape(qmodel.init, KEY, X)
        precision = Precision(weights=4, acts=bits)
        with pytest.raises(UsageError, match=r"not a (width|whole number)"):
            jax.eval_shape(lambda v: qmodel.apply(v, X, bits={"": precision} if per_layer else precision), variables)

    @pytest.mark.parametrize("bits", [4, "4", (4, 4), {"": 4}])
    def test_bits_that_are_no_precision(self, bits):
        qmodel = quantize(nn.Dense(3), Rule())
        with pytest.raises(UsageError, match=r"give a qtrain\.Precision, or a mapping"):
            qmodel.apply({"params": {"kernel": jnp.ones((6, 3)), "bias": jnp.ones(3)}}, X, bits=bits)

    def test_a_path_that_is_not_quantized(self):
        qmodel = quantize(MLP(), Rule())
        variables = jax.eval_shape(qmodel.init, KEY, X)
        bits = {f"Dense_{i}": Precision(4, 4) for i in range(3)}

        def apply(bits):
            return jax.eval_shape(lambda v: qmodel.apply(v, X, bits=bits), variables)

        apply(bits)
        with pytest.raises(
            UsageError, match=r"bits\['Dense_9'\]: no layer of that path is quantized. Did you mean 'Dense_"
        ):
            apply({**bits, "Dense_9": Precision(4, 4)})
        with pytest.raises(UsageError, match=r"no entry for \['Dense_1'\], which follow the schedule"):
            apply({path: p for path, p in bits.items() if path != "Dense_1"})

    def test_a_fixed_layer_needs_no_bits(self):
        qmodel = quantize(MLP(), default_rules())
        variables = jax.eval_shape(qmodel.init, KEY, X)
        jax.eval_shape(lambda v: qmodel.apply(v, X, bits={"Dense_1": Precision(4, 4)}), variables)

    @pytest.mark.parametrize(
        ("fields", "message"),
        [
            ({"path": "("}, r"rule path='\(': not a regular expression"),
            ({"path": None}, "rule path=None: not a regular expression"),
            ({"ops": "dott"}, "ops='dott'; give one of .*Did you mean 'dot'"),
            ({"ops": ("conv", "pool")}, "ops='pool'; give one of"),
            ({"ops": 3}, "ops=3; give a tuple of"),
            ({"residuals": "quantised"}, "residuals='quantised'; give one of .*Did you mean 'quantized'"),
            ({"position": "frist"}, "position='frist'; give one of .*Did you mean 'first'"),
            ({"execution": "fak"}, "execution='fak'; give one of .*Did you mean 'fake'"),
            ({"weight_quantizer": 8}, "weight_quantizer=8 is not a quantizer"),
            ({"act_quantizer": "affine"}, "act_quantizer='affine' is not a quantizer"),
        ],
    )
    def test_fields(self, fields, message):
        with pytest.raises(UsageError, match=message) as error:
            Rule(**fields)
        assert "\n" not in str(error.value)

    @pytest.mark.parametrize("call", ["plan", "init", "apply"])
    @pytest.mark.parametrize(
        ("rule", "message"),
        [
            (Rule("block0/upp"), "rule path='block0/upp' matches no module; quantizable are 'block0/up'.*Did you mean"),
            (
                Rule("block0/LayerNorm_0"),
                "matches only what cannot be quantized .*'block0/LayerNorm_0'.*Did you mean 'block0/",
            ),
            (Rule("head", ops=("conv",)), r"\(ops=\('conv',\)\) matches only what cannot be quantized \('head'\)"),
            (Rule("head", position="first"), "position='first', which is 'block0/up' and not among what it matches"),
        ],
    )
    def test_a_rule_that_does_nothing(self, rule, message, call):
        model = Stack()
        qmodel = quantize(model, [rule, Rule()])
        calls = {
            "plan": lambda: qmodel.plan(X),
            "init": lambda: jax.eval_shape(qmodel.init, KEY, X),
            "apply": lambda: jax.eval_shape(
                lambda v: qmodel.apply(v, X, bits=Precision(4, 4)), jax.eval_shape(model.init, KEY, X)
            ),
        }
        with pytest.raises(UsageError, match=message) as error:
            calls[call]()
        assert "\n" not in str(error.value)

    def test_a_model_with_nothing_to_quantize(self):
        class Norm(nn.Module):
            @nn.compact
            def __call__(self, x):
                return nn.LayerNorm()(x)

        with pytest.raises(UsageError, match=r"Norm has no layer that can be quantized.*'LayerNorm_0'"):
            quantize(Norm(), Rule()).plan(X)

    def test_what_quantize_takes(self):
        with pytest.raises(UsageError, match=r"type is not a flax.linen.Module instance|Dense"):
            quantize(nn.Dense, Rule())
        with pytest.raises(UsageError, match=r"give qtrain\.Rule objects"):
            quantize(nn.Dense(3), ["head"])
        assert quantize(nn.Dense(3), Rule()).rules == (Rule(),)


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


class TestMemory:
    """What was resolved is remembered by what it depends on, and no longer than useful."""

    def count(self, monkeypatch, model):
        calls = []
        apply = type(model).apply

        def counted(self, *args, **kwargs):
            calls.append(1)
            return apply(self, *args, **kwargs)

        monkeypatch.setattr(type(model), "apply", counted)
        return calls

    def test_an_eager_loop_resolves_once(self, monkeypatch):
        model = MLP()
        qmodel = quantize(model, Rule())
        variables = qmodel.init(KEY, X)
        calls = self.count(monkeypatch, model)
        for bits in (2, 3, 4):
            qmodel.apply(variables, X, bits=Precision(bits, bits))
        assert len(calls) == 3 + 1
        qmodel.apply(variables, X[:2], bits=Precision(4, 4))  # another shape
        assert len(calls) == 5 + 1

    def test_static_arguments_are_told_apart(self):
        class Chooses(nn.Module):
            @nn.compact
            def __call__(self, x, layer, flag=0):
                first, second = nn.Dense(3, name="first"), nn.Dense(3, name="second")
                if self.is_initializing():
                    first(x), second(x)
                return layer(first, second)(x) if flag is not True else nn.Dense(3, name="first")(x)

        qmodel = quantize(Chooses(), Rule())
        variables = qmodel.init(KEY, X, lambda first, second: first)
        for _ in range(3):  # lambdas of one address and one representation
            a, b = (qmodel.apply(variables, X, pick, bits=Precision(3, 3)) for pick in (lambda f, s: f, lambda f, s: s))
            assert bool(jnp.any(a != b))

    def test_unhashable_arguments(self):
        class Reads(nn.Module):
            @nn.compact
            def __call__(self, x, options):
                for name in options.names:
                    x = nn.Dense(6, name=name)(x)
                return x

        class Options:
            __hash__ = None

            def __init__(self, *names):
                self.names = names

        options = Options("a", "b")
        qmodel = quantize(Reads(), Rule())
        variables = qmodel.init(KEY, X, options)
        both = qmodel.apply(variables, X, options, bits=Precision(3, 3))
        options.names = ("a",)
        one = qmodel.apply(variables, X, options, bits=Precision(3, 3))
        assert bool(jnp.any(both != one))

    def test_memory_is_bounded(self):
        class Scaled(nn.Module):
            @nn.compact
            def __call__(self, x, factor):
                return nn.Dense(2)(x * factor)

        qmodel = quantize(Scaled(), Rule())
        variables = qmodel.init(KEY, X[:1, :2], 1.0)
        for step in range(150):
            qmodel._resolve(variables, None, (X[:1, :2], float(step)), {})
        assert len(qmodel._memory) <= 128


def test_nothing_of_the_model_needs_to_be_quantized_in_a_call():
    """A method without any quantizable layer runs, as long as the model has one elsewhere."""

    class Model(nn.Module):
        def setup(self):
            self.norm, self.head = nn.LayerNorm(), nn.Dense(3)

        def normalize(self, x):
            return self.norm(x)

        def __call__(self, x):
            return self.head(self.normalize(x))

    qmodel = quantize(Model(), Rule())
    variables = qmodel.init(KEY, X)
    out = qmodel.apply(variables, X, bits=Precision(3, 3), method="normalize")
    np.testing.assert_array_equal(out, Model().apply(variables, X, method="normalize"))


def test_rules_reach_into_blocks_by_depth():
    found = bits_of(Stack(Block, 3), [Rule("block[01]/.*", weights=4), Rule(r"block\d+/down", acts=6), Rule()])
    assert found["block0/down"] == (4, "schedule", None)
    assert found["block2/down"] == ("schedule", 6, None)
    assert found["block2/up"] == found["head"] == FOLLOWS
