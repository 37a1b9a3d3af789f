"""Widths that quantizers learn, what a step is charged for them, and the budget that they are held to."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from program import Steps, rows, small_config

from qtrain import cost
from qtrain.build import build
from qtrain.errors import UsageError
from qtrain.losses.budget import budget_from_config, initial_controller
from qtrain.precision import Precision
from qtrain.train import train

WIDTHS = {"quant__weights": "learned_width", "schedule": "constant"}
BITS = Precision(weights=6, acts=6, grads=8)


@pytest.fixture(scope="module")
def experiment():
    return build(small_config("digits_mlp", quant__acts="learned_width/unsigned", **WIDTHS))


def with_widths(experiment, value, **acts):
    """The initial state with every learned width at `value`, but those of activations by layer."""
    state = Steps(experiment.config).state

    def change(path, leaf):
        layer, kind, name = (key.key for key in path)
        given = acts.get(layer, value) if kind == "acts" else value
        return jnp.full_like(leaf, given) if name == "width" else leaf

    return state.params, jax.tree_util.tree_map_with_path(change, state.quant)


def test_a_step_is_charged_for_the_widths_in_force(experiment):
    params, quant = with_widths(experiment, 3.2, Dense_1=5.0)  # 3.2 rounds to 3
    priced = experiment.additions.priced(params, quant, BITS)
    assert set(priced) == set(experiment.plan.followers)
    assert float(priced["Dense_1"].weights) == 3 and float(priced["Dense_1"].acts) == 5 and priced["Dense_1"].grads == 8
    expected = 0
    for op in experiment.plan.ops:
        acts = 5 if op.path == "Dense_1" else 3
        # The image's gradient is asked for, too: by the scale that the first layer learns for it.
        expected += op.forward * (3 * acts + 8 * acts + 8 * 3)
    assert float(cost.bitops(experiment.plan.ops, priced)) == expected


def test_the_steps_bits_are_the_most_a_width_may_be(experiment):
    params, quant = with_widths(experiment, 7.0)
    low = Precision(weights=4, acts=5, grads=8)
    priced = experiment.additions.priced(params, quant, low)
    # The ends are fixed at 8 bits by their rule, which no schedule lowers.
    assert float(priced["Dense_1"].weights) == 4 and float(priced["Dense_0"].weights) == 7
    assert float(priced["Dense_1"].acts) == 5


def test_costs_are_differentiable_to_the_widths(experiment):
    params, quant = with_widths(experiment, 4.0)
    widths, ops = experiment.widths, experiment.plan.ops
    sizes = {weight.path: weight.size for weight in widths.weights}
    total = sum(sizes.values())
    assert float(widths.average_bits(params, quant, BITS)) == 4
    scales = 4 * len(sizes)  # one float32 each
    assert float(widths.bytes(params, quant, BITS)) == total * 4 / 8 + scales
    of_bits = jax.grad(lambda quant: widths.average_bits(params, quant, BITS))(quant)
    of_ops = jax.grad(lambda quant: widths.bitops(ops, params, quant, BITS))(quant)
    for path, size in sizes.items():
        np.testing.assert_allclose(of_bits[path]["weights"]["width"], size / total, rtol=1e-6)
        macs = sum(op.forward for op in ops if op.path == path)
        # b_w meets activations of 4 bits forward, and gradients of 8 bits.
        np.testing.assert_allclose(of_ops[path]["weights"]["width"], macs * (4 + 8), rtol=1e-6)


def budget(experiment, **given):
    config = {**experiment.config.budget.to_dict(), **given}
    return budget_from_config(config, experiment.widths, experiment.q_max, 100)


def test_the_multiplier_is_dual_ascent(experiment):
    params, quant = with_widths(experiment, 4.0)
    penalty = budget(experiment, unit="bits", target=2.0, rate=0.5)
    controller, step = initial_controller(), jnp.int32(0)
    for expected, multiplier in ((0.0, 0.5), (0.5, 1.0), (1.0, 1.5)):  # (4/2 − 1)·μ
        value, controller = penalty(step, params, quant, BITS, controller)
        assert float(value) == expected and float(controller["multiplier"]) == multiplier
    _, quant = with_widths(experiment, 2.0)
    value, controller = penalty(step, params, quant, BITS, controller)
    assert float(value) == 0 and float(controller["multiplier"]) == 1.5
    _, loose = with_widths(experiment, 4.0)
    relaxed = budget(experiment, unit="bits", target=8.0, rate=10.0)
    assert float(relaxed(step, params, loose, BITS, controller)[1]["multiplier"]) == 0  # never below


def test_the_budget_follows_its_schedule(experiment):
    params, quant = with_widths(experiment, 4.0)
    penalty = budget(experiment, unit="bits", target=2.0, start=6.0, schedule="linear_down")
    targets = [
        float(penalty(jnp.int32(step), params, quant, BITS, initial_controller())[1]["target"]) for step in (0, 50, 100)
    ]
    assert targets == [6.0, 4.0, 2.0]


@pytest.mark.parametrize(("unit", "target"), [("bits", 3.0), ("bytes", 500.0), ("bitops", 0.5)])
def test_training_keeps_to_the_budget(unit, target, tmp_path):
    config = small_config(
        "digits_mlp",
        quant__acts="learned_width/unsigned",
        train__steps=160,
        train__log_every_steps=40,
        optimizer__schedule="constant",
        optimizer__quant__width_learning_rate=0.1,
        budget__unit=unit,
        budget__target=target,
        budget__rate=0.2,
        **WIDTHS,
    )
    summary = train(config, str(tmp_path), quiet=True)
    last = rows(tmp_path, "train")[-1]
    spent = last["budget/spent"]
    assert last["budget/target"] == pytest.approx(target) and last["budget/multiplier"] >= 0
    first = build(config)
    params, quant = with_widths(first, 6.0)
    begun = {
        "bits": first.widths.average_bits(params, quant, BITS),
        "bytes": first.widths.bytes(params, quant, BITS),
        "bitops": 1.0,
    }[unit]
    assert spent < target * 1.1 < begun
    assert summary["effective_bitops"] < summary["static_bitops"]
    assert last["width/average"] < 6 and last["size/bits"] <= last["width/average"] + 1


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"budget__unit": "bit"}, r"budget\.unit='bit'.*Did you mean 'bits'"),
        ({"budget__unit": "bits"}, r"no quantizer learns its width.*'learned_width'"),
        ({"budget__unit": "bits", "budget__target": 0.0, **WIDTHS}, r"budget\.target=0\.0"),
        ({"budget__unit": "bits", "budget__rate": -1.0, **WIDTHS}, r"budget\.rate=-1\.0"),
        ({"budget__unit": "bitops", "budget__target": 3.0, **WIDTHS}, "give a share of the cost at q_max"),
        ({"budget__unit": "bits", "budget__schedule": "linear", **WIDTHS}, r"budget\.schedule='linear'"),
        ({"quant__threshold__schedule": "linear_up"}, "no weight has a threshold"),
        ({"quant__threshold__final_factor": 0.0}, r"quant\.threshold\.final_factor=0\.0"),
    ],
)
def test_mistakes(overrides, message):
    with pytest.raises(UsageError, match=message):
        build(small_config("digits_mlp", **overrides))


def test_a_threshold_follows_its_schedule_without_changing_the_state(tmp_path):
    given = {"quant__weights": "nested/column", "quant__acts": "none", "quant__grads": "none"}
    config = small_config(
        "digits_mlp", quant__threshold__schedule="linear_down", quant__threshold__final_factor=0.5, **given
    )
    experiment = build(config)
    quant = Steps(config).state.quant
    half = experiment.additions.scheduled(jnp.int32(experiment.total_steps // 2), quant)
    np.testing.assert_allclose(half["Dense_0"]["weights"]["threshold"], 0.1 * 0.75, rtol=1e-6)
    np.testing.assert_array_equal(half["Dense_0"]["weights"]["scale"], quant["Dense_0"]["weights"]["scale"])
    steps = Steps(config)
    with steps.batches() as batches:
        for _ in range(3):
            steps(next(batches))
    np.testing.assert_array_equal(steps.state.quant["Dense_0"]["weights"]["threshold"], np.float32(0.1))
