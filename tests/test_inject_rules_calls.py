"""Rules in calls: what a call skips, every way of getting rules and bits wrong, what is remembered between calls."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from inject_models import KEY, MLP, SetupMLP, Stack, X

from qtrain.errors import UsageError
from qtrain.inject import Rule, default_rules, quantize
from qtrain.precision import Precision


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
