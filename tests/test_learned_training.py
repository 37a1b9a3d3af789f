"""Learned quantizers, transition rates and loss terms in the trainer: how they begin, move, resume and are written."""

import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from program import Steps, final_state, rows, small_config

from qtrain.build import build
from qtrain.checkpoint import Checkpoints
from qtrain.errors import UsageError
from qtrain.losses import LOSSES, SCHEDULES, dampening, penalty_from_config
from qtrain.optim import TransitionState
from qtrain.optim.transition_metrics import find_states
from qtrain.precision import Precision
from qtrain.train import train

LEARNED = {"quant__weights": "lsq/signed", "quant__acts": "lsq/unsigned"}
TRANSITION = {"optimizer__name": "adamt", **LEARNED}


def leaves(tree):
    return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def moved(before, after):
    before, after = leaves(before), leaves(after)
    return {path for path in before if not np.array_equal(before[path], after[path])}


def run(config, folder):
    train(config, str(folder), quiet=True)
    return final_state(config, Path(folder, "checkpoints"))


@pytest.fixture(scope="module")
def float_run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("float")
    config = small_config("digits_cnn", schedule="constant", quant__weights=None, quant__acts=None, quant__grads=None)
    return folder, run(config, folder)


@pytest.fixture(scope="module")
def transition_run(tmp_path_factory, float_run):
    folder = tmp_path_factory.mktemp("transition")
    config = small_config(
        "digits_cnn", init_from=str(float_run[0]), checkpoint__every_steps=6, checkpoint__keep=3, **TRANSITION
    )
    return folder, config, run(config, folder)


def test_a_run_begins_with_the_float_parameters_and_quantizers_made_for_them(float_run, tmp_path):
    folder, trained = float_run
    config = small_config(
        "digits_cnn",
        init_from=str(folder),
        train__steps=2,
        train__log_every_steps=1,
        optimizer__learning_rate=1e-9,
        **LEARNED,
    )
    begun = run(config, tmp_path)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), trained.params, begun.params)
    assert any(np.any(leaf != 0) for leaf in leaves(trained.params).values())
    kernel = np.asarray(trained.params["Dense_0"]["kernel"], np.float64)
    # The schedule begins at 3 bits: s = 2⟨|w|⟩/√(2² − 1).
    np.testing.assert_allclose(
        begun.quant["Dense_0"]["weights"]["scale"], 2 * np.abs(kernel).mean() / np.sqrt(3), rtol=1e-4
    )
    assert begun.quant["Dense_0"]["weights"]["bits"] == 3 and begun.quant["Conv_0"]["weights"]["bits"] == 8
    scale = begun.quant["Dense_0"]["acts"]["scale"]
    assert scale > 0 and not np.isclose(scale, 2 * np.sqrt(2 / np.pi) / np.sqrt(7), rtol=1e-3)  # not of a normal tensor


def test_ordinary_training_moves_scales_and_not_what_is_frozen():
    config = small_config("digits_mlp", **LEARNED)
    steps = Steps(config)
    before = steps.state
    with steps.batches() as batches:
        for _ in range(3):
            steps(next(batches))
    changed = moved(before.quant, steps.state.quant)
    assert {path for path in changed if "bits" in path} == set()
    assert {path for path in leaves(before.quant) if "scale" in path} == changed
    assert moved(before.params, steps.state.params) == set(leaves(before.params))


def test_the_quantizers_have_a_learning_rate_and_a_decay_of_their_own():
    def after(**overrides):
        steps = Steps(small_config("digits_mlp", optimizer__name="sgd", **LEARNED, **overrides))
        before = steps.state.quant
        with steps.batches() as batches:
            steps(next(batches))
        return leaves(before), leaves(steps.state.quant)

    before, plain = after(optimizer__quant__learning_rate=1e-3)
    _, faster = after(optimizer__quant__learning_rate=2e-3)
    _, decayed = after(optimizer__quant__learning_rate=1e-3, optimizer__quant__weight_decay=0.5)
    _, still = after(optimizer__quant__learning_rate=0.0)
    name = "['Dense_0']['weights']['scale']"
    np.testing.assert_allclose(faster[name] - before[name], 2 * (plain[name] - before[name]), rtol=1e-3)
    np.testing.assert_allclose(decayed[name] - plain[name], -1e-3 * 0.5 * before[name], rtol=1e-2)
    assert still[name] == before[name]


