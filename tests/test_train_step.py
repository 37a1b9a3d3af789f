"""The training step: one program however schedules run and steps are dispatched, its optimizer, its numbers, AQT's."""

import dataclasses
import logging
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from program import CONFIGS, SCHEDULES, Steps, assert_equal, final_state, rows, small_config

from qtrain import overrides
from qtrain.build import build
from qtrain.config import base_config, finish
from qtrain.precision import Precision
from qtrain.train import train

# --- one program


PER_KIND = {"acts": {"name": "window", "low": 4, "high": 8, "start_percent": 25.0, "length_percent": 50.0}}


@pytest.mark.parametrize(
    ("schedule", "overrides"),
    [
        ("constant", {}),
        ("window", {}),
        ("delayed", {}),
        ("cyclic", {"acts": PER_KIND["acts"], "grads": {"name": "linear", "start_bits": 12, "end_bits": 4}}),
    ],
)
def test_one_compilation_whatever_the_schedule(schedule, overrides, tmp_path, caplog):
    config = base_config("digits_mlp")
    config.model.features = (16,)
    config.schedule.update(**SCHEDULES[schedule])
    for kind, values in overrides.items():
        config.schedule[kind].update(**values)
    config.train.update(steps=20, log_every_steps=5)
    config.data.batch_size = 32
    with jax.log_compiles(), caplog.at_level(logging.WARNING, logger="jax"):
        summary = train(finish(config), str(tmp_path / "run"), quiet=True)
    compiled = re.findall(r"Compiling (?:jit\()?(\w+)", caplog.text)
    assert compiled.count("train_step") == 1 == summary["compilations"]
    assert compiled.count("eval_step") == 2, "one program for all bits, one for float"
    bits = {
        tuple(row[f"bits_{kind}"] for kind in ("weights", "acts", "grads")) for row in rows(tmp_path / "run", "train")
    }
    assert len(bits) > 1 or schedule == "constant"


def test_steps_per_dispatch_changes_nothing(tmp_path):
    results = []
    for per_dispatch in (1, 3):
        # 12 steps: evaluation and checkpoints at 5 are moved to the next multiple.
        config = small_config(train__steps_per_dispatch=per_dispatch, checkpoint__every_steps=6, eval__every_steps=6)
        folder = tmp_path / str(per_dispatch)
        summary = train(config, str(folder), quiet=True)
        assert summary["compilations"] == 1
        results.append((final_state(config, folder), rows(folder), {**summary, "wall_seconds": 0}))
    (one, one_rows, one_summary), (three, three_rows, three_summary) = results
    # Bit for bit on a CPU, whose scan runs the same operations; elsewhere fusion may differ in the last bits.
    if jax.default_backend() == "cpu":
        assert_equal(one, three)
        assert one_rows == three_rows and one_summary == three_summary
    else:
        np.testing.assert_allclose(one_summary["test_loss"], three_summary["test_loss"], rtol=1e-2)


# --- the optimizer inside the step


def float_sgd(**overrides):
    return small_config(
        schedule="constant",
        optimizer__name="sgd",
        optimizer__momentum=0.0,
        optimizer__schedule="constant",
        optimizer__learning_rate=0.1,
        schedule__bits=32,
        **overrides,
    )


def test_accumulated_gradients_equal_a_big_batch():
    big = Steps(float_sgd(data__batch_size=32, grads=32))
    small = Steps(float_sgd(data__batch_size=16, grads=32, optimizer__accumulate_steps=2))
    with big.batches() as batches:
        for _ in range(3):
            batch = next(batches)
            big(batch)
            first = small({name: value[:16] for name, value in batch.items()})
            second = small({name: value[16:] for name, value in batch.items()})
            assert first["update_norm"] == 0 and second["update_norm"] > 0
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=2e-5, atol=1e-6), big.state.params, small.state.params
    )


def test_clipping_bounds_the_update_and_not_the_metric():
    steps = Steps(float_sgd(optimizer__clip_norm=0.01, grads=32))
    with steps.batches() as batches:
        found = steps(next(batches))
    assert found["grad_norm"] > 0.5
    assert found["update_norm"] == pytest.approx(0.1 * 0.01, rel=1e-5)


