"""Execution: the widths that codes hold, that it computes what fake does, and what rules and configs say of it."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from execution_rules import BITS, INT8, assert_like_fake, native_rule, spy, traced
from inject_models import KEY, MLP, Block, Scanned, Stack, X, normal, vmapped
from program import small_config
from refusals import refused

from qtrain.build import build
from qtrain.experiment import describe
from qtrain.inject import Rule, quantize
from qtrain.inject.execution import Choice, choose
from qtrain.inject.rules import EXECUTIONS
from qtrain.precision import Precision
from qtrain.quantizers import RESIDUALS, Uniform
from qtrain.quantizers.native import Paths

STOCHASTIC = Uniform("symmetric", per="tensor", rounding="stochastic")


class TestRules:
    @pytest.mark.parametrize("value", EXECUTIONS)
    def test_executions(self, value):
        assert Rule(execution=value).execution == value

    @pytest.mark.parametrize("value", RESIDUALS)
    def test_residuals(self, value):
        assert Rule(residuals=value).residuals == value

    def test_mistakes(self):
        refused(lambda: Rule("a", execution="natvie"), "rule 'a': execution='natvie'", "'fake', 'native', 'auto'")
        refused(lambda: Rule("a", residuals="fold"), "rule 'a': residuals='fold'", "'folded', 'requantized'")

    def test_limits(self):
        for value in (0, 4.5, "eight", True, Precision(weights=0), Precision(weights=jnp.float32(8))):
            refused(lambda value=value: quantize(MLP(), widest=value), "quantize: widest=", "give a whole number of")
        qmodel = quantize(MLP(), widest=Precision(weights=8.0, grads=np.int64(6)), narrowest=2)
        assert (qmodel.widest, qmodel.narrowest) == (Precision(8, None, 6), Precision(2, 2, 2))


def product_dtypes(jaxpr):
    """Operand dtypes of every dot and convolution of a program."""
    found = []
    for eqn in jaxpr.eqns:
        if eqn.primitive.name in ("dot_general", "conv_general_dilated"):
            found.append(str(eqn.invars[0].aval.dtype))
        for value in eqn.params.values():
            for inner in value if isinstance(value, tuple | list) else (value,):
                if hasattr(inner, "jaxpr"):
                    found += product_dtypes(inner.jaxpr)
                elif hasattr(inner, "eqns"):
                    found += product_dtypes(inner)
    return found


class TestWidths:
    def test_both_programs_where_traced_bits_may_exceed_eight(self):
        both = Paths("int8", "int8", "int8", switch=True)
        for widest, expected in ((None, both), (12, both), (8, INT8), (Precision(8, 8, 8), INT8), (3, INT8)):
            assert traced(MLP(), native_rule(), widest=widest) == [expected] * 3
        assert traced(MLP(), native_rule(), widest=Precision(8, 12, 8)) == [both] * 3
        # Only gradients may be wide, and they are in no product on codes.
        forward = native_rule(grad_quantizer=None)
        assert traced(MLP(), forward, widest=Precision(8, 8, 12)) == [Paths("int8", "float", "float")] * 3

    def test_what_is_known_needs_no_switch(self):
        fixed = native_rule(weights=8, acts=4, grads=8)
        assert traced(MLP(), fixed) == [INT8] * 3
        assert traced(MLP(), native_rule(), concrete=True) == [INT8] * 3
        assert traced(MLP(), native_rule(weights=8, acts=8)) == [Paths("int8", "int8", "int8", switch=True)] * 3

    def test_a_narrow_schedule_carries_no_float_program(self):
        def dtypes(**kwargs):
            qmodel = quantize(MLP(), native_rule(), **kwargs)
            variables = jax.eval_shape(qmodel.init, KEY, X)
            bits = jax.tree.map(jnp.float32, BITS)
            loss = jax.grad(lambda p, bits: qmodel.apply({"params": p}, X, bits=bits).sum())
            return product_dtypes(jax.make_jaxpr(loss)(variables["params"], bits).jaxpr)

        assert set(dtypes(widest=8)) == {"int8"}
        assert set(dtypes()) == {"int8", "float32"}

    def test_a_schedule_that_leaves_the_codes_runs_in_one_compilation(self):
        rule = native_rule(grad_quantizer=STOCHASTIC)
        assert_like_fake(MLP(), rule, X, [(4, 4, 8), (8, 8, 8), (12, 12, 8), (5, 12, 12), (32, 32, 32)], widest=12)


LIFTED = {"scan": Scanned(nn.remat(Block), length=2), "vmap": Stack(vmapped(nn.Dense), 0)}


@pytest.mark.parametrize(("name", "widest"), [("scan", None), ("scan", 8), ("vmap", None)])
def test_lifted_models(name, widest):
    x = normal(2, 6) if name == "vmap" else X
    assert_like_fake(LIFTED[name], native_rule(), x, [(3, 4, 8), (8, 8, 8)], widest=widest)


def test_a_precision_for_each_layer():
    """Known to one layer, traced to another."""
    bits = {"Dense_0": Precision(8, 8, 8), "Dense_1": jax.tree.map(jnp.float32, BITS), "Dense_2": Precision(4, 4)}
    both = Paths("int8", "int8", "int8", switch=True)
    seen = []
    qmodel = quantize(MLP(), native_rule(), execute=spy(seen))
    variables = jax.eval_shape(qmodel.init, KEY, X)

    def apply(v, middle):
        return qmodel.apply(v, X, bits={**bits, "Dense_1": middle})

    jax.eval_shape(apply, variables, bits["Dense_1"])
    assert seen == [INT8, both, Paths("int8", "float", "float")]


def test_choose_by_hand():
    """The function alone, without a model."""
    qmodel = quantize(MLP(), native_rule())
    qmodel.plan(X)
    variables = jax.eval_shape(qmodel.init, KEY, X)
    record = qmodel._resolve(variables, None, (X,), {}).records["Dense_0"]
    assert record.contraction.contracted == record.contracted == ((1,), (0,))
    assert choose(native_rule(), record, Precision(8, 8, 8), "cpu") == Choice(INT8)
    assert choose(Rule(), record, Precision(), "cpu") == Choice()


class TestConfig:
    def test_it_reaches_the_recipes_and_not_rules_of_their_own(self):
        own = ({"path": "Dense_1", "residuals": "original"},)
        config = small_config(quant__execution="native", quant__residuals="folded", quant__rules=own)
        experiment = build(config)
        rules = [(rule.execution, rule.residuals) for rule in experiment.qmodel.rules]
        assert rules == [("fake", "original"), ("native", "folded"), ("native", "folded")]
        assert [row.execution for row in experiment.plan] == ["int8", "float", "int8"]
        assert "execution" in describe(experiment)

    def test_cpt_keeps_its_last_layer_in_float(self):
        experiment = build(small_config(quant__recipe="cpt", quant__execution="native", quant__residuals="requantized"))
        *inner, last = experiment.plan
        assert {row.execution for row in inner} == {"int8"} and (last.execution, last.execution_reason) == ("float", "")
        assert {row.residuals for row in inner} == {"requantized"}

    def test_schedules_say_how_wide_codes_must_be(self):
        def paths(**schedule):
            (rule,) = {choice.paths for choice in build(wide(**schedule)).plan.choices.values()}
            return rule

        def wide(**overrides):
            config = small_config(
                schedule="constant",
                quant__execution="native",
                quant__ends=8,
                quant__weights="symmetric/tensor",
                quant__acts="symmetric/tensor",
            )
            with config.unlocked():
                config.schedule.update(**overrides)
            return config

        assert paths(bits=8) == INT8
        config = wide(name="linear", start_bits=4, end_bits=12, bits=None)
        experiment = build(config)
        assert [c.paths.switch for c in experiment.plan.choices.values()] == [False, True, False]
        assert "float above 8 bits" in describe(experiment)
        refused(lambda: build(wide(bits=12)), "layer 'Dense_1': execution='native' cannot run: ", "12 bits")

    @pytest.mark.parametrize(
        ("overrides", "pieces"),
        [
            ({"quant__execution": "nativ"}, ("quant.execution='nativ': give one of", "Did you mean 'native'?")),
            ({"quant__residuals": "origina"}, ("quant.residuals='origina': give one of", "Did you mean 'original'?")),
            (
                {"quant__execution": "auto", "quant__backend": "aqt"},
                ("quant.backend='aqt' with execution='auto'", "use quant.execution='fake', or quant.backend='qtrain'"),
            ),
            (
                {"quant__rules": ({"path": ".*", "execution": "native"},), "quant__backend": "aqt"},
                ("quant.backend='aqt' with execution='native'",),
            ),
            (
                {"quant__residuals": "folded", "quant__backend": "aqt"},
                ("quant.backend='aqt' with residuals='folded'", "('quantized', 'original')"),
            ),
            (
                {"quant__acts": "none", "quant__execution": "native"},
                ("layer 'Dense_0': execution='native' cannot run: its activations are not quantized",),
            ),
            (
                {"quant__ends": 12, "quant__execution": "native"},
                ("layer 'Dense_0': execution='native' cannot run: ", "12 bits", "give at most 8 bits"),
            ),
        ],
    )
    def test_mistakes(self, overrides, pieces):
        refused(lambda: build(small_config(**overrides)), *pieces)
