"""Training: one program, results that do not depend on how steps are dispatched, exact cost, metrics, divergence."""

import csv
import dataclasses
import logging
import math
import os
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from program import CONFIGS, SCHEDULES, Steps, final_state, rows, small_config, snapshot

from qtrain import cost, main, overrides, workdir
from qtrain.build import build
from qtrain.config import base_config, finish
from qtrain.data import ImageArrays, digits
from qtrain.errors import UsageError
from qtrain.precision import Precision
from qtrain.quantizers import native
from qtrain.start import as_started
from qtrain.state import make_train_step
from qtrain.train import Diverged, Run, train


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    """A small run that logs every step: its config, folder and summary."""
    config, folder = small_config(train__log_every_steps=1), tmp_path_factory.mktemp("reference") / "run"
    return config, folder, train(config, str(folder), quiet=True)


def assert_equal(left, right):
    jax.tree.map(np.testing.assert_array_equal, left, right)


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


def test_bfloat16_computes_in_bfloat16_and_keeps_float32_parameters(reference, tmp_path):
    config = small_config(model__dtype="bfloat16")
    experiment = build(config)
    assert {op.lhs.native_bits for op in experiment.plan.ops} == {16}, "the products are of bfloat16"
    summary = train(config, str(tmp_path / "run"), quiet=True)
    state = final_state(config, tmp_path / "run")
    floats = [
        leaf for leaf in jax.tree.leaves((state.params, state.opt_state)) if jnp.issubdtype(leaf.dtype, jnp.floating)
    ]
    assert {leaf.dtype for leaf in floats} == {jnp.dtype("float32")}
    _, _, full = reference
    assert summary["test_loss"] == pytest.approx(full["test_loss"], rel=0.05)
    assert summary["test_loss"] != full["test_loss"]


# --- cost


def test_bitops_add_up_to_the_exact_sum(reference):
    config, folder, summary = reference
    experiment = build(config)
    exact = cost.effective(experiment.plan.ops, experiment.schedule, 12)
    assert summary["effective_bitops"] == pytest.approx(exact, rel=1e-6)
    assert summary["static_bitops"] == cost.static(experiment.plan.ops, Precision(8, 8, 8), 12)
    assert rows(folder, "eval")[-1]["effective_bitops"] == summary["effective_bitops"]


def test_saving_of_a_window_by_hand(tmp_path):
    # Of 12 steps those from 20 % on, for 40 %, that is 2 to 6, are at 3 bits; the others at 8; gradients at 8.
    config = small_config(schedule="window", quant__rules=({"path": ".*", "grad_quantizer": "symmetric/tensor"},))
    summary = train(config, str(tmp_path / "run"), quiet=True)
    macs = [32 * size for size in (64 * 16, 16 * 16, 16 * 10)]

    def step(bits):
        forward, weight_gradient = bits * bits * sum(macs), bits * 8 * sum(macs)
        input_gradient = bits * 8 * sum(macs[1:])  # the first layer's input is data
        return forward + weight_gradient + input_gradient

    assert summary["static_bitops"] == 12 * step(8)
    assert summary["effective_bitops"] == pytest.approx(5 * step(3) + 7 * step(8), rel=1e-6)
    assert summary["saving"] == pytest.approx(1 - (5 * step(3) + 7 * step(8)) / (12 * step(8)), abs=1e-6)
    assert summary["bits_final"] == {"weights": 8, "acts": 8, "grads": 8}


# --- metrics


def test_rows_have_every_metric_and_norms_across_changes(reference):
    config, folder, _ = reference
    experiment = build(config)
    found = rows(folder, "train")
    assert [row["step"] for row in found] == list(range(1, 13))
    before = None
    changes = 0
    for t, row in enumerate(found):
        bits = experiment.precision_at(t)
        assert [row["bits_weights"], row["bits_acts"], row["bits_grads"]] == [bits.weights, bits.acts, bits.grads]
        assert row["learning_rate"] == pytest.approx(2e-3 * (1 + math.cos(math.pi * t / 12)) / 2, rel=1e-4)
        assert row["grad_norm"] > 0 and row["update_norm"] > 0 and 0 <= row["accuracy"] <= 1 and row["loss"] > 0
        changed = t > 0 and row["bits_weights"] != before["bits_weights"]
        assert row["bits_changes"] == changed
        for name in ("grad_norm", "update_norm"):
            ratio = row[f"{name}_ratio_on_change"]
            if changed:
                assert ratio == pytest.approx(row[name] / before[name], rel=1e-5)
            else:
                assert ratio is None
        before, changes = row, changes + changed
    assert changes >= 6


