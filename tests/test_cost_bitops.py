"""Bit operations and bytes of hand-made and counted ops: exact on the host, equal under tracing, errors in one line."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from refusals import refused

from qtrain import Precision, cost
from qtrain.cost import Op, OpBits, Operand, Ops, encode


def operand(kind, dtype="float32", gradient=True, parameter="", size=0):
    return Operand(kind, (), dtype, gradient, parameter, size)


def layer(path, macs, weights="schedule", acts="schedule", grads="schedule", dtype="float32", first=False, **kwargs):
    """One dense layer by hand: input × kernel, the input's gradient left out when it is the first."""
    return Op(
        path=path,
        kind="dot",
        lhs=operand("act", dtype, not first),
        rhs=operand("weight", dtype, True, f"params/{path}/kernel", kwargs.pop("size", macs)),
        output_shape=(),
        output_dtype=dtype,
        macs=macs,
        contraction=kwargs.pop("contraction", 8),
        marker=OpBits(path, weights, acts, grads),
        **kwargs,
    )


def attention(path, macs, acts="schedule", grads="schedule"):
    both = operand("act")
    return Op(path, "dot", both, both, (), "float32", macs, 8, marker=OpBits(path, None, acts, grads))


FIRST = layer("first", 100, weights=8, acts=8, grads=None, first=True)
MIDDLE = layer("middle", 1000)
HALF = layer("half", 500, dtype="bfloat16", executions=3)
SCORES = attention("scores", 70)
FLOAT = layer("float", 30, None, None, None)
UNMARKED = Op("plain", "dot", operand("act", "bfloat16"), operand("weight", "bfloat16"), (), "bfloat16", 10, 4)
NET = Ops([FIRST, MIDDLE, HALF, SCORES, FLOAT, UNMARKED])


def by_hand(w, a, g):
    """(forward, input gradient, weight gradient) of NET, written out."""
    forward = 100 * 8 * 8 + 1000 * a * w + 1500 * a * w + 70 * a * a + 30 * 32 * 32 + 10 * 16 * 16
    inputs = 1000 * g * w + 1500 * g * w + 2 * 70 * g * a + 30 * 32 * 32 + 10 * 16 * 16
    weights = 100 * 8 * 32 + 1000 * a * g + 1500 * a * g + 30 * 32 * 32 + 10 * 16 * 16
    return forward, inputs, weights


BITS = [(4, 4, 8), (3, 8, 8), (1, 2, 4), (16, 16, 16), (23, 5, 7)]


@pytest.mark.parametrize("bits", BITS)
def test_quadratic_by_hand_and_per_pass(bits):
    expected = by_hand(*bits)
    precision = Precision(*bits)
    assert cost.bitops(NET, precision) == sum(expected)
    assert tuple(cost.bitops(NET, precision, (name,)) for name in cost.PASSES) == expected
    assert cost.bitops(NET, precision, "forward") == expected[0]
    table = cost.breakdown(NET, precision)
    assert list(table) == ["first", "middle", "half", "scores", "float", "plain"]
    assert tuple(sum(row[name] for row in table.values()) for name in cost.PASSES) == expected
    assert table["first"] == {"forward": 6400, "input_gradient": 0, "weight_gradient": 100 * 8 * 32}
    assert table["scores"]["weight_gradient"] == 0


@pytest.mark.parametrize("number", [int, float, np.int32, np.float32, np.array])
def test_numbers_on_the_host_give_an_exact_int(number):
    huge = Ops([layer("huge", 10**17 + 1)])
    result = cost.bitops(huge, Precision(number(3), number(5), number(8)))
    assert type(result) is int
    assert result == (10**17 + 1) * (3 * 5 + 8 * 3 + 5 * 8)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize(
    "function", [cost.bitops, cost.linear, cost.bitops_accumulator, cost.memory_bits, cost.weight_bytes, cost.relative]
)
def test_traced_bits_agree_with_the_host(function, bits):
    traced = jax.jit(lambda w, a, g: function(NET, Precision(w, a, g)))(*map(jnp.float32, bits))
    assert traced.dtype == jnp.float32
    assert traced.shape == ()
    np.testing.assert_allclose(traced, function(NET, Precision(*bits)), rtol=1e-6)