def test_under_a_transition_rate_weight_scales_stand_still_and_the_rest_is_trained(transition_run):
    folder, config, state = transition_run
    experiment = build(config)
    first = Checkpoints(folder / "checkpoints", 3, "test_accuracy")
    begun = first.restore(6, jax.eval_shape(lambda: state)).state
    changed = moved(begun.quant, state.quant)
    assert changed and all("acts" in path and "scale" in path for path in changed)
    assert moved(begun.params, state.params) == set(leaves(state.params))
    (transition,) = find_states(state.opt_state, TransitionState)
    kernels = [name for name in leaves(transition.last) if "kernel" in name]
    assert len(kernels) == len(leaves(transition.last)) == 4 == len(experiment.weights)
    assert all(leaf.dtype == np.int8 for leaf in leaves(transition.last).values())


def test_the_target_follows_the_bits(transition_run):
    folder, config, _ = transition_run
    found = [row for row in rows(folder, "train")]
    experiment = build(config)
    for row in found:
        step = row["step"] - 1
        share = 0.5 * (1 + np.cos(np.pi * step / experiment.total_steps))
        bits = experiment.precision_at(step).weights
        assert row["bits_weights"] == bits
        expected = 5e-3 * share * np.sqrt(bits)
        np.testing.assert_allclose(row["transition/Dense_0/kernel/target"], expected, rtol=1e-4)
        np.testing.assert_allclose(row["transition/Conv_0/kernel/target"], 5e-3 * share * np.sqrt(8), rtol=1e-4)
    assert len({row["bits_weights"] for row in found}) > 1


def test_layer_metrics_are_in_the_file_and_in_tensorboard(transition_run):
    folder, _, _ = transition_run
    names = {"rate", "running", "target", "talr", "step", "distance"}
    for row in rows(folder, "train"):
        assert {f"transition/{name}" for name in names} <= set(row)
        assert {f"transition/logits/kernel/{name}" for name in names} <= set(row)
        assert 0 <= row["transition/distance"] <= 0.5
    events = b"".join(path.read_bytes() for path in folder.rglob("events.out.tfevents.*"))
    assert b"transition/Dense_0/kernel/talr" in events


def test_a_resumed_transition_run_is_the_same_bit_for_bit(transition_run, tmp_path):
    _, config, state = transition_run
    other = tmp_path / "again"
    train(config, str(other), quiet=True)
    for name in ("DONE", "summary.json"):
        (other / name).unlink()
    for step in other.glob("checkpoints/12*"):
        shutil.rmtree(step)
    resumed = run(config, other)
    assert not moved(state, resumed)
    assert json.loads((other / "summary.json").read_text())["compilations"] == 1


def test_oscillations_are_tracked_and_weights_freeze(tmp_path):
    config = small_config(
        "digits_cnn",
        schedule="constant",
        optimizer__name="sgd",
        optimizer__learning_rate=0.3,
        optimizer__oscillation__freeze=True,
        optimizer__oscillation__momentum=0.2,
        optimizer__oscillation__freeze_from_percent=10.0,
        quant__weights="lsq/signed",
        train__steps=24,
    )
    run(config, tmp_path)
    last = rows(tmp_path, "train")[-1]
    assert 0 < last["transition/frozen"] < 1 and last["transition/oscillation"] > 0
    with pytest.raises(UsageError, match=r"optimizer\.oscillation.*no weight is quantized"):
        build(small_config("digits_cnn", optimizer__oscillation__track=True, quant__weights=None))