def test_rows_average_over_the_steps_between_them(reference, tmp_path):
    _, folder, _ = reference
    train(small_config(train__log_every_steps=4), str(tmp_path / "four"), quiet=True)
    each, averages = rows(folder, "train"), rows(tmp_path / "four", "train")
    assert [row["step"] for row in averages] == [4, 8, 12]
    for i, row in enumerate(averages):
        group = each[4 * i : 4 * i + 4]
        for name in ("loss", "accuracy", "grad_norm", "update_norm", "bits_changes"):
            assert row[name] == pytest.approx(np.mean([one[name] for one in group]), rel=1e-5)
        ratios = [one["grad_norm_ratio_on_change"] for one in group if one["grad_norm_ratio_on_change"] is not None]
        assert row["grad_norm_ratio_on_change"] == pytest.approx(np.mean(ratios), rel=1e-5)


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


# --- evaluation


def test_evaluation_at_each_precision(tmp_path):
    # The last step is inside the window: 3 bits are current, 8 are q_max.
    config = small_config(
        schedule="window", schedule__start_percent=50.0, schedule__length_percent=50.0, train__steps=40
    )
    summary = train(config, str(tmp_path / "run"), quiet=True)
    assert summary["bits_final"] == {"weights": 3, "acts": 3, "grads": 8}
    experiment, state = build(config), final_state(config, tmp_path / "run")
    test = experiment.dataset.eval["test"]
    images, labels = test.gather(np.arange(len(test)))
    inputs = (images.astype(np.float32) / 16 - experiment.dataset.mean[0]) / experiment.dataset.std[0]
    losses = set()
    for suffix, bits in (("", Precision(8, 8, 8)), ("_scheduled", Precision(3, 3, 8)), ("_float", None)):
        rngs = {"quant": jax.random.key(0)}  # unused: only gradients round stochastically
        logits = experiment.qmodel.apply(state.variables, jnp.float32(inputs), bits=bits, rngs=rngs)
        logits = np.asarray(logits, np.float64)
        logits -= logits.max(-1, keepdims=True)
        picked = np.take_along_axis(logits, labels[:, None], -1)[:, 0]
        loss = np.mean(np.log(np.exp(logits).sum(-1)) - picked)
        assert summary[f"test_loss{suffix}"] == pytest.approx(loss, rel=1e-3)
        assert summary[f"test_accuracy{suffix}"] == pytest.approx(np.mean(logits.argmax(-1) == labels), abs=0.003)
        losses.add(round(loss, 6))
    assert len(losses) == 3, "three precisions, three losses"
    assert abs(summary["test_loss"] - summary["test_loss_float"]) < abs(
        summary["test_loss_scheduled"] - summary["test_loss_float"]
    )


def test_evaluation_in_small_batches_is_the_same(reference, tmp_path):
    # 360 test examples in batches of 50: the last is padded, and the padding must not count.
    _, _, whole = reference
    parts = train(small_config(eval__batch_size=50), str(tmp_path / "parts"), quiet=True)
    for name in ("test_loss", "test_accuracy", "test_loss_float", "test_accuracy_float", "test_loss_scheduled"):
        assert parts[name] == pytest.approx(whole[name], rel=1e-5)


# --- what stops a run