def test_vmap_arrays_per_path_and_one_compilation():
    values = np.array(list(itertools.product((2, 5, 8), (3, 8), (8, 32))))
    expected = [cost.bitops(NET, Precision(*map(int, row))) for row in values]
    w, a, g = jnp.asarray(values.T, jnp.float32)
    np.testing.assert_allclose(
        jax.vmap(lambda w, a, g: cost.bitops(NET, Precision(w, a, g)))(w, a, g), expected, rtol=1e-6
    )
    np.testing.assert_allclose(cost.bitops(NET, Precision(w, a, g)), expected, rtol=1e-6)
    followers = ("middle", "half", "scores")
    per_path = jax.jit(lambda w, a, g: cost.bitops(NET, {path: Precision(w, a, g) for path in followers}))
    np.testing.assert_allclose([per_path(*map(jnp.int32, row)) for row in values], expected, rtol=1e-6)
    assert per_path._cache_size() == 1


def test_the_traced_expression_does_not_grow_with_the_model():
    def size(layers):
        ops = Ops(layer(f"layer{i}", 1000 + i) for i in range(layers))
        return len(jax.make_jaxpr(lambda b: cost.bitops(ops, Precision(b, b, 8)))(8.0).eqns)

    assert size(200) == size(2) < 40


def test_precision_by_path():
    precision = {
        "middle": Precision(2, 3, 4),
        "half": Precision(5, 6, 7),
        "scores": Precision(None, 8, 8),
        "unrelated": Precision(1, 1, 1),
    }
    expected = sum(cost.bitops(Ops([op]), precision.get(op.path, Precision(9, 9, 9))) for op in NET)
    assert cost.bitops(NET, precision) == expected
    swapped = {**precision, "middle": precision["half"], "half": precision["middle"]}
    assert cost.bitops(NET, swapped) != expected


def test_float_is_the_dtype_whatever_says_so():
    plain = cost.bitops(NET, None)
    ops = (100 * 2 + (1000 + 30) * 3 + 70 * 3) * 32**2 + (1500 + 10) * 3 * 16**2
    assert plain == ops
    # No bits at all leaves fixed-bit layers alone too; bits of 24 and more only those that follow the schedule.
    following = Ops(op for op in NET if op.path != "first")
    for bits in (24, 32, None):
        assert cost.bitops(following, Precision(bits, bits, bits)) == cost.bitops(following, None)
    traced = jax.jit(lambda b: cost.bitops(following, Precision(b, b, b)))(jnp.float32(24))
    np.testing.assert_allclose(traced, cost.bitops(following, None), rtol=1e-6)
    np.testing.assert_allclose(cost.relative(Ops([FLOAT]), None), 1)


@pytest.mark.parametrize(
    ("left", "right", "units"),
    [(1, 1, 4), (4, 4, 4), (4, 2, 4), (4, 5, 8), (8, 8, 8), (3, 9, 16), (16, 4, 16), (17, 4, 32), (32, 4, 32)],
)
def test_linear_rounds_up_to_the_widths_of_hardware(left, right, units):
    ops = Ops([layer("layer", 10)])
    assert cost.linear(ops, Precision(left, right, 8), ("forward",)) == 10 * units
    traced = jax.jit(lambda w, a: cost.linear(ops, Precision(w, a, 8), ("forward",)))(float(left), float(right))
    assert float(traced) == 10 * units


def test_a_backward_pass_on_the_original_operands_is_float():
    marker = OpBits("layer", "schedule", "schedule", "schedule", residuals="original")
    op = Op(**{**vars(layer("layer", 10)), "marker": marker})
    for precision in (Precision(2, 3, 5), Precision(*map(jnp.float32, (2, 3, 5)))):
        assert [float(cost.bitops(Ops([op]), precision, name)) for name in cost.PASSES] == [
            60,
            10 * 5 * 32,
            10 * 5 * 32,
        ]


def test_accumulator():
    # UNIQ: m·n·k²·(b_a·b_w + b_a + b_w + log2(n·k²)) for m outputs, n inputs, k×k taps, at one output position.
    m, n, k, b_a, b_w = 64, 16, 3, 8, 4
    ops = Ops([layer("conv", m * n * k**2, contraction=n * k**2)])
    expected = m * n * k**2 * (b_a * b_w + b_a + b_w + math.log2(n * k**2))
    assert cost.bitops_accumulator(ops, Precision(b_w, b_a, 8)) == pytest.approx(expected, rel=1e-12)


