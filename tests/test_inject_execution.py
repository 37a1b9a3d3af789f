"""Execution: who decides what runs on codes, that it is shown, that it stays, and that it computes what fake does."""

import json
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from inject_models import MLP, Block, ConvNet, Scanned, Stack, normal, random_variables, vmapped
from program import small_config

from qtrain.build import build
from qtrain.errors import UsageError
from qtrain.experiment import describe
from qtrain.inject import Rule, quantize
from qtrain.inject.execution import Choice, choose
from qtrain.inject.rules import EXECUTIONS
from qtrain.precision import Precision
from qtrain.quantizers import RESIDUALS, Uniform, contract, native
from qtrain.quantizers.native import Paths

KEY = jax.random.key(0)
X = normal(4, 6)
TENSOR = Uniform("symmetric", per="tensor")
STOCHASTIC = Uniform("symmetric", per="tensor", rounding="stochastic")
TENSORS = {"weight_quantizer": TENSOR, "act_quantizer": TENSOR, "grad_quantizer": TENSOR}
INT8 = Paths("int8", "int8", "int8")
BITS = Precision(weights=8, acts=8, grads=8)


def native_rule(path=".*", **fields):
    """A rule under which all three products have codes."""
    return Rule(path, **{**TENSORS, "execution": "native", **fields})


def fake(rule):
    return Rule(**{**vars(rule), "execution": "fake"})


def spy(seen):
    """`contract`, and a note of each layer's paths."""

    def execute(op, operands, lhs, rhs, traced):
        seen.append(operands.paths)
        return contract(op, operands, lhs, rhs, traced)

    return execute


def traced(model, rules, x=X, bits=BITS, concrete=False, **kwargs):
    """What each layer's contraction is told in a call whose bits are traced, or concrete."""
    seen = []
    qmodel = quantize(model, rules, execute=spy(seen), **kwargs)
    variables = jax.eval_shape(qmodel.init, KEY, x)

    def apply(variables, bits):
        return qmodel.apply(variables, x, bits=bits, rngs={"quant": KEY})

    if concrete:
        jax.eval_shape(lambda v: apply(v, bits), variables)
    else:
        jax.eval_shape(apply, variables, jax.tree.map(jnp.float32, bits))
    return seen


def plan(rules, model=None, x=X, **kwargs):
    return quantize(MLP() if model is None else model, rules, **kwargs).plan(x)


def refused(call, *pieces):
    with pytest.raises(UsageError) as caught:
        call()
    message = str(caught.value)
    assert "\n" not in message
    for piece in pieces:
        assert piece in message
    return message


@pytest.fixture
def never(monkeypatch):
    """A backend on which float is faster throughout; what `slower` was asked."""
    asked = []

    def slower(op, operands, lhs, rhs, backend):
        asked.append((lhs.shape, rhs.shape, backend))
        return dict.fromkeys(("forward", "dlhs", "drhs"), "float is faster here")

    monkeypatch.setattr(native, "slower", slower)
    return asked


@pytest.fixture
def always(monkeypatch):
    monkeypatch.setattr(native, "slower", lambda *_: {})


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


class TestWhatIsAskedFor:
    def test_fake_is_the_default_and_asks_nobody(self, never, monkeypatch):
        monkeypatch.setattr(native, "obstacles", None)
        assert traced(MLP(), Rule()) == [Paths()] * 3
        assert not never

    def test_native_is_native_however_slow(self, never):
        assert traced(MLP(), native_rule(), widest=8) == [INT8] * 3

    def test_auto_is_what_is_not_slower(self, never):
        rules = [native_rule("Dense_0", execution="auto"), native_rule("Dense_1"), Rule()]
        assert traced(MLP(), rules, widest=8) == [Paths(), INT8, Paths()]
        assert {(lhs, rhs) for lhs, rhs, _ in never} == {((4, 6), (6, 8))}
        assert {backend for *_, backend in never} == {jax.default_backend()}

    def test_auto_asks_for_each_product(self, monkeypatch):
        monkeypatch.setattr(native, "slower", lambda *_: {"drhs": "the batch is small"})
        assert traced(MLP(), native_rule(execution="auto"), widest=8) == [Paths("int8", "int8", "float")] * 3

    def test_a_backward_product_without_codes_is_in_float(self):
        float_backward = Paths("int8", "float", "float")
        assert traced(MLP(), native_rule(grad_quantizer=None), widest=8) == [float_backward] * 3
        assert traced(MLP(), native_rule(residuals="original"), widest=8) == [float_backward] * 3
        # Scales per row of the input and per column of the kernel vary along the backward contractions.
        rows = Rule(execution="native", grad_quantizer=TENSOR)
        assert traced(MLP(), rows, widest=8) == [float_backward] * 3
        for residuals in ("folded", "requantized"):
            rule = Rule(execution="native", grad_quantizer=TENSOR, residuals=residuals)
            assert traced(MLP(), rule, widest=8) == [INT8] * 3

    def test_initialisation_and_the_float_model_know_nothing_of_it(self, monkeypatch):
        qmodel = quantize(MLP(), native_rule())
        monkeypatch.setattr("qtrain.inject.linen_pass.choose", None)
        variables = qmodel.init(KEY, X)
        np.testing.assert_array_equal(qmodel.apply(variables, X), MLP().apply(variables, X))

    def test_bits_that_leave_both_operands_in_float(self):
        qmodel = quantize(MLP(), native_rule())
        variables = qmodel.init(KEY, X)
        np.testing.assert_array_equal(qmodel.apply(variables, X, bits=Precision()), MLP().apply(variables, X))

    def test_layers_that_are_not_quantized(self):
        assert traced(MLP(), [native_rule("Dense_1")], widest=8) == [INT8]