def test_divergence_stops_with_step_batch_and_bits(tmp_path, capsys):
    path = tmp_path / "config.py"
    path.write_text(
        "from program import small_config\n"
        "def get_config():\n"
        "    return small_config(optimizer__name='sgd', optimizer__learning_rate=1e30, checkpoint__every_steps=1)\n"
    )
    arguments = ["train", "--config", str(path), "--workdir", str(tmp_path / "run"), "--quiet"]
    assert main.main(arguments) == main.DIVERGED == 1
    out, error = capsys.readouterr()
    match = re.fullmatch(
        r"qtrain: loss is (\S+), its gradient's norm (\S+) at step (\d+) \(batch (\d+), "
        r"bits (\d)/(\d)/8 of weights/acts/grads\); last checkpoint: (\d+|none)\n",
        error,
    )
    assert match and out == "", error
    assert not (math.isfinite(float(match[1])) and math.isfinite(float(match[2])))
    step, batch = int(match[3]), int(match[4])
    assert batch == step - 1 <= 4
    experiment = build(small_config())
    assert int(match[5]) == experiment.precision_at(batch).weights
    # Nothing of the diverged state was kept, and the run is not done.
    steps = sorted(int(name) for name in os.listdir(tmp_path / "run" / "checkpoints") if name.isdigit())
    assert max(steps, default=0) < step
    assert not (tmp_path / "run" / "DONE").exists()
    assert main.main(arguments) == 1, "and again when it is resumed"


def test_a_gradient_that_is_not_finite_stops_a_run_whose_loss_is(tmp_path, monkeypatch):
    real = make_train_step

    def poisoned(*args):
        step = real(*args)

        def train_step(state, batch, key):
            state, out = step(state, batch, key)
            return state, {**out, "grad_norm": jnp.where(state.step == 5, jnp.inf, out["grad_norm"])}

        return train_step

    monkeypatch.setattr("qtrain.programs.make_train_step", poisoned)
    config = small_config(checkpoint__every_steps=1, train__log_every_steps=1, data__repeat=2)
    with pytest.raises(Diverged, match=r"norm inf at step 5 \(batch 2, bits .*last checkpoint: 4$"):
        train(config, str(tmp_path / "run"), quiet=True)
    assert rows(tmp_path / "run", "train")[-1]["step"] == 4


def test_divergence_inside_a_dispatch_names_its_step(tmp_path):
    config = small_config(optimizer__name="sgd", optimizer__learning_rate=1e30, train__steps_per_dispatch=3)
    with pytest.raises(Diverged, match=r"at step [1-4] \(batch [0-3], "):
        train(config, str(tmp_path / "run"), quiet=True)


def test_other_data_under_the_same_config_is_refused(tmp_path, monkeypatch):
    config, folder = small_config(train__steps=2, train__log_every_steps=1), tmp_path / "run"
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(workdir, "finish", _interrupt)
        train(config, str(folder), quiet=True)
    training, test = digits.load()
    monkeypatch.setattr(digits, "load", lambda: (ImageArrays(training.images[::-1].copy(), training.labels), test))
    before = snapshot(folder)
    with pytest.raises(UsageError, match=r"other data.*train_content was \d+ and is \d+.*another --workdir"):
        train(config, str(folder), quiet=True)
    assert snapshot(folder) == before


def _interrupt(*_):
    raise KeyboardInterrupt


def test_a_batch_that_devices_cannot_share_is_refused(tmp_path, monkeypatch):
    class Mesh:
        size = 5

    monkeypatch.setattr("qtrain.sharding.make_mesh", lambda _: Mesh())
    with pytest.raises(UsageError, match=r"data\.batch_size=32: does not divide evenly among 5 devices"):
        train(small_config(), str(tmp_path / "run"))
    assert not (tmp_path / "run").exists()


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


# --- execution, as the run was started


def native_config(**overrides):
    fields = {"model__features": (16,), "quant__execution": "auto", "quant__residuals": "folded"}
    return small_config(train__log_every_steps=1, **fields, **overrides)


def slow_weight_gradients(op, operands, lhs, rhs, backend):
    return {"drhs": "measured"} if rhs.shape == (64, 16) else {}


def slow_throughout(*_):
    return dict.fromkeys(native.PRODUCTS, "measured anew")