def test_bytes():
    ops = Ops(
        [
            layer("first", 1, weights=8, size=80, contraction=8),  # 10 output channels
            layer("middle", 1, size=160, contraction=16),  # 10 as well
            layer("float", 1, None, size=40),
            layer("scanned", 1, size=3 * 64, contraction=8, executions=3),  # 8 per iteration
        ]
    )
    assert cost.memory_bits(ops, Precision(4, 8, 8)) == 80 * 8 + 160 * 4 + 40 * 32 + 192 * 4
    assert cost.weight_bytes(ops, Precision(4, 8, 8)) == 80 + 80 + 160 + 96 + 4 * (10 + 10 + 24)
    assert cost.weight_bytes(ops, Precision(4, 8, 8), {"middle": 1, "scanned": 3}) == 80 + 80 + 160 + 96 + 4 * (
        10 + 1 + 3
    )
    # At float bits there is no scale; without bits nothing is quantized.
    assert cost.weight_bytes(ops, Precision(32, 32, 32)) == 80 + 640 + 160 + 768 + 4 * 10
    assert cost.weight_bytes(ops, None) == 4 * (80 + 160 + 40 + 192)


def test_a_leaf_that_two_ops_share_is_stored_once_at_the_wider_bits():
    def tied(path, weights):
        op = layer(path, 1, weights=weights, contraction=8)
        return op.__class__(**{**vars(op), "rhs": operand("weight", parameter="params/embedding", size=80)})

    ops = Ops([tied("in", "schedule"), tied("out", 6)])
    assert cost.memory_bits(ops, Precision(4, 8, 8)) == 80 * 6
    assert cost.memory_bits(ops, Precision(7, 8, 8)) == 80 * 7
    assert float(jax.jit(lambda b: cost.memory_bits(ops, Precision(b, b, b)))(7.0)) == 80 * 7
    assert cost.memory_bits(Ops([*ops, tied("float", None)]), Precision(4, 8, 8)) == 80 * 32


def test_marked_products_of_two_weights_take_acts_on_the_left():
    """A layer on learned positions: neither operand depends on an argument, and the left one is the layer's input."""

    def fn(v, x):
        with jax.named_scope(encode(OpBits("layer", weights="schedule", acts="schedule", grads="schedule"))):
            return v["positions"] @ v["kernel"] + x

    shape = lambda *dims: jax.ShapeDtypeStruct(dims, jnp.float32)  # noqa: E731
    ops = cost.count(fn, {"positions": shape(6, 4), "kernel": shape(4, 5)}, shape(6, 5))
    assert (ops.forward, ops.input_gradient, ops.weight_gradient) == (120, 0, 240)
    assert cost.bitops(ops, Precision(2, 3, 5)) == 120 * (2 * 3 + 5 * 2 + 5 * 3)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: cost.bitops(NET, Precision(0, 8, 8)), ["precision.weights=0", "at least 1"]),
        (lambda: cost.bitops(NET, Precision(8, 4.5, 8)), ["precision.acts=4.5", "whole number"]),
        (lambda: cost.bitops(NET, Precision(8, 8, "four")), ["precision.grads='four'"]),
        (lambda: cost.bitops(NET, Precision(8, 8, True)), ["precision.grads=True"]),
        (lambda: cost.bitops(NET, Precision(float("nan"), 8, 8)), ["precision.weights=nan"]),
        (lambda: cost.bitops(NET, Precision(float("inf"), 8, 8)), ["precision.weights=inf"]),
        (lambda: cost.bitops(NET, {"middel": Precision(8, 8, 8)}), ["'middle'", "'middel'", "Did you mean"]),
        (
            lambda: cost.bitops(NET, {p: Precision(8, -1, 8) for p in ("middle", "half", "scores")}),
            ["precision['middle'].acts=-1"],
        ),
        (lambda: cost.bitops(NET, Precision(8, 8, 8), ("backward",)), ["'backward'", "input_gradient"]),
        (lambda: cost.linear(NET, Precision(8, 8, 8), "forwards"), ["'forwards'", "Did you mean 'forward'"]),
        (lambda: cost.saving(1, 0), ["static cost"]),
        (lambda: cost.relative(Ops(), Precision(8, 8, 8)), ["no MACs"]),
        (lambda: cost.effective(NET, lambda step: Precision(8, 8, 8), 0), ["total_steps=0"]),
        (lambda: cost.static(NET, 8, 2.5), ["total_steps=2.5"]),
        (lambda: cost.static(NET, 0, 10), ["precision.weights=0"]),
    ],
)
def test_errors_are_one_line(call, words):
    refused(call, *words)