CASES = {
    "acts": ({"act_quantizer": None}, "its activations are not quantized (act_quantizer=None); quantize them, or"),
    "weights": ({"weight_quantizer": None}, "its weights are not quantized (weight_quantizer=None); quantize them, or"),
    "fixed": ({"weights": 12}, "12 bits"),
    "group": ({"weight_quantizer": Uniform(per=4)}, ""),
}


class TestRefusals:
    @pytest.mark.parametrize("name", CASES)
    def test_native_that_cannot_run_names_layer_reason_and_alternatives(self, name):
        fields, reason = CASES[name]
        rules = [Rule("Dense_1", **{"execution": "native", **fields}), Rule()]
        parts = ("layer 'Dense_1': execution='native' cannot run: " + reason * (name != "fixed"), reason)
        message = refused(lambda: plan(rules), *parts, "use execution='auto' or 'fake'")
        assert name != "fixed" or "give at most 8 bits, or use" in message
        refused(lambda: traced(MLP(), rules), message)

    @pytest.mark.parametrize("name", CASES)
    def test_auto_never_errs(self, name):
        fields, _ = CASES[name]
        rules = [Rule("Dense_1", **{"execution": "auto", **fields}), Rule()]
        row = plan(rules)["Dense_1"]
        assert "int8 fwd" not in row.execution and row.execution != "int8"
        assert traced(MLP(), rules)[1].forward == "float"

    def test_more_bits_than_codes_hold(self, always):
        wide = Precision(weights=8, acts=12, grads=8)
        message = refused(
            lambda: traced(MLP(), native_rule("Dense_0"), bits=wide, concrete=True),
            "layer 'Dense_0': execution='native' cannot run: ",
            "12 bits",
            "give at most 8 bits, or use execution='auto' or 'fake'",
        )
        assert refused(lambda: plan(native_rule("Dense_0"), widest=16, narrowest=12)) == message
        auto = native_rule("Dense_0", execution="auto")
        assert traced(MLP(), auto, bits=wide, concrete=True) == [Paths()]
        assert plan(auto, widest=16, narrowest=12)["Dense_0"].execution == "float"

    def test_a_call_that_leaves_one_operand_in_float(self):
        refused(
            lambda: traced(MLP(), native_rule(), bits=Precision(weights=4), concrete=True),
            "layer 'Dense_0': execution='native' cannot run: its activations are not quantized (bits have acts=None)",
        )

    def test_gradients_of_many_bits_are_in_float(self):
        """Told by the switch: where there are codes, the cotangent would be encoded too."""
        float_backward = Paths("int8", "float", "float", switch=True)
        bits = Precision(weights=4, acts=4, grads=16)
        assert traced(MLP(), native_rule(), bits=bits, concrete=True) == [float_backward] * 3
        assert traced(MLP(), native_rule(grads=16), widest=8) == [float_backward] * 3
        assert_like_fake(MLP((4, 4)), native_rule(grads=16), X, [(3, 4, 2)], widest=8)