def test_execution_is_recorded_before_anything_runs(tmp_path, monkeypatch):
    config, folder = native_config(), tmp_path / "run"
    monkeypatch.setattr(native, "slower", slow_weight_gradients)
    workdir.prepare(folder, config.to_dict(), {})
    first = as_started(build(config), folder)  # also after a kill between the two
    assert workdir.recorded(folder)["execution"] == {path: c.to_json() for path, c in first.plan.choices.items()}
    monkeypatch.setattr(native, "slower", slow_throughout)
    assert {row.execution for row in build(config).plan} == {"float"}
    again = as_started(build(config), folder)
    assert {path: c.paths for path, c in again.plan.choices.items()} == {
        p: c.paths for p, c in first.plan.choices.items()
    }
    assert again.plan["Dense_0"].execution_reason == "recorded; dW float: measured"
    assert again.qmodel.choices == again.plan.choices
    workdir.record(folder, "execution", {"Dense_0": {"forward": "int4"}})
    with pytest.raises(UsageError, match=r"execution\['Dense_0'\]\.forward='int4': give one of"):
        as_started(build(config), folder)


def test_a_resumed_run_computes_as_it_was_started(tmp_path, monkeypatch, capsys):
    config = native_config(train__steps=4, checkpoint__every_steps=2, quant__ends=4)
    monkeypatch.setattr(native, "slower", slow_weight_gradients)
    folder, whole = tmp_path / "run", tmp_path / "whole"
    summary = train(config, str(whole), quiet=True)
    assert summary["compilations"] == 1
    batches, taken = Run._next, iter([False, False, False])
    with monkeypatch.context() as patch, pytest.raises(StopIteration):
        patch.setattr(Run, "_next", lambda *args: next(taken) or batches(*args))
        train(config, str(folder), quiet=True)
    monkeypatch.setattr(native, "slower", slow_throughout)
    resumed = train(config, str(folder))
    assert "recorded; dW float: measured" in capsys.readouterr().out
    assert {**resumed, "wall_seconds": 0} == {**summary, "wall_seconds": 0}
    assert rows(folder) == rows(whole)
    assert_equal(final_state(config, folder), final_state(config, whole))


def test_a_run_in_float_records_no_execution(reference):
    assert workdir.recorded(reference[1]) == {}


# --- the library's own door


def test_a_run_is_a_function_of_its_config(reference, tmp_path):
    config, folder, first = reference
    second = train(config, str(tmp_path / "run"), quiet=True)
    assert {**first, "wall_seconds": 0} == {**second, "wall_seconds": 0}
    assert rows(folder) == rows(tmp_path / "run")
    before = snapshot(folder)
    assert train(config, str(folder), quiet=True) == first, "a finished run is read, not repeated"
    assert snapshot(folder) == before


def test_seeds_change_what_they_say():
    # `seed`: initial values and rounding; `data.seed`: order.
    plain, seed, data_seed = (Steps(small_config(**kwargs)) for kwargs in ({}, {"seed": 1}, {"data__seed": 1}))
    kernels = [steps.state.params["Dense_0"]["kernel"] for steps in (plain, seed, data_seed)]
    assert np.array_equal(kernels[0], kernels[2]) and not np.array_equal(kernels[0], kernels[1])
    labels = []
    for steps in (plain, seed, data_seed):
        with steps.batches() as batches:
            labels.append(next(batches)["label"])
    assert np.array_equal(labels[0], labels[1]) and not np.array_equal(labels[0], labels[2])


# --- what reads it afterwards


def test_the_report_reads_what_the_trainer_writes(reference):
    from qtrain.report import find_runs, make_report, read_runs

    _, folder, summary = reference
    notes: list[str] = []
    (run,) = read_runs(find_runs([folder.parent]), notes)
    assert not notes and run.finished and run.step == run.total == 12 and run.seed == (0, 0)
    assert run.values["effective_bitops"] == summary["effective_bitops"] and run.values["stored_bytes"] > 0
    assert run.curve.steps.tolist() == list(range(1, 13)) and np.isfinite(run.curve.loss).all()
    assert run.curve.bits[:, 2].tolist() == [8.0] * 12 and set(run.curve.bits[:, 0]) <= set(range(3, 9))
    text = make_report([run]).files["points_digits_test_accuracy.csv"].decode()
    (row,) = csv.DictReader(text.splitlines())
    assert float(row["test accuracy, %"]) == 100 * summary["test_accuracy"]
    assert row["point"] == "CR 3–8, g 8 bits" and row["test accuracy, % n"] == "1" and row["test accuracy, % low"] == ""
