"""Execution: who decides what runs on codes, that it is shown, and that it stays."""

import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from execution_rules import BITS, INT8, TENSOR, assert_like_fake, fake, native_rule, spy, traced
from inject_models import KEY, MLP, ConvNet, X, normal
from refusals import refused

from qtrain.errors import UsageError
from qtrain.inject import Rule, quantize
from qtrain.inject.execution import Choice
from qtrain.precision import Precision
from qtrain.quantizers import RESIDUALS, Uniform, native
from qtrain.quantizers.native import Paths


def plan(rules, model=None, x=X, **kwargs):
    return quantize(MLP() if model is None else model, rules, **kwargs).plan(x)


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