def test_the_penalty_against_numpy_and_its_gradient():
    experiment = build(small_config("digits_mlp", **LEARNED))
    state = Steps(experiment.config).state
    bits = Precision(weights=3, acts=3)
    total = 0.0
    for weight in experiment.weights:
        value = np.asarray(weight.value(state.params), np.float64)
        own = weight.learned(state.quant)
        b = weight.bits(bits)
        step = float(own["scale"]) * 2.0 ** (float(own["bits"]) - b)
        inside = (value / step >= -(2 ** (b - 1))) & (value / step <= 2 ** (b - 1) - 1)
        total += np.sum(np.where(inside, (np.round(value / step) * step - value) ** 2, 0))
    found = dampening(experiment.weights, state.params, state.quant, bits)
    np.testing.assert_allclose(found, total, rtol=1e-4)
    gradient = jax.grad(lambda params: dampening(experiment.weights, params, state.quant, bits))(state.params)
    weight = experiment.weights[1]
    value = np.asarray(weight.value(state.params))
    coded = np.asarray(weight.apply("__call__", state.params, state.quant, 3))
    inside = (coded != coded.min()) & (coded != coded.max())
    np.testing.assert_allclose(np.asarray(weight.value(gradient))[inside], 2 * (value - coded)[inside], atol=1e-6)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_rate_follows_its_schedule(schedule):
    experiment = build(small_config("digits_mlp", **LEARNED))
    state = Steps(experiment.config).state
    penalty = penalty_from_config({"dampening": {"rate": 0.5, "schedule": schedule}}, experiment.weights, 100)
    bits = Precision(weights=3, acts=3)
    whole = float(dampening(experiment.weights, state.params, state.quant, bits))
    ends = [float(penalty(np.int32(step), state.params, state.quant, bits)) / whole for step in (0, 50, 100)]
    expected = {
        "constant": [0.5, 0.5, 0.5],
        "linear_up": [0, 0.25, 0.5],
        "cosine_up": [0, 0.25, 0.5],
        "linear_down": [0.5, 0.25, 0],
        "cosine_down": [0.5, 0.25, 0],
    }
    np.testing.assert_allclose(ends, expected[schedule], atol=1e-6)


def test_dampening_draws_weights_to_the_middle_of_their_bins(tmp_path):
    def distance(name, **overrides):
        config = small_config(
            "digits_mlp",
            schedule="constant",
            optimizer__oscillation__track=True,
            quant__weights="trs",
            train__steps=36,
            **overrides,
        )
        run(config, tmp_path / name)
        found = rows(tmp_path / name, "train")
        return found[-1]["transition/distance"], found[-1]

    plain, row = distance("plain")
    damped, other = distance("damped", losses__dampening__rate=3.0)
    assert damped > plain + 0.01
    assert "penalty" not in row and other["penalty"] > 0


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"optimizer__name": "adamt"}, r"'Conv_0/kernel' is quantized by 'symmetric/channel'.*'trs' or 'lsq'"),
        ({"optimizer__name": "adamt", "quant__weights": None}, "needs quantized weights"),
        ({**TRANSITION, "optimizer__transition__factor": -1.0}, r"optimizer\.transition\.factor=-1\.0"),
        ({**TRANSITION, "optimizer__transition__momentum": 1.0}, r"optimizer\.transition: momentum=1\.0"),
        ({**TRANSITION, "optimizer__transition__rule": "aditive"}, r"Did you mean 'additive'"),
        ({**TRANSITION, "optimizer__transition__target_scale": "sqrt_bit"}, r"Did you mean 'sqrt_bits'"),
        ({**TRANSITION, "optimizer__transition__schedule": "cosin"}, r"optimizer\.transition\.schedule='cosin'"),
        ({**LEARNED, "optimizer__quant__learning_rate": -1.0}, r"optimizer\.quant\.learning_rate=-1\.0"),
        ({**TRANSITION, "losses__inverse_scale__rate": 1.0}, "freezes the scales of the weights"),
        ({"losses__dampening__rate": -1.0}, r"losses\.dampening\.rate=-1\.0"),
        ({"losses__dampening__schedule": "cosine_upp", "losses__dampening__rate": 1.0}, "Did you mean 'cosine_up'"),
        ({"losses__dampening__rate": 1.0, "quant__weights": None}, "no quantized weight to penalise"),
        ({"quant__grads": "lsq"}, "grad_quantizer"),
    ],
)
def test_mistakes(overrides, message):
    with pytest.raises(UsageError, match=message):
        build(small_config("digits_cnn", **overrides))
    assert set(LOSSES) >= {"dampening"}


def test_a_checkpoint_that_does_not_fit_is_refused_before_anything_is_written(float_run, tmp_path):
    folder = tmp_path / "new"
    config = small_config("digits_mlp", init_from=str(float_run[0]))
    with pytest.raises(UsageError, match=r"init_from=.*does not fit this model"):
        train(config, str(folder), quiet=True)
    assert not folder.exists()