class TestPlan:
    def test_nothing_is_said_where_nothing_was_asked(self):
        found = plan(Rule())
        assert "execution" not in str(found) and not found.choices
        assert all((row.execution, row.execution_reason) == ("float", "") for row in found)
        assert {"execution", "execution_reason"} <= json.loads(found.dumps())[0].keys()

    def test_every_layer_says_what_it_does_and_why(self, monkeypatch):
        monkeypatch.setattr(native, "slower", lambda *_: {"drhs": "the batch is small"})
        rules = [
            native_rule("Dense_0"),
            native_rule("Dense_1", execution="auto", grad_quantizer=None),
            native_rule(execution="auto"),
        ]
        found = plan(rules, MLP((8, 8, 8, 4)), widest=8)
        unquantized = "its gradients are not quantized (grad_quantizer=None)"
        assert [(row.execution, row.execution_reason) for row in found] == [
            ("int8", ""),
            ("int8 fwd, float dX, float dW", f"auto; dX, dW float: {unquantized}"),
            *[("int8 fwd, int8 dX, float dW", "auto; dW float: the batch is small")] * 2,
        ]
        lines = str(found).splitlines()
        cells = [re.split(r"\s{2,}", line) for line in (lines[0], *lines[2:6])]
        assert [row[5] for row in cells] == ["execution", *(row.execution for row in found)]
        assert [row[8:] for row in cells] == [["note"], [], *([row.execution_reason] for row in list(found)[1:])]
        assert all(line[lines[0].index("execution") - 1] == " " for line in lines[1:6])
        written = json.loads(found.dumps())
        assert [row["execution_reason"] for row in written] == [row.execution_reason for row in found]

    def test_advice_is_given_once(self, monkeypatch):
        reasons = {"dlhs": "the kernel is small; give more filters", "drhs": "the batch is small; give more examples"}
        monkeypatch.setattr(native, "slower", lambda *_: reasons)
        found = plan(native_rule(execution="auto"), widest=8)
        lines = str(found).splitlines()
        assert {row.execution for row in found} == {"int8 fwd, float dX, float dW"}
        assert all(
            line.endswith("auto; dX float: the kernel is small; dW float: the batch is small") for line in lines[2:5]
        )
        assert lines[6:] == [f"float: {reason}" for reason in reasons.values()]
        assert "give more filters" in found["Dense_0"].execution_reason

    def test_all_on_codes(self, always):
        (row, *_) = plan(native_rule(execution="auto"), widest=8)
        assert (row.execution, row.execution_reason) == ("int8", "auto: nothing is faster in float")

    def test_all_in_float(self, never):
        (row, *_) = plan(native_rule(execution="auto"), widest=8)
        assert (row.execution, row.execution_reason) == ("float", "auto; float: float is faster here")

    def test_a_note_of_its_own_comes_first(self):
        rules = [native_rule(position="ends", residuals="folded"), Rule()]
        found = plan(rules)
        assert "first or last layer; scales folded into the cotangent; float above 8 bits" in str(found)
        assert found["Dense_1"].execution == "float" and found["Dense_1"].execution_reason == ""

    @pytest.mark.parametrize("x", [X, normal(2, 8, 8, 3)], ids=["dot", "conv"])
    def test_the_count_describes_the_model_and_not_the_formulation(self, x):
        model = MLP() if x.ndim == 2 else ConvNet()
        affine = Uniform("affine", per="tensor")
        rule = Rule(weight_quantizer=affine, act_quantizer=affine, grad_quantizer=affine, execution="auto")
        native_plan, fake_plan = plan(rule, model, x), plan(fake(rule), model, x)
        assert native_plan.choices and not fake_plan.choices
        assert native_plan.ops == fake_plan.ops and native_plan.macs == fake_plan.macs
        assert native_plan.weight_scales == fake_plan.weight_scales

    @pytest.mark.parametrize("residuals", RESIDUALS)
    def test_residuals_reach_the_count(self, residuals):
        found = plan(native_rule(residuals=residuals, execution="auto"))
        assert {op.marker.residuals for op in found.ops} == {residuals}