def test_weight_decay_enters_the_gradient():
    batch = next(Steps(float_sgd()).batches())
    plain, decayed = Steps(float_sgd(grads=32)), Steps(float_sgd(grads=32, optimizer__weight_decay=0.5))
    start = plain.state.params
    plain(batch), decayed(batch)

    def check(path, before, without, with_decay):
        factor = 0.1 * 0.5 if before.ndim > 1 else 0.0
        np.testing.assert_allclose(without - with_decay, factor * before, atol=1e-6, err_msg=str(path))

    jax.tree_util.tree_map_with_path(check, start, plain.state.params, decayed.state.params)


# --- its numbers


@pytest.mark.parametrize(
    ("name", "expected", "tolerance"),
    [
        # At 3 bits a sum that cancels is 0 or ±1e-9, by its order, and a ReLU passes its gradient on or does not.
        (
            "digits_mlp_cpt",
            {"loss": 2.419975, "accuracy": 10 / 64, "grad_norm": 1.63716, "update_norm": 0.305339},
            5e-3,
        ),
        (
            "digits_cnn_static",
            {"loss": 2.317781, "accuracy": 3 / 64, "grad_norm": 1.176304, "update_norm": 0.429933},
            1e-4,
        ),
    ],
)
def test_the_first_step_is_what_it_was(name, expected, tolerance):
    """Pins the numerics: initial values, data, quantizers, loss, gradient, optimizer. Change it only on purpose."""
    steps = Steps(overrides.load(f"{CONFIGS / name}.py"))
    with steps.batches() as batches:
        found = steps(next(batches))
    assert found["loss"] == pytest.approx(expected["loss"], rel=1e-5)
    assert found["accuracy"] == expected["accuracy"]
    for key in ("grad_norm", "update_norm"):
        assert found[key] == pytest.approx(expected[key], rel=tolerance)


# --- the AQT baseline


def parity_config(task, backend, bits):
    config = base_config(task)
    config.model.features = (4, 8) if task == "digits_cnn" else (16, 16)
    config.data.batch_size = 32
    config.schedule.update(name="constant", bits=bits)
    config.quant.update(weights="aqt/channel", acts="aqt/channel", grads="none", backend=backend)
    config.optimizer.update(name="sgd", learning_rate=0.05, momentum=0.0, schedule="constant")
    return finish(config)


@pytest.mark.parametrize(("task", "bits"), [("digits_mlp", 3), ("digits_mlp", 8), ("digits_cnn", 4)])
def test_aqt_backend_trains_as_qtrain_with_its_grid(task, bits):
    pytest.importorskip("aqt.jax.v2")
    ours, theirs = (Steps(parity_config(task, backend, bits)) for backend in ("qtrain", "aqt"))
    # Biases of zero would leave pre-activations that are exactly 0 at few bits; whether rounding puts such a one above
    # or below decides the gradient of the ReLU, and the two programs round a sum differently.
    rng = np.random.default_rng(0)
    params = jax.tree.map(
        lambda x: x + jnp.float32(rng.normal(0, 0.1, x.shape)) if x.ndim == 1 else x, ours.state.params
    )
    for steps in (ours, theirs):
        steps.state = dataclasses.replace(steps.state, params=params)
    with ours.batches() as batches:
        for _ in range(4):
            batch = next(batches)
            mine, aqts = ours(batch), theirs(batch)
            assert mine["loss"] == pytest.approx(aqts["loss"], rel=1e-6)
            assert mine["grad_norm"] == pytest.approx(aqts["grad_norm"], rel=1e-5)
    moved = jax.tree.map(lambda x, y: np.max(np.abs(x - y)), ours.state.params, params)
    assert min(jax.tree.leaves(moved)) > 1e-5, "every parameter was trained"
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-6), ours.state.params, theirs.state.params
    )


def test_aqt_backend_runs_a_scheduled_config_at_its_static_counterpart(tmp_path):
    pytest.importorskip("aqt.jax.v2")
    config = small_config(quant__backend="aqt")
    experiment = build(config)
    assert experiment.fixed == Precision(weights=8, acts=8)
    assert "static: weights 8, activations 8 bits" in experiment.describe_schedule()
    summary = train(config, str(tmp_path / "run"), quiet=True)
    assert summary["compilations"] == 1
    assert summary["bits_final"] == {"weights": 8, "acts": 8, "grads": 32}
    assert summary["effective_bitops"] == pytest.approx(summary["static_bitops"], rel=1e-6)
    assert summary["test_loss"] == summary["test_loss_scheduled"] != summary["test_loss_float"]
