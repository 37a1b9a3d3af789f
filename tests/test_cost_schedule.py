"""The cost of whole runs: exact against a float64 closed form, the published savings, and the running total."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qtrain import Precision, cost, schedules
from qtrain.cost import Op, OpBits, Operand, Ops

STEPS = 64_000
# A net in which every layer follows the schedule and has all three products: the closed form's.
UNIFORM = Ops(
    [
        Op(
            path="layer",
            kind="dot",
            lhs=Operand("act", (), "float32", True),
            rhs=Operand("weight", (), "float32", True, "params/layer/kernel", 1),
            output_shape=(),
            output_dtype="float32",
            macs=40_551_040 * 128,
            contraction=1,
            marker=OpBits("layer", "schedule", "schedule", "schedule"),
        )
    ]
)

# Percent saved against static q_max, gradients at q_max, 8 cycles; a column per range of bits.
RANGES = [(3, 8), (3, 6), (4, 8), (4, 6), (5, 8), (5, 6)]
SAVINGS = {
    "RR": (60.1, 50.3, 49.9, 35.6, 38.9, 19.4),
    "RTH": (60.1, 50.3, 49.9, 35.6, 38.9, 19.4),
    "LR": (37.2, 30.4, 30.5, 20.8, 23.4, 10.65),
    "LT": (37.2, 30.4, 30.5, 20.8, 23.4, 10.65),
    "CR": (36.7, 30.0, 30.1, 20.7, 23.1, 10.65),
    "CT": (36.7, 30.0, 30.1, 20.7, 23.1, 10.65),
    "ETV": (36.5, 29.9, 30.0, 20.6, 23.1, 10.65),
    "RTV": (36.3, 29.75, 29.8, 20.55, 23.0, 10.65),
    "ER": (17.8, 13.7, 14.2, 8.8, 10.5, 3.7),
    "ETH": (17.8, 13.7, 14.2, 8.8, 10.5, 3.7),
}


def together(schedule, grads):
    def precision(step):
        bits = schedule(step)
        return Precision(bits, bits, grads)

    return precision


@pytest.mark.parametrize("column", range(len(RANGES)), ids=[f"{low}-{high}" for low, high in RANGES])
def test_savings_of_the_suite(column):
    low, high = RANGES[column]
    static = cost.static(UNIFORM, high, STEPS)
    suite = schedules.suite(low, high, 8, STEPS)
    assert set(suite) == set(SAVINGS)
    for name, schedule in suite.items():
        effective = cost.effective(UNIFORM, together(schedule, high), STEPS)
        assert isinstance(effective, int)
        assert 100 * cost.saving(effective, static) == pytest.approx(SAVINGS[name][column], abs=0.06), name


@pytest.mark.parametrize("total", [1, 7, 1000, 65_536, 70_000])
def test_effective_is_the_sum_over_steps(total):
    schedule = schedules.cyclic("cosine", low=3, high=8, cycles=1, total_steps=total)
    bits = np.array(jax.jit(jax.vmap(schedule))(jnp.arange(total))).astype(object)
    expected = UNIFORM.forward * int(sum(q * q + 2 * q * 8 for q in bits))
    assert cost.effective(UNIFORM, together(schedule, 8), total) == expected


def test_per_path_constant_and_absent_bits():
    def schedule(step):
        return {"layer": Precision(jnp.where(step < 3, 2, 8), 4, None)}

    # Gradients that nothing quantizes count 32: the cotangent's dtype.
    expected = UNIFORM.forward * sum(w * 4 + 32 * w + 4 * 32 for w in [2] * 3 + [8] * 7)
    assert cost.effective(UNIFORM, schedule, 10) == expected
    fixed = cost.effective(UNIFORM, lambda step: Precision(None, None, None), 10)
    assert fixed == cost.static(UNIFORM, None, 10) == cost.static(UNIFORM, 32, 10) == UNIFORM.forward * 3 * 1024 * 10


def test_passes():
    schedule = together(schedules.constant(4), 8)
    assert cost.effective(UNIFORM, schedule, 5, ("forward",)) == 5 * 16 * UNIFORM.forward
    assert cost.static(UNIFORM, 4, 5, "forward") == 5 * 16 * UNIFORM.forward


def test_the_running_total_agrees_with_the_exact_one():
    total = 5000
    schedule = together(schedules.cyclic("cosine", low=3, high=8, cycles=8, total_steps=total), 8)

    @jax.jit
    def run():
        def step(running, t):
            return cost.add(running, cost.bitops(UNIFORM, schedule(t))), None

        return jax.lax.scan(step, cost.zero(), jnp.arange(total))[0]

    assert cost.value(run()) == pytest.approx(cost.effective(UNIFORM, schedule, total), rel=2e-7)