class TestFrozen:
    def test_the_choice_serves_every_shape(self, monkeypatch):
        def slower(op, operands, lhs, rhs, backend):
            return {"forward": "few rows", "drhs": "few rows"} if lhs.shape[0] < 8 else {}

        monkeypatch.setattr(native, "slower", slower)
        rule, large = native_rule(execution="auto"), normal(16, 6)
        seen = []
        qmodel = quantize(MLP(), rule, execute=spy(seen), widest=8)
        variables = jax.eval_shape(qmodel.init, KEY, X)

        def run(qmodel, x):
            seen.clear()
            jax.eval_shape(lambda v, bits: qmodel.apply(v, x, bits=bits), variables, jax.tree.map(jnp.float32, BITS))
            return set(seen)

        some = Paths("float", "int8", "float")
        assert run(qmodel, X) == {some} and run(qmodel, large) == {INT8}
        frozen = qmodel.with_choices(qmodel.plan(large).choices)
        assert run(frozen, X) == run(frozen, large) == {INT8}
        assert frozen.rules == qmodel.rules and run(qmodel, X) == {some}
        other = qmodel.with_choices({"Dense_1": qmodel.plan(X).choices["Dense_1"]})
        assert run(other, large) == {INT8, some}
        # What was chosen is shown for a plan of any shape, with the reason that held then.
        assert {(row.execution, row.execution_reason[:5]) for row in frozen.plan(X)} == {("int8", "auto:")}
        assert other.plan(large)["Dense_1"].execution_reason == "auto; fwd, dW float: few rows"

    def test_through_json(self, always):
        qmodel = quantize(MLP(), native_rule(execution="auto", grad_quantizer=None), widest=8)
        choices = qmodel.plan(X).choices
        written = json.loads(json.dumps({path: choice.to_json() for path, choice in choices.items()}))
        assert written["Dense_0"] == {
            "forward": "int8",
            "dlhs": "float",
            "drhs": "float",
            "switch": False,
            "reasons": dict.fromkeys(("dlhs", "drhs"), "its gradients are not quantized (grad_quantizer=None)"),
            "chosen_by": "auto",
        }
        row = qmodel.with_choices(written).plan(X)["Dense_0"]
        assert row.execution == "int8 fwd, float dX, float dW"
        assert row.execution_reason.startswith("recorded; dX, dW float: its gradients")

    def test_a_recorded_choice_cannot_do_the_impossible(self, always):
        choices = {"Dense_0": Choice(INT8, chosen_by="recorded")}
        auto = quantize(MLP(), native_rule(execution="auto"), widest=8).with_choices(choices)
        variables = auto.init(KEY, X)
        wide = Precision(12, 12, 12)
        expected = jax.jit(lambda v: quantize(MLP(), fake(native_rule())).apply(v, X, bits=wide))(variables)
        np.testing.assert_array_equal(jax.jit(lambda v: auto.apply(v, X, bits=wide))(variables), expected)
        strict = quantize(MLP(), native_rule(), widest=8).with_choices(choices)
        refused(lambda: strict.apply(variables, X, bits=wide), "12 bits")

    def test_a_recorded_float_stays_float(self):
        choices = {f"Dense_{i}": Choice(Paths("int8", "float", "int8")) for i in range(3)}
        found = quantize(MLP(), native_rule(), widest=8).with_choices(choices).plan(X)
        assert found["Dense_2"].execution == "int8 fwd, float dX, int8 dW"
        assert found["Dense_2"].execution_reason == "dX float: as recorded"

    @pytest.mark.parametrize(
        ("value", "message"),
        [
            ({"forward": "int4", "dlhs": "int8", "drhs": "int8"}, r"execution\['Dense_0'\]\.forward='int4': give one"),
            ({"forward": "int8", "dlhs": "int8"}, r"execution\['Dense_0'\]\.drhs=None: give one of"),
            ("int8", r"execution\['Dense_0'\]\.forward=None"),
        ],
    )
    def test_what_is_no_choice(self, value, message):
        with pytest.raises(UsageError, match=message):
            quantize(MLP(), native_rule()).with_choices({"Dense_0": value})

    def test_a_layer_that_is_not_there(self):
        qmodel = quantize(MLP(), native_rule()).with_choices({"Dense_7": Choice()})
        with pytest.raises(UsageError, match=r"execution\['Dense_7'\]: no layer of that path.*Did you mean 'Dense_"):
            qmodel.plan(X)
        found = quantize(MLP(), native_rule()).plan(X)
        with pytest.raises(UsageError, match=r"execution: \['Dense_0', 'Dense_7'\] are recorded and not in the plan"):
            found.with_choices({**{f"Dense_{i}": Choice() for i in (1, 2, 7)}})


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


def assert_like_fake(model, rule, x, widths, **kwargs):
    """Output and gradients of native and fake execution, jitted once each, at traced widths."""
    variables = random_variables(model, x)

    def of(qmodel):
        def loss(params, bits, key):
            y = qmodel.apply({**variables, "params": params}, x, bits=bits, rngs={"quant": key})
            return jnp.sum(y * jnp.cos(jnp.arange(y.size)).reshape(y.shape)), y

        return jax.jit(jax.grad(loss, has_aux=True))

    ours, reference = of(quantize(model, rule, **kwargs)), of(quantize(model, fake(rule)))
    for weights, acts, grads in widths:
        bits = jax.tree.map(np.float32, Precision(weights=weights, acts=acts, grads=grads))
        found, expected = (fn(variables["params"], bits, jax.random.key(3)) for fn in (ours, reference))
        for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
            assert float(jnp.linalg.norm(a - b)) <= 1e-5 * float(jnp.linalg.norm(b)), (weights, acts, grads)
    assert ours._cache_size() == 1


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
